"""What a fabric manager may do to a device: add, release, references, region configuration (5602h,
5604h to 5607h).

Each command gathers every reason to refuse it and answers the first in the specification's order
(CXL r3.1 7.6.7.6.5 and .6); only then does it change anything. Success means *started*: hosts
answer later.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.limits import EXTENTS_PER_ADD_MAX
from tagmem.base.units import Bytes, MediaOffset, Nanoseconds, is_power_of_two
from tagmem.domain.device_free import (
    Cut,
    divide_pieces,
    extra_extents,
    give_back,
    let_go,
    retire,
    sanitising_bytes,
)
from tagmem.domain.device_records import (
    OK,
    Add,
    AddReference,
    Allocation,
    AllocState,
    Answer,
    AskedExtent,
    Code,
    DcEvent,
    EventType,
    Group,
    Holder,
    Item,
    Piece,
    Policy,
    RegionRow,
    RegionSpec,
    Release,
    Removal,
    RemoveReference,
    SetRegionConfig,
)
from tagmem.domain.device_state import DeviceState

BLOCK_SIZES = range(12, 31)
"""Blocks of 2^n bytes that 5602h may set, where the region's size allows: a page to 1 GiB."""

_ADD_ORDER = (
    Code.INVALID_INPUT,
    Code.RESOURCES_EXHAUSTED,
    Code.INVALID_EXTENT_LIST,
    Code.RETRY_REQUIRED,
)
_RELEASE_ORDER = (
    Code.INVALID_INPUT,
    Code.INVALID_EXTENT_LIST,
    Code.INVALID_PHYSICAL_ADDRESS,
    Code.RETRY_REQUIRED,
    Code.RESOURCES_EXHAUSTED,
)


class Refusals:
    """Reasons to refuse, of which the specification's order picks one."""

    __slots__ = ("_reasons",)

    def __init__(self) -> None:
        self._reasons: dict[Code, str] = {}

    def add(self, code: Code, reason: str) -> None:
        """Note a reason; the first of each code is told."""
        self._reasons.setdefault(code, reason)

    def first(self, order: Iterable[Code]) -> Answer | None:
        """The answer that comes first in `order`, or None when there is no reason."""
        if not self._reasons:
            return None
        code = next(code for code in order if code in self._reasons)
        return Answer(code, None, self._reasons[code])


class Wanted(msgspec.Struct):
    """What an add will offer of one tag."""

    tag: Tag
    region: int
    pieces: tuple[Piece, ...]
    row: Allocation | None = None
    """Set when it exists already (shared access)."""


def laid_out(ranges: Iterable[tuple[int, Bytes]]) -> tuple[Piece, ...]:
    """Pieces whose bytes follow each other in the allocation."""
    pieces: list[Piece] = []
    at = 0
    for start, length in ranges:
        pieces.append(Piece(MediaOffset(start), length, at))
        at += length
    return tuple(pieces)


# ---- 5604h


def add(state: DeviceState, event: Add, now: Nanoseconds) -> Answer:
    """Initiate Dynamic Capacity Add (5604h), all four policies."""
    if not 0 <= event.ld < len(state.spec.lds):
        return Answer(Code.INVALID_INPUT, None, f"host {event.ld} of {len(state.spec.lds)}")
    if event.policy == Policy.PRESCRIPTIVE:
        found = _prescribed(state, event)
    elif event.policy == Policy.ENABLE_SHARED:
        found = _shared(state, event)
    elif event.policy in (Policy.FREE, Policy.CONTIGUOUS):
        found = _placed(state, event)
    else:
        return Answer(Code.INVALID_INPUT, None, f"selection policy {event.policy}")
    if isinstance(found, Answer):
        return found
    _offer(state, event.ld, found, now)
    return OK


