"""Records into the documents of API v1: the one place that knows both.

Records keep media offsets; a document shows each host's DPAs beside them. Everything here reads a
`View` of the machine's state and changes nothing, so the same functions serve the API, the
dashboard and the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from tagmem.domain.dpa import to_dpa
from tagmem.domain.effects import CreateCapacity
from tagmem.domain.outcome import Reply
from tagmem.domain.records import (
    ApplianceRecord,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    CapacityState,
    Extent,
    HostRecord,
    Move,
    QuarantineRecord,
    RegionRecord,
)
from tagmem.wire.agentapi import Desired
from tagmem.wire.rest import (
    ApplianceDocument,
    ApplianceMapDocument,
    AttachmentDocument,
    CapacityDocument,
    ExplanationDocument,
    ExtentDocument,
    HolderDocument,
    HostDocument,
    MapPiece,
    MoveDocument,
    PoolMapDocument,
    QuarantineDocument,
    RegionDocument,
    WorkloadDocument,
)

HOLDING = frozenset(
    {
        AttachmentState.OFFERED,
        AttachmentState.ATTACHED,
        AttachmentState.UNKNOWN,
        AttachmentState.RELEASING,
        AttachmentState.FENCING,
    }
)
"""States in which a host has, or may have, the extents."""


class View(Protocol):
    """What documents are made from: the machine's state, to be read only."""

    @property
    def capacities(self) -> Mapping[str, CapacityRecord]: ...

    @property
    def appliances(self) -> Mapping[str, ApplianceRecord]: ...

    @property
    def hosts(self) -> Mapping[str, HostRecord]: ...

    @property
    def quarantine(self) -> Mapping[str, QuarantineRecord]: ...

    def attachment(self, tag: str, host: str) -> AttachmentRecord | None: ...

    def attachments_of(self, tag: str) -> Sequence[AttachmentRecord]:
        """In the order in which the hosts were named."""
        ...

    def tags_on(self, host: str) -> Sequence[str]: ...

    def free_bytes(self, appliance: str, region: int) -> tuple[int, int]:
        """(free, largest free run) of the pool behind a region."""
        ...

    def explain(self, event: CreateCapacity) -> ExplanationDocument | Reply:
        """Where a request would go, and why; a Reply that is not ok for one that can go nowhere
        ever.
        """
        ...

    def desired(self, host: str, tag: str) -> Desired | None:
        """What the host is to reach for one tag; None when there is nothing to tell."""
        ...


def capacity(view: View, record: CapacityRecord) -> CapacityDocument:
    """One capacity with its attachments."""
    return CapacityDocument(
        tag=record.tag,
        size_bytes=record.size_bytes,
        state=record.state.value,
        tagged=record.tagged,
        guaranteed=record.guaranteed,
        sharing=record.sharing.value,
        owner=record.owner,
        appliance=record.appliance,
        region=record.region,
        extents=extents(record.extents),
        attachments=tuple(
            attachment(view, record, held) for held in view.attachments_of(record.tag)
        ),
        created_ns=record.created_ns,
        revision=record.revision,
        fault=record.fault,
        retain=record.retain,
        reference=record.reference.value,
        published=record.published,
        move=None if record.move is None else move(record.move),
    )


def move(record: Move) -> MoveDocument:
    """A hand-over or publication."""
    return MoveDocument(
        record.kind.value,
        record.source,
        record.targets,
        record.step.value,
        record.reason,
        record.began_ns,
        record.ended_ns,
    )


def extents(pieces: Iterable[Extent]) -> tuple[ExtentDocument, ...]:
    """Extents numbered in sequence order."""
    return tuple(
        ExtentDocument(sequence, piece.start, piece.length) for sequence, piece in enumerate(pieces)
    )


def attachment(view: View, held: CapacityRecord, record: AttachmentRecord) -> AttachmentDocument:
    """One capacity on one host."""
    return AttachmentDocument(
        host=record.host,
        state=record.state.value,
        ready=record.ready,
        read_only=record.read_only,
        dax_path=record.dax_path,
        reason=record.reason,
        rung=record.rung,
        holders=tuple(HolderDocument(who.pid, who.name, who.how) for who in record.holders),
        workload=workload(record),
        dpas=dpas(view, held, record),
    )


def workload(record: AttachmentRecord) -> WorkloadDocument | None:
    """What runs on an attachment, as wanted and as last seen."""
    wanted, seen = record.workload, record.workload_status
    if wanted is None:
        return None
    if seen is None or seen.id != wanted.id:
        return WorkloadDocument(wanted.id, wanted.command, "pending", None, None, "", "")
    return WorkloadDocument(
        wanted.id,
        wanted.command,
        seen.state,
        seen.pid or None,
        seen.exit_code,
        seen.reason,
        seen.log_path,
    )


def dpas(view: View, held: CapacityRecord, record: AttachmentRecord) -> tuple[tuple[int, int], ...]:
    """(DPA, length) of each extent for one host; empty until its appliance has been read."""
    appliance = view.appliances.get(record.appliance)
    if appliance is None:
        return ()
    ld = next((each for each in appliance.lds if each.ld == record.ld), None)
    region = region_of(appliance, record.region)
    if ld is None or region is None or region.index >= len(ld.bases):
        return ()
    return tuple((to_dpa(ld, region, piece), piece.length) for piece in held.extents)


