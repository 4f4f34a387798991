"""What the orchestrator remembers, one frozen record per thing; each is one row of the store.

A record is replaced, never changed. Extents are kept in *media offsets* (the same for every host of
a pool); a host's DPAs are derived from them at the border, because DPAs differ from host to host.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import Bytes, Dpa, MediaOffset, Nanoseconds


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of everything that the store keeps."""


class Extent(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """`length` bytes of one pool's media from `start`; both multiples of the block size."""

    start: MediaOffset
    length: Bytes

    @property
    def end(self) -> int:
        """The first offset behind the extent."""
        return self.start + self.length


class Sharing(Enum):
    """How a capacity may be seen by several hosts."""

    NONE = "none"
    READ_ONLY = "read-only"
    HARDWARE_COHERENT = "hardware-coherent"
    SOFTWARE_COHERENT = "software-coherent"


class ApplianceState(Enum):
    """How far the orchestrator's picture of an appliance can be trusted."""

    DOUBT = "doubt"
    """Not read since the last connection or a missing answer: nothing there may be freed or
    granted.
    """
    READY = "ready"
    LOST = "lost"


class RegionRecord(Record, frozen=True):
    """One DC region as the FM sees it (5601h), plus which pool of media it is a window on."""

    index: int
    pool: int
    size_bytes: Bytes
    block_bytes: Bytes
    sharable: bool = False
    hardware_coherent: bool = False
    read_only: bool = False
    sanitise: bool = True


class LdRecord(Record, frozen=True):
    """How one LD addresses the pools: the DPA of each region's start, and in which order it sees
    them.
    """

    ld: int
    bases: tuple[Dpa, ...]
    mirrored: bool = False
    """False: DPA = base + media offset. True: DPA = base + region size - media offset - length."""


class ApplianceRecord(Record, frozen=True):
    """A registered appliance."""

    id: ApplianceId
    address: str
    state: ApplianceState
    regions: tuple[RegionRecord, ...] = ()
    lds: tuple[LdRecord, ...] = ()
    registered_ns: Nanoseconds = 0
    fault: str = ""


class HostRecord(Record, frozen=True):
    """A registered host, and the LD under which each appliance knows it."""

    id: HostId
    links: dict[ApplianceId, int]
    registered_ns: Nanoseconds = 0
    boot_id: str = ""
    """Changes when the host's agent has lost what it held (a restart of the host)."""


class CapacityState(Enum):
    """Where a capacity is in its life."""

    RESERVED = "reserved"
    """Extents are set aside; no host has been offered them."""
    ACTIVE = "active"
    RETAINED = "retained"
    """No host has it; its bytes are kept, because the fabric manager holds a reference (5606h)."""
    RELEASING = "releasing"
    SANITISING = "sanitising"
    QUARANTINED = "quarantined"
    """Not usable and not free: sanitising failed, or the appliance disagrees. A person decides."""


RUNGS: tuple[str, ...] = ("ask", "stop", "detach", "restart", "fence", "force")
"""The release ladder, mildest first (design rule 6)."""


class ReleasePlan(Record, frozen=True):
    """How far a release may climb, and how long each rung may take (nanoseconds, by rung name)."""

    up_to: str = "detach"
    deadlines_ns: dict[str, Nanoseconds] = {}


class Reference(Enum):
    """The fabric manager's own reference on a sharable tag (5606h), so that it outlives its hosts.

    Between asking and knowing nothing may be concluded from what hosts give back: with a reference
    the bytes stay, without one they are wiped. Only an answer or the appliance's lists decide.
    """

    NONE = "none"
    SECURING = "securing"
    """Asked for (5606h)."""
    HELD = "held"
    DROPPING = "dropping"
    """Given up (5607h); what that led to has to be read from the appliance's lists."""


class MoveKind(Enum):
    """What takes a capacity from one host to others with its contents."""

    HAND_OVER = "hand-over"
    PUBLISH = "publish"


class MoveStep(Enum):
    """How far a move is. `domain/moves.py` has the order of each kind."""

    SECURING = "securing"
    """Until the fabric manager holds a reference nothing else begins."""
    OFFERING = "offering"
    """The next hosts are being offered it."""
    ENDING = "ending"
    """The present host is giving it back."""
    SURFACING = "surfacing"
    """The present host has let go; the next one makes its device."""
    DONE = "done"
    FAILED = "failed"


class Move(Record, frozen=True):
    """An intent of several steps, kept until the next one so that its end can be read."""

    kind: MoveKind
    source: str
    """The host that lets go; empty for retained capacity, which nobody has."""
    targets: tuple[HostId, ...]
    step: MoveStep
    plan: ReleasePlan
    """How far the release of the source may climb."""
    began_ns: Nanoseconds
    ended_ns: Nanoseconds = 0
    reason: str = ""
    """Why it failed, or who of several did not take it."""

    @property
    def active(self) -> bool:
        """Whether it is under way."""
        return self.step not in (MoveStep.DONE, MoveStep.FAILED)


class CapacityRecord(Record, frozen=True):
    """What a user asked for and holds."""

    tag: Tag
    size_bytes: Bytes
    tagged: bool
    """False: the device knows these extents by the nil tag; `tag` is then only the API's handle."""
    sharing: Sharing
    hosts: tuple[HostId, ...]
    """The hosts asked for, in order; empty for a reservation."""
    appliance: ApplianceId
    region: int
    extents: tuple[Extent, ...]
    """In sequence order: byte 0 of the tag is byte 0 of the first."""
    state: CapacityState
    revision: int
    """Grows with every change of the capacity or its attachments; the ETag."""
    owner: str = ""
    created_ns: Nanoseconds = 0
    contiguous: bool = True
    leaving: bool = False
    """The owner wants it back in the pool."""
    sanitise_deadline_ns: Nanoseconds = 0
    """When sanitising has taken too long; 0 while none is awaited."""
    request_digest: str = ""
    """Of the creating request, so that a repeated PUT is told apart from a conflicting one."""
    fault: str = ""
    retain: bool = False
    """The owner wants it to outlive its last host."""
    reference: Reference = Reference.NONE
    published: bool = False
    """Of read-only sharing: loaded and closed. Whoever has it now reads, and nobody writes."""
    move: Move | None = None
    """The hand-over or publication under way, or the last one."""

    @property
    def moving(self) -> Move | None:
        """The move that is under way."""
        return self.move if self.move is not None and self.move.active else None

    @property
    def guaranteed(self) -> bool:
        """Whether its return is guaranteed: never for untagged memory (rule 8)."""
        return self.tagged


class AttachmentState(Enum):
    """One capacity on one host, as the orchestrator knows it. `domain/attachment.py` has the
    machine.
    """

    PLANNED = "planned"
    """Committed; the add is in the outbox."""
    OFFERED = "offered"
    """The appliance has started the add; the host has not answered."""
    ATTACHED = "attached"
    """The appliance's own list shows the host as holder."""
    REFUSED = "refused"
    """The host answered no (`reason`); it holds nothing."""
    UNKNOWN = "unknown"
    """An answer is missing; nothing may be concluded until the appliance's lists have been read."""
    RELEASING = "releasing"
    FENCING = "fencing"
    """Forced release is on its way."""
    RELEASED = "released"
    """Gone from the appliance's list, and proved unused by the host or fenced."""


class WorkloadSpec(Record, frozen=True):
    """What to run on a tag. `{dax}`, `{tag}` and `{size}` in arguments and environment are filled
    in by the host.
    """

    id: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}
    stop: bool = False
    """The workload is wanted stopped (its status stays to be read)."""


