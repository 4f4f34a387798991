"""What a host may do at its mailbox: answer the oldest offer, give capacity back (4802h, 4803h).

One answer per group, in the order of the groups. A list may come in several commands (More), with
no other dynamic capacity command between them; whatever breaks that chain voids it up to its end,
so that a half-heard list is never taken for a whole one. The order of checks follows CXL r3.1
8.2.9.9.9.3 and .4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from tagmem.base.limits import EXTENTS_PER_ADD_MAX
from tagmem.base.units import Nanoseconds
from tagmem.domain.device_fm import cuts_inside, held_parts, laid_out
from tagmem.domain.device_free import (
    Cut,
    divide_pieces,
    extra_extents,
    give_back,
    let_go,
)
from tagmem.domain.device_records import (
    FM_PORT,
    OK,
    Allocation,
    Answer,
    Code,
    DcEvent,
    EventType,
    Group,
    HostRelease,
    Item,
    Piece,
    Range,
    Respond,
)
from tagmem.domain.device_state import DeviceState

CHAIN_RANGES_MAX = 4 * EXTENTS_PER_ADD_MAX
"""Ranges in one list, however many commands it came in."""


class Chains:
    """Lists under way, one per LD. Volatile: after a restart or a new session the host starts its
    list again.
    """

    def __init__(self, lds: int) -> None:
        self._open: list[tuple[str, list[Range]] | None] = [None] * lds
        self._broken = [False] * lds

    def reset(self, ld: int) -> None:
        """A new session."""
        self._open[ld] = None
        self._broken[ld] = False

    def interrupted(self, ld: int) -> bool:
        """Another dynamic capacity command comes; whether that breaks a chain (the command is then
        refused).
        """
        if self._open[ld] is None:
            return False
        self._open[ld] = None
        self._broken[ld] = True
        return True

    def take(self, event: Respond | HostRelease) -> Sequence[Range] | Answer:
        """The whole list, or the answer to a part of it (Success when more is to come)."""
        kind = type(event).__name__
        current = self._open[event.ld]
        if self._broken[event.ld] or (current is not None and current[0] != kind):
            self._open[event.ld] = None
            self._broken[event.ld] = event.more
            return Answer(Code.INVALID_INPUT, None, "its list was interrupted")
        if current is None and not event.more:
            return event.ranges
        ranges = [] if current is None else current[1]
        if len(ranges) + len(event.ranges) > CHAIN_RANGES_MAX:
            self._open[event.ld] = None
            self._broken[event.ld] = event.more
            return Answer(Code.RESOURCES_EXHAUSTED, None, f"over {CHAIN_RANGES_MAX} ranges")
        ranges = [*ranges, *event.ranges]
        if event.more:
            self._open[event.ld] = (kind, ranges)
            return OK
        self._open[event.ld] = None
        return ranges


def _well_formed(state: DeviceState, ranges: Sequence[Range]) -> Answer | list[int]:
    """The region of each range; or 0Fh for no region, 1Eh for misalignment or overlap."""
    regions: list[int] = []
    for entry in ranges:
        region = state.region_at(entry.start, entry.length)
        if region is None:
            reason = f"no region at {entry.start:#x}"
            return Answer(Code.INVALID_PHYSICAL_ADDRESS, None, reason)
        regions.append(region)
    for entry, region in zip(ranges, regions, strict=True):
        block = state.regions[region].block_bytes
        if entry.length <= 0 or entry.length % block or (entry.start - state.bases[region]) % block:
            return Answer(Code.INVALID_EXTENT_LIST, None, f"{entry.start:#x} is not whole blocks")
    ordered = sorted(ranges)
    for entry, following in pairwise(ordered):
        if following.start < entry.start + entry.length:
            return Answer(Code.INVALID_EXTENT_LIST, None, f"overlap at {following.start:#x}")
    return regions


# ---- 4802h


def respond(state: DeviceState, ld: int, ranges: Sequence[Range], now: Nanoseconds) -> Answer:
    """Add Dynamic Capacity Response (4802h): the answer to the LD's oldest group."""
    queue = state.groups[ld]
    if not queue:
        return Answer(Code.INVALID_INPUT, None, "nothing is offered")
    group = queue[0]
    taken: list[list[Cut]] = [[] for _ in group.items]
    if ranges:
        refused = _match(state, ld, ranges, taken)
        if refused is not None:
            return refused
    queue.popleft()
    state.drop_group(group)
    _settle(state, ld, group, taken, now)
    return OK


def _match(
    state: DeviceState, ld: int, ranges: Sequence[Range], taken: list[list[Cut]]
) -> Answer | None:
    group = state.groups[ld][0]
    regions = _well_formed(state, ranges)
    if isinstance(regions, Answer):
        return regions
    for entry, region in zip(ranges, regions, strict=True):
        start = state.to_media(ld, region, entry.start, entry.length)
        index = _offered(group, region, start, entry.length)
        if index is None:
            for later in list(state.groups[ld])[1:]:
                if _offered(later, region, start, entry.length) is not None:
                    return Answer(
                        Code.INVALID_INPUT, None, "an older offer is to be answered first"
                    )
            reason = f"{entry.start:#x} is not in the oldest offer"
            return Answer(Code.INVALID_PHYSICAL_ADDRESS, None, reason)
        taken[index].append((start, entry.length))
    extra = 0
    for item, cuts in zip(group.items, taken, strict=True):
        if item.dead or not cuts:
            continue
        accepted = sum(length for _, length in cuts)
        if item.sharable and accepted < sum(piece.length for piece in item.pieces):
            return Answer(Code.INVALID_EXTENT_LIST, None, f"part of sharable tag {item.tag}")
        extra += len(cuts) - len(item.pieces)
    if state.extents_used + extra > state.spec.extents_max:
        return Answer(Code.RESOURCES_EXHAUSTED, None, f"{state.extents_used} extents are tracked")
    return None