def region_of(appliance: ApplianceRecord, index: int) -> RegionRecord | None:
    """The region with an index, or None."""
    return next((region for region in appliance.regions if region.index == index), None)


def appliance(view: View, record: ApplianceRecord) -> ApplianceDocument:
    """One appliance, its regions and the hosts that reach it. Pools are counted once."""
    regions = []
    pools: dict[int, tuple[int, int]] = {}
    for region in record.regions:
        free, largest = view.free_bytes(record.id, region.index)
        pools.setdefault(region.pool, (region.size_bytes, free))
        regions.append(
            RegionDocument(
                index=region.index,
                pool=region.pool,
                size_bytes=region.size_bytes,
                free_bytes=free,
                largest_free_bytes=largest,
                block_bytes=region.block_bytes,
                sharable=region.sharable,
                hardware_coherent=region.hardware_coherent,
                read_only=region.read_only,
                sanitise=region.sanitise,
            )
        )
    return ApplianceDocument(
        id=record.id,
        address=record.address,
        state=record.state.value,
        regions=tuple(regions),
        hosts={
            host.id: host.links[record.id]
            for host in sorted(view.hosts.values(), key=lambda each: each.id)
            if record.id in host.links
        },
        size_bytes=sum(size for size, _ in pools.values()),
        free_bytes=sum(free for _, free in pools.values()),
        fault=record.fault,
    )


def host(view: View, record: HostRecord, *, connected: bool) -> HostDocument:
    """One host."""
    return HostDocument(
        id=record.id,
        connected=connected,
        boot_id=record.boot_id,
        links={str(appliance): ld for appliance, ld in record.links.items()},
        tags=tuple(sorted(view.tags_on(record.id))),
    )


def quarantined(record: QuarantineRecord) -> QuarantineDocument:
    """One thing that this orchestrator did not put where it is."""
    return QuarantineDocument(
        id=record.id,
        appliance=record.appliance,
        ld=record.ld,
        region=record.region,
        tag=record.tag,
        extents=tuple((piece.start, piece.length) for piece in record.extents),
        reason=record.reason,
        found_ns=record.found_ns,
    )


def extent_map(view: View, record: ApplianceRecord) -> ApplianceMapDocument:
    """Every byte of each of an appliance's pools, in order."""
    windows: dict[int, list[RegionRecord]] = {}
    for region in record.regions:
        windows.setdefault(region.pool, []).append(region)
    pool_of = {region.index: region.pool for region in record.regions}
    taken: dict[int, list[MapPiece]] = {pool: [] for pool in windows}
    for kept in view.capacities.values():
        if kept.appliance == record.id and kept.region in pool_of:
            taken[pool_of[kept.region]].extend(_pieces(view, kept))
    for odd in view.quarantine.values():
        if odd.appliance == record.id and odd.region in pool_of:
            taken[pool_of[odd.region]].extend(
                MapPiece(piece.start, piece.length, "quarantined", odd.tag, ())
                for piece in odd.extents
            )
    return ApplianceMapDocument(
        record.id,
        tuple(
            PoolMapDocument(
                pool=pool,
                regions=tuple(region.index for region in regions),
                size_bytes=max(region.size_bytes for region in regions),
                block_bytes=min(region.block_bytes for region in regions),
                pieces=tuple(_whole(taken[pool], max(region.size_bytes for region in regions))),
            )
            for pool, regions in sorted(windows.items())
        ),
    )


def _pieces(view: View, record: CapacityRecord) -> Iterator[MapPiece]:
    state, hosts = _map_state(record, view.attachments_of(record.tag))
    for piece in record.extents:
        yield MapPiece(piece.start, piece.length, state, record.tag, hosts)


def _map_state(
    record: CapacityRecord, attachments: Sequence[AttachmentRecord]
) -> tuple[str, tuple[str, ...]]:
    hosts = tuple(held.host for held in attachments if held.state in HOLDING)
    if record.state is not CapacityState.ACTIVE:
        return record.state.value, hosts
    states = {held.state for held in attachments}
    if AttachmentState.UNKNOWN in states:
        return "unknown", hosts
    if AttachmentState.ATTACHED in states:
        return "accepted", hosts
    if states & {AttachmentState.PLANNED, AttachmentState.OFFERED}:
        return "offered", hosts
    if states & {AttachmentState.RELEASING, AttachmentState.FENCING}:
        return "releasing", hosts
    return "reserved", hosts


def _whole(taken: list[MapPiece], size_bytes: int) -> Iterator[MapPiece]:
    """The pieces in order, free ones between them; of two that overlap the first is shown."""
    at = 0
    for piece in sorted(taken, key=lambda each: each.start):
        end = piece.start + piece.length
        if end <= at:
            continue
        if piece.start > at:
            yield MapPiece(at, piece.start - at, "free", "", ())
        start = max(at, piece.start)
        yield MapPiece(start, end - start, piece.state, piece.tag, piece.hosts)
        at = end
    if at < size_bytes:
        yield MapPiece(at, size_bytes - at, "free", "", ())
