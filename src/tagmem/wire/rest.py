"""API v1 documents: the JSON that the orchestrator and its clients share; sizes are in bytes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tagmem.base.limits import COMMAND_ARGUMENTS_MAX, HOSTS_PER_APPLIANCE_MAX

SharingName = Literal["none", "read-only", "hardware-coherent", "software-coherent"]
RungName = Literal["ask", "stop", "detach", "restart", "fence", "force"]
SizeBytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""Bounded by what a database column and a JSON reader in another language can hold."""
Name = Annotated[str, Meta(max_length=63)]
Text = Annotated[str, Meta(max_length=32_768)]
Links = Annotated[
    dict[Name, Annotated[int, Meta(ge=0, le=65_535)]], Meta(max_length=HOSTS_PER_APPLIANCE_MAX)
]


class Document(msgspec.Struct, frozen=True, omit_defaults=False):
    """Base of what the API answers."""


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what clients send; an unknown field is an error, not a guess."""


class CapacityRequest(Body, frozen=True):
    """PUT /v1/capacities/{tag}, or POST /v1/capacities to have a tag chosen."""

    size_bytes: SizeBytes
    hosts: Annotated[tuple[Name, ...], Meta(max_length=HOSTS_PER_APPLIANCE_MAX)] = ()
    tagged: bool = True
    sharing: SharingName = "none"
    owner: Annotated[str, Meta(max_length=256)] = ""
    appliance: Name = ""
    region: Annotated[int, Meta(ge=0, le=255)] | None = None
    contiguous: bool = True
    retain: bool = False
    """Of shared capacity: it outlives its last host."""


class HandOverRequest(Body, frozen=True):
    """POST /v1/capacities/{tag}/hand-over."""

    source: Name = msgspec.field(name="from")
    target: Name = msgspec.field(name="to")


class PublishRequest(Body, frozen=True):
    """POST /v1/capacities/{tag}/publish: who is to read, beside the host that wrote."""

    to: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=HOSTS_PER_APPLIANCE_MAX)]


class AttachmentRequest(Body, frozen=True):
    """PUT /v1/capacities/{tag}/attachments/{host}."""


class WorkloadRequest(Body, frozen=True):
    """POST /v1/capacities/{tag}/attachments/{host}/workload."""

    command: Annotated[tuple[Text, ...], Meta(max_length=COMMAND_ARGUMENTS_MAX)]
    environment: Annotated[dict[str, Text], Meta(max_length=COMMAND_ARGUMENTS_MAX)] = {}
    id: Annotated[str, Meta(max_length=128)] = ""
    """Chosen by the client to make a repeat harmless; empty: the server chooses."""


class ApplianceRequest(Body, frozen=True):
    """PUT /v1/appliances/{id}."""

    address: Annotated[str, Meta(max_length=1024)]
    """`unix:/PATH` of its fabric-manager port."""


class HostRequest(Body, frozen=True):
    """PUT /v1/hosts/{id}: its LD on each appliance that it reaches."""

    links: Links


class ExtentDocument(Document, frozen=True):
    """One extent: where it lies in the pool's media, and its DPA for each attached host."""

    sequence: int
    start: int
    length: int


class HolderDocument(Document, frozen=True):
    pid: int
    name: str
    how: str


class WorkloadDocument(Document, frozen=True):
    id: str
    command: tuple[str, ...]
    state: str
    pid: int | None
    exit_code: int | None
    reason: str
    log_path: str


class AttachmentDocument(Document, frozen=True):
    host: str
    state: str
    ready: bool
    read_only: bool
    dax_path: str
    reason: str
    rung: str
    holders: tuple[HolderDocument, ...]
    workload: WorkloadDocument | None
    dpas: tuple[tuple[int, int], ...]
    """(DPA, length) of each extent in this host's view, in sequence order."""


class MoveDocument(Document, frozen=True):
    """A hand-over or publication, under way or ended.

    `kind` is `hand-over` or `publish`, `step` is `securing`, `offering`, `ending`, `surfacing`,
    `done` or `failed`.
    """

    kind: str
    source: str = msgspec.field(name="from")
    targets: tuple[str, ...] = msgspec.field(name="to")
    step: str
    reason: str
    began_ns: int
    ended_ns: int


