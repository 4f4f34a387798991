"""The host's side of dynamic capacity: commands 4800h to 4803h on a logical device's mailbox.

Source: CXL r3.1 8.2.9.9.9.1 to 8.2.9.9.9.4 (r3.2: 8.2.10.9.9.x).
"""

from __future__ import annotations

from tagmem.wire.extent import UpdatedExtent, WireExtent
from tagmem.wire.fields import array, bits, count, flag, reserved, u8, u32, u64
from tagmem.wire.layout import WireStruct, wire

DECODE_UNIT_BYTES = 256 << 20
"""The decode length of a region is given in units of 256 MiB on the wire, in bytes here."""


@wire(u8(0x00, "regions_wanted"), u8(0x01, "first_region"), size=2)
class GetDcConfigurationRequest(WireStruct, frozen=True, gc=False):
    """Get Dynamic Capacity Configuration (4800h), CXL r3.1 8.2.9.9.9.1."""

    regions_wanted: int = 8
    first_region: int = 0


@wire(
    u64(0x00, "base_dpa"),
    u64(0x08, "decode_length_bytes", scale=DECODE_UNIT_BYTES),
    u64(0x10, "length_bytes"),
    u64(0x18, "block_bytes"),
    u32(0x20, "dsmad_handle"),
    bits(0x24, 1, flag("sanitise_on_release", 0)),
    reserved(0x25, 3),
    size=40,
)
class DcRegion(WireStruct, frozen=True, gc=False):
    """A region as the host sees it in 4800h, 40 bytes (CXL r3.1 8.2.9.9.9.1).

    On the wire the decode length is in units of 256 MiB and the length in bytes; here both are
    bytes.
    """

    base_dpa: int
    decode_length_bytes: int
    length_bytes: int
    block_bytes: int
    dsmad_handle: int = 0
    sanitise_on_release: bool = False


@wire(
    u8(0x00, "regions_available"),
    count(0x01, 1, "regions"),
    reserved(0x02, 6),
    array(0x08, "regions", DcRegion),
    u32(None, "extents_supported"),
    u32(None, "extents_available"),
    u32(None, "tags_supported"),
    u32(None, "tags_available"),
    size=24,
)
class GetDcConfigurationResponse(WireStruct, frozen=True):
    """Get Dynamic Capacity Configuration response (4800h), CXL r3.1 8.2.9.9.9.1.

    The four counts follow the last region that is returned (libcxlmi's structure has them
    elsewhere).
    """

    regions_available: int
    regions: tuple[DcRegion, ...]
    extents_supported: int = 0
    extents_available: int = 0
    tags_supported: int = 0
    tags_available: int = 0


@wire(u32(0x00, "extents_wanted"), u32(0x04, "first_extent"), size=8)
class GetDcExtentListRequest(WireStruct, frozen=True, gc=False):
    """Get Dynamic Capacity Extent List (4801h), CXL r3.1 8.2.9.9.9.2. Zero wanted gives only the
    counts.
    """

    extents_wanted: int
    first_extent: int = 0


@wire(
    count(0x00, 4, "extents"),
    u32(0x04, "extents_total"),
    u32(0x08, "generation"),
    reserved(0x0C, 4),
    array(0x10, "extents", WireExtent),
    size=16,
)
class GetDcExtentListResponse(WireStruct, frozen=True):
    """Get Dynamic Capacity Extent List response (4801h), CXL r3.1 8.2.9.9.9.2.

    A reader of pages starts again when `generation` or `extents_total` moved.
    """

    extents: tuple[WireExtent, ...]
    extents_total: int
    generation: int


_UPDATED = (
    count(0x00, 4, "extents"),
    bits(0x04, 1, flag("more", 0)),
    reserved(0x05, 3),
    array(0x08, "extents", UpdatedExtent),
)


@wire(*_UPDATED, size=8)
class AddDcResponseRequest(WireStruct, frozen=True):
    """Add Dynamic Capacity Response (4802h), CXL r3.1 8.2.9.9.9.3: the host's answer to one group
    of offers.

    No extents: the group is refused. `more`: further 4802h follow for the same group. No output
    payload.
    """

    extents: tuple[UpdatedExtent, ...]
    more: bool = False


@wire(*_UPDATED, size=8)
class ReleaseDcRequest(WireStruct, frozen=True):
    """Release Dynamic Capacity (4803h), CXL r3.1 8.2.9.9.9.4. No output payload."""

    extents: tuple[UpdatedExtent, ...]
    more: bool = False
