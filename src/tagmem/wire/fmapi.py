"""The fabric manager's side: tunnelling, LD and multi-headed information, dynamic capacity
management.

Source: CXL r3.1/r3.2 7.6.7.3.1 (5300h), 7.6.7.4 (54xxh), 7.6.7.5 (55xxh), 7.6.7.6.1 to .9 (5600h to
5608h). "Host id" in all of them is the LD-id of the host interface.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, IntFlag

from tagmem.wire.extent import NIL_TAG_BYTES, WireExtent
from tagmem.wire.fields import (
    BadValue,
    array,
    bit,
    bits,
    blob,
    count,
    flag,
    numbers,
    optional_array,
    raw,
    repeat,
    reserved,
    u8,
    u16,
    u32,
    u64,
)
from tagmem.wire.generic import CAPACITY_UNIT_BYTES
from tagmem.wire.layout import WireStruct, wire
from tagmem.wire.memdev import DECODE_UNIT_BYTES

# -- 53xxh: tunnelling -----------------------------------------------------------------------------


class TunnelTarget(IntEnum):
    """What a tunnelled command is for."""

    PORT_OR_LD = 0
    LD_POOL_CCI = 1


@wire(
    u8(0x00, "target_id"),
    bits(0x01, 1, bit("target_type", 0, 4, TunnelTarget)),
    count(0x02, 2, "message"),
    blob(0x04, "message"),
    size=4,
)
class TunnelRequest(WireStruct, frozen=True, gc=False):
    """Tunnel Management Command (5300h), CXL r3.1 7.6.7.3.1; `message` is a whole CCI message."""

    target_id: int
    target_type: TunnelTarget
    message: bytes


@wire(count(0x00, 2, "message"), reserved(0x02, 2), blob(0x04, "message"), size=4)
class TunnelResponse(WireStruct, frozen=True, gc=False):
    """Tunnel Management Command response (5300h), CXL r3.1 7.6.7.3.1.

    The inner return code is in the inner message; the outer command succeeds even if the inner one
    failed.
    """

    message: bytes


# -- 54xxh: MLD components -------------------------------------------------------------------------


@wire(size=0)
class GetLdInfoRequest(WireStruct, frozen=True, gc=False):
    """Get LD Info (5400h), CXL r3.1 7.6.7.4.1."""


@wire(u64(0x00, "memory_bytes"), u16(0x08, "ld_count"), u8(0x0A, "qos_capabilities"), size=11)
class GetLdInfoResponse(WireStruct, frozen=True, gc=False):
    """Get LD Info response (5400h), CXL r3.1 7.6.7.4.1."""

    memory_bytes: int
    ld_count: int
    qos_capabilities: int = 0


class LdGranularity(IntEnum):
    """Unit of the ranges of Get LD Allocations."""

    MIB_256 = 0
    MIB_512 = 1
    GIB_1 = 2


@wire(u8(0x00, "first_ld"), u8(0x01, "lds_max", low=1), size=2)
class GetLdAllocationsRequest(WireStruct, frozen=True, gc=False):
    """Get LD Allocations (5401h), CXL r3.1 7.6.7.4.2."""

    first_ld: int = 0
    lds_max: int = 255


@wire(u64(0x00, "range1_units"), u64(0x08, "range2_units"), size=16)
class LdAllocation(WireStruct, frozen=True, gc=False):
    """Static memory of one LD, 16 bytes (CXL r3.1 7.6.7.4.2), in units of the granularity."""

    range1_units: int
    range2_units: int


@wire(
    u8(0x00, "ld_count"),
    u8(0x01, "granularity", LdGranularity),
    u8(0x02, "first_ld"),
    count(0x03, 1, "allocations"),
    array(0x04, "allocations", LdAllocation),
    size=4,
)
class GetLdAllocationsResponse(WireStruct, frozen=True):
    """Get LD Allocations response (5401h), CXL r3.1 7.6.7.4.2."""

    ld_count: int
    granularity: LdGranularity
    first_ld: int
    allocations: tuple[LdAllocation, ...]


# -- 55xxh: multi-headed devices -------------------------------------------------------------------

NO_HEAD = 0xFF
"""In the map of 5500h: this LD belongs to no head."""


@wire(u8(0x00, "first_ld"), u8(0x01, "lds_max", low=1), size=2)
class GetMultiHeadedInfoRequest(WireStruct, frozen=True, gc=False):
    """Get Multi-Headed Info (5500h), CXL r3.1 7.6.7.5.1."""

    first_ld: int = 0
    lds_max: int = 255


@wire(
    u8(0x00, "ld_count"),
    u8(0x01, "head_count"),
    reserved(0x02, 2),
    u8(0x04, "first_ld"),
    count(0x05, 1, "ld_map"),
    reserved(0x06, 2),
    numbers(0x08, "ld_map", 1),
    size=8,
)
class GetMultiHeadedInfoResponse(WireStruct, frozen=True, gc=False):
    """Get Multi-Headed Info response (5500h), CXL r3.1 7.6.7.5.1.

    `ld_map`: for each LD from `first_ld` up, the port number of its head, or NO_HEAD.
    """

    ld_count: int
    head_count: int
    first_ld: int
    ld_map: tuple[int, ...]


@wire(u8(0x00, "first_head"), u8(0x01, "heads_wanted"), size=2)
class GetHeadInfoRequest(WireStruct, frozen=True, gc=False):
    """Get Head Info (5501h), CXL r3.1 7.6.7.5.2."""

    first_head: int
    heads_wanted: int


@wire(
    u8(0x00, "port"),
    u8(0x01, "width_max"),
    u8(0x02, "width_negotiated"),
    u8(0x03, "speeds_supported"),
    u8(0x04, "speed_max"),
    u8(0x05, "speed_current"),
    u8(0x06, "ltssm_state"),
    u8(0x07, "first_lane"),
    u8(0x08, "link_flags"),
    size=9,
)
class HeadInfo(WireStruct, frozen=True, gc=False):
    """One head of a multi-headed device, 9 bytes (CXL r3.1 7.6.7.5.2)."""

    port: int
    width_max: int = 0
    width_negotiated: int = 0
    speeds_supported: int = 0
    speed_max: int = 0
    speed_current: int = 0
    ltssm_state: int = 0
    first_lane: int = 0
    link_flags: int = 0


@wire(count(0x00, 1, "heads"), reserved(0x01, 3), array(0x04, "heads", HeadInfo), size=4)
class GetHeadInfoResponse(WireStruct, frozen=True):
    """Get Head Info response (5501h), CXL r3.1 7.6.7.5.2."""

    heads: tuple[HeadInfo, ...]


# -- 56xxh: dynamic capacity -----------------------------------------------------------------------


class SelectionPolicy(IntEnum):
    """How the device chooses the extents of an add (5604h)."""

    FREE = 0
    CONTIGUOUS = 1
    PRESCRIPTIVE = 2
    ENABLE_SHARED_ACCESS = 3


class RemovalPolicy(IntEnum):
    """What a release names (5605h)."""

    TAG_BASED = 0
    PRESCRIPTIVE = 1


class RegionAttribute(IntFlag):
    """Attributes of a region in 5601h; the bits of CDAT's DSMAS flags."""

    NONE = 0
    NON_VOLATILE = 1 << 2
    SHARABLE = 1 << 3
    HARDWARE_COHERENT = 1 << 4
    INTERCONNECT_SPECIFIC = 1 << 5
    READ_ONLY = 1 << 6


