"""What a device is told, what it remembers and what it answers: the words of `device`, free of
bytes.

Kept apart from the rules so that the store, the dispatcher and the tests can name them without the
rules. Addresses here are of two kinds: *media offsets* (in a pool, the same for every host) inside
records, and *DPAs* (of one LD) in commands and event records, because that is what hosts and fabric
managers speak.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import Bytes, Dpa, MediaOffset, Nanoseconds
from tagmem.ports import Effect, Event

FM_PORT = -1
"""The fabric manager's port, where a host's is its LD-ID."""
DC_LOG = 4
"""The dynamic capacity event log (CXL r3.1 8.2.9.2); logs 0 to 3 exist and stay empty here."""


class Code(IntEnum):
    """CXL return codes that a device's rules give (CXL r3.1 table 8-34); the wire has the full
    list.
    """

    SUCCESS = 0x00
    INVALID_INPUT = 0x02
    UNSUPPORTED = 0x03
    INTERNAL_ERROR = 0x04
    RETRY_REQUIRED = 0x05
    BUSY = 0x06
    INVALID_HANDLE = 0x0E
    INVALID_PHYSICAL_ADDRESS = 0x0F
    RESOURCES_EXHAUSTED = 0x1D
    INVALID_EXTENT_LIST = 0x1E


class Policy(IntEnum):
    """Selection policy of 5604h."""

    FREE = 0
    CONTIGUOUS = 1
    PRESCRIPTIVE = 2
    ENABLE_SHARED = 3


class Removal(IntEnum):
    """Removal policy of 5605h."""

    TAG_BASED = 0
    PRESCRIPTIVE = 1


class EventType(IntEnum):
    """Kind of a dynamic capacity record; 0 to 3 go to hosts, 4 and 5 to the fabric manager."""

    ADD = 0
    RELEASE = 1
    FORCED_RELEASE = 2
    REGION_UPDATED = 3
    ADD_RESPONSE = 4
    RELEASED = 5


# ---- what the device is


class RegionSpec(msgspec.Struct, frozen=True):
    """One DC region of every LD, as configured. Regions with one `pool` are windows on the same
    media.
    """

    pool: int
    size_bytes: Bytes
    block_bytes: Bytes
    sharable: bool = False
    hardware_coherent: bool = False
    read_only: bool = False
    sanitise: bool = True


class LdSpec(msgspec.Struct, frozen=True):
    """One LD, which is one head and one host. Its number is its place in the device's list."""

    name: str
    mirrored: bool = False
    """DPA = base + size - media offset - length, so that hosts see other addresses in another
    order.
    """
    log_records: int = 1024


class DeviceSpec(msgspec.Struct, frozen=True):
    """A whole device."""

    regions: tuple[RegionSpec, ...]
    lds: tuple[LdSpec, ...]
    extents_max: int = 262_144
    """Extents the device can track: pending, added and FM-referenced together."""
    tags_max: int = 65_536
    fm_log_records: int = 1024


# ---- what it remembers: one row each


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of the device's rows."""


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`length` bytes of a pool from `start`; `at` is where they stand in the allocation's own
    bytes.
    """

    start: MediaOffset
    length: Bytes
    at: int

    @property
    def end(self) -> int:
        """The first media offset behind the piece."""
        return self.start + self.length


class Holder(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One LD that an allocation is offered to (pending) or has been added to."""

    ld: int
    region: int
    pending: bool = True
    fenced: bool = False
    """The host's way to the bytes was taken away (C003h) and is not to be made again."""


class AllocState(IntEnum):
    """Where an allocation is in its life."""

    LIVE = 0
    SANITISING = 1
    FAILED = 2
    """Could not be sanitised: its blocks are never given out again."""


