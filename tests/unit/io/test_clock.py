"""The clock is wall time at its start and runs forward from there."""

from __future__ import annotations

import time

from tagmem.base.units import SECOND
from tagmem.io.clock import SystemClock


def test_it_is_wall_time_and_never_runs_back() -> None:
    clock = SystemClock()
    assert abs(clock.now() - time.time_ns()) < SECOND
    stamps = [clock.now() for _ in range(1_000)]
    assert stamps == sorted(stamps)