def _offered(group: Group, region: int, start: int, length: int) -> int | None:
    for index, item in enumerate(group.items):
        if item.region == region:
            for piece in item.pieces:
                if piece.start <= start and start + length <= piece.end:
                    return index
    return None


def _settle(
    state: DeviceState, ld: int, group: Group, taken: list[list[Cut]], now: Nanoseconds
) -> None:
    # The fabric manager gets one group of records per allocation: what was taken, or one record of
    # length 0.
    for item, cuts in zip(group.items, taken, strict=True):
        if item.dead:
            continue
        if cuts:
            pieces = _accept(state, ld, item, cuts)
            told = state.extent_events(
                EventType.ADD_RESPONSE, ld, item.region, item.tag, pieces, item.sharable
            )
        else:
            told = [refusal(state, ld, item)]
            row = state.allocations[item.allocation]
            let_go(state, row, ld, now)
        state.log(FM_PORT, now, told)
    if any(cuts and not item.dead for item, cuts in zip(group.items, taken, strict=True)):
        state.changed(ld)


def refusal(state: DeviceState, ld: int, item: Item) -> DcEvent:
    """The record that tells the fabric manager of a refused offer: its first extent's place, length
    0.
    """
    first = item.pieces[0]
    start = state.to_dpa(ld, item.region, first.start, first.length)
    kind = EventType.ADD_RESPONSE
    return DcEvent(0, 0, kind, 0, ld=ld, region=item.region, start=start, tag=item.tag)


def _accept(state: DeviceState, ld: int, item: Item, cuts: list[Cut]) -> tuple[Piece, ...]:
    row = state.allocations[item.allocation]
    pieces = row.pieces
    if sum(length for _, length in cuts) < row.size_bytes:
        accepted, refused = divide_pieces(pieces, cuts)
        row = _trim(state, row, accepted, refused)
        pieces = row.pieces
    holders = tuple(
        [msgspec.structs.replace(h, pending=False) if h.ld == ld else h for h in row.holders]
    )
    row = state.put(msgspec.structs.replace(row, holders=holders, pieces=pieces, touched=True))
    holder = row.holder(ld)
    assert holder is not None
    if not holder.fenced:
        state.draft.effects.append(state.expose(row, holder))
    return pieces


def _trim(
    state: DeviceState,
    row: Allocation,
    accepted: Sequence[Piece],
    refused: Sequence[Piece],
) -> Allocation:
    # What was not taken was never reachable, so it is free at once. The tag's bytes are what was
    # taken, in order.
    space = state.pools[row.pool]
    for piece in row.pieces:
        parts = [p for p in (*accepted, *refused) if piece.start <= p.start < piece.end]
        space.divide(piece.start, piece.length, [(p.start, p.length, row.id) for p in parts])
    for piece in refused:
        space.give_up(piece.start, piece.length)
    kept = laid_out((piece.start, piece.length) for piece in accepted)
    return msgspec.structs.replace(row, pieces=kept)


# ---- 4803h


def host_release(state: DeviceState, ld: int, ranges: Sequence[Range], now: Nanoseconds) -> Answer:
    """Release Dynamic Capacity (4803h): asked for, after a forced release, or unsolicited."""
    if not ranges:
        return Answer(Code.INVALID_INPUT, None, "no ranges")
    regions = _well_formed(state, ranges)
    if isinstance(regions, Answer):
        return regions
    cuts: dict[int, list[Cut]] = {}
    for entry, region in zip(ranges, regions, strict=True):
        found = held_parts(state, ld, region, entry.start, entry.length, pending=False)
        if found is None:
            reason = f"{entry.start:#x} is not in the host's list"
            return Answer(Code.INVALID_PHYSICAL_ADDRESS, None, reason)
        for number, start, length in found:
            cuts.setdefault(number, []).append((start, length))
    extra = 0
    targets = [(state.allocations[number], parts) for number, parts in cuts.items()]
    for row, parts in targets:
        if row.sharable and sum(length for _, length in parts) < row.size_bytes:
            return Answer(Code.INVALID_EXTENT_LIST, None, f"part of sharable tag {row.tag}")
        if state.spec.lds[ld].mirrored and cuts_inside(row, parts):
            return Answer(Code.INVALID_EXTENT_LIST, None, "this LD releases whole extents")
        extra += extra_extents(row.pieces, parts)
    if state.extents_used + extra > state.spec.extents_max:
        return Answer(Code.RESOURCES_EXHAUSTED, None, f"{state.extents_used} extents are tracked")
    for row, parts in targets:
        give_back(state, row, ld, parts, now)
    return OK
