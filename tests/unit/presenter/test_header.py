"""The header that shows a tag to a stock kernel: bytes seen to work, and every way to spoil it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import InvalidInput
from tagmem.base.units import GIB, MIB
from tagmem.presenter.header import (
    DATA_AT,
    HEADER_SIZE,
    dax_header,
    fletcher64,
    parse_dax_header,
    place,
)

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
UNITS = st.integers(2, 1 << 20).map(lambda n: n * 2 * MIB)


def test_the_bytes_are_those_that_a_kernel_took() -> None:
    # Of this header Linux 7.3.4 made dax0.0 with the tag as its uuid.
    header = dax_header(TAG, 512 * MIB)
    assert len(header) == HEADER_SIZE
    assert header[:16] == b"NVDIMM_DAX_INFO\0"
    assert header[16:32].hex() == TAG.replace("-", "")
    assert header[48:94].hex() == (
        "0000000001000400000020000000000000fe010000000000"
        "01000000000000000000000000002000001000004000"
    )  # fmt: skip
    assert header[94:4088] == bytes(4088 - 94)
    assert int.from_bytes(header[4088:], "little") == fletcher64(header[:4088] + bytes(8))
    digest = hashlib.sha256(header).hexdigest()
    assert digest == "ef03bea278f8c7bfefa714933cd7c1b9410294791121f08bcc8699a45840e0b4"


def test_a_sum_by_hand() -> None:
    data = b"\x01\0\0\0\x02\0\0\0" + bytes(HEADER_SIZE - 8)
    # low: 1, 3, 3, ...; high: 1, 4, 7, ...: 1 + 3 * 1023.
    assert fletcher64(data) == (1 + 3 * 1023) << 32 | 3


def test_sums_wrap() -> None:
    assert fletcher64(b"\xff" * HEADER_SIZE) >> 64 == 0


@given(st.uuids().filter(lambda u: u.int), UNITS, UNITS)
def test_what_is_written_is_read(tag: object, device_bytes: int, more: int) -> None:
    header = dax_header(str(tag), device_bytes, device_bytes + more)
    found = parse_dax_header(header)
    assert found.tag == str(tag)
    assert found.data_bytes == device_bytes - DATA_AT
    # Data and what is cut off fill the memory exactly, so that the DAX device has the tag's size.
    assert found.data_at + found.data_bytes + found.end_trunc == device_bytes + more


@given(st.integers(0, HEADER_SIZE - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, change: int) -> None:
    header = bytearray(dax_header(TAG, 64 * MIB))
    header[at] ^= change
    with pytest.raises(InvalidInput):
        parse_dax_header(bytes(header))


@given(st.binary(max_size=HEADER_SIZE + 1))
def test_any_bytes_can_be_looked_at(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_dax_header(data)


@pytest.mark.parametrize("size", [0, 2 * MIB, 2 * MIB + 4096, 63 * MIB, -2 * MIB])
def test_sizes_that_no_device_has(size: int) -> None:
    with pytest.raises(InvalidInput, match="device_bytes"):
        dax_header(TAG, size)


def test_memory_must_hold_the_device() -> None:
    with pytest.raises(InvalidInput, match="memory_bytes"):
        dax_header(TAG, 64 * MIB, 62 * MIB)


@pytest.mark.parametrize("tag", ["", "x", "00000000-0000-0000-0000-000000000000"])
def test_a_header_is_of_a_tag(tag: str) -> None:
    with pytest.raises(InvalidInput, match="tag"):
        dax_header(tag, 64 * MIB)


def test_surplus_goes_where_it_costs_nothing_first() -> None:
    small = place(62 * MIB, 64 * MIB)
    assert (small.start_pad, small.data_offset, small.end_trunc) == (0, DATA_AT, 2 * MIB)
    middle = place(5 * GIB, 11 * GIB)
    assert middle.end_trunc == 4 * GIB - 2 * MIB
    assert middle.data_offset == DATA_AT
    assert middle.data_at == 2 * GIB + 4 * MIB
    large = place(65 * GIB, 128 * GIB)
    assert large.start_pad == large.end_trunc == 4 * GIB - 2 * MIB
    assert large.data_at + 65 * GIB - DATA_AT + large.end_trunc == 128 * GIB