@wire(size=0)
class GetDcdInfoRequest(WireStruct, frozen=True, gc=False):
    """Get DCD Info (5600h), CXL r3.1 7.6.7.6.1."""


@wire(
    u8(0x00, "host_count"),
    u8(0x01, "region_count"),
    reserved(0x02, 2),
    u16(0x04, "add_policies"),
    reserved(0x06, 2),
    u16(0x08, "removal_policies"),
    u8(0x0A, "sanitise_configurable"),
    reserved(0x0B, 1),
    u64(0x0C, "capacity_bytes", scale=CAPACITY_UNIT_BYTES),
    repeat(0x14, "block_size_masks", 8, 8),
    size=0x54,
)
class GetDcdInfoResponse(WireStruct, frozen=True):
    """Get DCD Info response (5600h), CXL r3.1 7.6.7.6.1.

    `add_policies`: bit n is SelectionPolicy n (bit 3, shared access, is never advertised here).
    `removal_policies`: bit n is RemovalPolicy n. `sanitise_configurable`: bit n for region n.
    `block_size_masks`: per region, bit n means that blocks of 2**n bytes are possible.
    """

    host_count: int
    region_count: int
    add_policies: int
    removal_policies: int
    capacity_bytes: int
    block_size_masks: tuple[int, ...]
    sanitise_configurable: int = 0


