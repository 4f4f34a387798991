"""How capacity leaves an LD, by whatever command, and how its media become free: the one path to
freedom.

An allocation whose last holder (and reference) is gone is sanitised if any host ever had it and a
region or a request wants it so; only the proof that it reads zero makes its blocks free and tells
the fabric manager. What no host ever accepted was never reachable and is free at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tagmem.base.ids import NIL_TAG
from tagmem.base.units import SECOND, Bytes, MediaOffset, Nanoseconds
from tagmem.domain.device_records import (
    FM_PORT,
    Allocation,
    AllocState,
    Conceal,
    Drop,
    EventType,
    Piece,
    Sanitise,
    SanitiseDone,
    SanitiseFailed,
    WipedRow,
)
from tagmem.domain.device_state import DeviceState

SANITISE_ATTEMPTS_MAX = 6
"""After so many failures the blocks are given up for lost."""
SANITISE_BACK_OFF_NS = SECOND
"""Before the second attempt; doubled before each further one."""

Cut = tuple[int, int]
"""A media range (start, length)."""


def let_go(
    state: DeviceState, row: Allocation, ld: int, now: Nanoseconds, *, forced: bool = False
) -> None:
    """One LD no longer has (or, forced or refused, is no longer offered) the whole allocation."""
    holder = row.holder(ld)
    assert holder is not None
    row = msgspec.structs.replace(
        row,
        holders=tuple([h for h in row.holders if h.ld != ld]),
        last=(ld, holder.region),
        sanitise=row.sanitise or state.regions[holder.region].sanitise,
        forced=row.forced or forced,
    )
    told = forced or not holder.pending
    if not holder.pending:
        state.changed(ld)
        state.draft.effects.append(Conceal(0, ld, row.file))
    if row.holders or row.referenced:
        state.put(row)
        if told:
            _tell_released(state, row, now)
        return
    retire(state, row, now, told=told)


def retire(state: DeviceState, row: Allocation, now: Nanoseconds, *, told: bool) -> None:
    """Nobody has the allocation any more: sanitise it, or free it when there is nothing to hide."""
    if row.touched and row.sanitise:
        start_sanitising(state, row)
        return
    state.remove(row)
    if row.touched and not row.part:
        state.draft.effects.append(Drop(0, row.file, row.pool))
    if told:
        _tell_released(state, row, now)


def start_sanitising(state: DeviceState, row: Allocation) -> None:
    """Order the sanitising, for the first time or again."""
    effect_id = state.next_effect()
    state.waiting.pop(row.id, None)
    row = state.put(
        msgspec.structs.replace(row, state=AllocState.SANITISING, effect=effect_id, retry_ns=0)
    )
    state.draft.effects.append(
        Sanitise(
            effect_id, row.id, row.file, row.pool, row.pieces, part=row.part, forced=row.forced
        )
    )


def sanitise_done(state: DeviceState, event: SanitiseDone, now: Nanoseconds) -> None:
    """The media read zero: the blocks are free, and the fabric manager learns it now and not
    before.
    """
    state.draft.done.append(event.effect_id)
    row = state.allocations.get(event.allocation)
    if row is None or row.effect != event.effect_id:
        return
    state.remove(row)
    if row.tag != NIL_TAG:
        state.put_wiped(
            WipedRow(
                slot=state.wiped_next,
                serial=state.next_serial(),
                tag=row.tag,
                method=event.method,
                sanitised_bytes=event.sanitised_bytes,
                read_back_bytes=event.read_back_bytes,
                finished_ns=now,
            )
        )
    _tell_released(state, row, now)


def sanitise_failed(state: DeviceState, event: SanitiseFailed, now: Nanoseconds) -> None:
    """Try again later; in the end, park: blocks that cannot be proved zero are never given out."""
    state.draft.done.append(event.effect_id)
    row = state.allocations.get(event.allocation)
    if row is None or row.effect != event.effect_id:
        return
    attempts = row.attempts + 1
    parked = attempts >= SANITISE_ATTEMPTS_MAX
    retry_ns = 0 if parked else now + (SANITISE_BACK_OFF_NS << (attempts - 1))
    row = state.put(
        msgspec.structs.replace(
            row,
            state=AllocState.FAILED if parked else AllocState.SANITISING,
            attempts=attempts,
            effect=0,
            retry_ns=retry_ns,
            fault=event.reason,
        )
    )
    if not parked:
        state.waiting[row.id] = retry_ns


def give_back(
    state: DeviceState,
    row: Allocation,
    ld: int,
    cuts: Sequence[Cut],
    now: Nanoseconds,
    *,
    forced: bool = False,
) -> None:
    """One LD gives up ranges of an allocation that it alone has; all of them: the allocation."""
    gone, kept = divide_pieces(row.pieces, cuts)
    if not kept:
        let_go(state, row, ld, now, forced=forced)
        return
    holder = row.holder(ld)
    assert holder is not None
    number = state.next_serial()
    _divide_space(state, row, number, gone, kept)
    state.put(msgspec.structs.replace(row, pieces=kept))
    state.changed(ld)
    part = state.put(
        msgspec.structs.replace(
            row,
            id=number,
            pieces=gone,
            holders=(),
            part=True,
            last=(ld, holder.region),
            sanitise=row.sanitise or state.regions[holder.region].sanitise,
            forced=forced,
        )
    )
    retire(state, part, now, told=True)


def divide_pieces(
    pieces: Sequence[Piece], cuts: Sequence[Cut]
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """(what the cuts take, what they leave), both in the pieces' order. Cuts do not overlap each
    other.
    """
    gone: list[Piece] = []
    kept: list[Piece] = []
    ordered = sorted(cuts)
    for piece in pieces:
        at = int(piece.start)
        for start, length in ordered:
            low, high = max(start, piece.start), min(start + length, piece.end)
            if low >= high:
                continue
            if at < low:
                kept.append(_part_of(piece, at, low))
            gone.append(_part_of(piece, low, high))
            at = high
        if at < piece.end:
            kept.append(_part_of(piece, at, piece.end) if at > piece.start else piece)
    return tuple(gone), tuple(kept)


def _part_of(piece: Piece, low: int, high: int) -> Piece:
    return Piece(MediaOffset(low), high - low, piece.at + low - piece.start)


def _divide_space(
    state: DeviceState,
    row: Allocation,
    part: int,
    gone: Sequence[Piece],
    kept: Sequence[Piece],
) -> None:
    space = state.pools[row.pool]
    owned = [(p.start, p.length, part) for p in gone] + [(p.start, p.length, row.id) for p in kept]
    for piece in row.pieces:
        parts = [o for o in owned if piece.start <= o[0] < piece.end]
        space.divide(piece.start, piece.length, parts)


def extra_extents(pieces: Sequence[Piece], cuts: Sequence[Cut]) -> int:
    """How many more extents the device must track after the cuts."""
    gone, kept = divide_pieces(pieces, cuts)
    return len(gone) + len(kept) - len(pieces) if kept else 0


def sanitising_bytes(state: DeviceState, pool: int) -> Bytes:
    """Bytes of a pool that will be free once they have been sanitised."""
    return sum(
        row.size_bytes
        for row in state.allocations.values()
        if row.pool == pool and row.state is AllocState.SANITISING
    )


def _tell_released(state: DeviceState, row: Allocation, now: Nanoseconds) -> None:
    ld, region = row.last
    events = state.extent_events(EventType.RELEASED, ld, region, row.tag, row.pieces, row.sharable)
    state.log(FM_PORT, now, events)
