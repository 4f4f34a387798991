"""A device's dynamic capacity log as the host knows it: records become groups, and are cleared in
order.

A group is complete with its record whose More is clear (CXL r3.1 8.2.9.2.1.6). Handles may only be
cleared oldest first, so a group that is done waits for those before it.
"""

from __future__ import annotations

from tagmem.base.limits import DC_EVENT_LOG_RECORDS_MAX
from tagmem.wire.extent import WireExtent
from tagmem.wire.generic import DcEventType, DynamicCapacityRecord, EventRecord

CLEAR_HANDLES_MAX = 255
"""The handle count of 0101h is 8 bits wide."""


class Group:
    """Records of one group."""

    def __init__(self, number: int, kind: DcEventType | None) -> None:
        self.number = number
        self.kind = kind
        """None: a record that is no business of ours."""
        self.handles: list[int] = []
        self.extents: list[WireExtent] = []
        self.complete = False
        self.done = False


class EventLog:
    """The records that were read and not cleared yet. Group numbers are never used again."""

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._known: set[int] = set()
        self._last_number = 0

    def forget(self) -> None:
        """A new session: what is still in the log will be read again."""
        self._groups.clear()
        self._known.clear()

    @property
    def empty(self) -> bool:
        """Nothing waits to be cleared."""
        return not self._groups

    def take(self, records: tuple[EventRecord, ...]) -> list[Group]:
        """Add what is new in a response to 0100h; the groups that are complete now.

        Raises ValueError when the device shows more records than a log may have.
        """
        complete: list[Group] = []
        for record in records:
            handle = record.header.handle
            if handle in self._known:
                continue
            if len(self._known) >= DC_EVENT_LOG_RECORDS_MAX:
                raise ValueError(
                    f"event log: at most {DC_EVENT_LOG_RECORDS_MAX} records, and one more came"
                )
            self._known.add(handle)
            group = self._add(record)
            group.handles.append(handle)
            if group.complete:
                complete.append(group)
        return complete

    def _add(self, record: EventRecord) -> Group:
        if not isinstance(record, DynamicCapacityRecord):
            group = self._new(None)
            group.complete = True
            return group
        last = self._groups[-1] if self._groups else None
        if last is None or last.complete or last.kind is not record.type:
            if last is not None:
                last.complete = True  # A chain that another type breaks off never ends otherwise.
            last = self._new(record.type)
        last.extents.append(record.extent)
        last.complete = not record.more
        return last

    def _new(self, kind: DcEventType | None) -> Group:
        self._last_number += 1
        group = Group(self._last_number, kind)
        self._groups.append(group)
        return group

    def find(self, number: int) -> Group | None:
        """A group that has not been cleared."""
        return next((group for group in self._groups if group.number == number), None)

    def clearable(self) -> tuple[int, ...]:
        """Handles that may be cleared now: whole groups from the oldest on that are done."""
        handles: list[int] = []
        for group in self._groups:
            if not group.done:
                break
            room = CLEAR_HANDLES_MAX - len(handles)
            handles += group.handles[:room]
            if len(group.handles) > room:
                break
        return tuple(handles)

    def cleared(self, handles: tuple[int, ...]) -> None:
        """The device has cleared them."""
        gone = set(handles)
        self._known -= gone
        for group in self._groups:
            if gone.isdisjoint(group.handles):
                break
            group.handles = [handle for handle in group.handles if handle not in gone]
        self._groups = [group for group in self._groups if group.handles or not group.done]
