"""Drives a CXL device with dynamic capacity from user space, where the guest's kernel cannot: every
register that is read or written, and nothing that reads or writes one.

Each operation is a generator of accesses: it yields Read, Write or Pause and is sent what was read
(`mmio.perform` carries that out; tests send what a simulated device says). Widths matter: QEMU ends
with an assertion when a byte is written into the mailbox, and ignores two halves of a command.

Written for what QEMU does (facts beside the clauses) as well as for what the specification says:
records of an offer stay in the log until it is answered, so that a driver that dies in between
finds it again; 4802h is never sent while nothing is pending, for that ends QEMU; tags are believed
when there are any, and otherwise come from the host, by address.

The structures are packed with `struct`, because the guest has no msgspec; a test compares each with
the golden vectors of `wire`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from itertools import pairwise
from struct import Struct, error, unpack_from
from typing import Any, NamedTuple, TypeVar

from tagmem.base.errors import Conflict, InvalidInput, RemoteError, Unsupported
from tagmem.base.ids import NIL_TAG, Tag, tag_from_bytes

GET_EVENTS, CLEAR_EVENTS = 0x0100, 0x0101
GET_CONFIGURATION, GET_EXTENTS, ADD_RESPONSE, RELEASE = 0x4800, 0x4801, 0x4802, 0x4803
_INVALID_PHYSICAL_ADDRESS = 0x0F
DC_LOG = 4
DC_RECORD_UUID = bytes.fromhex("ca95afa7f18340188c2f95268e101a2a")
ADD, ASK_RELEASE, FORCED_RELEASE, REGION_UPDATED = range(4)

COMPONENT_BLOCK, DEVICE_BLOCK = 1, 3
STATUS_CAPABILITY, MAILBOX_CAPABILITY, MEMDEV_CAPABILITY = 1, 2, 0x4000
HDM_CAPABILITY = 5
DECODER_UNIT_BYTES = 256 << 20
ALIGN_BYTES = 2 << 20
"""Linux refuses smaller extents."""

POLL_SECONDS = 0.001
COMMAND_POLLS_MAX = 2_000
"""Two seconds, as Linux gives a command."""
BACKGROUND_POLLS_MAX = 60_000
COMMIT_POLLS_MAX = 20
EXTENTS_MAX = 65_536
ROUNDS_MAX = 64
RECORDS_KEPT_MAX = 4
"""Of QEMU's eight records."""
_CAPABILITIES_MAX = 64
_DECODERS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
"""By the encoding of the HDM decoder capability."""

T = TypeVar("T")


class Read(NamedTuple):
    """Read `width` bytes at once; the value is sent back."""

    space: str
    offset: int
    width: int


class Write(NamedTuple):
    """Write `width` bytes at once."""

    space: str
    offset: int
    width: int
    value: int


class Pause(NamedTuple):
    """Wait at least this long."""

    seconds: float


Steps = Generator[Read | Write | Pause, int, T]


class CommandFailed(RemoteError):
    """The device answered a mailbox command with an error."""


# ---- structures: (format, fields), little-endian; offsets follow from the format