class CapacityDocument(Document, frozen=True):
    tag: str
    size_bytes: int
    state: str
    tagged: bool
    guaranteed: bool
    sharing: str
    owner: str
    appliance: str
    region: int
    extents: tuple[ExtentDocument, ...]
    attachments: tuple[AttachmentDocument, ...]
    created_ns: int
    revision: int
    fault: str
    retain: bool = False
    """It is to outlive its last host."""
    reference: str = "none"
    """The fabric manager's reference on it: `none`, `securing`, `held` or `dropping`."""
    published: bool = False
    move: MoveDocument | None = None
    """The hand-over or publication under way, or the last one."""


class RegionDocument(Document, frozen=True):
    index: int
    pool: int
    size_bytes: int
    free_bytes: int
    largest_free_bytes: int
    block_bytes: int
    sharable: bool
    hardware_coherent: bool
    read_only: bool
    sanitise: bool


class ApplianceDocument(Document, frozen=True):
    id: str
    address: str
    state: str
    regions: tuple[RegionDocument, ...]
    hosts: dict[str, int]
    """Host name to LD-ID."""
    size_bytes: int
    free_bytes: int
    fault: str


class MapPiece(Document, frozen=True):
    """One run of the extent map.

    `state` is `free`, `reserved`, `offered`, `accepted`, `releasing`, `sanitising`, `unknown` or
    `quarantined`.
    """

    start: int
    length: int
    state: str
    tag: str
    hosts: tuple[str, ...]


class PoolMapDocument(Document, frozen=True):
    """Every byte of one pool of media, in order; several regions may be windows on it."""

    pool: int
    regions: tuple[int, ...]
    size_bytes: int
    block_bytes: int
    pieces: tuple[MapPiece, ...]


class ApplianceMapDocument(Document, frozen=True):
    """GET /v1/appliances/{id}/map."""

    appliance: str
    pools: tuple[PoolMapDocument, ...]


class HostDocument(Document, frozen=True):
    id: str
    connected: bool
    boot_id: str
    links: dict[str, int]
    tags: tuple[str, ...]


class QuarantineDocument(Document, frozen=True):
    id: str
    appliance: str
    ld: int | None
    region: int
    tag: str
    extents: tuple[tuple[int, int], ...]
    reason: str
    found_ns: int


class CandidateDocument(Document, frozen=True):
    """Why one region was or was not chosen."""

    appliance: str
    region: int
    verdict: str
    """`chosen`, `fits`, or the reason it does not."""
    free_bytes: int
    largest_free_bytes: int


class ExplanationDocument(Document, frozen=True):
    """POST /v1/explain: where a request would go, and why."""

    fits: bool
    sentence: str
    candidates: tuple[CandidateDocument, ...]
    extents: tuple[ExtentDocument, ...] = ()


class EventDocument(Document, frozen=True):
    """One entry of GET /v1/events (CloudEvents 1.0 names where they fit); `id` resumes a stream."""

    id: int
    time_ns: int
    type: str
    subject: str
    data: dict[str, Any]


class CapacityPage(Document, frozen=True):
    """GET /v1/capacities, in the order of their tags.

    `next` is the `after` of the following page; null on the last.
    """

    items: tuple[CapacityDocument, ...]
    next: str | None


class ApplianceList(Document, frozen=True):
    """GET /v1/appliances."""

    items: tuple[ApplianceDocument, ...]


class HostList(Document, frozen=True):
    """GET /v1/hosts."""

    items: tuple[HostDocument, ...]


class QuarantineList(Document, frozen=True):
    """GET /v1/quarantine: what lies on appliances and was not put there by this orchestrator."""

    items: tuple[QuarantineDocument, ...]


class EventPage(Document, frozen=True):
    """GET /v1/events as JSON.

    `next` is the `after` of the following page, `last` the newest event there is.
    """

    items: tuple[EventDocument, ...]
    next: int
    last: int


class HealthDocument(Document, frozen=True):
    """GET /v1/health. `status` is `ok`, or `degraded` while an appliance is in doubt or lost."""

    status: Literal["ok", "degraded"]
    version: str
    started_ns: int
    capacities: int
    quarantined: int
    appliances: dict[str, str]
    """Appliance name to its state."""
    hosts: int
    hosts_connected: int
    events_waiting: int


class Problem(Document, frozen=True):
    """RFC 9457 `application/problem+json`, plus the outcome's stable code and the offending field.

    `transient` says whether the same request may succeed later.
    """

    type: str
    title: str
    status: int
    detail: str
    code: int
    outcome: str
    field: str = ""
    limit: str = ""
    value: str = ""
    transient: bool = False