def _check_tracking(
    state: DeviceState, ld: int, extents: int, new_tags: int, refusals: Refusals
) -> None:
    if state.extents_used + extents > state.spec.extents_max:
        refusals.add(Code.RESOURCES_EXHAUSTED, f"{state.extents_used} extents are tracked")
    if state.tags_used + new_tags > state.spec.tags_max:
        refusals.add(Code.RESOURCES_EXHAUSTED, f"{state.tags_used} tags are tracked")
    port = state.ports[ld]
    if extents > port.capacity:
        refusals.add(Code.RESOURCES_EXHAUSTED, f"an event log holds {port.capacity} records")
    elif extents > port.room:
        refusals.add(Code.RETRY_REQUIRED, f"host {ld}'s event log has {len(port.records)} records")


def _check_new_tag(state: DeviceState, tag: Tag, spec: RegionSpec, refusals: Refusals) -> None:
    if tag == NIL_TAG:
        if spec.sharable:
            refusals.add(Code.INVALID_INPUT, "a sharable region needs a tag")
    elif state.live(tag) is not None:
        refusals.add(Code.INVALID_INPUT, f"tag {tag} is in use")
    elif any(state.allocations[n].state is AllocState.FAILED for n in state.tags.get(tag, ())):
        refusals.add(Code.INVALID_INPUT, f"tag {tag} could not be sanitised")
    elif tag in state.tags:
        refusals.add(Code.RETRY_REQUIRED, f"tag {tag} is being sanitised")


def _placed(state: DeviceState, event: Add) -> list[Wanted] | Answer:
    if not 0 <= event.region < len(state.spec.regions):
        return Answer(Code.INVALID_INPUT, None, f"region {event.region}")
    spec = state.spec.regions[event.region]
    block = state.regions[event.region].block_bytes
    if event.length <= 0 or event.length % block:
        return Answer(Code.INVALID_INPUT, None, f"length {event.length}, blocks of {block}")
    refusals = Refusals()
    _check_new_tag(state, event.tag, spec, refusals)
    space = state.pools[spec.pool]
    start = space.contiguous(event.length, block)
    ranges: list[tuple[int, int]] | None = None if start is None else [(start, event.length)]
    if ranges is None and event.policy == Policy.FREE:
        ranges = space.scattered(event.length, block)
    if ranges is None:
        coming = sanitising_bytes(state, spec.pool)
        if coming and event.length <= space.free.free_bytes + coming:
            refusals.add(Code.RETRY_REQUIRED, f"{coming} bytes are being sanitised")
        else:
            refusals.add(Code.RESOURCES_EXHAUSTED, f"{space.free.free_bytes} bytes are free")
        ranges = []
    _check_tracking(state, event.ld, len(ranges), event.tag != NIL_TAG, refusals)
    refused = refusals.first(_ADD_ORDER)
    return refused or [Wanted(event.tag, event.region, laid_out(ranges))]


def _shared(state: DeviceState, event: Add) -> list[Wanted] | Answer:
    refusals = Refusals()
    row = state.live(event.tag)
    if not 0 <= event.region < len(state.spec.regions):
        return Answer(Code.INVALID_INPUT, None, f"region {event.region}")
    spec = state.spec.regions[event.region]
    if row is None:
        return Answer(Code.INVALID_INPUT, None, f"tag {event.tag} is not known")
    block = state.regions[event.region].block_bytes
    if not spec.sharable or not row.sharable:
        refusals.add(Code.INVALID_INPUT, "region or tag is not sharable")
    if spec.pool != row.pool:
        refusals.add(Code.INVALID_INPUT, f"region {event.region} shows other media")
    elif any(piece.start % block or piece.length % block for piece in row.pieces):
        refusals.add(Code.INVALID_INPUT, f"extents are not whole blocks of {block}")
    if row.holder(event.ld) is not None:
        refusals.add(Code.INVALID_INPUT, f"host {event.ld} has tag {event.tag} already")
    _check_tracking(state, event.ld, len(row.pieces), 0, refusals)
    refused = refusals.first(_ADD_ORDER)
    return refused or [Wanted(event.tag, event.region, row.pieces, row)]