class Allocation(Row, frozen=True):
    """Media that belongs to one tag (or one untagged add), until it is free again. Key: `id`."""

    id: int
    """Never reused."""
    serial: int
    """Of its last change; device-wide and growing."""
    tag: Tag
    pool: int
    region: int
    """Through which it was first added."""
    pieces: tuple[Piece, ...]
    """In sequence order: the number of a piece is its shared extent sequence number."""
    file: str
    """Names its bytes in the media."""
    sharable: bool = False
    holders: tuple[Holder, ...] = ()
    referenced: bool = False
    """The fabric manager holds a reference (5606h)."""
    touched: bool = False
    """Some host has had it, so its bytes may not be zero."""
    sanitise: bool = False
    state: AllocState = AllocState.LIVE
    part: bool = False
    """Was split from a tag that lives on, so its file stays."""
    forced: bool = False
    last: tuple[int, int] = (0, 0)
    """(LD, region) of the last holder, for the final record to the fabric manager."""
    attempts: int = 0
    effect: int = 0
    """Outbox id of the sanitising under way; 0: to be started (again) at `retry_ns`."""
    retry_ns: Nanoseconds = 0
    fault: str = ""

    @property
    def size_bytes(self) -> Bytes:
        """All pieces together."""
        return sum(piece.length for piece in self.pieces)

    def holder(self, ld: int) -> Holder | None:
        """The entry of one LD."""
        for holder in self.holders:
            if holder.ld == ld:
                return holder
        return None


class Item(msgspec.Struct, frozen=True, array_like=True):
    """What one group offers of one allocation. Apart from it because a dead item outlives it."""

    allocation: int
    region: int
    tag: Tag
    sharable: bool
    pieces: tuple[Piece, ...]
    dead: bool = False
    """Released by force before it was answered: the answer is consumed and grants nothing."""


class Group(Row, frozen=True):
    """One set of extents offered together, awaiting its one answer. Key: `ld/seq`."""

    ld: int
    seq: int
    items: tuple[Item, ...]


class LdRow(Row, frozen=True):
    """What an LD's extent list is numbered with. Key: the LD."""

    ld: int
    generation: int
    serial: int


class PortRow(Row, frozen=True):
    """An event log's memory between records. Key: the port."""

    port: int
    next_seq: int = 0
    overflow_count: int = 0
    overflow_first_ns: Nanoseconds = 0
    overflow_last_ns: Nanoseconds = 0
    policy: bytes = b""
    """Set Event Interrupt Policy as written; empty: never set, and then notifications are on."""


class DcEvent(Row, frozen=True):
    """One dynamic capacity event record in a port's log. Key: `port/seq`."""

    port: int
    seq: int
    type: EventType
    at_ns: Nanoseconds
    ld: int = 0
    region: int = 0
    more: bool = False
    start: Dpa = Dpa(0)
    length: Bytes = 0
    tag: Tag = NIL_TAG
    sequence: int = 0
    extents_available: int = 0
    tags_available: int = 0

    @property
    def handle(self) -> int:
        """The record's 16-bit handle, never 0."""
        return self.seq % 0xFFFF + 1


class RegionRow(Row, frozen=True):
    """A region as 5602h left it. Key: its number."""

    region: int
    block_bytes: Bytes
    sanitise: bool


class SpecRow(Row, frozen=True):
    """The configuration that the other rows were made under. Key: `spec`."""

    spec: DeviceSpec
    media: str = ""
    """Incarnation of the media; another one than ours means that the bytes are gone."""


class SanitiseMethod(IntEnum):
    """How media were made to read zero (C001h)."""

    OVERWRITE = 0
    PUNCH = 1


class WipedRow(Row, frozen=True):
    """The last sanitising of a tag. Key: a slot of a ring, so that these stay bounded."""

    slot: int
    serial: int
    tag: Tag
    method: SanitiseMethod
    sanitised_bytes: Bytes
    read_back_bytes: Bytes
    finished_ns: Nanoseconds


