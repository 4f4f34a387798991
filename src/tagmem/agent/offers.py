"""Offers that wait for an answer, per appliance: in their order, each answered once."""

from __future__ import annotations

from collections import deque

import msgspec

from tagmem.agent.records import Extent, Region, Span
from tagmem.base.units import Nanoseconds

GROUPS_MAX = 1024
"""Offers that wait at one appliance; as many as its event log can have records."""


class Group(msgspec.Struct, frozen=True):
    """An offer that has not been answered."""

    number: int
    extents: tuple[Extent, ...]
    since_ns: Nanoseconds


class Part(msgspec.Struct, frozen=True):
    """What one answer accepts of one tag."""

    tag: str
    spans: tuple[Span, ...]
    region: int


class Link:
    """One appliance as the agent's loop sees it."""

    def __init__(self) -> None:
        self.read = False
        """Its lists have been read in the present session."""
        self.session = 0
        self.regions: tuple[Region, ...] = ()
        self.waiting: deque[Group] = deque()
        self.answering: dict[int, tuple[Part, ...]] = {}
        self.dead: set[str] = set()
        """Tags taken away while our answer was on its way: an accepting answer grants nothing."""

    def renew(self) -> None:
        """A new session: the device shows again whatever it still waits for."""
        self.waiting.clear()
        self.answering.clear()
        self.dead.clear()

    def pending(self, tag: str) -> bool:
        """Whether an accepting answer for this tag is on its way."""
        return any(part.tag == tag for parts in self.answering.values() for part in parts)
