"""The header in which Linux keeps how a DAX device lies in persistent memory, and its UUID.

A stock kernel makes a DAX device of memory that begins with it (4 KiB at offset 4096: signature
NVDIMM_DAX_INFO, struct nd_pfn_sb of drivers/nvdimm/pfn.h) and shows the UUID in sysfs. This is the
part that says something; `presenter/header` pads it and sums it up.
"""

from __future__ import annotations

from tagmem.wire.fields import raw, u16, u32, u64
from tagmem.wire.layout import WireStruct, wire


@wire(
    raw(0x00, "signature", 16),
    raw(0x10, "uuid", 16),
    raw(0x20, "parent_uuid", 16),
    u32(0x30, "flags"),
    u16(0x34, "version_major"),
    u16(0x36, "version_minor"),
    u64(0x38, "data_offset"),
    u64(0x40, "page_count"),
    u32(0x48, "mode"),
    u32(0x4C, "start_pad"),
    u32(0x50, "end_trunc"),
    u32(0x54, "align_bytes"),
    u32(0x58, "page_bytes"),
    u16(0x5C, "page_struct_bytes"),
    size=94,
)
class DaxInfo(WireStruct, frozen=True, gc=False):
    """struct nd_pfn_sb, version 1.4, up to its padding; the UUID in the order in which it is
    printed.
    """

    signature: bytes
    uuid: bytes
    parent_uuid: bytes
    flags: int
    version_major: int
    version_minor: int
    data_offset: int
    page_count: int
    mode: int
    start_pad: int
    end_trunc: int
    align_bytes: int
    page_bytes: int
    page_struct_bytes: int
