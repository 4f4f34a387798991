"""A CXL type 3 device with dynamic capacity as QEMU emulates it, down to its faults: what a driver
in user space meets when it reads and writes registers. Stands in for QEMU where none can run.

Beside the specification it does what was seen of QEMU 10.0 and 11.1: a byte written into mailbox
registers aborts, as does an answer while nothing is pending; only certain widths have an effect;
event logs have eight records; tags are zero, and lost on acceptance even where they are not; the
generation never changes; released memory's extents are split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from struct import pack, pack_into

from tagmem.wire.cci import ReturnCode
from tagmem.wire.extent import NIL_TAG_BYTES, WireExtent
from tagmem.wire.generic import (
    DcEventType,
    DynamicCapacityRecord,
    EventHeader,
    EventLog,
    GetEventRecordsResponse,
)
from tagmem.wire.layout import DecodeError
from tagmem.wire.memdev import (
    AddDcResponseRequest,
    DcRegion,
    GetDcConfigurationRequest,
    GetDcConfigurationResponse,
    GetDcExtentListRequest,
    GetDcExtentListResponse,
    ReleaseDcRequest,
)

MAILBOX = 0x88
PAYLOAD_BYTES = 2048
STATUS = 0x80
MEMDEV = 0x8A8
HDM = 0x1128
DECODERS = 4
LOG_RECORDS_MAX = 8
DEVICE_BYTES = 4096
COMPONENT_BYTES = 64 * 1024
REGION_BYTES = 512 << 20
_DVSEC_AT = {0: 0x10C, 8: 0x148}


class QemuAborted(Exception):
    """What was done ends QEMU, and the guest with it."""


class _Refused(Exception):
    """A command fails with this return code."""

    def __init__(self, code: ReturnCode) -> None:
        self.code = code
        super().__init__(code.name)


class Type3:
    """One device. `device` and `component` are its two BARs, as `guest.mmio` wants them."""

    def __init__(
        self, *, regions: int = 2, tags: bool = False, log_max: int = LOG_RECORDS_MAX
    ) -> None:
        self._regions = [(n * REGION_BYTES, REGION_BYTES) for n in range(regions)]
        self._tags = tags
        self._log_max = log_max
        self.accepted: list[WireExtent] = []
        self.pending: deque[tuple[WireExtent, ...]] = deque()
        self.log: list[DynamicCapacityRecord] = []
        self._lost = 0
        self._handle = 0
        self.commands: list[int] = []
        self.device = _DeviceRegisters(self)
        self.component = _ComponentRegisters()

    # ---- what the host does

    def offer(self, *extents: tuple[int, int], tag: bytes = NIL_TAG_BYTES) -> None:
        """QMP's cxl-add-dynamic-capacity of (DPA, length)."""
        kept = tag if self._tags else NIL_TAG_BYTES
        group = tuple(
            WireExtent(dpa, length, kept, number if self._tags else 0)
            for number, (dpa, length) in enumerate(extents)
        )
        self.pending.append(group)
        self._record(DcEventType.ADD_CAPACITY, group)

    def ask_release(self, *extents: tuple[int, int]) -> None:
        """QMP's cxl-release-dynamic-capacity."""
        self._record(DcEventType.RELEASE_CAPACITY, [WireExtent(*extent) for extent in extents])

    def _record(self, kind: DcEventType, extents: Sequence[WireExtent]) -> None:
        for number, extent in enumerate(extents, 1):
            self._handle += 1
            if len(self.log) >= self._log_max:
                self._lost += 1
                continue
            header = EventHeader(self._handle)
            more = number < len(extents)
            self.log.append(DynamicCapacityRecord(header, kind, extent, more=more))

    # ---- what a command does

    def execute(self, opcode: int, payload: bytes) -> tuple[ReturnCode, bytes]:
        """Return code and output."""
        self.commands.append(opcode)
        handler = {
            0x0100: self._get_events,
            0x0101: self._clear_events,
            0x4800: self._get_configuration,
            0x4801: self._get_extents,
            0x4802: self._add_response,
            0x4803: self._release,
        }.get(opcode)
        if handler is None:
            return ReturnCode.UNSUPPORTED, b""
        try:
            return ReturnCode.SUCCESS, handler(payload)
        except _Refused as refused:
            return refused.code, b""
        except DecodeError:
            return ReturnCode.INVALID_PAYLOAD_LENGTH, b""

    def _get_events(self, payload: bytes) -> bytes:
        if payload != bytes([EventLog.DYNAMIC_CAPACITY]):
            raise _Refused(ReturnCode.INVALID_INPUT)
        room = (PAYLOAD_BYTES - 0x20) // 128
        answer = GetEventRecordsResponse(
            tuple(self.log[:room]),
            more_records=bool(self.log),
            overflow=bool(self._lost),
            overflow_count=self._lost,
        )
        return answer.encode()

    def _clear_events(self, payload: bytes) -> bytes:
        count = payload[2]
        handles = [int.from_bytes(payload[6 + 2 * n : 8 + 2 * n], "little") for n in range(count)]
        if handles != [record.header.handle for record in self.log[:count]]:
            raise _Refused(ReturnCode.INVALID_INPUT)
        del self.log[:count]
        if not self.log:
            self._lost = 0
        return b""

    def _get_configuration(self, payload: bytes) -> bytes:
        request = GetDcConfigurationRequest.decode(payload)
        if request.first_region >= len(self._regions):
            raise _Refused(ReturnCode.INVALID_INPUT)
        chosen = self._regions[request.first_region :][: request.regions_wanted]
        regions = tuple(DcRegion(base, length, length, 2 << 20) for base, length in chosen)
        return GetDcConfigurationResponse(len(self._regions), regions, 512, 512).encode()

    def _get_extents(self, payload: bytes) -> bytes:
        request = GetDcExtentListRequest.decode(payload)
        if request.first_extent > len(self.accepted):
            raise _Refused(ReturnCode.INVALID_INPUT)
        room = min(request.extents_wanted, (PAYLOAD_BYTES - 16) // 40)
        page = tuple(self.accepted[request.first_extent :][:room])
        return GetDcExtentListResponse(page, len(self.accepted), 0).encode()

    def _add_response(self, payload: bytes) -> bytes:
        request = AddDcResponseRequest.decode(payload)
        if not self.pending:
            raise QemuAborted("4802h while nothing is pending: a null dereference")
        group = self.pending[0]
        for extent in request.extents:
            inside = any(
                offered.start_dpa <= extent.start_dpa
                and extent.start_dpa + extent.length_bytes
                <= offered.start_dpa + offered.length_bytes
                for offered in group
            )
            if not inside or self._overlaps(extent.start_dpa, extent.length_bytes):
                raise _Refused(ReturnCode.INVALID_PHYSICAL_ADDRESS)
        # More is ignored: each answer takes the whole group.
        self.pending.popleft()
        self.accepted += [WireExtent(e.start_dpa, e.length_bytes) for e in request.extents]
        return b""

    def _release(self, payload: bytes) -> bytes:
        request = ReleaseDcRequest.decode(payload)
        if not request.extents:
            raise _Refused(ReturnCode.INVALID_INPUT)
        for extent in request.extents:
            wanted = WireExtent(extent.start_dpa, extent.length_bytes)
            if wanted not in self.accepted:
                raise _Refused(ReturnCode.INVALID_PHYSICAL_ADDRESS)
        for extent in request.extents:
            self.accepted.remove(WireExtent(extent.start_dpa, extent.length_bytes))
        return b""

    def _overlaps(self, dpa: int, length: int) -> bool:
        return any(
            e.start_dpa < dpa + length and dpa < e.start_dpa + e.length_bytes for e in self.accepted
        )

    @staticmethod
    def config() -> bytes:
        """Configuration space, as far as a driver reads it."""
        space = bytearray(4096)
        pack_into("<HH", space, 0, 0x8086, 0x0D93)
        pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | _DVSEC_AT[0] << 20)
        for number, (at, following, length) in {
            0: (_DVSEC_AT[0], _DVSEC_AT[8], 0x3C),
            8: (_DVSEC_AT[8], 0, 0x24),
        }.items():
            pack_into("<IIH", space, at, 0x23 | following << 20, 0x1E98 | length << 20, number)
        blocks = ((0, 1, 0), (2, 3, 0), (0, 0, 0))
        for n, (bar, identifier, offset) in enumerate(blocks):
            pack_into("<II", space, _DVSEC_AT[8] + 0xC + 8 * n, bar | identifier << 8 | offset, 0)
        return bytes(space)