class WorkloadStatus(Record, frozen=True):
    """What the host last said about a workload: state is `pending`, `running`, `exited` or
    `failed`.
    """

    id: str
    state: str
    pid: int = 0
    exit_code: int | None = None
    reason: str = ""
    log_path: str = ""


class Holder(Record, frozen=True):
    """A process that keeps a tag from being given back: it maps it, or has it open."""

    pid: int
    name: str
    how: str
    """`maps` or `open`."""


class AttachmentRecord(Record, frozen=True):
    """One capacity on one host. Key: `tag/host`."""

    tag: Tag
    host: HostId
    appliance: ApplianceId
    ld: int
    region: int
    state: AttachmentState
    revision: int
    """Of what is wanted; the agent's observations quote it."""
    read_only: bool = False
    ready: bool = False
    """The host's agent has surfaced the DAX device."""
    dax_path: str = ""
    reason: str = ""
    workload: WorkloadSpec | None = None
    workload_status: WorkloadStatus | None = None
    release: ReleasePlan | None = None
    rung: str = ""
    rung_deadline_ns: Nanoseconds = 0
    holders: tuple[Holder, ...] = ()
    gone: bool = False
    """The appliance has said that this host no longer has the extents."""
    proved: bool = False
    """The host has proved that nothing maps or holds them."""
    fenced: bool = False
    held: tuple[Extent, ...] = ()
    """What the host took and the appliance has not yet reported back; empty again when that media
    is clean or another host's alone.
    """

    @property
    def key(self) -> str:
        """The record's key in the store."""
        return f"{self.tag}/{self.host}"


class QuarantineRecord(Record, frozen=True):
    """Something on an appliance that this orchestrator did not put there. Shown, never guessed
    about.
    """

    id: str
    appliance: ApplianceId
    ld: int | None
    region: int
    tag: Tag
    extents: tuple[Extent, ...]
    reason: str
    found_ns: Nanoseconds = 0


class IdempotencyRecord(Record, frozen=True):
    """The answer given under an `Idempotency-Key`, so that a repeat gets the same one."""

    key: str
    digest: str
    outcome: int
    subject: str
    at_ns: Nanoseconds = 0


KINDS: dict[str, type[Record]] = {
    "appliance": ApplianceRecord,
    "host": HostRecord,
    "capacity": CapacityRecord,
    "attachment": AttachmentRecord,
    "quarantine": QuarantineRecord,
    "idempotency": IdempotencyRecord,
}
"""The orchestrator's record kinds, by the name of their table."""
