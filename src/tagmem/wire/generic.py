"""Generic component commands: Identify, event records, event interrupt policy, logs; and Identify
Memory Device.

Source: CXL r3.1 8.2.9.1 (0001h), 8.2.9.2 (01xxh), 8.2.9.5 (04xxh), 8.2.9.9.1.1 (4000h).
"""

from __future__ import annotations

from enum import IntEnum
from uuid import UUID

from tagmem.wire.extent import WireExtent
from tagmem.wire.fields import (
    BadValue,
    array,
    bit,
    bits,
    choice,
    count,
    flag,
    nested,
    numbers,
    optional_u8,
    raw,
    reserved,
    rest,
    u8,
    u16,
    u24,
    u32,
    u64,
)
from tagmem.wire.layout import WireStruct, wire

CAPACITY_UNIT_BYTES = 256 << 20
"""Capacities in 4000h and 5600h are given in units of 256 MiB on the wire, in bytes here."""

CEL_UUID = UUID("0da9c0b5-bf41-4b78-8f79-96b1623b3f17").bytes
"""Names the Command Effects Log in 0400h and 0401h."""

DYNAMIC_CAPACITY_UUID = UUID("ca95afa7-f183-4018-8c2f-95268e101a2a").bytes
"""Names the Dynamic Capacity record. UUIDs are the only big-endian fields."""


class ComponentType(IntEnum):
    """Component types of Identify (0001h)."""

    SWITCH = 0x00
    TYPE3 = 0x03
    GFD = 0x04


@wire(size=0)
class IdentifyRequest(WireStruct, frozen=True, gc=False):
    """Identify (0001h), CXL r3.1 8.2.9.1.1."""


@wire(
    u16(0x00, "vendor_id"),
    u16(0x02, "device_id"),
    u16(0x04, "subsystem_vendor_id"),
    u16(0x06, "subsystem_id"),
    u64(0x08, "serial_number"),
    u8(0x10, "message_size_log2", high=20),
    u8(0x11, "component_type"),
    size=18,
)
class IdentifyResponse(WireStruct, frozen=True, gc=False):
    """Identify response (0001h), CXL r3.1 8.2.9.1.1.

    `message_size_log2` is the largest message the component accepts, as a power of two.
    """

    vendor_id: int
    device_id: int
    subsystem_vendor_id: int
    subsystem_id: int
    serial_number: int
    message_size_log2: int
    component_type: int


# -- events ----------------------------------------------------------------------------------------


class EventLog(IntEnum):
    """Event logs (CXL r3.1 8.2.9.2.2)."""

    INFORMATIONAL = 0
    WARNING = 1
    FAILURE = 2
    FATAL = 3
    DYNAMIC_CAPACITY = 4


class Severity(IntEnum):
    """Severity of an event record."""

    INFORMATIONAL = 0
    WARNING = 1
    FAILURE = 2
    FATAL = 3


class DcEventType(IntEnum):
    """Types of Dynamic Capacity record. Hosts see 0 to 3; the fabric manager sees 4 and 5."""

    ADD_CAPACITY = 0
    RELEASE_CAPACITY = 1
    FORCED_CAPACITY_RELEASE = 2
    REGION_CONFIGURATION_UPDATED = 3
    ADD_CAPACITY_RESPONSE = 4
    CAPACITY_RELEASED = 5


@wire(
    raw(0x00, "identifier", 16),
    u8(0x10, "length_bytes"),
    bits(
        0x11,
        3,
        bit("severity", 0, 2, Severity),
        flag("permanent", 2),
        flag("maintenance_needed", 3),
        flag("performance_degraded", 4),
        flag("replacement_needed", 5),
        flag("maintenance_subclass_valid", 6),
        flag("ld_id_valid", 7),
        flag("head_id_valid", 8),
    ),
    u16(0x14, "handle"),
    u16(0x16, "related_handle"),
    u64(0x18, "timestamp_ns"),
    u8(0x20, "maintenance_class"),
    u8(0x21, "maintenance_subclass"),
    u16(0x22, "ld_id"),
    u8(0x24, "head_id"),
    reserved(0x25, 11),
    size=48,
)
class EventHeader(WireStruct, frozen=True, gc=False):
    """Common event record header, 48 bytes (CXL r3.1 8.2.9.2.1, with the LD and head ids of r3.2).

    `timestamp_ns` is the device's clock, since 1970. Do not filter by severity: QEMU's Dynamic
    Capacity records claim "warning", where the specification wants "informational".
    """

    handle: int
    timestamp_ns: int = 0
    identifier: bytes = DYNAMIC_CAPACITY_UUID
    severity: Severity = Severity.INFORMATIONAL
    related_handle: int = 0
    length_bytes: int = 128
    permanent: bool = False
    maintenance_needed: bool = False
    performance_degraded: bool = False
    replacement_needed: bool = False
    maintenance_subclass_valid: bool = False
    ld_id_valid: bool = False
    head_id_valid: bool = False
    maintenance_class: int = 0
    maintenance_subclass: int = 0
    ld_id: int = 0
    head_id: int = 0


