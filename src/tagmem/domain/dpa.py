"""Between a pool's media offsets and one host's device physical addresses, so that only the borders
see DPAs.
"""

from __future__ import annotations

from tagmem.base.units import Dpa, MediaOffset
from tagmem.domain.records import Extent, LdRecord, RegionRecord


def to_dpa(ld: LdRecord, region: RegionRecord, extent: Extent) -> Dpa:
    """Where `extent` begins for the host behind `ld`. Raises ValueError for what lies outside the
    region.
    """
    if extent.start < 0 or extent.end > region.size_bytes:
        raise ValueError(f"extent must lie in {region.size_bytes} bytes, ends at {extent.end}")
    base = ld.bases[region.index]
    if ld.mirrored:
        return Dpa(base + region.size_bytes - extent.start - extent.length)
    return Dpa(base + extent.start)


def from_dpa(ld: LdRecord, region: RegionRecord, start: Dpa, length: int) -> Extent:
    """The media behind `length` bytes from `start`. Raises ValueError for what lies outside the
    region.
    """
    offset = start - ld.bases[region.index]
    if length <= 0 or offset < 0 or offset + length > region.size_bytes:
        raise ValueError(
            f"range must lie in region {region.index} of {region.size_bytes} bytes, "
            f"got {length} bytes from {start:#x}"
        )
    if ld.mirrored:
        offset = region.size_bytes - offset - length
    return Extent(MediaOffset(offset), length)


def region_at(ld: LdRecord, regions: tuple[RegionRecord, ...], start: Dpa) -> RegionRecord | None:
    """The region in which an address lies for one LD, or None."""
    for region in regions:
        if region.index < len(ld.bases):
            base = ld.bases[region.index]
            if base <= start < base + region.size_bytes:
                return region
    return None
