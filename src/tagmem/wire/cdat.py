"""The table in which a CXL device tells how fast its memory is (CDAT), so that an emulated one can
say what the memory behind it is worth.

Source: Coherent Device Attribute Table specification 1.03: header, DSMAS (a range of addresses of
the device) and DSLBIS (a figure of such a range).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from tagmem.base.errors import InvalidInput
from tagmem.base.units import MIB, Bytes
from tagmem.wire.fields import bits, flag, repeat, reserved, u8, u16, u32, u64
from tagmem.wire.layout import WireStruct, wire

LATENCY_NS_MAX = 60_000
BANDWIDTH_BYTES_MAX = 4096 << 30
_ENTRY_MAX = 0xFFFE
"""FFFFh: not reachable."""
_PICOSECONDS = 1000


class DataType(IntEnum):
    """What a DSLBIS says: ACPI's numbers for HMAT."""

    ACCESS_LATENCY = 0
    READ_LATENCY = 1
    WRITE_LATENCY = 2
    ACCESS_BANDWIDTH = 3
    READ_BANDWIDTH = 4
    WRITE_BANDWIDTH = 5


@wire(
    u32(0x00, "length_bytes"),
    u8(0x04, "revision"),
    u8(0x05, "checksum"),
    reserved(0x06, 6),
    u32(0x0C, "sequence"),
    size=16,
)
class CdatHeader(WireStruct, frozen=True, gc=False):
    """In front of the table; all of its bytes add up to 0, modulo 256."""

    length_bytes: int
    revision: int = 1
    checksum: int = 0
    sequence: int = 0


@wire(
    u8(0x00, "kind"),
    reserved(0x01, 1),
    u16(0x02, "length_bytes"),
    u8(0x04, "handle"),
    bits(
        0x05,
        1,
        flag("non_volatile", 2),
        flag("sharable", 3),
        flag("hardware_coherent", 4),
        flag("dynamic", 5),
        flag("read_only", 6),
    ),
    reserved(0x06, 2),
    u64(0x08, "dpa"),
    u64(0x10, "dpa_length_bytes"),
    size=24,
)
class Dsmas(WireStruct, frozen=True, gc=False):
    """Device Scoped Memory Affinity Structure: a range that is alike in all that is said of it."""

    handle: int
    dpa: int
    dpa_length_bytes: int
    dynamic: bool = False
    non_volatile: bool = False
    sharable: bool = False
    hardware_coherent: bool = False
    read_only: bool = False
    kind: int = 0
    length_bytes: int = 24


@wire(
    u8(0x00, "kind"),
    reserved(0x01, 1),
    u16(0x02, "length_bytes"),
    u8(0x04, "handle"),
    u8(0x05, "hierarchy"),
    u8(0x06, "data_type", DataType),
    reserved(0x07, 1),
    u64(0x08, "base_unit"),
    repeat(0x10, "entries", 2, 3),
    reserved(0x16, 2),
    size=24,
)
class Dslbis(WireStruct, frozen=True, gc=False):
    """Device Scoped Latency and Bandwidth Information Structure: `base_unit` times the first entry
    are picoseconds, or megabytes in a second. Hierarchy 0 is the memory itself.
    """

    handle: int
    data_type: DataType
    base_unit: int
    entries: tuple[int, ...]
    hierarchy: int = 0
    kind: int = 1
    length_bytes: int = 24


def performance(regions: Iterable[Bytes], latency_ns: int, bandwidth_bytes: Bytes) -> bytes:
    """The table of a device whose dynamic regions, of such lengths, follow one another from DPA 0,
    all equally fast. Raises InvalidInput.
    """
    if not 1 <= latency_ns <= LATENCY_NS_MAX:
        raise InvalidInput("latency_ns", f"1 to {LATENCY_NS_MAX}", latency_ns)
    if not MIB <= bandwidth_bytes <= BANDWIDTH_BYTES_MAX:
        limit = f"{MIB} to {BANDWIDTH_BYTES_MAX}"
        raise InvalidInput("bandwidth_bytes", limit, bandwidth_bytes)
    megabytes = bandwidth_bytes // MIB
    unit = -(-megabytes // _ENTRY_MAX)
    body, at = b"", 0
    for handle, length in enumerate(regions):
        latency = (latency_ns, 0, 0)
        body += Dsmas(handle, at, length, dynamic=True).encode()
        body += Dslbis(handle, DataType.ACCESS_LATENCY, _PICOSECONDS, latency).encode()
        bandwidth = (megabytes // unit, 0, 0)
        body += Dslbis(handle, DataType.ACCESS_BANDWIDTH, unit, bandwidth).encode()
        at += length
    length = CdatHeader.LAYOUT.size + len(body)
    table = CdatHeader(length).encode() + body
    return CdatHeader(length, checksum=-sum(table) & 0xFF).encode() + body
