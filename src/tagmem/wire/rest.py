"""API v1 documents: the JSON that the orchestrator and its clients share. Sizes are integers of bytes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Document(msgspec.Struct, frozen=True, omit_defaults=False):
    """Base of what the API answers."""


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what clients send; an unknown field is an error, not a guess."""


class CapacityRequest(Body, frozen=True):
    """PUT /v1/capacities/{tag}, or POST /v1/capacities to have a tag chosen."""

    size_bytes: int
    hosts: tuple[str, ...] = ()
    tagged: bool = True
    sharing: Literal["none", "read-only", "hardware-coherent", "software-coherent"] = "none"
    owner: str = ""
    appliance: str = ""
    region: int | None = None
    contiguous: bool = True


class AttachmentRequest(Body, frozen=True):
    """PUT /v1/capacities/{tag}/attachments/{host}."""


class WorkloadRequest(Body, frozen=True):
    """POST /v1/capacities/{tag}/attachments/{host}/workload."""

    command: tuple[str, ...]
    environment: dict[str, str] = {}
    id: str = ""
    """Chosen by the client to make a repeat harmless; empty: the server chooses."""


class ApplianceRequest(Body, frozen=True):
    """PUT /v1/appliances/{id}."""

    address: str


class HostRequest(Body, frozen=True):
    """PUT /v1/hosts/{id}."""

    links: dict[str, int]


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
    """One run of the extent map: state is `free`, `offered`, `accepted`, `releasing`, `sanitising`, `unknown`, `quarantined`."""

    start: int
    length: int
    state: str
    tag: str
    hosts: tuple[str, ...]


class RegionMapDocument(Document, frozen=True):
    """GET /v1/appliances/{id}/map: every byte of each pool, in order."""

    region: int
    size_bytes: int
    block_bytes: int
    pieces: tuple[MapPiece, ...]


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


class Problem(Document, frozen=True):
    """RFC 9457 `application/problem+json`, plus the outcome's stable code and the offending field."""

    type: str
    title: str
    status: int
    detail: str
    code: int
    outcome: str
    field: str = ""
    limit: str = ""
    value: str = ""
