"""What must hold after every step, as functions that production, simulation and properties all
call.

They raise InvariantViolated, a real exception, so that no interpreter option can remove them.
`check` looks at the whole state and costs as much as the state is large; `check_tag` looks at one
capacity and is cheap enough to be called after each step in production.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from tagmem.base.ids import NIL_TAG
from tagmem.domain import attachment as attachments
from tagmem.domain import moves
from tagmem.domain.effects import FenceHost, InitiateAdd, InitiateRelease, SetReference
from tagmem.domain.extent import (
    InvariantViolated,
    covers,
    intersect,
    normal,
    overlapping_pair,
    subtract,
    total,
)
from tagmem.domain.records import (
    AttachmentState,
    CapacityRecord,
    CapacityState,
    Extent,
    Reference,
    Sharing,
)
from tagmem.domain.state import State


class DeviceExtent(NamedTuple):
    """One extent in the device's own books, in media offsets."""

    ld: int
    region: int
    tag: str
    extent: Extent


def check(state: State) -> None:
    """Everything that can be seen from the orchestrator's own books."""
    for tag in state.capacities:
        check_tag(state, tag)
    for tag in state.attachments:
        if tag not in state.capacities:
            raise InvariantViolated(f"{tag} has attachments and is no capacity")
    check_pools(state)
    check_outbox(state)


def check_tag(state: State, tag: str) -> None:
    """One capacity and its attachments."""
    capacity = state.capacities[tag]
    if total(capacity.extents) != capacity.size_bytes:
        raise InvariantViolated(f"the extents of {tag} do not make up its size")
    records = state.attachments.get(tag, {})
    holders = 0
    for record in records.values():
        if record.state is AttachmentState.RELEASED and not (
            record.gone and (record.proved or record.fenced)
        ):
            raise InvariantViolated(f"{record.key} is released without gone and proof or fence")
        if record.state is AttachmentState.ATTACHED and record.held != capacity.extents:
            raise InvariantViolated(f"{record.key} is attached and does not hold all of it")
        if not covers(normal(capacity.extents), normal(record.held)):
            raise InvariantViolated(f"{record.key} holds what is not the capacity's")
        holders += record.state not in attachments.OVER
    if holders > 1 and capacity.sharing is Sharing.NONE:
        raise InvariantViolated(f"{tag} is on {holders} hosts and not shared")
    if capacity.state in (CapacityState.RESERVED, CapacityState.RETAINED) and holders:
        raise InvariantViolated(f"{tag} is {capacity.state.value} and on {holders} hosts")
    if capacity.state is CapacityState.RETAINED and capacity.reference is not Reference.HELD:
        raise InvariantViolated(f"{tag} is retained without a reference")
    check_sharing(state, capacity)
    if capacity.state is CapacityState.ACTIVE and (capacity.leaving or not holders):
        raise InvariantViolated(f"{tag} is active, and leaving or without a host")


def check_pools(state: State) -> None:
    """No byte of media in two capacities; and total = free + capacities + quarantined."""
    for (appliance, index), pool in state.pools.items():
        taken: list[Extent] = []
        for tag in state.by_appliance.get(appliance, ()):
            capacity = state.capacities[tag]
            if state.region(appliance, capacity.region).pool != index:
                continue
            for extent in capacity.extents:
                if extent.start % pool.block_bytes or extent.length % pool.block_bytes:
                    raise InvariantViolated(f"{extent} of {tag} is not aligned")
                if pool.owner_at(extent.start) != tag:
                    raise InvariantViolated(f"{extent} of {tag} is not in its pool's books")
            taken.extend(capacity.extents)
        pair = overlapping_pair(taken)
        if pair is not None:
            raise InvariantViolated(f"{pair[0]} and {pair[1]} overlap on {appliance}")
        free = normal(pool.free.free_runs())
        if intersect(free, normal(taken)) or intersect(free, pool.quarantined):
            raise InvariantViolated(f"pool {index} of {appliance} lends what is taken")
        used = normal((*taken, *pool.quarantined))
        if total(free) != pool.free.free_bytes or total(taken) != pool.used_bytes:
            raise InvariantViolated(f"pool {index} of {appliance} counts wrongly")
        if total(free) + total(used) != pool.free.size_bytes:
            raise InvariantViolated(f"pool {index} of {appliance} has lost or gained bytes")


def check_outbox(state: State) -> None:
    """Each effect belongs to an attachment that still needs it, and each plan has its effect."""
    for effect in state.outbox.values():
        if isinstance(effect, SetReference):
            _check_reference(state, effect)
            continue
        if not isinstance(effect, InitiateAdd | InitiateRelease | FenceHost):
            raise InvariantViolated(f"{effect} cannot be durable")
        record = state.attachment(effect.tag, effect.host)
        if record is None:
            raise InvariantViolated(f"effect {effect.id} belongs to no attachment")
        if record.state is AttachmentState.RELEASED:
            raise InvariantViolated(f"effect {effect.id} is for {record.key}, which is over")
        if isinstance(effect, InitiateRelease) and not record.fenced:
            raise InvariantViolated(f"effect {effect.id} forces {record.key}, which is not fenced")
    for records in state.attachments.values():
        for record in records.values():
            waits = record.state is AttachmentState.UNKNOWN
            if waits and state.effect_for(InitiateAdd, record.tag, record.host) is None:
                raise InvariantViolated(f"{record.key} is unknown and no effect asks for it")