def _prescribed(state: DeviceState, event: Add) -> list[Wanted] | Answer:
    if not 1 <= len(event.extents) <= EXTENTS_PER_ADD_MAX:
        return Answer(Code.INVALID_EXTENT_LIST, None, f"{len(event.extents)} extents")
    refusals = Refusals()
    by_tag: dict[Tag, list[tuple[int, AskedExtent, int]]] = {}
    for extent in event.extents:
        region = state.region_at(extent.start, extent.length)
        if region is None:
            return Answer(Code.INVALID_INPUT, None, f"no region at {extent.start:#x}")
        block = state.regions[region].block_bytes
        if extent.length <= 0 or extent.length % block:
            refusals.add(Code.INVALID_INPUT, f"length {extent.length}, blocks of {block}")
        if (extent.start - state.bases[region]) % block:
            refusals.add(Code.INVALID_EXTENT_LIST, f"{extent.start:#x} is not a block's start")
        start = state.to_media(event.ld, region, extent.start, extent.length)
        by_tag.setdefault(extent.tag, []).append((region, extent, start))
    _check_disjoint(state, event.ld, by_tag, refusals)
    wanted: list[Wanted] = []
    for tag, asked in by_tag.items():
        regions = {region for region, _, _ in asked}
        if len(regions) > 1:
            refusals.add(Code.INVALID_EXTENT_LIST, f"tag {tag} in several regions")
        region = asked[0][0]
        spec = state.spec.regions[region]
        _check_new_tag(state, tag, spec, refusals)
        ranges = _in_sequence(asked, spec.sharable, refusals)
        wanted.append(Wanted(tag, region, laid_out(ranges)))
    new_tags = sum(1 for want in wanted if want.tag != NIL_TAG)
    _check_tracking(state, event.ld, len(event.extents), new_tags, refusals)
    return refusals.first(_ADD_ORDER) or wanted


def _in_sequence(
    asked: list[tuple[int, AskedExtent, int]], sharable: bool, refusals: Refusals
) -> list[tuple[int, Bytes]]:
    numbers = [extent.sequence for _, extent, _ in asked]
    if any(numbers):
        # All zero means that the fabric manager leaves the numbers to us: the order of its list.
        if not sharable or sorted(numbers) != list(range(len(numbers))):
            refusals.add(Code.INVALID_EXTENT_LIST, f"sequence numbers {numbers[:8]}")
        asked = sorted(asked, key=lambda entry: entry[1].sequence)
    return [(start, extent.length) for _, extent, start in asked]


def _check_disjoint(
    state: DeviceState,
    ld: int,
    by_tag: dict[Tag, list[tuple[int, AskedExtent, int]]],
    refusals: Refusals,
) -> None:
    taken: list[tuple[int, int, int]] = []
    for asked in by_tag.values():
        for region, extent, start in asked:
            pool = state.spec.regions[region].pool
            taken.append((pool, start, start + extent.length))
            for _, _, owner in state.pools[pool].owners(start, extent.length):
                row = state.allocations[owner]
                if row.holder(ld) is not None:
                    refusals.add(Code.INVALID_EXTENT_LIST, f"{extent.start:#x} is the host's")
                elif row.state is AllocState.SANITISING:
                    refusals.add(Code.RETRY_REQUIRED, f"{extent.start:#x} is being sanitised")
                else:
                    refusals.add(Code.RESOURCES_EXHAUSTED, f"{extent.start:#x} is another tag's")
    taken.sort()
    for (pool, _, end), (next_pool, next_start, _) in pairwise(taken):
        if pool == next_pool and next_start < end:
            refusals.add(Code.INVALID_EXTENT_LIST, "extents of the list overlap")


