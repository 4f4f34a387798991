"""The device's memory in its working form: rows indexed by what commands ask for, and one draft of
changes.

The rules (`device_fm`, `device_host`) read and write through this; each write both changes the
working form and notes the row for the commit, so that the two cannot drift. Rules check first and
write last: nothing here is undone, except by loading everything again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.limits import REGION_GRANULARITY_BYTES
from tagmem.base.units import Bytes, Dpa, Nanoseconds, align_up
from tagmem.domain.device_records import (
    FM_PORT,
    Allocation,
    AllocState,
    DcEvent,
    DeviceSpec,
    EventType,
    Expose,
    Group,
    Holder,
    LdRow,
    Notify,
    Piece,
    PortRow,
    RegionRow,
    SpecRow,
    WipedRow,
)
from tagmem.domain.device_space import Space
from tagmem.ports import Change, Effect, Loaded, Step

SERIAL_JUMP = 1 << 16
"""Serials given out since the last row that a restart can see are fewer than this."""
WIPED_SLOTS = 4096
"""Sanitise records kept for C001h; the oldest go."""


class Draft:
    """What the step under way will ask to be committed and done."""

    __slots__ = ("changes", "done", "effects")

    def __init__(self) -> None:
        self.changes: dict[tuple[str, str], msgspec.Struct | None] = {}
        self.effects: list[Effect] = []
        self.done: list[int] = []

    def step(self, reply: object) -> Step:
        """The finished step."""
        changes = tuple([Change(kind, key, row) for (kind, key), row in self.changes.items()])
        return Step(changes, tuple(self.effects), tuple(self.done), (), reply)


class Port:
    """One event log: the oldest record first."""

    __slots__ = ("capacity", "overflow_told", "records", "row")

    def __init__(self, row: PortRow, capacity: int) -> None:
        self.row = row
        self.capacity = capacity
        self.records: deque[DcEvent] = deque()
        self.overflow_told = 0
        """The overflow count that a reader has seen; only what was seen may be forgotten."""

    @property
    def room(self) -> int:
        """Records that still fit."""
        return self.capacity - len(self.records)


class DeviceState:
    """Everything the device knows."""

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec
        self.draft = Draft()
        self.bases = self._lay_out(spec)
        self.clear()

    @staticmethod
    def _lay_out(spec: DeviceSpec) -> tuple[Dpa, ...]:
        # The same for every LD: regions in increasing DPA, each on its 256 MiB boundary, no static
        # memory below.
        bases: list[Dpa] = []
        at = 0
        for region in spec.regions:
            at = align_up(at, max(REGION_GRANULARITY_BYTES, region.block_bytes))
            bases.append(Dpa(at))
            at += align_up(region.size_bytes, REGION_GRANULARITY_BYTES)
        return tuple(bases)

    def clear(self) -> None:
        """Forget everything but what the device is."""
        spec = self.spec
        pools: dict[int, int] = {}
        for region in spec.regions:
            pools[region.pool] = max(pools.get(region.pool, 0), region.size_bytes)
        self.pools = {pool: Space(size) for pool, size in pools.items()}
        self.regions = [RegionRow(i, r.block_bytes, r.sanitise) for i, r in enumerate(spec.regions)]
        self.allocations: dict[int, Allocation] = {}
        self.tags: dict[Tag, list[int]] = {}
        """Ids of allocations under a tag: the tag itself, and parts of it that are being sanitised.
        """
        self.members: list[dict[int, int]] = [{} for _ in spec.lds]
        """Per LD: allocation id -> region, of what it has been added, in the order of adding."""
        self.extent_counts = [0] * len(spec.lds)
        self.lists: list[list[tuple[int, int, Tag, int]] | None] = [None] * len(spec.lds)
        self.ld_rows = [LdRow(ld, 0, 0) for ld in range(len(spec.lds))]
        self.groups: list[deque[Group]] = [deque() for _ in spec.lds]
        self.group_seq = 0
        self.ports: dict[int, Port] = {
            ld: Port(PortRow(ld), entry.log_records) for ld, entry in enumerate(spec.lds)
        }
        self.ports[FM_PORT] = Port(PortRow(FM_PORT), spec.fm_log_records)
        self.wiped: dict[Tag, WipedRow] = {}
        self.wiped_slots: dict[int, Tag] = {}
        self.wiped_next = 0
        self.waiting: dict[int, Nanoseconds] = {}
        """Allocations whose sanitising is to start (again), and when."""
        self.extents_used = 0
        self.tags_used = 0
        self.serial = 0
        self.effect_id = 0
        self.spec_row: SpecRow | None = None
        self.stale: list[tuple[str, str]] = []
        """Rows made under another configuration, which were not loaded."""
        self.foreign = 0
        """Allocations among them."""

    @property
    def misfit(self) -> bool:
        """Whether the rows were made under another configuration than ours."""
        return self.spec_row is not None and self.spec_row.spec != self.spec

    # ---- loading

    def load(self, loaded: Loaded) -> None:
        """Start from the store's rows."""
        self.clear()
        self.draft = Draft()
        rows: dict[str, list[msgspec.Struct]] = {}
        keys: list[tuple[str, str]] = []
        for kind, key, row in loaded.records:
            rows.setdefault(kind, []).append(row)
            keys.append((kind, key))
        for row in rows.get("spec", ()):
            assert isinstance(row, SpecRow)
            self.spec_row = row
        self.effect_id = loaded.last_effect_id
        if self.misfit:
            self.stale = keys
            self.foreign = len(rows.get("allocation", ()))
            return
        self._load_numbers(rows)
        self._load_allocations(rows)
        self._load_logs(rows)
        self.serial += SERIAL_JUMP

    def _load_numbers(self, rows: dict[str, list[msgspec.Struct]]) -> None:
        for row in rows.get("region", ()):
            assert isinstance(row, RegionRow)
            self.regions[row.region] = row
        for row in rows.get("ld", ()):
            assert isinstance(row, LdRow)
            self.ld_rows[row.ld] = row
            self.serial = max(self.serial, row.serial)
        for row in rows.get("wiped", ()):
            assert isinstance(row, WipedRow)
            self.serial = max(self.serial, row.serial)
            self._note_wiped(row)
        newest = max(self.wiped.values(), key=lambda w: w.serial, default=None)
        self.wiped_next = 0 if newest is None else newest.slot + 1

    def _load_allocations(self, rows: dict[str, list[msgspec.Struct]]) -> None:
        found = [row for row in rows.get("allocation", ()) if isinstance(row, Allocation)]
        for row in sorted(found, key=lambda row: row.serial):
            self.serial = max(self.serial, row.serial)
            space = self.pools[row.pool]
            for piece in row.pieces:
                space.take(piece.start, piece.length, row.id)
            self._add(row)
            if row.state is AllocState.SANITISING and not row.effect:
                self.waiting[row.id] = row.retry_ns

    def _load_logs(self, rows: dict[str, list[msgspec.Struct]]) -> None:
        groups = [row for row in rows.get("group", ()) if isinstance(row, Group)]
        for group in sorted(groups, key=lambda row: row.seq):
            self.groups[group.ld].append(group)
            self.group_seq = max(self.group_seq, group.seq)
        for row in rows.get("port", ()):
            assert isinstance(row, PortRow)
            self.ports[row.port].row = row
        events = [row for row in rows.get("event", ()) if isinstance(row, DcEvent)]
        for event in sorted(events, key=lambda row: row.seq):
            port = self.ports[event.port]
            port.records.append(event)
            if event.seq >= port.row.next_seq:
                port.row = msgspec.structs.replace(port.row, next_seq=event.seq + 1)

    # ---- numbers

    def next_serial(self) -> int:
        """A number larger than any before."""
        self.serial += 1
        return self.serial

    def next_effect(self) -> int:
        """An outbox id that was never used."""
        self.effect_id += 1
        return self.effect_id

    @property
    def tag_generation(self) -> int:
        """Changes with every change of the list of tags or of who has them."""
        return self.serial & 0xFFFFFFFF

    # ---- addresses

    def region_at(self, start: int, length: Bytes) -> int | None:
        """The region that a DPA range lies in, or None."""
        for index, region in enumerate(self.spec.regions):
            base = self.bases[index]
            if base <= start and start + length <= base + region.size_bytes:
                return index
        return None

    def to_media(self, ld: int, region: int, start: int, length: Bytes) -> int:
        """The media offset behind a DPA range of one LD that lies in `region`."""
        offset = start - self.bases[region]
        if self.spec.lds[ld].mirrored:
            return self.spec.regions[region].size_bytes - offset - length
        return offset

    def to_dpa(self, ld: int, region: int, start: int, length: Bytes) -> Dpa:
        """Where one LD sees a media range through `region`."""
        if self.spec.lds[ld].mirrored:
            start = self.spec.regions[region].size_bytes - start - length
        return Dpa(self.bases[region] + start)

    # ---- allocations

    def _weight(self, row: Allocation) -> int:
        # Extents that the device tracks for it: one set per LD, and one for a reference or the
        # wiping alone.
        return len(row.pieces) * max(1, len(row.holders))

    @staticmethod
    def _members_in(row: Allocation) -> dict[int, int]:
        if row.state is not AllocState.LIVE:
            return {}
        return {holder.ld: holder.region for holder in row.holders if not holder.pending}

    def _index(self, before: Allocation | None, after: Allocation | None) -> None:
        # An LD that had it and still has it keeps its place in the LD's list: pages must not shift
        # unseen.
        old = {} if before is None else self._members_in(before)
        new = {} if after is None else self._members_in(after)
        if before is not None:
            self.extents_used -= self._weight(before)
            for ld in old:
                self.extent_counts[ld] -= len(before.pieces)
                if ld not in new:
                    del self.members[ld][before.id]
                self.lists[ld] = None
        if after is not None:
            self.extents_used += self._weight(after)
            for ld, region in new.items():
                self.extent_counts[ld] += len(after.pieces)
                self.members[ld][after.id] = region
                self.lists[ld] = None

    def _add(self, row: Allocation) -> None:
        before = self.allocations.get(row.id)
        self._index(before, row)
        self.allocations[row.id] = row
        if before is None and row.tag != NIL_TAG:
            ids = self.tags.setdefault(row.tag, [])
            if not ids:
                self.tags_used += 1
            ids.append(row.id)

    def put(self, row: Allocation) -> Allocation:
        """Keep a new or changed allocation (its pieces are the pool's already). Returns it with its
        serial.
        """
        row = msgspec.structs.replace(row, serial=self.next_serial())
        self._add(row)
        self.draft.changes["allocation", str(row.id)] = row
        return row

    def remove(self, row: Allocation) -> None:
        """Make an allocation's media free and forget it."""
        # The caller's row may be ahead of the one that is kept.
        row = self.allocations.pop(row.id)
        self._index(row, None)
        self.waiting.pop(row.id, None)
        if row.tag != NIL_TAG:
            ids = self.tags[row.tag]
            ids.remove(row.id)
            if not ids:
                del self.tags[row.tag]
                self.tags_used -= 1
        space = self.pools[row.pool]
        for piece in row.pieces:
            space.give_up(piece.start, piece.length)
        self.next_serial()
        self.draft.changes["allocation", str(row.id)] = None

    def live(self, tag: Tag) -> Allocation | None:
        """The allocation that carries a tag, unless it is being sanitised."""
        for number in self.tags.get(tag, ()):
            row = self.allocations[number]
            if row.state is AllocState.LIVE:
                return row
        return None

    def changed(self, ld: int) -> None:
        """An LD's extent list is another one now: its generation grows."""
        row = self.ld_rows[ld]
        row = LdRow(ld, (row.generation + 1) & 0xFFFFFFFF, self.next_serial())
        self.ld_rows[ld] = row
        self.lists[ld] = None
        self.draft.changes["ld", str(ld)] = row

    def extent_list(self, ld: int) -> list[tuple[int, int, Tag, int]]:
        """(DPA, length, tag, sequence) of all that an LD has been added."""
        cached = self.lists[ld]
        if cached is None:
            cached = []
            for number, region in self.members[ld].items():
                row = self.allocations[number]
                for sequence, piece in enumerate(row.pieces):
                    start = self.to_dpa(ld, region, piece.start, piece.length)
                    cached.append((start, piece.length, row.tag, sequence if row.sharable else 0))
            self.lists[ld] = cached
        return cached

    # ---- groups

    def put_group(self, group: Group) -> None:
        """Keep a group whose place in its queue has been set."""
        self.draft.changes["group", f"{group.ld}/{group.seq}"] = group

    def drop_group(self, group: Group) -> None:
        """Forget a group that has been answered."""
        self.draft.changes["group", f"{group.ld}/{group.seq}"] = None

    # ---- event logs

    def log(self, number: int, now: Nanoseconds, events: Iterable[DcEvent]) -> None:
        """Append one group of records; those that do not fit are lost and counted."""
        port = self.ports[number]
        was_empty = not port.records
        row = port.row
        lost = 0
        for event in events:
            if len(port.records) >= port.capacity:
                lost += 1
                continue
            event = msgspec.structs.replace(
                event,
                port=number,
                seq=row.next_seq,
                at_ns=now,
                extents_available=max(0, self.spec.extents_max - self.extents_used),
                tags_available=max(0, self.spec.tags_max - self.tags_used),
            )
            row = msgspec.structs.replace(row, next_seq=row.next_seq + 1)
            port.records.append(event)
            self.draft.changes["event", f"{number}/{event.seq}"] = event
        if lost:
            row = msgspec.structs.replace(
                row,
                overflow_count=row.overflow_count + lost,
                overflow_first_ns=row.overflow_first_ns or now,
                overflow_last_ns=now,
            )
            self.draft.changes["port", str(number)] = row
        port.row = row
        policy = row.policy
        notifies = len(policy) < 5 or policy[4] & 3 == 1
        if was_empty and port.records and notifies:
            self.draft.effects.append(Notify(0, number))

    def extent_events(
        self,
        kind: EventType,
        ld: int,
        region: int,
        row_tag: Tag,
        pieces: tuple[Piece, ...],
        sharable: bool,
    ) -> list[DcEvent]:
        """Records of one kind for some pieces as one LD sees them, all but the last marked More."""
        last = len(pieces) - 1
        return [
            DcEvent(
                port=0,
                seq=0,
                type=kind,
                at_ns=0,
                ld=ld,
                region=region,
                more=index < last,
                start=self.to_dpa(ld, region, piece.start, piece.length),
                length=piece.length,
                tag=row_tag,
                sequence=index if sharable else 0,
            )
            for index, piece in enumerate(pieces)
        ]

    # ---- sanitise records

    def _note_wiped(self, row: WipedRow) -> None:
        old = self.wiped_slots.get(row.slot)
        if old is not None and self.wiped.get(old) is not None and self.wiped[old].slot == row.slot:
            del self.wiped[old]
        held = self.wiped.get(row.tag)
        if held is None or held.serial <= row.serial:
            self.wiped[row.tag] = row
        self.wiped_slots[row.slot] = row.tag

    def put_wiped(self, row: WipedRow) -> None:
        """Remember how a tag was sanitised, in place of the oldest such memory."""
        self._note_wiped(row)
        self.wiped_next = (row.slot + 1) % WIPED_SLOTS
        self.draft.changes["wiped", str(row.slot)] = row

    # ---- exposure

    def expose(self, row: Allocation, holder: Holder) -> Expose:
        """The effect that lets a holder reach its bytes."""
        return Expose(0, holder.ld, holder.region, row.file, row.pool, row.pieces)