def _check_reference(state: State, effect: SetReference) -> None:
    capacity = state.capacities.get(effect.tag)
    asked = Reference.SECURING if effect.wanted else Reference.DROPPING
    if capacity is None or capacity.reference is not asked:
        raise InvariantViolated(f"effect {effect.id} is for a reference that nobody asked for")


def check_sharing(state: State, capacity: CapacityRecord) -> None:
    """Who may write: of read-only capacity one host until it is published, and then nobody; of what
    is handed over, the next host only when the last has let go.
    """
    records = state.attachments.get(capacity.tag, {}).values()
    living = [record for record in records if record.state not in attachments.OVER]
    writers = [record for record in living if not record.read_only]
    if capacity.sharing is Sharing.READ_ONLY:
        if capacity.published and writers:
            raise InvariantViolated(f"{writers[0].key} writes what is published")
        wanted = [r for r in writers if r.state in attachments.WANTED]
        able = [r for r in wanted if not moves.held_back(capacity, r.host)]
        if len(able) > 1:
            raise InvariantViolated(f"{capacity.tag} has {len(able)} writers")
    if capacity.published is False and len(writers) < len(living):
        raise InvariantViolated(f"{capacity.tag} is read and not published")
    if capacity.published and capacity.sharing is not Sharing.READ_ONLY:
        raise InvariantViolated(f"{capacity.tag} is published and not read-only")
    move = capacity.moving
    if move is not None and capacity.leaving:
        raise InvariantViolated(f"{capacity.tag} moves, and goes back to the pool")
    if capacity.reference is not Reference.NONE and capacity.sharing is Sharing.NONE:
        raise InvariantViolated(f"{capacity.tag} has a reference and is not shared")


def check_same(one: State, other: State) -> None:
    """Two states are the same; for a state and what its store restores to."""
    for name in ("appliances", "hosts", "capacities", "attachments", "quarantines", "outbox"):
        if getattr(one, name) != getattr(other, name):
            raise InvariantViolated(f"{name} differ from what is kept")
    if list(one.idempotency.values()) != list(other.idempotency.values()):
        raise InvariantViolated("idempotency differs from what is kept")
    if one.pools.keys() != other.pools.keys():
        raise InvariantViolated("pools differ from what is kept")
    for key, pool in one.pools.items():
        same = other.pools[key]
        if pool.owned() != same.owned() or pool.free.runs != same.free.runs:
            raise InvariantViolated(f"free map {key} differs from what is kept")
    if one.next_deadline() != other.next_deadline():
        raise InvariantViolated("the next deadline differs from what is kept")


def check_device(state: State, appliance: str, held: Iterable[DeviceExtent]) -> None:
    """The device's own view: nobody has what another has unless it is shared, and nothing that is
    free here.
    """
    holdings: dict[tuple[int, int], list[tuple[DeviceExtent, Extent]]] = {}
    for one in held:
        pool = state.region(appliance, one.region).pool
        holdings.setdefault((pool, 0), []).append((one, one.extent))
    for (index, _), found in holdings.items():
        found.sort(key=lambda pair: pair[1])
        for (left, a), (right, b) in pairwise(found):
            if b.start < a.end and not _may_share(state, left, right):
                raise InvariantViolated(f"{left} and {right} are held at once")
        free = normal(state.pools[state.appliances[appliance].id, index].free.free_runs())
        for one, extent in found:
            if intersect(free, (extent,)) and _ready(state, appliance):
                raise InvariantViolated(f"{one} is held and counted free")


def _ready(state: State, appliance: str) -> bool:
    return state.appliances[appliance].state.value == "ready"


def _may_share(state: State, one: DeviceExtent, other: DeviceExtent) -> bool:
    if one.tag == NIL_TAG or one.tag != other.tag or one.ld == other.ld:
        return False
    capacity = state.capacities.get(one.tag)
    return capacity is None or capacity.sharing is not Sharing.NONE


def check_settled(state: State, appliance: str, held: Iterable[DeviceExtent]) -> None:
    """After quiescence: whatever the device holds is ours, on the right host, or quarantined."""
    for one in held:
        host = state.ld_hosts.get((appliance, one.ld))
        if _owner(state, appliance, host, one) is not None:
            continue
        foreign = normal(
            extent
            for record in state.quarantines.values()
            if record.appliance == appliance and record.tag == one.tag and record.ld == one.ld
            for extent in record.extents
        )
        if subtract((one.extent,), foreign):
            raise InvariantViolated(f"{one} is neither known here nor quarantined")


def _owner(
    state: State, appliance: str, host: str | None, one: DeviceExtent
) -> CapacityRecord | None:
    for capacity in state.owner_of(appliance, one.extent, one.region):
        record = state.attachment(capacity.tag, host or "")
        named = one.tag == (capacity.tag if capacity.tagged else NIL_TAG)
        if named and record is not None and record.state not in attachments.OVER:
            return capacity
    return None