def _offer(state: DeviceState, ld: int, wanted: list[Wanted], now: Nanoseconds) -> None:
    items: list[Item] = []
    events: list[DcEvent] = []
    for want in wanted:
        row = want.row
        holder = Holder(ld, want.region)
        if row is None:
            row = _allocate(state, want, holder)
        else:
            row = state.put(msgspec.structs.replace(row, holders=(*row.holders, holder)))
        items.append(Item(row.id, want.region, row.tag, row.sharable, row.pieces))
        events += state.extent_events(
            EventType.ADD, ld, want.region, row.tag, row.pieces, row.sharable
        )
    state.group_seq += 1
    group = Group(ld, state.group_seq, tuple(items))
    state.groups[ld].append(group)
    state.put_group(group)
    state.log(ld, now, chained(events))


def _allocate(state: DeviceState, want: Wanted, holder: Holder) -> Allocation:
    spec = state.spec.regions[want.region]
    number = state.next_serial()
    for piece in want.pieces:
        state.pools[spec.pool].take(piece.start, piece.length, number)
    return state.put(
        Allocation(
            id=number,
            serial=number,
            tag=want.tag,
            pool=spec.pool,
            region=want.region,
            pieces=want.pieces,
            file=want.tag if want.tag != NIL_TAG else f"untagged-{number}",
            sharable=spec.sharable,
            holders=(holder,),
        )
    )


def chained(events: list[DcEvent]) -> list[DcEvent]:
    """The records as one group: More in all but the last."""
    last = len(events) - 1
    return [
        event if event.more == (i < last) else msgspec.structs.replace(event, more=i < last)
        for i, event in enumerate(events)
    ]


# ---- 5605h


def release(state: DeviceState, event: Release, now: Nanoseconds) -> Answer:
    """Initiate Dynamic Capacity Release (5605h), by tag or by list, normal or forced."""
    if not 0 <= event.ld < len(state.spec.lds):
        return Answer(Code.INVALID_INPUT, None, f"host {event.ld} of {len(state.spec.lds)}")
    refusals = Refusals()
    if event.policy == Removal.TAG_BASED:
        targets = _targets_by_tag(state, event, refusals)
    elif event.policy == Removal.PRESCRIPTIVE:
        targets = _targets_by_list(state, event, refusals)
    else:
        return Answer(Code.INVALID_INPUT, None, f"removal policy {event.policy}")
    if event.forced:
        extra = sum(extra_extents(row.pieces, cuts) for row, cuts in targets)
        if state.extents_used + extra > state.spec.extents_max:
            refusals.add(Code.RESOURCES_EXHAUSTED, f"{state.extents_used} extents are tracked")
    else:
        records = sum(len(divide_pieces(row.pieces, cuts)[0]) for row, cuts in targets)
        port = state.ports[event.ld]
        if records > port.capacity:
            refusals.add(Code.RESOURCES_EXHAUSTED, f"an event log holds {port.capacity} records")
        elif records > port.room:
            refusals.add(Code.RETRY_REQUIRED, f"{len(port.records)} records in the event log")
    refused = refusals.first(_RELEASE_ORDER)
    if refused is not None:
        return refused
    _start_release(state, event, targets, now)
    return OK


Targets = list[tuple[Allocation, list[Cut]]]


def _targets_by_tag(state: DeviceState, event: Release, refusals: Refusals) -> Targets:
    row = state.live(event.tag)
    holder = None if row is None else row.holder(event.ld)
    if row is None or holder is None:
        refusals.add(Code.INVALID_INPUT, f"host {event.ld} has no tag {event.tag}")
        return []
    block = state.regions[holder.region].block_bytes
    whole = row.size_bytes
    if event.length <= 0 or event.length % block:
        refusals.add(Code.INVALID_INPUT, f"length {event.length}, blocks of {block}")
    elif event.length < whole and row.sharable:
        refusals.add(Code.INVALID_INPUT, f"{event.length} of the tag's {whole} bytes")
    elif event.length > whole:
        refusals.add(Code.RESOURCES_EXHAUSTED, f"{event.length}, the tag has {whole} bytes")
    if holder.pending and not event.forced:
        refusals.add(Code.INVALID_PHYSICAL_ADDRESS, f"tag {event.tag} is not answered yet")
    cuts: list[Cut] = []
    left = event.length
    for piece in reversed(row.pieces):
        length = min(left, piece.length)
        if length > 0:
            cuts.append((piece.end - length, length))
            left -= length
            if length < piece.length and state.spec.lds[event.ld].mirrored:
                refusals.add(Code.INVALID_EXTENT_LIST, "this LD releases whole extents")
    return [(row, cuts)]


