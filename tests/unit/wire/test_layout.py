"""The codec's own rules: tables that contradict themselves, and values that no table can encode."""

from __future__ import annotations

from typing import Any

import pytest

from tagmem.base.errors import InvalidInput
from tagmem.wire.cci import Category, CciMessage
from tagmem.wire.extent import WireExtent
from tagmem.wire.fields import array, bit, bits, count, reserved, u8, u16, u32
from tagmem.wire.fmapi import (
    GetDcdInfoResponse,
    GetLdAllocationsRequest,
    GetMultiHeadedInfoResponse,
    InitiateDcAddRequest,
    InitiateDcReleaseRequest,
    RemovalPolicy,
    SelectionPolicy,
    bitmap_from_lds,
    lds_from_bitmap,
)
from tagmem.wire.generic import (
    DYNAMIC_CAPACITY_UUID,
    DcEventType,
    DynamicCapacityRecord,
    EventHeader,
    EventLog,
    EventNotification,
    GetEventRecordsRequest,
    GetEventRecordsResponse,
    IdentifyMemoryDeviceResponse,
    OtherEventRecord,
)
from tagmem.wire.layout import BadValue, LayoutError, WireStruct, WrongSize, wire
from tagmem.wire.memdev import AddDcResponseRequest, DcRegion

MIB_256 = 256 << 20


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        ((u8(0, "a"), u16(2, "b")), 3),  # a hole
        ((u8(0, "a"), u16(0, "b")), 3),  # an overlap
        ((u8(0, "a"), u16(1, "b")), 4),  # a wrong size
        ((u8(0, "a"),), 1),  # an attribute without a line
        ((u8(0, "a"), u8(1, "b"), u8(2, "c")), 3),  # a line without an attribute
        ((u8(0, "a"), u8(1, "a"), u8(2, "b")), 3),  # a line twice
    ],
)
def test_a_table_that_contradicts_its_class_is_refused(lines: Any, size: int) -> None:
    class Pair(WireStruct, frozen=True):
        a: int
        b: int

    with pytest.raises(LayoutError):
        wire(*lines, size=size)(Pair)


def test_a_fixed_part_between_variable_parts_is_refused() -> None:
    class Lists(WireStruct, frozen=True):
        a: tuple[WireExtent, ...]
        b: tuple[WireExtent, ...]

    lines = (
        count(0, 1, "a"),
        array(1, "a", WireExtent),
        count(None, 1, "b"),
        array(None, "b", WireExtent),
    )
    with pytest.raises(LayoutError):
        wire(*lines, size=2)(Lists)


@pytest.mark.parametrize("members", [(bit("a", 0, 4), bit("b", 3, 2)), (bit("a", 4, 5),)])
def test_bits_that_overlap_or_lie_outside_are_refused(members: Any) -> None:
    with pytest.raises(LayoutError):
        bits(0, 1, *members)


def test_arrays_of_variable_structures_are_refused() -> None:
    with pytest.raises(LayoutError):
        array(0, "messages", CciMessage)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: WireExtent(-1, 0), "start_dpa", -1),
        (lambda: WireExtent(1 << 64, 0), "start_dpa", 1 << 64),
        (lambda: WireExtent(0, 1 << 64), "length_bytes", 1 << 64),
        (lambda: WireExtent(0, 0, b"short"), "tag", b"short"),
        (lambda: WireExtent(0, 0, sequence=65_536), "sequence", 65_536),
        (lambda: WireExtent("0", 0), "start_dpa", "0"),  # type: ignore[arg-type]  # on purpose
        (lambda: EventNotification(65_536), "events", 65_536),
        (lambda: EventHeader(handle=65_536), "handle", 65_536),
        (lambda: EventHeader(1, permanent=2), "permanent", 2),  # type: ignore[arg-type]  # wrong
        (lambda: GetEventRecordsRequest(9), "log", 9),  # type: ignore[arg-type]  # on purpose
        (lambda: GetLdAllocationsRequest(0, 0), "lds_max", 0),
        (lambda: DcRegion(0, MIB_256 + 1, 0, 64), "decode_length_bytes", MIB_256 + 1),
        (lambda: DcRegion(0, MIB_256 << 64, 0, 64), "decode_length_bytes", MIB_256 << 64),
        (
            lambda: IdentifyMemoryDeviceResponse(bytes(16), poison_records_max=1 << 24),
            "poison_records_max",
            1 << 24,
        ),
        (lambda: GetDcdInfoResponse(1, 1, 1, 1, 0, (0,) * 7), "block_size_masks", (0,) * 7),
        (lambda: GetMultiHeadedInfoResponse(1, 1, 0, (256,)), "ld_map", 256),
        (lambda: GetMultiHeadedInfoResponse(1, 1, 0, (0,) * 256), "ld_map length", 256),
        (lambda: CciMessage(Category.REQUEST, 256, 0), "tag", 256),
        (lambda: CciMessage(Category.REQUEST, 0, 0, bytes(65_537)), "payload bytes", 65_537),
        (
            lambda: InitiateDcAddRequest(0, SelectionPolicy.FREE, extents=(WireExtent(0, 64),)),
            "extents",
            "1 items",
        ),
    ],
)
def test_what_cannot_be_encoded_cannot_be_made(make: Any, field: str, value: object) -> None:
    with pytest.raises(BadValue) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.limit
    assert caught.value.value == value
    assert isinstance(caught.value, InvalidInput)
    assert isinstance(caught.value, ValueError)


