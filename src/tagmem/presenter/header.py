"""The header that makes a stock guest kernel show a tag: a DAX device whose UUID is the tag.

Linux looks 4 KiB into persistent memory for a `struct nd_pfn_sb` (drivers/nvdimm/pfn_devs.c); a
valid one gives a DAX device without any command in the guest, and its UUID stands in sysfs. The
kernel says nothing of a wrong one: a bad checksum gives a raw /dev/pmem, so what is written here is
parsed back by the tests. The header takes 2 MiB in front of the bytes, which start at offset 0 of
the DAX device; it is never part of the capacity.

The format has no way to say *read-only*. A window for a read-only sharer is read-only where the
memory is mapped, and its header is the same.
"""

from __future__ import annotations

import struct

import msgspec

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import NIL_TAG, Tag, parse_tag, tag_from_bytes, tag_to_bytes
from tagmem.base.limits import DAX_ALIGN_BYTES
from tagmem.base.units import KIB, Bytes
from tagmem.wire.nd_pfn import DaxInfo

SIGNATURE = b"NVDIMM_DAX_INFO\0"
HEADER_AT = 4 * KIB
"""From the start of the device's memory."""
HEADER_SIZE = 4 * KIB
DATA_AT = DAX_ALIGN_BYTES
"""Where the bytes begin: what precedes is the header's room."""
_CHECKSUM_AT = HEADER_SIZE - 8
_WORDS = struct.Struct(f"<{HEADER_SIZE // 4}I")
_MODE_RAM = 1
"""Page structures are kept in RAM, so that they take nothing of the memory itself."""
_PAGE_BYTES = 4 * KIB
_PAGE_STRUCT_BYTES = 64
_VERSION = (1, 4)
_CUT_MAX = (1 << 32) - DAX_ALIGN_BYTES
"""The largest multiple of the alignment in the header's 32-bit fields."""


class Placement(msgspec.Struct, frozen=True):
    """Where the bytes lie in the device's memory, as the header can say it."""

    start_pad: Bytes
    data_offset: Bytes
    """From the end of the pad."""
    end_trunc: Bytes

    @property
    def data_at(self) -> Bytes:
        """From the start of the device's memory."""
        return self.start_pad + self.data_offset


class DaxHeader(msgspec.Struct, frozen=True):
    """What a valid header says."""

    tag: Tag
    data_at: Bytes
    data_bytes: Bytes
    end_trunc: Bytes


def place(device_bytes: Bytes, memory_bytes: Bytes) -> Placement:
    """Where the bytes of a device lie whose memory is larger than header and bytes.

    What is cut off at the end or padded at the start costs the guest nothing, but both are 32-bit
    numbers; what is left over lies between header and bytes, and the guest's kernel keeps page
    structures for it (1/64 of it). Raises InvalidInput for sizes that no DAX device has.
    """
    for name, value in (("device_bytes", device_bytes), ("memory_bytes", memory_bytes)):
        if value % DAX_ALIGN_BYTES or value <= DATA_AT:
            limit = f"a multiple of {DAX_ALIGN_BYTES} above {DATA_AT}"
            raise InvalidInput(name, limit, value)
    left = memory_bytes - device_bytes
    if left < 0:
        raise InvalidInput("memory_bytes", f"at least {device_bytes}", memory_bytes)
    end_trunc = min(left, _CUT_MAX)
    start_pad = min(left - end_trunc, _CUT_MAX)
    return Placement(start_pad, DATA_AT + left - end_trunc - start_pad, end_trunc)


def fletcher64(data: bytes) -> int:
    """The kernel's checksum (nd_fletcher64) of 4 KiB: over 32-bit words, the sums not reduced."""
    low = high = 0
    for word in _WORDS.unpack(data):
        low = (low + word) & 0xFFFFFFFF
        high += low
    return (high & 0xFFFFFFFF) << 32 | low


def dax_header(tag: str, device_bytes: Bytes, memory_bytes: Bytes = 0) -> bytes:
    """The 4 KiB at HEADER_AT of a device of `device_bytes`, header room included.

    `memory_bytes` is what the guest sees of memory where that is more. Raises InvalidInput for
    sizes without data, or that no DAX device has, and for no tag.
    """
    at = place(device_bytes, memory_bytes or device_bytes)
    info = DaxInfo(
        signature=SIGNATURE,
        uuid=tag_to_bytes(parse_tag(tag)),
        parent_uuid=bytes(16),
        flags=0,
        version_major=_VERSION[0],
        version_minor=_VERSION[1],
        data_offset=at.data_offset,
        page_count=(device_bytes - DATA_AT) // _PAGE_BYTES,
        mode=_MODE_RAM,
        start_pad=at.start_pad,
        end_trunc=at.end_trunc,
        align_bytes=DAX_ALIGN_BYTES,
        page_bytes=_PAGE_BYTES,
        page_struct_bytes=_PAGE_STRUCT_BYTES,
    )
    body = info.encode().ljust(HEADER_SIZE, b"\0")
    return body[:_CHECKSUM_AT] + fletcher64(body).to_bytes(8, "little")


def parse_dax_header(data: bytes) -> DaxHeader:
    """What a header says, if the kernel would believe it. Raises InvalidInput.

    The kernel takes other shapes as well (fsdax, other alignments); those are not ours.
    """
    if len(data) != HEADER_SIZE:
        raise InvalidInput("header bytes", str(HEADER_SIZE), len(data))
    info, _ = DaxInfo.decode_prefix(data)
    if info.signature != SIGNATURE:
        raise InvalidInput("signature", repr(SIGNATURE), info.signature)
    told = int.from_bytes(data[_CHECKSUM_AT:], "little")
    summed = fletcher64(data[:_CHECKSUM_AT] + bytes(8))
    if told != summed:
        raise InvalidInput("checksum", f"{summed:#018x}", f"{told:#018x}")
    version = (info.version_major, info.version_minor)
    for name, limit, value in (
        ("version", _VERSION, version),
        ("mode", _MODE_RAM, info.mode),
        ("align_bytes", DAX_ALIGN_BYTES, info.align_bytes),
        ("page_bytes", _PAGE_BYTES, info.page_bytes),
    ):
        if value != limit:
            raise InvalidInput(name, str(limit), value)
    for name, value in (
        ("data_offset", info.data_offset),
        ("start_pad", info.start_pad),
        ("end_trunc", info.end_trunc),
    ):
        if value % DAX_ALIGN_BYTES:
            raise InvalidInput(name, f"a multiple of {DAX_ALIGN_BYTES}", value)
    tag = tag_from_bytes(info.uuid)
    if tag == NIL_TAG:
        raise InvalidInput("uuid", "a tag", tag)
    data_at = info.start_pad + info.data_offset
    return DaxHeader(tag, data_at, info.page_count * _PAGE_BYTES, info.end_trunc)
