"""What must be true of a device after every event: for tests, simulation and operators alike."""

from __future__ import annotations

from collections.abc import Iterable

from tagmem.domain.device_records import Allocation, AllocState
from tagmem.domain.device_state import DeviceState
from tagmem.domain.extent import InvariantViolated


def check_device(state: DeviceState) -> None:
    """Raise InvariantViolated for the first rule that does not hold."""
    _check_media(state)
    _check_owners(state)
    _check_lists(state)
    _check_groups(state)
    _check_logs(state)


def _broken(what: str) -> InvariantViolated:
    return InvariantViolated(f"device: {what}")


def _check_media(state: DeviceState) -> None:
    for pool, space in state.pools.items():
        ranges = [(run.start, run.end) for run in space.free.free_runs()]
        for row in state.allocations.values():
            if row.pool == pool:
                ranges += [(piece.start, piece.end) for piece in row.pieces]
        at = 0
        for start, end in sorted(ranges):
            if start != at:
                kind = "belong to two" if start < at else "belong to nobody"
                raise _broken(f"bytes of pool {pool} at {min(start, at)} {kind}")
            at = end
        if at != space.size_bytes:
            raise _broken(f"pool {pool} ends at {at} of {space.size_bytes}")


def _check_owners(state: DeviceState) -> None:
    for row in state.allocations.values():
        added = [holder for holder in row.holders if not holder.pending]
        if len(row.holders) > 1 and not row.sharable:
            raise _broken(f"allocation {row.id} is not sharable and has {len(row.holders)} holders")
        if len({holder.ld for holder in row.holders}) != len(row.holders):
            raise _broken(f"allocation {row.id} has one holder twice")
        if row.state is AllocState.LIVE and not row.holders and not row.referenced:
            raise _broken(f"allocation {row.id} is live and nobody's")
        if row.state is not AllocState.LIVE and (row.holders or row.referenced):
            raise _broken(f"allocation {row.id} is held while it is sanitised")
        if added and not row.touched:
            raise _broken(f"allocation {row.id} is held and yet never touched")
    for tag, numbers in state.tags.items():
        live = [n for n in numbers if state.allocations[n].state is AllocState.LIVE]
        if len(live) > 1 or not numbers:
            raise _broken(f"tag {tag} names {len(live)} live allocations")


def _weight(rows: Iterable[Allocation]) -> int:
    return sum(len(row.pieces) * max(1, len(row.holders)) for row in rows)


def _check_lists(state: DeviceState) -> None:
    if state.extents_used != _weight(state.allocations.values()):
        raise _broken(f"{state.extents_used} extents are counted as used")
    if state.tags_used != len(state.tags):
        raise _broken(f"{state.tags_used} tags are counted as used")
    for ld in range(len(state.spec.lds)):
        expected = {
            row.id
            for row in state.allocations.values()
            if (holder := row.holder(ld)) is not None and not holder.pending
        }
        if set(state.members[ld]) != expected:
            raise _broken(f"LD {ld} lists {sorted(state.members[ld])}, holds {sorted(expected)}")
        if state.extent_counts[ld] != len(state.extent_list(ld)):
            raise _broken(f"LD {ld} counts {state.extent_counts[ld]} extents")


def _check_groups(state: DeviceState) -> None:
    offered: set[tuple[int, int]] = set()
    for ld, queue in enumerate(state.groups):
        for group in queue:
            for item in group.items:
                if item.dead:
                    continue
                row = state.allocations.get(item.allocation)
                holder = None if row is None else row.holder(ld)
                if row is None or holder is None or not holder.pending:
                    raise _broken(f"LD {ld} is offered {item.tag}, which is not pending")
                if row.pieces != item.pieces:
                    raise _broken(f"LD {ld} is offered other extents of {item.tag}")
                offered.add((ld, item.allocation))
    for row in state.allocations.values():
        for holder in row.holders:
            if holder.pending and (holder.ld, row.id) not in offered:
                raise _broken(f"allocation {row.id} is pending at {holder.ld} and not offered")


def _check_logs(state: DeviceState) -> None:
    for number, port in state.ports.items():
        if len(port.records) > port.capacity:
            raise _broken(f"the log of port {number} holds {len(port.records)} records")
        handles = [record.seq for record in port.records]
        if handles != sorted(set(handles)):
            raise _broken(f"records of port {number} are out of order")