@wire(
    u16(0x00, "host_id"),
    u8(0x02, "regions_wanted"),
    u8(0x03, "first_region"),
    size=4,
)
class GetHostDcRegionConfigurationRequest(WireStruct, frozen=True, gc=False):
    """Get Host DC Region Configuration (5601h), CXL r3.1 7.6.7.6.2."""

    host_id: int
    regions_wanted: int = 8
    first_region: int = 0


@wire(
    u64(0x00, "base_dpa"),
    u64(0x08, "decode_length_bytes", scale=DECODE_UNIT_BYTES),
    u64(0x10, "length_bytes"),
    u64(0x18, "block_bytes"),
    u8(0x20, "attributes"),
    reserved(0x21, 3),
    bits(0x24, 1, flag("sanitise_on_release", 0)),
    reserved(0x25, 3),
    size=40,
)
class HostDcRegion(WireStruct, frozen=True, gc=False):
    """A region of one host as the fabric manager sees it in 5601h, 40 bytes (CXL r3.1 7.6.7.6.2).

    `attributes` as in RegionAttribute. Both lengths are bytes here; the decode length is scaled on
    the wire.
    """

    base_dpa: int
    decode_length_bytes: int
    length_bytes: int
    block_bytes: int
    attributes: int = 0
    sanitise_on_release: bool = False


@wire(
    u16(0x00, "host_id"),
    u8(0x02, "regions_available"),
    count(0x03, 1, "regions"),
    array(0x04, "regions", HostDcRegion),
    u32(None, "extents_supported"),
    u32(None, "extents_available"),
    u32(None, "tags_supported"),
    u32(None, "tags_available"),
    size=20,
)
class GetHostDcRegionConfigurationResponse(WireStruct, frozen=True):
    """Get Host DC Region Configuration response (5601h), CXL r3.1 7.6.7.6.2."""

    host_id: int
    regions_available: int
    regions: tuple[HostDcRegion, ...]
    extents_supported: int = 0
    extents_available: int = 0
    tags_supported: int = 0
    tags_available: int = 0


_REGION_SETTING = (
    u8(0x00, "region"),
    reserved(0x01, 3),
    u64(0x04, "block_bytes"),
    bits(0x0C, 1, flag("sanitise_on_release", 0)),
    reserved(0x0D, 3),
)


@wire(*_REGION_SETTING, size=16)
class SetDcRegionConfigurationRequest(WireStruct, frozen=True, gc=False):
    """Set DC Region Configuration (5602h), CXL r3.1 7.6.7.6.3."""

    region: int
    block_bytes: int
    sanitise_on_release: bool = False


@wire(*_REGION_SETTING, size=16)
class SetDcRegionConfigurationResponse(WireStruct, frozen=True, gc=False):
    """Set DC Region Configuration response (5602h), CXL r3.1 7.6.7.6.3.

    The specification titles this layout request and response; QEMU sends no payload, so NoPayload
    is accepted in its place.
    """

    region: int
    block_bytes: int
    sanitise_on_release: bool = False


@wire(
    u16(0x00, "host_id"),
    reserved(0x02, 2),
    u32(0x04, "extents_wanted"),
    u32(0x08, "first_extent"),
    size=12,
)
class GetDcRegionExtentListsRequest(WireStruct, frozen=True, gc=False):
    """Get DC Region Extent Lists (5603h), CXL r3.1 7.6.7.6.4."""

    host_id: int
    extents_wanted: int
    first_extent: int = 0


@wire(
    u16(0x00, "host_id"),
    reserved(0x02, 2),
    u32(0x04, "first_extent"),
    count(0x08, 4, "extents"),
    u32(0x0C, "extents_total"),
    u32(0x10, "generation"),
    reserved(0x14, 4),
    array(0x18, "extents", WireExtent),
    size=24,
)
class GetDcRegionExtentListsResponse(WireStruct, frozen=True):
    """Get DC Region Extent Lists response (5603h), CXL r3.1 7.6.7.6.4.

    A reader of pages starts again when `generation` or `extents_total` moved.
    """

    host_id: int
    first_extent: int
    extents: tuple[WireExtent, ...]
    extents_total: int
    generation: int