KINDS: dict[str, type[Row]] = {
    "allocation": Allocation,
    "group": Group,
    "ld": LdRow,
    "port": PortRow,
    "event": DcEvent,
    "region": RegionRow,
    "spec": SpecRow,
    "wiped": WipedRow,
}
"""The device's row kinds, by the name of their table."""


# ---- what it is told


class AskedExtent(msgspec.Struct, frozen=True, gc=False):
    """An extent in a command: addresses of the LD that the command names."""

    start: Dpa
    length: Bytes
    tag: Tag = NIL_TAG
    sequence: int = 0


class Range(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """A DPA range in a host's answer."""

    start: Dpa
    length: Bytes


class Add(Event, frozen=True):
    """Initiate Dynamic Capacity Add (5604h). Reply: Answer."""

    ld: int
    policy: int
    region: int = 0
    length: Bytes = 0
    tag: Tag = NIL_TAG
    extents: tuple[AskedExtent, ...] = ()


class Release(Event, frozen=True):
    """Initiate Dynamic Capacity Release (5605h). Reply: Answer."""

    ld: int
    policy: int
    forced: bool = False
    sanitise: bool = False
    length: Bytes = 0
    tag: Tag = NIL_TAG
    extents: tuple[AskedExtent, ...] = ()


class AddReference(Event, frozen=True):
    """Dynamic Capacity Add Reference (5606h). Reply: Answer."""

    tag: Tag


class RemoveReference(Event, frozen=True):
    """Dynamic Capacity Remove Reference (5607h). Reply: Answer."""

    tag: Tag


class SetRegionConfig(Event, frozen=True):
    """Set DC Region Configuration (5602h). Reply: Answer."""

    region: int
    block_bytes: Bytes
    sanitise: bool


class Respond(Event, frozen=True):
    """Add Dynamic Capacity Response (4802h). Reply: Answer."""

    ld: int
    ranges: tuple[Range, ...]
    more: bool = False


class HostRelease(Event, frozen=True):
    """Release Dynamic Capacity (4803h). Reply: Answer."""

    ld: int
    ranges: tuple[Range, ...]
    more: bool = False


class ClearEvents(Event, frozen=True):
    """Clear Event Records (0101h). Reply: Answer."""

    port: int
    log: int
    handles: tuple[int, ...] = ()
    clear_all: bool = False


class SetInterruptPolicy(Event, frozen=True):
    """Set Event Interrupt Policy (0103h). Reply: Answer."""

    port: int
    policy: bytes


class Fence(Event, frozen=True):
    """Take a host's way to capacity (C003h). Reply: Answer whose value is the FencePlan to carry
    out.
    """

    ld: int
    tag: Tag = NIL_TAG
    start: Dpa = Dpa(0)
    length: Bytes = 0


class Query(Event, frozen=True):
    """A question about the device as it is when everything before it is durable. Reply: Answer."""

    name: str
    args: tuple[int | str, ...] = ()


class SessionStarted(Event, frozen=True):
    """A host's (or the FM's) new session: half-sent answers of the old one are void."""

    port: int


class SanitiseDone(Event, frozen=True):
    """Media read back as zero."""

    effect_id: int
    allocation: int
    method: SanitiseMethod
    sanitised_bytes: Bytes
    read_back_bytes: Bytes


class SanitiseFailed(Event, frozen=True):
    """Media could not be made to read zero."""

    effect_id: int
    allocation: int
    reason: str


class HeadReset(Event, frozen=True):
    """A conventional reset of one head: its shared capacity is lost to all who share it, without an
    event.
    """

    ld: int


class MediaLost(Event, frozen=True):
    """The bytes are gone (a reboot of the machine that has them): start empty on new media."""

    media: str


class Adopt(Event, frozen=True):
    """First start, or a new configuration while nothing is allocated."""

    media: str


# ---- what it wants done


class Sanitise(Effect, frozen=True):
    """Make the bytes read zero, prove it, and give them up; the result comes back as an event."""

    allocation: int
    file: str
    pool: int
    pieces: tuple[Piece, ...]
    part: bool = False
    forced: bool = False


class Expose(Effect, frozen=True):
    """Let a host reach the bytes of an accepted allocation. Derived again from the rows after a
    restart.
    """

    durable = False

    ld: int
    region: int
    file: str
    pool: int
    pieces: tuple[Piece, ...]


class Conceal(Effect, frozen=True):
    """Take a host's way to the bytes. What a crash leaves undone, the shell finds by comparing
    directories.
    """

    durable = False

    ld: int
    file: str


class Drop(Effect, frozen=True):
    """Remove bytes that need no sanitising. What a crash leaves undone, the shell finds by
    comparing files.
    """

    durable = False

    file: str
    pool: int


class Notify(Effect, frozen=True):
    """An event log is no longer empty."""

    durable = False

    port: int


DurableEffect = Sanitise
"""What the outbox can hold, for its decoder."""


# ---- what it answers


class Answer(msgspec.Struct, frozen=True):
    """A command's return code and value; an error's `reason` is for the log of the device."""

    code: Code
    value: object = None
    reason: str = ""


OK = Answer(Code.SUCCESS)


class FencePlan(msgspec.Struct, frozen=True):
    """What C003h has to make sure of: nothing of `ld` reaches these bytes."""

    ld: int
    file: str
    pool: int
    pieces: tuple[Piece, ...]
    shared: bool
    """Others hold it rightfully, so its bytes must stay."""


class HeldExtent(msgspec.Struct, frozen=True, gc=False):
    """An extent of an LD's list (4801h, 5603h)."""

    start: Dpa
    length: Bytes
    tag: Tag
    sequence: int


class ExtentPage(msgspec.Struct, frozen=True):
    """Part of an LD's list."""

    total: int
    generation: int
    extents: tuple[HeldExtent, ...]


class RegionInfo(msgspec.Struct, frozen=True):
    """A region as one LD sees it."""

    index: int
    base: Dpa
    decode_bytes: Bytes
    size_bytes: Bytes
    block_bytes: Bytes
    block_sizes: int
    """Bit n: blocks of 2^n bytes can be set."""
    pool: int
    sharable: bool
    hardware_coherent: bool
    read_only: bool
    sanitise: bool


class Counts(msgspec.Struct, frozen=True):
    """What the device can track, and how much of that is left."""

    extents: int
    extents_available: int
    tags: int
    tags_available: int


class Configuration(msgspec.Struct, frozen=True):
    """Regions and counts (4800h, 5601h)."""

    regions: tuple[RegionInfo, ...]
    counts: Counts


class LogPage(msgspec.Struct, frozen=True):
    """The oldest records of a log (0100h)."""

    records: tuple[DcEvent, ...]
    more: bool
    overflow_count: int = 0
    overflow_first_ns: Nanoseconds = 0
    overflow_last_ns: Nanoseconds = 0


class TagEntry(msgspec.Struct, frozen=True):
    """One tag and who has it (5608h)."""

    tag: Tag
    referenced: bool
    added: tuple[int, ...]
    pending: tuple[int, ...]


class TagPage(msgspec.Struct, frozen=True):
    """Part of the list of tags."""

    generation: int
    total: int
    entries: tuple[TagEntry, ...]


class SanitiseReport(msgspec.Struct, frozen=True):
    """What is known of a tag's sanitising (C001h). 0 nothing, 1 running, 2 done, 3 failed."""

    state: int
    method: SanitiseMethod = SanitiseMethod.PUNCH
    sanitised_bytes: Bytes = 0
    read_back_bytes: Bytes = 0
    finished_ns: Nanoseconds = 0


class MediaView(msgspec.Struct, frozen=True):
    """Where the bytes of an accepted tag are (C000h)."""

    file: str
    pool: int
    pieces: tuple[Piece, ...]
    read_only: bool
