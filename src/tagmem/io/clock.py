"""The clock of a running process: time since 1970 that neither jumps nor runs back.

Wall time is read once; from there the monotonic clock counts. An operator who sets the machine's
clock changes no deadline, and stamps of one process are in order. After a restart they follow the
new wall time, so stamps of two runs need not be in order; the history's numbers are.
"""

from __future__ import annotations

import time

from tagmem.base.units import Nanoseconds


class SystemClock:
    """The `Clock` of a real process."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now(self) -> Nanoseconds:
        """Nanoseconds since 1970, anchored when this clock was made."""
        return self._offset_ns + time.monotonic_ns()