def cedt(windows: Iterable[tuple[int, int]] = ((0xA90000000, 4 << 30),)) -> bytes:
    """The ACPI table of one host bridge, uid 12, and its windows."""
    body = pack("<BxHIIxxxxQQ", 0, 32, 12, 1, 0xA80000000, 0x10000)
    for base, size in windows:
        body += pack("<BxHIQQBBxxIHHI", 1, 40, 0, base, size, 0, 0, 0, 0x2F, 0, 12)
    return pack("<4sI28x", b"CEDT", 36 + len(body)) + body


class _DeviceRegisters:
    """BAR 2: the capabilities array, device status, mailbox, memory device status."""

    span = DEVICE_BYTES

    def __init__(self, owner: Type3) -> None:
        self._owner = owner
        self._bytes = bytearray(DEVICE_BYTES)
        pack_into("<HBxHxx", self._bytes, 0, 0, 1, 3)
        entries = ((1, STATUS, 8), (2, MAILBOX, 0x20 + PAYLOAD_BYTES), (0x4000, MEMDEV, 8))
        for n, (identifier, offset, length) in enumerate(entries, 1):
            pack_into("<HBxII", self._bytes, 16 * n, identifier, 1, offset, length)
        pack_into("<I", self._bytes, MAILBOX, 11 | 1 << 6 | 7 << 7)
        pack_into("<Q", self._bytes, MEMDEV, 1 << 2 | 1 << 4)

    def read(self, offset: int, width: int) -> int:
        """As QEMU answers it."""
        if offset == STATUS:
            waiting = bool(self._owner.log) << EventLog.DYNAMIC_CAPACITY
            return waiting & ((1 << 8 * width) - 1)
        return int.from_bytes(self._bytes[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """As QEMU takes it: registers want their own width."""
        at = offset - MAILBOX
        if 0 <= at < 0x20:
            if width in (1, 2):
                raise QemuAborted(f"a write of {width} bytes into the mailbox: an assertion")
            if (at, width) not in ((4, 4), (8, 8)):
                return
        elif not 0x20 <= at < 0x20 + PAYLOAD_BYTES:
            return
        self._bytes[offset : offset + width] = value.to_bytes(width, "little")
        if at == 4 and value & 1:
            self._ring()

    def _ring(self) -> None:
        command = self.read(MAILBOX + 8, 8)
        length = command >> 16 & 0xFFFFF
        begin = MAILBOX + 0x20
        payload = bytes(self._bytes[begin : begin + length])
        code, output = self._owner.execute(command & 0xFFFF, payload)
        self._bytes[begin : begin + len(output)] = output
        pack_into("<Q", self._bytes, MAILBOX + 8, command & 0xFFFF | len(output) << 16)
        pack_into("<Q", self._bytes, MAILBOX + 0x10, int(code) << 32)
        pack_into("<I", self._bytes, MAILBOX + 4, 0)


class _ComponentRegisters:
    """BAR 0: the cache/mem array and the HDM decoders. Four bytes at a time, or nothing happens."""

    span = COMPONENT_BYTES

    def __init__(self) -> None:
        self._bytes = bytearray(COMPONENT_BYTES)
        pack_into("<III", self._bytes, 0x1000, 1 | 2 << 24, 2 | 0x100 << 20, 5 | 0x128 << 20)
        pack_into("<I", self._bytes, HDM, 2)

    def read(self, offset: int, width: int) -> int:
        """As QEMU answers it."""
        if width != 4:
            return 0
        return int.from_bytes(self._bytes[offset : offset + 4], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """As QEMU takes it: commit is believed at once."""
        if width != 4:
            return
        at = offset - HDM - 0x10
        if 0 <= at < 0x20 * DECODERS and at % 0x20 == 0x10:
            value = value & ~(1 << 10) | (1 << 10 if value & 1 << 9 else 0)
        if 0 <= at < 0x20 * DECODERS and at % 0x20 in (0x00, 0x08, 0x14):
            value &= 0xF0000000
        self._bytes[offset : offset + 4] = value.to_bytes(4, "little")
