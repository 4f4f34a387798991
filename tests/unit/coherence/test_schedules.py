"""The library's own code on caches that lie: it passes under every schedule, and each mistake that
is planted in it is caught and named.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tagmem.coherence.luck import Missing
from tagmem.testing.catalogues import HOSTS_MAX, Mistake, forgetting, run

SCHEDULES = 1_000
"""The first of those that tests/sim/test_schedules.py runs."""


@pytest.fixture(scope="module")
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(HOSTS_MAX)


def test_the_catalogue_depends_on_no_luck(pool: ThreadPoolExecutor) -> None:
    bad = [
        outcome.tell()
        for seed in range(SCHEDULES)
        if (outcome := run(seed, pool)).finding or outcome.errors
    ]
    assert not bad, "\n".join(bad[:3])


@pytest.mark.parametrize("mistake", list(Mistake))
def test_a_mistake_in_the_catalogue_is_caught_in_every_schedule(
    mistake: Mistake, pool: ThreadPoolExecutor
) -> None:
    outcomes = [run(seed, pool, forgetting(mistake)) for seed in range(40)]
    assert all(outcome.finding for outcome in outcomes)
    named = [o for o in outcomes if o.finding and o.finding.missing == Missing(mistake)]
    assert len(named) > len(outcomes) * 0.8


@pytest.mark.parametrize("mistake", list(Mistake))
def test_a_seed_tells_the_same_again(mistake: Mistake, pool: ThreadPoolExecutor) -> None:
    first = run(5, pool, forgetting(mistake)).tell()
    assert first == run(5, pool, forgetting(mistake)).tell()
    assert "catalogue.py" in first
    assert first != run(6, pool, forgetting(mistake)).tell()
