"""Asks again: what makes the demo indifferent to the death of any daemon.

Each request of the demo may be repeated (tags and workload ids are chosen here), so an orchestrator
that is away, restarting, or in doubt about its appliance is asked again until a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tagmem.base.errors import OutcomeUnknown, Retry, TagmemError

T = TypeVar("T")

_PAUSE_SECONDS_MIN = 0.002
_PAUSE_SECONDS_MAX = 0.05


class TooLate(OutcomeUnknown, TimeoutError):
    """It did not come about in time; it may still."""


def insist(call: Callable[[], T], seconds: float = 30.0) -> T:
    """The answer of `call`, asked again while the answer is "later". Raises its last error."""
    deadline = time.monotonic() + seconds
    pause = _PAUSE_SECONDS_MIN
    while True:
        try:
            return call()
        except TagmemError as error:
            if error.retry is Retry.NEVER or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_SECONDS_MAX)


def until(look: Callable[[], T | None], what: str, seconds: float = 30.0) -> T:
    """What `look` returns as soon as that is not None. Raises TooLate, which says `what`."""
    deadline = time.monotonic() + seconds
    pause = _PAUSE_SECONDS_MIN
    while True:
        found = insist(look, max(deadline - time.monotonic(), 0.0))
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise TooLate(f"{what}: not in {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_SECONDS_MAX)