@wire(
    nested(0x00, "header", EventHeader),
    u8(0x30, "type", DcEventType),
    bits(0x31, 1, flag("available_valid", 0)),
    u16(0x32, "host_id"),
    u8(0x34, "region"),
    bits(0x35, 1, flag("more", 0)),
    reserved(0x36, 2),
    nested(0x38, "extent", WireExtent),
    reserved(0x60, 24),
    u32(0x78, "extents_available"),
    u32(0x7C, "tags_available"),
    size=128,
)
class DynamicCapacityRecord(WireStruct, frozen=True):
    """Dynamic Capacity event record, 128 bytes (CXL r3.1 8.2.9.2.1.6).

    `host_id` counts in types 4 and 5, `region` in type 3. `more`: the next record belongs to the
    same group. The available counts count only with `available_valid`.
    """

    header: EventHeader
    type: DcEventType
    extent: WireExtent = WireExtent(0, 0)
    more: bool = False
    host_id: int = 0
    region: int = 0
    available_valid: bool = False
    extents_available: int = 0
    tags_available: int = 0

    def __post_init__(self) -> None:
        self.LAYOUT.check(self)
        if self.header.identifier != DYNAMIC_CAPACITY_UUID:
            limit = f"{DYNAMIC_CAPACITY_UUID.hex()}, a Dynamic Capacity record's"
            raise BadValue("header", limit, self.header.identifier.hex())


@wire(
    nested(0x00, "header", EventHeader),
    raw(0x30, "data", 80),
    size=128,
)
class OtherEventRecord(WireStruct, frozen=True):
    """An event record that tagmem does not read, 128 bytes (CXL r3.1 8.2.9.2.1).

    Also a Dynamic Capacity record with values that r3.1 does not have: it must not hide the others.
    """

    header: EventHeader
    data: bytes


EventRecord = DynamicCapacityRecord | OtherEventRecord


@wire(u8(0x00, "log", EventLog), size=1)
class GetEventRecordsRequest(WireStruct, frozen=True, gc=False):
    """Get Event Records (0100h), CXL r3.1 8.2.9.2.2."""

    log: EventLog


@wire(
    bits(0x00, 1, flag("overflow", 0), flag("more_records", 1)),
    reserved(0x01, 1),
    u16(0x02, "overflow_count"),
    u64(0x04, "first_overflow_ns"),
    u64(0x0C, "last_overflow_ns"),
    count(0x14, 2, "records"),
    reserved(0x16, 10),
    array(
        0x20,
        "records",
        choice(16, {DYNAMIC_CAPACITY_UUID: DynamicCapacityRecord}, OtherEventRecord),
    ),
    size=32,
)
class GetEventRecordsResponse(WireStruct, frozen=True):
    """Get Event Records response (0100h), CXL r3.1 8.2.9.2.2.

    `more_records` says that the log holds more than this response; it has nothing to do with `more`
    in a Dynamic Capacity record. QEMU sets it whenever the log is not empty: loop until no record
    comes.
    """

    records: tuple[EventRecord, ...] = ()
    more_records: bool = False
    overflow: bool = False
    overflow_count: int = 0
    first_overflow_ns: int = 0
    last_overflow_ns: int = 0


@wire(
    u8(0x00, "log", EventLog),
    bits(0x01, 1, flag("clear_all", 0)),
    count(0x02, 1, "handles"),
    reserved(0x03, 3),
    numbers(0x06, "handles", 2),
    size=6,
)
class ClearEventRecordsRequest(WireStruct, frozen=True, gc=False):
    """Clear Event Records (0101h), CXL r3.1 8.2.9.2.3.

    `clear_all` is legal only after an overflow; the handles are the oldest ones, in temporal order.
    """

    log: EventLog
    handles: tuple[int, ...] = ()
    clear_all: bool = False


@wire(size=0)
class GetEventInterruptPolicyRequest(WireStruct, frozen=True, gc=False):
    """Get Event Interrupt Policy (0102h), CXL r3.1 8.2.9.2.4."""


_POLICY = (
    u8(0x00, "informational"),
    u8(0x01, "warning"),
    u8(0x02, "failure"),
    u8(0x03, "fatal"),
    optional_u8(0x04, "dynamic_capacity"),
)


@wire(*_POLICY, size=4)
class GetEventInterruptPolicyResponse(WireStruct, frozen=True, gc=False):
    """Get Event Interrupt Policy response (0102h), CXL r3.1 8.2.9.2.4.

    Each byte: bits 1:0 are 0 none, 1 MSI/MSI-X, 2 firmware; bits 7:4 the message number.
    `dynamic_capacity` is None where the payload has four bytes (devices without dynamic capacity).
    """

    informational: int = 0
    warning: int = 0
    failure: int = 0
    fatal: int = 0
    dynamic_capacity: int | None = None


