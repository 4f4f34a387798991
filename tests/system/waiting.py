"""The one place where system tests wait: for something to become so, by looking, until a deadline.

Real processes take the time that they take; a test says what it waits for, and how long at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 20.0
"""Long enough for a loaded machine of two cores; nothing waits for it when all is well."""
_PAUSE_SECONDS = 0.01


def wait_until(look: Callable[[], T | None], what: str, seconds: float = SECONDS) -> T:
    """What `look` returns as soon as it is neither None nor False. Fails with `what`."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s: {what}")
        time.sleep(_PAUSE_SECONDS)