def _targets_by_list(state: DeviceState, event: Release, refusals: Refusals) -> Targets:
    if not 1 <= len(event.extents) <= EXTENTS_PER_ADD_MAX:
        refusals.add(Code.INVALID_EXTENT_LIST, f"{len(event.extents)} extents")
        return []
    cuts: dict[int, list[Cut]] = {}
    listed: list[tuple[int, int]] = []
    for extent in event.extents:
        listed.append((extent.start, extent.start + extent.length))
        region = state.region_at(extent.start, extent.length)
        if region is None:
            refusals.add(Code.INVALID_PHYSICAL_ADDRESS, f"no region at {extent.start:#x}")
            continue
        block = state.regions[region].block_bytes
        if (
            extent.length <= 0
            or extent.length % block
            or (extent.start - state.bases[region]) % block
        ):
            refusals.add(Code.INVALID_EXTENT_LIST, f"{extent.start:#x} is not whole blocks")
            continue
        found = held_parts(state, event.ld, region, extent.start, extent.length, pending=True)
        if found is None or any(
            extent.tag not in (NIL_TAG, state.allocations[number].tag) for number, _, _ in found
        ):
            refusals.add(Code.INVALID_EXTENT_LIST, f"{extent.start:#x} is not the host's")
            continue
        for number, start, length in found:
            cuts.setdefault(number, []).append((start, length))
    listed.sort()
    if any(b[0] < a[1] for a, b in pairwise(listed)):
        refusals.add(Code.INVALID_EXTENT_LIST, "extents of the list overlap")
    targets = [(state.allocations[number], parts) for number, parts in cuts.items()]
    for row, parts in targets:
        holder = row.holder(event.ld)
        if holder is not None and holder.pending and not event.forced:
            refusals.add(Code.INVALID_PHYSICAL_ADDRESS, f"tag {row.tag} is not answered yet")
        if row.sharable and sum(length for _, length in parts) < row.size_bytes:
            refusals.add(Code.INVALID_INPUT, f"part of sharable tag {row.tag}")
        if state.spec.lds[event.ld].mirrored and cuts_inside(row, parts):
            refusals.add(Code.INVALID_EXTENT_LIST, "this LD releases whole extents")
    return targets


def held_parts(
    state: DeviceState, ld: int, region: int, start: int, length: Bytes, *, pending: bool
) -> list[tuple[int, int, Bytes]] | None:
    """(allocation, media start, length) of what an LD has in a DPA range; None when a byte is not
    its own.
    """
    media = state.to_media(ld, region, start, length)
    found: list[tuple[int, int, Bytes]] = []
    at = media
    for low, high, owner in state.pools[state.spec.regions[region].pool].owners(media, length):
        row = state.allocations[owner]
        holder = row.holder(ld)
        if (
            low > at
            or holder is None
            or holder.region != region
            or row.state is not AllocState.LIVE
            or (holder.pending and not pending)
        ):
            return None
        end = min(high, media + length)
        found.append((owner, at, end - at))
        at = end
    return found if at == media + length else None


def cuts_inside(row: Allocation, cuts: Iterable[Cut]) -> bool:
    """Whether the cuts take only part of an extent."""
    taken = divide_pieces(row.pieces, list(cuts))[0]
    whole = {(piece.start, piece.length) for piece in row.pieces}
    return any((piece.start, piece.length) not in whole for piece in taken)