@wire(*_POLICY, size=4)
class SetEventInterruptPolicyRequest(WireStruct, frozen=True, gc=False):
    """Set Event Interrupt Policy (0103h), CXL r3.1 8.2.9.2.5: four bytes, or five with
    `dynamic_capacity`.
    """

    informational: int = 0
    warning: int = 0
    failure: int = 0
    fatal: int = 0
    dynamic_capacity: int | None = None


@wire(u16(0x00, "events"), size=2)
class EventNotification(WireStruct, frozen=True, gc=False):
    """Event Notification (0106h), CXL r3.1 8.2.9.2.8: sent by the device, never answered.

    Bits 0 to 4 are the logs of EventLog that went from empty to not empty; bit 15 background
    completion.
    """

    events: int

    def has(self, log: EventLog) -> bool:
        """Whether this log has records."""
        return bool(self.events >> log & 1)


# -- logs ------------------------------------------------------------------------------------------


@wire(size=0)
class GetSupportedLogsRequest(WireStruct, frozen=True, gc=False):
    """Get Supported Logs (0400h), CXL r3.1 8.2.9.5.1."""


@wire(raw(0x00, "identifier", 16), u32(0x10, "size_bytes"), size=20)
class SupportedLog(WireStruct, frozen=True, gc=False):
    """An entry of Get Supported Logs, 20 bytes (CXL r3.1 8.2.9.5.1)."""

    identifier: bytes
    size_bytes: int


@wire(
    count(0x00, 2, "logs"),
    reserved(0x02, 6),
    array(0x08, "logs", SupportedLog),
    size=8,
)
class GetSupportedLogsResponse(WireStruct, frozen=True):
    """Get Supported Logs response (0400h), CXL r3.1 8.2.9.5.1."""

    logs: tuple[SupportedLog, ...]


@wire(
    raw(0x00, "identifier", 16),
    u32(0x10, "offset"),
    u32(0x14, "length_bytes"),
    size=24,
)
class GetLogRequest(WireStruct, frozen=True, gc=False):
    """Get Log (0401h), CXL r3.1 8.2.9.5.2."""

    identifier: bytes
    offset: int
    length_bytes: int


@wire(rest(0x00, "data"), size=0)
class GetLogResponse(WireStruct, frozen=True, gc=False):
    """Get Log response (0401h), CXL r3.1 8.2.9.5.2: the bytes of the log that were asked for."""

    data: bytes


@wire(u16(0x00, "opcode"), u16(0x02, "effects"), size=4)
class CelEntry(WireStruct, frozen=True, gc=False):
    """An entry of the Command Effects Log, 4 bytes (CXL r3.1 8.2.9.5.2.1); `effects` as in
    cci.Effect.
    """

    opcode: int
    effects: int


# -- Identify Memory Device ------------------------------------------------------------------------


@wire(size=0)
class IdentifyMemoryDeviceRequest(WireStruct, frozen=True, gc=False):
    """Identify Memory Device (4000h), CXL r3.1 8.2.9.9.1.1."""


@wire(
    raw(0x00, "firmware_revision", 16),
    u64(0x10, "total_bytes", scale=CAPACITY_UNIT_BYTES),
    u64(0x18, "volatile_bytes", scale=CAPACITY_UNIT_BYTES),
    u64(0x20, "persistent_bytes", scale=CAPACITY_UNIT_BYTES),
    u64(0x28, "partition_alignment_bytes", scale=CAPACITY_UNIT_BYTES),
    u16(0x30, "informational_log_records"),
    u16(0x32, "warning_log_records"),
    u16(0x34, "failure_log_records"),
    u16(0x36, "fatal_log_records"),
    u32(0x38, "lsa_bytes"),
    u24(0x3C, "poison_records_max"),
    u16(0x3F, "inject_poison_max"),
    u8(0x41, "poison_capabilities"),
    u8(0x42, "qos_capabilities"),
    u16(0x43, "dynamic_capacity_log_records"),
    size=0x45,
)
class IdentifyMemoryDeviceResponse(WireStruct, frozen=True, gc=False):
    """Identify Memory Device response (4000h), CXL r3.1 8.2.9.9.1.1.

    Capacities leave out dynamic capacity. Log sizes are numbers of records.
    """

    firmware_revision: bytes
    total_bytes: int = 0
    volatile_bytes: int = 0
    persistent_bytes: int = 0
    partition_alignment_bytes: int = 0
    informational_log_records: int = 0
    warning_log_records: int = 0
    failure_log_records: int = 0
    fatal_log_records: int = 0
    lsa_bytes: int = 0
    poison_records_max: int = 0
    inject_poison_max: int = 0
    poison_capabilities: int = 0
    qos_capabilities: int = 0
    dynamic_capacity_log_records: int = 0
