"""`kill -9` of each daemon at each step of the demo: everything recovers, and nothing is lost.

One run of the demo for each daemon and moment, with fewer records; the daemon dies in every step,
either before the step's first request or right after its answer, when nothing has settled. The demo
itself checks every record, the media, and that all capacity is free in the end.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tagmem.demo import system
from tagmem.demo.chaos import MOMENTS, STEPS, always
from tagmem.demo.console import Console
from tagmem.demo.layout import DAEMONS, Layout
from tagmem.demo.main import demo

RECORDS = 5_000


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", DAEMONS)
def test_killing_a_daemon_in_every_step_loses_nothing(
    name: str, moment: str, tmp_path: Path
) -> None:
    told = io.StringIO()
    code = demo(tmp_path, records_max=RECORDS, choose=always(name, moment), console=Console(told))
    assert code == 0, f"{told.getvalue()}\n{logs(Layout.of(tmp_path))}"
    assert told.getvalue().count(f"kill -9        {name}\n") == len(STEPS)
    assert f"{RECORDS:,} of {RECORDS:,} equal" in told.getvalue()
    assert not system.strays(Layout.of(tmp_path))
    assert not Layout.of(tmp_path).volatile.exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_killing_any_daemon_at_any_moment_loses_nothing(seed: int, tmp_path: Path) -> None:
    told = io.StringIO()
    code = demo(tmp_path, records_max=RECORDS, chaos_seed=seed, console=Console(told))
    assert code == 0, f"{told.getvalue()}\n{logs(Layout.of(tmp_path))}"
    assert "nothing was lost" in told.getvalue()


def logs(layout: Layout) -> str:
    """The last words of every daemon, for a failure's message."""
    names = ("supervisor", *DAEMONS)
    return "\n".join(f"--- {name}\n{system.last_words(layout, name)}" for name in names)