def _start_release(state: DeviceState, event: Release, targets: Targets, now: Nanoseconds) -> None:
    events: list[DcEvent] = []
    kind = EventType.FORCED_RELEASE if event.forced else EventType.RELEASE
    for row, cuts in targets:
        if event.sanitise and not row.sanitise:
            row = state.put(msgspec.structs.replace(row, sanitise=True))
        holder = row.holder(event.ld)
        assert holder is not None
        if event.forced and holder.pending:
            kill_offer(state, row, event.ld)
            let_go(state, row, event.ld, now, forced=True)
            continue
        pieces = divide_pieces(row.pieces, cuts)[0]
        numbered = state.extent_events(kind, event.ld, holder.region, row.tag, pieces, row.sharable)
        events += numbered
        if event.forced:
            give_back(state, row, event.ld, cuts, now, forced=True)
    if events:
        state.log(event.ld, now, chained(events))


def kill_offer(state: DeviceState, row: Allocation, ld: int) -> None:
    """Mark an LD's unanswered offer of an allocation dead: its answer will be consumed and grant
    nothing.
    """
    queue = state.groups[ld]
    for index, group in enumerate(queue):
        if any(item.allocation == row.id and not item.dead for item in group.items):
            items = tuple(
                [
                    msgspec.structs.replace(item, dead=True) if item.allocation == row.id else item
                    for item in group.items
                ]
            )
            queue[index] = msgspec.structs.replace(group, items=items)
            state.put_group(queue[index])


# ---- 5606h, 5607h, 5602h


def add_reference(state: DeviceState, event: AddReference) -> Answer:
    """Dynamic Capacity Add Reference (5606h): a sharable tag outlives its last host. Idempotent."""
    row = state.live(event.tag)
    if row is None or not row.sharable:
        return Answer(Code.INVALID_INPUT, None, f"no sharable tag {event.tag}")
    if not row.referenced:
        state.put(msgspec.structs.replace(row, referenced=True))
    return OK


def remove_reference(state: DeviceState, event: RemoveReference, now: Nanoseconds) -> Answer:
    """Dynamic Capacity Remove Reference (5607h): with no host left, the memory is sanitised and
    freed.
    """
    row = state.live(event.tag)
    if row is None or not row.referenced:
        return Answer(Code.INVALID_INPUT, None, f"no reference on tag {event.tag}")
    row = msgspec.structs.replace(row, referenced=False)
    if row.holders:
        state.put(row)
    else:
        retire(state, row, now, told=True)
    return OK


def block_sizes(spec: RegionSpec) -> int:
    """The mask of block sizes that a region can be set to."""
    mask = 1 << (spec.block_bytes.bit_length() - 1)
    for exponent in BLOCK_SIZES:
        if spec.size_bytes % (1 << exponent) == 0:
            mask |= 1 << exponent
    return mask


def set_region_config(state: DeviceState, event: SetRegionConfig, now: Nanoseconds) -> Answer:
    """Set DC Region Configuration (5602h), only while none of its media is allocated."""
    if not 0 <= event.region < len(state.spec.regions):
        return Answer(Code.INVALID_INPUT, None, f"region {event.region}")
    spec = state.spec.regions[event.region]
    if not is_power_of_two(event.block_bytes) or not block_sizes(spec) & event.block_bytes:
        return Answer(Code.INVALID_INPUT, None, f"block size {event.block_bytes}")
    if not state.pools[spec.pool].empty:
        return Answer(Code.UNSUPPORTED, None, f"region {event.region} is in use")
    if any(state.ports[ld].room < 1 for ld in range(len(state.spec.lds))):
        return Answer(Code.RETRY_REQUIRED, None, "a host's event log is full")
    row = RegionRow(event.region, event.block_bytes, event.sanitise)
    state.regions[event.region] = row
    state.draft.changes["region", str(event.region)] = row
    for ld in range(len(state.spec.lds)):
        told = DcEvent(0, 0, EventType.REGION_UPDATED, 0, ld=ld, region=event.region)
        state.log(ld, now, [told])
    return OK