@wire(
    u16(0x00, "host_id"),
    bits(0x02, 1, bit("policy", 0, 4, SelectionPolicy)),
    u8(0x03, "region"),
    u64(0x04, "length_bytes"),
    raw(0x0C, "tag", 16),
    optional_array(0x1C, "extents", WireExtent, "policy", SelectionPolicy.PRESCRIPTIVE),
    size=28,
)
class InitiateDcAddRequest(WireStruct, frozen=True):
    """Initiate Dynamic Capacity Add (5604h), CXL r3.1 7.6.7.6.5. No output payload.

    Prescriptive adds use `extents` (each with its own tag) and leave region, length and tag zero;
    the others have no extent list at all, though a zero count is tolerated when read. Success means
    that the add was started, not that the host took it.
    """

    host_id: int
    policy: SelectionPolicy
    region: int = 0
    length_bytes: int = 0
    tag: bytes = NIL_TAG_BYTES
    extents: tuple[WireExtent, ...] = ()


@wire(
    u16(0x00, "host_id"),
    bits(0x02, 1, bit("policy", 0, 4, RemovalPolicy), flag("forced", 4), flag("sanitise", 5)),
    reserved(0x03, 1),
    u64(0x04, "length_bytes"),
    raw(0x0C, "tag", 16),
    optional_array(0x1C, "extents", WireExtent, "policy", RemovalPolicy.PRESCRIPTIVE),
    size=28,
)
class InitiateDcReleaseRequest(WireStruct, frozen=True):
    """Initiate Dynamic Capacity Release (5605h), CXL r3.1 7.6.7.6.6. No output payload."""

    host_id: int
    policy: RemovalPolicy
    forced: bool = False
    sanitise: bool = False
    length_bytes: int = 0
    tag: bytes = NIL_TAG_BYTES
    extents: tuple[WireExtent, ...] = ()


@wire(raw(0x00, "tag", 16), size=16)
class DcAddReferenceRequest(WireStruct, frozen=True, gc=False):
    """Dynamic Capacity Add Reference (5606h), CXL r3.1 7.6.7.6.7. No output payload."""

    tag: bytes


@wire(raw(0x00, "tag", 16), size=16)
class DcRemoveReferenceRequest(WireStruct, frozen=True, gc=False):
    """Dynamic Capacity Remove Reference (5607h), CXL r3.1 7.6.7.6.8. No output payload."""

    tag: bytes


@wire(u32(0x00, "first_tag"), u32(0x04, "tags_max"), size=8)
class DcListTagsRequest(WireStruct, frozen=True, gc=False):
    """Dynamic Capacity List Tags (5608h), CXL r3.1 7.6.7.6.9. Zero `tags_max` gives only the
    counts.
    """

    first_tag: int
    tags_max: int


@wire(
    raw(0x00, "tag", 16),
    bits(0x10, 1, flag("fm_reference", 0)),
    reserved(0x11, 3),
    raw(0x14, "reference_bitmap", 32),
    raw(0x34, "pending_bitmap", 32),
    size=84,
)
class DcTagInfo(WireStruct, frozen=True, gc=False):
    """A tag and who has it, 84 bytes (CXL r3.1 7.6.7.6.9): one bit per LD that holds it or has it
    pending.
    """

    tag: bytes
    fm_reference: bool = False
    reference_bitmap: bytes = bytes(32)
    pending_bitmap: bytes = bytes(32)


@wire(
    u32(0x00, "generation"),
    u32(0x04, "tags_total"),
    count(0x08, 4, "tags"),
    bits(0x0C, 1, flag("reference_valid", 0), flag("pending_valid", 1)),
    reserved(0x0D, 3),
    array(0x10, "tags", DcTagInfo),
    size=16,
)
class DcListTagsResponse(WireStruct, frozen=True):
    """Dynamic Capacity List Tags response (5608h), CXL r3.1 7.6.7.6.9."""

    generation: int
    tags_total: int
    tags: tuple[DcTagInfo, ...]
    reference_valid: bool = True
    pending_valid: bool = True


def bitmap_from_lds(lds: Iterable[int]) -> bytes:
    """The 32-byte bitmap of 5608h with these LD-ids set. Raises BadValue for ids that have no
    bit.
    """
    bitmap = 0
    for ld in lds:
        if not 0 <= ld < 256:
            raise BadValue("ld", "0 to 255", ld)
        bitmap |= 1 << ld
    return bitmap.to_bytes(32, "little")


def lds_from_bitmap(bitmap: bytes) -> tuple[int, ...]:
    """The LD-ids that are set in a bitmap of 5608h, ascending."""
    number = int.from_bytes(bitmap, "little")
    found = []
    while number:
        low = number & -number
        found.append(low.bit_length() - 1)
        number ^= low
    return tuple(found)
