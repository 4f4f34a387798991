"""Ten thousand schedules of the catalogue on caches that lie: right values or honest errors, and no
access that depended on luck.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tagmem.testing.catalogues import HOSTS_MAX, run

SCHEDULES = 10_000
PART = 1_000


@pytest.mark.parametrize("begin", range(0, SCHEDULES, PART))
def test_the_catalogue_depends_on_no_luck(begin: int, seed: int | None) -> None:
    seeds = range(begin, begin + PART) if seed is None else [seed]
    with ThreadPoolExecutor(HOSTS_MAX) as pool:
        bad = [
            outcome.tell()
            for number in seeds
            if (outcome := run(number, pool)).finding or outcome.errors
        ]
    assert not bad, "\n".join(bad[:3])
