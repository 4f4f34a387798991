"""An appliance's extent lists and tags, page by page, until all of them hold at one moment. No I/O.

Each list has a generation number that moves with it. First every list that is wanted is read, page
after page, from its beginning again when its generation moves meanwhile. Then the generations of
all lists are asked once more; lists that moved are read again. When none moved, all lists were as
read between the last page and the first of these questions: that is the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from tagmem.base.limits import EXTENTS_PER_LD_MAX, TAGS_PER_APPLIANCE_MAX
from tagmem.wire.extent import WireExtent
from tagmem.wire.fmapi import (
    DcListTagsRequest,
    DcListTagsResponse,
    DcTagInfo,
    GetDcRegionExtentListsRequest,
    GetDcRegionExtentListsResponse,
)
from tagmem.wire.layout import WireStruct

EXTENTS_PER_PAGE = 1_024
TAGS_PER_PAGE = 512
"""A device with smaller messages returns fewer; the next page begins where it stopped."""


class _State(Enum):
    WANTED = 1
    ASKED = 2
    READ = 3
    CHECKED = 4
    CONFIRMED = 5


class _List:
    """One list: what was read of it so far."""

    __slots__ = ("dirty", "generation", "items", "state", "total")

    def __init__(self) -> None:
        self.state = _State.WANTED
        self.dirty = False
        self.generation = 0
        self.total = 0
        self.items: list[WireExtent | DcTagInfo] = []

    def want(self) -> None:
        """Read it from its beginning, once an answer that is on its way has come."""
        if self.state in (_State.ASKED, _State.CHECKED):
            self.dirty = True
            return
        self.state = _State.WANTED
        self.items = []

    def take(
        self, generation: int, total: int, items: Sequence[WireExtent | DcTagInfo], limit: int
    ) -> str:
        """One answer; what is wrong with it, or nothing."""
        checked = self.state is _State.CHECKED
        if not checked and self.state is not _State.ASKED:
            return "an answer that was not asked for"
        moved = (generation, total) != (self.generation, self.total)
        self.state = _State.READ
        if self.dirty or (moved and (checked or self.items)):
            self.dirty = False
            self.want()
            return ""
        if checked:
            self.state = _State.CONFIRMED
            return ""
        if total > limit:
            return f"at most {limit} entries can be, it says {total}"
        self.generation, self.total = generation, total
        self.items.extend(items)
        if len(self.items) > total or (not items and len(self.items) < total):
            return f"says {total} entries and gives {len(self.items)}"
        self.state = _State.READ if len(self.items) == total else _State.WANTED
        return ""


class Lists:
    """The 5603h lists of all LDs, and the 5608h tags."""

    def __init__(self, lds: int = 0) -> None:
        self._lds = [_List() for _ in range(lds)]
        self._tags = _List()

    def _all(self) -> Iterator[_List]:
        yield from self._lds
        yield self._tags

    def stale(self) -> None:
        """Nothing that was read counts any more."""
        for each in self._all():
            each.want()

    def touch(self, ld: int) -> None:
        """A record says that this LD's list moved, and with it the tags."""
        if ld < len(self._lds):
            self._lds[ld].want()
        self._tags.want()

    @property
    def waiting(self) -> bool:
        """Whether an answer is outstanding."""
        return any(each.state in (_State.ASKED, _State.CHECKED) for each in self._all())

    @property
    def complete(self) -> bool:
        """Whether every list is confirmed."""
        return all(each.state is _State.CONFIRMED for each in self._all())

    def requests(self) -> list[WireStruct]:
        """The next page of each list that wants one. They count as asked."""
        wanted: list[WireStruct] = []
        for ld, each in enumerate(self._lds):
            if each.state is _State.WANTED:
                each.state = _State.ASKED
                wanted.append(GetDcRegionExtentListsRequest(ld, EXTENTS_PER_PAGE, len(each.items)))
        if self._tags.state is _State.WANTED:
            self._tags.state = _State.ASKED
            wanted.append(DcListTagsRequest(len(self._tags.items), TAGS_PER_PAGE))
        return wanted

    def checks(self) -> list[WireStruct]:
        """Ask for every list's generation, now that all are read. They count as asked."""
        for each in self._all():
            each.state = _State.CHECKED
        counts: list[WireStruct] = [
            GetDcRegionExtentListsRequest(ld, 0) for ld in range(len(self._lds))
        ]
        return [*counts, DcListTagsRequest(0, 0)]

    def take(self, answer: WireStruct) -> str:
        """Take an answer to one of the requests; what is wrong with it, or nothing."""
        if isinstance(answer, GetDcRegionExtentListsResponse):
            if answer.host_id >= len(self._lds):
                return f"5603h: an answer for LD {answer.host_id}, which is not there"
            each, limit = self._lds[answer.host_id], EXTENTS_PER_LD_MAX
            fault = each.take(answer.generation, answer.extents_total, answer.extents, limit)
            return f"5603h of LD {answer.host_id}: {fault}" if fault else ""
        if isinstance(answer, DcListTagsResponse):
            limit = TAGS_PER_APPLIANCE_MAX
            fault = self._tags.take(answer.generation, answer.tags_total, answer.tags, limit)
            return f"5608h: {fault}" if fault else ""
        return f"a {type(answer).__name__} is no list"

    def extents(self) -> Iterator[tuple[int, list[WireExtent]]]:
        """(LD, its extents), for LDs that hold some."""
        for ld, each in enumerate(self._lds):
            if each.items:
                yield ld, [item for item in each.items if isinstance(item, WireExtent)]

    def tags(self) -> list[DcTagInfo]:
        """Every tag of the appliance."""
        return [item for item in self._tags.items if isinstance(item, DcTagInfo)]
