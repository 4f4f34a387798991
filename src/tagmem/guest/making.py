"""CXL memory on its way in or out on behalf of the agent: each is worked on in a thread, one at a
time per tag, and its end is the loop's to deal with.
"""

from __future__ import annotations

from collections.abc import Callable

from tagmem.guest.system import System
from tagmem.wire.guest import Told

KINDS = ("cxl", "cxl-static")
"""What no kernel makes by itself."""


class Making:
    """Which tags are in work. `later` has the loop do something."""

    def __init__(self, system: System, later: Callable[[Callable[[], None]], None]) -> None:
        self._system = system
        self._later = later
        self._tags: set[str] = set()

    def make(self, told: Told, seconds: float, done: Callable[[Told, str], None]) -> bool:
        """Make a DAX device of what is of such a kind (else False); `done` gets how it is known
        from then on, or a reason.
        """
        if told.kind not in KINDS:
            return False
        if not self._begin(told.tag):
            return True

        def made(resource: int, reason: str) -> None:
            # Known by its place from now on: the serial is that of a whole window.
            known = told._replace(serial="", resource=resource) if resource else told
            self._later(lambda: self._end(told.tag, lambda: done(known, reason)))

        self._system.prepare(told, seconds, made)
        return True

    def give(self, told: Told, done: Callable[[str], None], *, busy: bool) -> None:
        """Have a device take an extent back; `done` gets a reason."""
        if busy or not self._begin(told.tag):
            done(f"tag {told.tag} is in work")
            return

        def given(reason: str) -> None:
            self._later(lambda: self._end(told.tag, lambda: done(reason)))

        self._system.give(told, given)

    def _begin(self, tag: str) -> bool:
        fresh = tag not in self._tags
        self._tags.add(tag)
        return fresh

    def _end(self, tag: str, then: Callable[[], None]) -> None:
        self._tags.discard(tag)
        then()