def test_unknown_enumeration_values_name_what_is_known() -> None:
    with pytest.raises(BadValue) as caught:
        GetEventRecordsRequest.decode(b"\x05")
    assert caught.value.field == "log"
    assert "4 dynamic_capacity" in caught.value.limit
    assert caught.value.value == 5


def test_a_count_that_promises_more_than_there_is_reads_nothing() -> None:
    with pytest.raises(WrongSize) as caught:
        AddDcResponseRequest.decode(b"\xff\xff\xff\xff" + bytes(4 + 24))
    assert caught.value.field == "extents"


def test_reserved_bytes_are_reported_with_their_offset() -> None:
    extent = bytearray(WireExtent(0, 64).encode())
    extent[0x25] = 1
    assert WireExtent.LAYOUT.reserved_nonzero(extent) == (0x25,)
    request = bytearray(
        InitiateDcReleaseRequest(
            0, RemovalPolicy.PRESCRIPTIVE, extents=(WireExtent(0, 64), WireExtent(64, 64))
        ).encode()
    )
    request[0x02] |= 0x80
    request[0x03] = 7
    request[0x20 + 40 + 0x22] = 1
    assert InitiateDcReleaseRequest.LAYOUT.reserved_nonzero(request) == (2, 3, 0x20 + 40 + 0x22)


class TestOptionalExtentList:
    """5604h and 5605h have an extent count only when prescriptive; some senders always have it."""

    def test_a_zero_count_where_none_belongs_is_tolerated(self) -> None:
        value = InitiateDcAddRequest(1, SelectionPolicy.CONTIGUOUS, 0, 64, b"t" * 16)
        assert len(value.encode()) == 0x1C
        assert InitiateDcAddRequest.decode(value.encode() + bytes(4)) == value

    def test_another_count_where_none_belongs_is_refused(self) -> None:
        value = InitiateDcAddRequest(1, SelectionPolicy.CONTIGUOUS, 0, 64, b"t" * 16)
        with pytest.raises(BadValue) as caught:
            InitiateDcAddRequest.decode(value.encode() + b"\1\0\0\0")
        assert (caught.value.field, caught.value.value) == ("extents", 1)

    def test_a_missing_count_where_it_belongs_is_refused(self) -> None:
        data = InitiateDcAddRequest(1, SelectionPolicy.PRESCRIPTIVE).encode()
        assert len(data) == 0x20
        with pytest.raises(WrongSize):
            InitiateDcAddRequest.decode(data[:0x1C])


def test_bitmaps_of_logical_devices() -> None:
    assert lds_from_bitmap(bitmap_from_lds([255, 0, 9])) == (0, 9, 255)
    with pytest.raises(BadValue):
        bitmap_from_lds([256])


def test_log_bits_of_a_notification() -> None:
    assert EventNotification(0x10).has(EventLog.DYNAMIC_CAPACITY)
    assert not EventNotification(0x10).has(EventLog.FATAL)


def test_values_are_frozen_and_hashable() -> None:
    extent = WireExtent(0, 64)
    with pytest.raises(AttributeError):
        extent.length_bytes = 1  # type: ignore[misc]  # the mistake to find
    assert len({extent, WireExtent(0, 64)}) == 1
    assert extent.encode()[:8] == bytes(8)


def test_parts_may_stand_behind_reserved_bytes() -> None:
    @wire(reserved(0, 3), u8(3, "a"), reserved(4, 4), u32(8, "b"), size=12)
    class Padded(WireStruct, frozen=True):
        a: int
        b: int

    assert Padded(1, 2).encode() == bytes.fromhex("000000010000000002000000")
    assert Padded.decode(bytes.fromhex("ffffff01ffffffff02000000")) == Padded(1, 2)


def test_a_record_of_a_later_revision_does_not_hide_the_others() -> None:
    known = DynamicCapacityRecord(EventHeader(1), DcEventType.ADD_CAPACITY)
    data = bytearray(GetEventRecordsResponse((known, known)).encode())
    data[0x20 + 0x30] = 9
    strange, same = GetEventRecordsResponse.decode(data).records
    assert same == known
    assert isinstance(strange, OtherEventRecord)
    assert strange.header.identifier == DYNAMIC_CAPACITY_UUID
    assert strange.data[0] == 9


def test_a_dynamic_capacity_record_has_its_own_identifier() -> None:
    with pytest.raises(BadValue):
        DynamicCapacityRecord(EventHeader(1, identifier=bytes(16)), DcEventType.ADD_CAPACITY)