class Layout:
    """One structure of the specification."""

    def __init__(self, fmt: str, *names: str) -> None:
        self._struct = Struct("<" + fmt)
        self._names = names
        self.size = self._struct.size

    def pack(self, **fields: Any) -> bytes:
        """The bytes; what is not given is zero."""
        return self._struct.pack(*(fields.get(name, 0) for name in self._names))

    def unpack(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """The fields. Raises Unsupported when the device sent too little."""
        try:
            values = self._struct.unpack_from(data, offset)
        except error:
            raise Unsupported(
                f"the device sent {len(data)} bytes, where {offset + self.size} are needed"
            ) from None
        return dict(zip(self._names, values, strict=True))


LAYOUTS = {
    "extent": Layout("QQ16sH6x", "start_dpa", "length_bytes", "tag", "sequence"),
    "updated": Layout("QQ8x", "start_dpa", "length_bytes"),
    "list": Layout("IB3x", "count", "flags"),
    "get-extents": Layout("II", "wanted", "first"),
    "extents": Layout("III4x", "returned", "total", "generation"),
    "get-configuration": Layout("BB", "wanted", "first"),
    "configuration": Layout("BB6x", "available", "returned"),
    "region": Layout("QQQQIB3x", "base", "decode_units", "length", "block", "dsmad", "flags"),
    "counts": Layout("IIII", "extents", "extents_available", "tags", "tags_available"),
    "get-events": Layout("B", "log"),
    "events": Layout("BxHQQH10x", "flags", "lost", "first_ns", "last_ns", "count"),
    "clear-events": Layout("BBB3x", "log", "flags", "count"),
    "record": Layout(
        "16sB3sH26xBBHBB2x40s24xII",
        "uuid",
        "length",
        "flags",
        "handle",
        "type",
        "validity",
        "host",
        "region",
        "dc_flags",
        "extent",
        "extents_available",
        "tags_available",
    ),
}


class Extent(NamedTuple):
    """A piece of capacity, in this device's addresses."""

    dpa: int
    length: int
    tag: Tag = NIL_TAG
    sequence: int = 0


class Region(NamedTuple):
    """A DC region."""

    base: int
    decode_length: int
    length: int
    block: int


class Offer(NamedTuple):
    """A group of added extents, to be answered once. Not `whole`: its end was lost, so that it can
    only be refused.
    """

    number: int
    extents: tuple[Extent, ...]
    whole: bool = True


class ReleaseAsked(NamedTuple):
    """The device wants these back; `forced`: it has taken them already."""

    extents: tuple[Extent, ...]
    forced: bool = False


class RegionsChanged(NamedTuple):
    """The regions are to be read anew."""


Event = Offer | ReleaseAsked | RegionsChanged


def _extent(data: bytes) -> Extent:
    fields = LAYOUTS["extent"].unpack(data)
    tag = tag_from_bytes(fields["tag"])
    return Extent(fields["start_dpa"], fields["length_bytes"], tag, fields["sequence"])


# ---- where the registers are


class Locator(NamedTuple):
    """What configuration space says: register blocks as id -> (BAR, offset), and the DVSECs."""

    blocks: dict[int, tuple[int, int]]
    dvsecs: dict[int, int]
    """Id -> offset in configuration space."""


def locate(config: bytes) -> Locator:
    """Walk the extended capabilities (CXL r3.1 8.1.9). Raises Unsupported for no CXL device."""
    blocks: dict[int, tuple[int, int]] = {}
    dvsecs: dict[int, int] = {}
    offset, seen = 0x100, set[int]()
    while 0x100 <= offset <= len(config) - 12 and offset not in seen:
        seen.add(offset)
        head, vendor, number = unpack_from("<IIH", config, offset)
        if head & 0xFFFF == 0x23 and vendor & 0xFFFF == 0x1E98:
            dvsecs[number] = offset
            if number == 8:
                end = min(offset + (vendor >> 20), len(config) - 7)
                for entry in range(offset + 0xC, end, 8):
                    low, high = unpack_from("<II", config, entry)
                    if low >> 8 & 0xFF:
                        blocks[low >> 8 & 0xFF] = (low & 7, low & 0xFFFF0000 | high << 32)
        offset = head >> 20 & ~3
    if DEVICE_BLOCK not in blocks:
        raise Unsupported("configuration space has no CXL device registers")
    return Locator(blocks, dvsecs)


class Window(NamedTuple):
    """A CXL fixed memory window of the CEDT."""

    base: int
    size: int
    targets: tuple[int, ...]


def read_cedt(table: bytes) -> tuple[dict[int, int], list[Window]]:
    """Host bridges (uid -> component registers) and fixed memory windows (CXL r3.1 9.18.1)."""
    bridges: dict[int, int] = {}
    windows: list[Window] = []
    offset = 36
    while offset + 4 <= len(table):
        kind, length = table[offset], unpack_from("<H", table, offset + 2)[0]
        if length < 4 or offset + length > len(table):
            break
        if kind == 0 and length >= 32:
            uid, _, base = unpack_from("<IIQ", table, offset + 4)[:3]
            bridges[uid] = unpack_from("<Q", table, offset + 16)[0]
        elif kind == 1 and length >= 40:
            base, size = unpack_from("<QQ", table, offset + 8)
            count = (length - 36) // 4
            windows.append(Window(base, size, unpack_from(f"<{count}I", table, offset + 36)))
        offset += length
    return bridges, windows


# ---- the mailbox


class Mailbox:
    """The primary mailbox of one device (CXL r3.1 8.2.8.4); one command at a time."""

    def __init__(self, base: int, payload_bytes: int, status: int, memdev: int) -> None:
        self._base = base
        self.payload_bytes = payload_bytes
        self._status = status
        self._memdev = memdev

    @classmethod
    def find(cls, block: int, span: int) -> Steps[Mailbox]:
        """Read the capabilities array at `block` of a BAR of `span` bytes."""
        head = yield Read("device", block, 8)
        count = min(head >> 32 & 0xFFFF, _CAPABILITIES_MAX)
        found: dict[int, tuple[int, int]] = {}
        for number in range(1, count + 1):
            at = block + 16 * number
            identifier = (yield Read("device", at, 4)) & 0xFFFF
            offset = block + (yield Read("device", at + 4, 4))
            length = yield Read("device", at + 8, 4)
            if offset % 8 == 0 and offset + length <= span:
                found[identifier] = (offset, length)
        base, length = found.get(MAILBOX_CAPABILITY, (0, 0))
        if length < 0x20 + 256:
            raise Unsupported("the device has no primary mailbox within its BAR")
        exponent = (yield Read("device", base, 4)) & 0x1F
        size = 1 << exponent if 8 <= exponent <= 20 else 0
        if not size or size > length - 0x20:
            raise Unsupported(f"the mailbox claims a payload of 2^{exponent} in {length} bytes")
        status = found.get(STATUS_CAPABILITY, (0, 0))[0]
        return cls(base, size, status, found.get(MEMDEV_CAPABILITY, (0, 0))[0])

    def events_waiting(self) -> Steps[bool]:
        """Whether the dynamic capacity log has records, by one register; True if it cannot say."""
        if not self._status:
            return True
        return bool((yield Read("device", self._status, 8)) >> DC_LOG & 1)

    def command(self, opcode: int, payload: bytes = b"") -> Steps[bytes]:
        """One command; its output. Raises CommandFailed, or Unsupported if nothing answers."""
        base = self._base
        if len(payload) > self.payload_bytes:
            raise InvalidInput("payload", f"at most {self.payload_bytes} bytes", len(payload))
        if self._memdev:
            yield from self._until(self._memdev, 8, 1 << 4, 1 << 4, "become ready")
        yield from self._until(base + 4, 4, 1, 0, "become free")
        padded = payload + bytes(-len(payload) % 4)
        for offset in range(0, len(padded), 4):
            word = int.from_bytes(padded[offset : offset + 4], "little")
            yield Write("device", base + 0x20 + offset, 4, word)
        yield Write("device", base + 8, 8, opcode | len(payload) << 16)
        yield Write("device", base + 4, 4, 1)
        yield from self._until(base + 4, 4, 1, 0, f"finish {opcode:04x}h")
        code = (yield Read("device", base + 0x10, 8)) >> 32 & 0xFFFF
        if code == 1:
            code = yield from self._background(opcode)
        if code:
            raise CommandFailed("CXL device", code, f"it refused {opcode:04x}h")
        length = (yield Read("device", base + 8, 8)) >> 16 & 0x1FFFFF
        return (yield from self._output(min(length, self.payload_bytes)))

    def _output(self, length: int) -> Steps[bytes]:
        data = bytearray()
        for offset in range(0, length, 4):
            data += (yield Read("device", self._base + 0x20 + offset, 4)).to_bytes(4, "little")
        return bytes(data[:length])

    def _until(self, at: int, width: int, mask: int, value: int, what: str) -> Steps[None]:
        for _ in range(COMMAND_POLLS_MAX):
            if (yield Read("device", at, width)) & mask == value:
                return
            yield Pause(POLL_SECONDS)
        raise Unsupported(f"the device's mailbox does not {what}")

    def _background(self, opcode: int) -> Steps[int]:
        for _ in range(BACKGROUND_POLLS_MAX):
            status = yield Read("device", self._base + 0x18, 8)
            if status >> 16 & 0x7F >= 100:
                return status >> 32 & 0xFFFF
            yield Pause(POLL_SECONDS)
        raise Unsupported(f"{opcode:04x}h does not end in the background")


# ---- dynamic capacity


class _Group:
    """Records of one group. Settled: they may leave the log."""

    def __init__(self, number: int, kind: int) -> None:
        self.number = number
        self.kind = kind
        self.extents: list[Extent] = []
        self.closed = False
        self.whole = True
        self.settled = False


class Driver:
    """What one device has offered, and what we hold of it."""

    def __init__(self, mailbox: Mailbox, *, keep_asked: bool = False) -> None:
        self._mailbox = mailbox
        self._keep_asked = keep_asked
        """Leave what is asked back in the log until it is released, for a driver after this one."""
        self.regions: tuple[Region, ...] = ()
        self.held: dict[int, Extent] = {}
        """By DPA; the device's own list, with such tags as the offers had."""
        self._log: list[tuple[int, _Group]] = []
        """Handles in the device's log, oldest first, with the group of each."""
        self._open: _Group | None = None
        self._pending: deque[_Group] = deque()
        """Offers that wait for our answer, in the order in which they must be answered."""
        self._groups = 0

    def start(self) -> Steps[list[Event]]:
        """Read regions and extents, and what the log has: offers that nobody answered yet."""
        self.regions = yield from self._read_regions()
        yield from self.read_extents()
        return (yield from self.poll())

    def _read_regions(self) -> Steps[tuple[Region, ...]]:
        request = LAYOUTS["get-configuration"].pack(wanted=8)
        data = yield from self._mailbox.command(GET_CONFIGURATION, request)
        head, entry = LAYOUTS["configuration"], LAYOUTS["region"]
        regions = []
        for number in range(min(head.unpack(data)["returned"], 8)):
            fields = entry.unpack(data, head.size + number * entry.size)
            decode = fields["decode_units"] * DECODER_UNIT_BYTES
            regions.append(Region(fields["base"], decode, fields["length"], fields["block"]))
        return tuple(regions)

    def read_extents(self) -> Steps[None]:
        """Make `held` the device's list; begins again when the list changes meanwhile."""
        room = (self._mailbox.payload_bytes - 16) // LAYOUTS["extent"].size
        for _ in range(ROUNDS_MAX):
            found: list[Extent] = []
            first: tuple[int, int] | None = None
            while True:
                request = LAYOUTS["get-extents"].pack(wanted=room, first=len(found))
                data = yield from self._mailbox.command(GET_EXTENTS, request)
                head = LAYOUTS["extents"].unpack(data)
                now = (head["total"], head["generation"])
                first = first or now
                page = min(head["returned"], room, head["total"] - len(found))
                for number in range(max(page, 0)):
                    found.append(_extent(data[16 + 40 * number : 56 + 40 * number]))
                if now != first or page <= 0 or not len(found) < min(now[0], EXTENTS_MAX):
                    break
            if now == first:
                self._take(found)
                return
        raise Unsupported("the device's extent list does not stand still")

    def _take(self, found: Iterable[Extent]) -> None:
        """QEMU lists pending extents as empty ones, and forgets tags that we have seen."""
        known = self.held
        self.held = {}
        for extent in found:
            before = known.get(extent.dpa)
            if extent.tag == NIL_TAG and before is not None and before.length == extent.length:
                extent = before
            if extent.length:
                self.held[extent.dpa] = extent

    def poll(self) -> Steps[list[Event]]:
        """News, drained from the log. Records of offers stay until `answer`."""
        events: list[Event] = []
        for _ in range(ROUNDS_MAX):
            if not (yield from self._mailbox.events_waiting()):
                break
            request = LAYOUTS["get-events"].pack(log=DC_LOG)
            data = yield from self._mailbox.command(GET_EVENTS, request)
            head = LAYOUTS["events"].unpack(data)
            fresh = self._note(data, head["count"])
            events += self._closed(fresh)
            lost = bool(head["flags"] & 1)
            if lost and self._open is not None:
                events += self._closed([self._cut(self._open)])
            # An open group that fills the log: it must make room for the rest.
            stuck = not fresh and self._open is not None and bool(head["flags"] & 2)
            cleared = yield from self._clear(force=stuck)
            if lost:
                yield from self.read_extents()
            if not cleared:
                break
        return events

    def _note(self, data: bytes, count: int) -> list[_Group]:
        """Put new records into their groups; the groups that this closes."""
        layout, known = LAYOUTS["record"], {handle for handle, _ in self._log}
        closed: list[_Group] = []
        most = (len(data) - LAYOUTS["events"].size) // layout.size
        for number in range(min(count, most)):
            record = layout.unpack(data, LAYOUTS["events"].size + number * layout.size)
            if record["handle"] in known:
                continue
            group = self._open
            if group is not None and group.kind != record["type"]:
                closed.append(self._cut(group))
                group = None
            if group is None:
                self._groups += 1
                group = self._open = _Group(self._groups, record["type"])
            self._log.append((record["handle"], group))
            if record["uuid"] != DC_RECORD_UUID:
                group.kind, group.closed = -1, True
            else:
                group.extents.append(_extent(record["extent"]))
                group.closed = not record["dc_flags"] & 1
            if group.closed:
                self._open = None
                closed.append(group)
        return closed

    def _closed(self, groups: Sequence[_Group]) -> list[Event]:
        events: list[Event] = []
        for group in groups:
            extents = tuple(group.extents)
            if group.kind == ADD:
                if group.whole and all(self._holds(extent) for extent in extents):
                    group.settled = True  # Answered by the driver that was here before us.
                    continue
                self._pending.append(group)
                events.append(Offer(group.number, extents, group.whole))
                continue
            asked = group.kind == ASK_RELEASE and any(map(self._holds, extents))
            group.settled = not (self._keep_asked and asked)
            if group.kind in (ASK_RELEASE, FORCED_RELEASE):
                forced = group.kind == FORCED_RELEASE
                events.append(ReleaseAsked(extents, forced))
            elif group.kind == REGION_UPDATED:
                events.append(RegionsChanged())
        return events

    def _cut(self, group: _Group) -> _Group:
        """Records were lost: a group that is open will never close by itself."""
        self._open = None
        group.closed, group.whole = True, False
        return group

    def _holds(self, extent: Extent) -> bool:
        held = self.held.get(extent.dpa)
        return held is not None and held.length == extent.length

    def _clear(self, *, force: bool = False) -> Steps[bool]:
        """Clear the oldest records, as far as they are settled: handles go in temporal order."""
        handles: list[int] = []
        for behind, (_, group) in enumerate(reversed(self._log), 1):
            if behind > RECORDS_KEPT_MAX and group.kind == ASK_RELEASE:
                group.settled = True  # A full log would cost an offer, told of only once.
        for handle, group in self._log:
            if not (group.settled or force):
                break
            handles.append(handle)
        handles = handles[:255]
        if handles:
            request = LAYOUTS["clear-events"].pack(log=DC_LOG, count=len(handles))
            request += b"".join(handle.to_bytes(2, "little") for handle in handles)
            yield from self._mailbox.command(CLEAR_EVENTS, request)
            del self._log[: len(handles)]
        return bool(handles)

    def why_not(self, offer: Offer) -> str:
        """Why an offer cannot be taken, as Linux would judge it; empty when it can."""
        if not offer.whole:
            return "the end of the offer was lost"
        for extent in offer.extents:
            if extent.dpa % ALIGN_BYTES or extent.length % ALIGN_BYTES or not extent.length:
                return f"extent {extent.dpa:#x}+{extent.length:#x} is not aligned to 2 MiB"
            if not any(
                r.base <= extent.dpa and extent.dpa + extent.length <= r.base + r.length
                for r in self.regions
            ):
                return f"extent {extent.dpa:#x}+{extent.length:#x} is in no region"
        ordered = sorted([*offer.extents, *self.held.values()])
        for one, two in pairwise(ordered):
            if one.dpa + one.length > two.dpa:
                return f"extents {one.dpa:#x} and {two.dpa:#x} overlap"
        if len({extent.tag for extent in offer.extents}) > 1:
            return "one offer, several tags"
        sequence = sorted(extent.sequence for extent in offer.extents)
        if any(sequence) and sequence != list(range(len(sequence))):
            return f"the sequence numbers have gaps: {sequence}"
        return ""

    def answer(self, offer: Offer, *, accept: bool) -> Steps[None]:
        """4802h for the oldest offer that waits. Raises Conflict for any other.

        Accepted first, cleared after: a driver that dies in between sees that the extents are held.
        Refused last, for nothing would tell it that the refusal was sent, and a second one ends
        QEMU.
        """
        if not self._pending or self._pending[0].number != offer.number:
            raise Conflict(f"offer {offer.number} is not the one to be answered next")
        if accept and (reason := self.why_not(offer)):
            raise Conflict(f"offer {offer.number}: {reason}")
        group = self._pending.popleft()
        if accept:
            yield from self._accept(offer.extents)
            self.held |= {extent.dpa: extent for extent in offer.extents}
        group.settled = True
        yield from self._clear()
        if not accept:
            yield from self._respond(ADD_RESPONSE, ())

    def _accept(self, extents: Sequence[Extent]) -> Steps[None]:
        """Past offers that a driver before us was to refuse, and died: no record tells of them.

        They are known by the device's word that these extents are not what it waits for, while they
        overlap nothing that it lists: then something else is first, and there is something to
        refuse.
        """
        for _ in range(ROUNDS_MAX):
            try:
                return (yield from self._respond(ADD_RESPONSE, extents))
            except CommandFailed as failed:
                if failed.code != _INVALID_PHYSICAL_ADDRESS:
                    raise
                yield from self.read_extents()
                if any(self._overlapping(extent) for extent in extents):
                    raise
            yield from self._respond(ADD_RESPONSE, ())
        raise Unsupported("the device does not come to the offer that it made")

    def _overlapping(self, extent: Extent) -> bool:
        end = extent.dpa + extent.length
        return any(e.dpa < end and extent.dpa < e.dpa + e.length for e in self.held.values())

    def release(self, extents: Sequence[Extent]) -> Steps[None]:
        """4803h for extents that nobody uses any more. Raises Conflict for what we do not hold."""
        for extent in extents:
            if not self._holds(extent):
                raise Conflict(f"extent {extent.dpa:#x}+{extent.length:#x} is not held")
        if not extents:
            raise InvalidInput("extents", "at least one", 0)
        yield from self._respond(RELEASE, extents)
        for extent in extents:
            del self.held[extent.dpa]
        for _, group in self._log:
            if group.kind == ASK_RELEASE and not any(map(self._holds, group.extents)):
                group.settled = True
        yield from self._clear()

    def _respond(self, opcode: int, extents: Sequence[Extent]) -> Steps[None]:
        """In several commands when one does not hold them: 4802h says so (More), 4803h need not."""
        room = (self._mailbox.payload_bytes - LAYOUTS["list"].size) // LAYOUTS["updated"].size
        parts = [extents[at : at + room] for at in range(0, len(extents), room)] or [()]
        for number, part in enumerate(parts, 1):
            more = opcode == ADD_RESPONSE and number < len(parts)
            payload = LAYOUTS["list"].pack(count=len(part), flags=int(more))
            for extent in part:
                payload += LAYOUTS["updated"].pack(start_dpa=extent.dpa, length_bytes=extent.length)
            yield from self._mailbox.command(opcode, payload)


# ---- HDM decoders


class Decoders:
    """The HDM decoders of an endpoint or a host bridge (CXL r3.1 8.2.4.20): 4-byte accesses only.

    `space` names the BAR or the bridge's registers.
    """

    def __init__(self, space: str, base: int, count: int) -> None:
        self._space = space
        self._base = base
        self.count = count

    @classmethod
    def find(cls, space: str, block: int, span: int) -> Steps[Decoders | None]:
        """Through the cache/mem array at `block`+1000h; None: pass-through, nothing to program."""
        array = block + 0x1000
        head = yield Read(space, array, 4)
        if head & 0xFFFF != 1:
            raise Unsupported("component registers have no cache/mem capability array")
        for number in range(1, min(head >> 24, _CAPABILITIES_MAX) + 1):
            entry = yield Read(space, array + 4 * number, 4)
            base = array + (entry >> 20)
            if entry & 0xFFFF == HDM_CAPABILITY and base % 4 == 0 and base + 0x30 <= span:
                encoded = (yield Read(space, base, 4)) & 0xF
                return cls(space, base, _DECODERS[min(encoded, len(_DECODERS) - 1)])
        return None

    def committed(self, number: int) -> Steps[tuple[int, int] | None]:
        """(base, size) of a decoder that is committed; None: it is free."""
        at = self._base + 0x10 + 0x20 * number
        if not (yield Read(self._space, at + 0x10, 4)) >> 10 & 1:
            return None
        found = []
        for offset in (0x00, 0x08):
            low = yield Read(self._space, at + offset, 4)
            found.append(low | (yield Read(self._space, at + offset + 4, 4)) << 32)
        return found[0], found[1]

    def program(
        self, number: int, base: int, size: int, *, skip: int = 0, targets: Sequence[int] = ()
    ) -> Steps[None]:
        """Commit decoder `number` for `size` bytes from guest physical `base`, without interleave.

        `skip` is the endpoint's (DPA bytes below), `targets` the bridge's (its root port's number).
        Does nothing when it is committed so already; raises Conflict when otherwise.
        """
        unit = DECODER_UNIT_BYTES
        for name, value in (("base", base), ("size", size), ("skip", skip)):
            if value % unit or value < 0:
                raise InvalidInput(name, f"a multiple of {unit}", value)
        if not 0 <= number < self.count or not size:
            raise InvalidInput("decoder", f"0 to {self.count - 1}, of some size", number)
        at = self._base + 0x10 + 0x20 * number
        seen = yield from self.committed(number)
        if seen is not None:
            if seen != (base, size):
                what = f"decoder {number} is committed for {seen[0]:#x}+{seen[1]:#x} already"
                raise Conflict(what)
            return
        control = yield Read(self._space, self._base + 4, 4)
        yield Write(self._space, self._base + 4, 4, control | 2)
        last = sum(port << 8 * way for way, port in enumerate(targets)) if targets else skip
        for offset, value in ((0x00, base), (0x08, size), (0x14, last)):
            yield Write(self._space, at + offset + 4, 4, value >> 32)
            yield Write(self._space, at + offset, 4, value & 0xFFFFFFFF)
        host_only = 1 << 12
        yield Write(self._space, at + 0x10, 4, host_only | 1 << 9)
        for _ in range(COMMIT_POLLS_MAX):
            state = yield Read(self._space, at + 0x10, 4)
            if state >> 10 & 1:
                return
            if state >> 11 & 1:
                break
            yield Pause(POLL_SECONDS)
        yield Write(self._space, at + 0x10, 4, host_only)
        raise Unsupported(f"the device does not commit decoder {number} at {base:#x}")

    def tear_down(self, number: int) -> Steps[None]:
        """Take a decoder back; the last one first."""
        at = self._base + 0x10 + 0x20 * number
        control = yield Read(self._space, at + 0x10, 4)
        yield Write(self._space, at + 0x10, 4, control & ~(1 << 9))
        for offset in (0x0C, 0x08, 0x04, 0x00):
            yield Write(self._space, at + offset, 4, 0)
