"""What a host is to reach for a tag: derived from the records each time, so that it can be lost
without harm.
"""

from __future__ import annotations

import msgspec

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import Bytes, Dpa, Nanoseconds
from tagmem.domain import attachment as attachments
from tagmem.domain import dpa, ladder
from tagmem.domain.moves import held_back
from tagmem.domain.records import (
    AttachmentRecord,
    CapacityRecord,
    ReleasePlan,
    Sharing,
    WorkloadSpec,
)
from tagmem.domain.state import State


class Desired(msgspec.Struct, frozen=True):
    """The facts of one `wire/agentapi.py: Desired`."""

    host: HostId
    tag: Tag
    revision: int
    released: bool
    """The goal: False is `attached`."""
    appliance: ApplianceId
    ld: int
    region: int
    size_bytes: Bytes
    tagged: bool
    read_only: bool
    extents: tuple[tuple[Dpa, Bytes], ...]
    """In the host's own view, in sequence order; empty while the appliance has not told how it
    addresses them."""
    workload: WorkloadSpec | None
    up_to: str
    """The highest rung that the agent may climb by itself."""
    deadlines_ns: dict[str, Nanoseconds]
    kill_holders: bool
    shared: bool = False
    """Other hosts may have the tag too; their processes are not this host's to answer for."""
    held_back: bool = False
    """To be accepted and not surfaced yet: another host still writes."""
    sharing: Sharing = Sharing.NONE


def desired(state: State, host: str, tag: str) -> Desired | None:
    """What a host is to reach for one tag; None where nothing is wanted of it."""
    record = state.attachment(tag, host)
    if record is None or record.state in attachments.OVER:
        return None
    capacity = state.capacities[tag]
    plan = record.release or ReleasePlan()
    released = record.state in attachments.LEAVING
    return Desired(
        record.host,
        record.tag,
        record.revision,
        released,
        record.appliance,
        record.ld,
        record.region,
        capacity.size_bytes,
        capacity.tagged,
        record.read_only,
        extents_for(state, capacity, record),
        record.workload,
        plan.up_to if ladder.rank(plan.up_to) < ladder.rank("detach") else "detach",
        plan.deadlines_ns,
        released and ladder.rank(record.rung) >= ladder.rank("restart"),
        capacity.sharing is not Sharing.NONE,
        held_back(capacity, host),
        capacity.sharing,
    )


def desired_for(state: State, host: str) -> list[Desired]:
    """All that is wanted of a host, for a full synchronisation."""
    tags = tuple(state.by_host.get(host, ()))
    return [found for tag in tags if (found := desired(state, host, tag)) is not None]


def extents_for(
    state: State, capacity: CapacityRecord, record: AttachmentRecord
) -> tuple[tuple[Dpa, Bytes], ...]:
    """(DPA, length) of each extent in one host's view, in sequence order."""
    ld = state.ld(record.appliance, record.ld)
    if ld is None:
        return ()
    region = state.region(record.appliance, record.region)
    return tuple((dpa.to_dpa(ld, region, extent), extent.length) for extent in capacity.extents)
