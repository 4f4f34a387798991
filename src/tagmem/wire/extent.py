"""The one structure that host commands, fabric-manager commands and event records share: the
extent.
"""

from __future__ import annotations

from tagmem.wire.fields import raw, reserved, u16, u64
from tagmem.wire.layout import WireStruct, wire

NIL_TAG_BYTES = bytes(16)
"""The tag of untagged capacity."""

_U64_MAX = (1 << 64) - 1


@wire(
    u64(0x00, "start_dpa"),
    u64(0x08, "length_bytes"),
    raw(0x10, "tag", 16),
    u16(0x20, "sequence"),
    reserved(0x22, 6),
    size=40,
)
class WireExtent(WireStruct, frozen=True, gc=False):
    """Dynamic Capacity Extent, 40 bytes (CXL r3.1 8.2.9.2.1.6).

    `tag` is 16 opaque bytes, in RFC 4122 order where it is a UUID; `sequence` is the shared extent
    sequence number, 0 for capacity that is not sharable.
    """

    start_dpa: int
    length_bytes: int
    tag: bytes = NIL_TAG_BYTES
    sequence: int = 0

    def __post_init__(self) -> None:
        # Written out because lists of 100,000 extents are read at start; the table says the same.
        try:
            if (
                0 <= self.start_dpa <= _U64_MAX
                and 0 <= self.length_bytes <= _U64_MAX
                and 0 <= self.sequence <= 0xFFFF
                and len(self.tag) == 16
            ):
                return
        except TypeError:
            pass
        self.LAYOUT.check(self)


@wire(
    u64(0x00, "start_dpa"),
    u64(0x08, "length_bytes"),
    reserved(0x10, 8),
    size=24,
)
class UpdatedExtent(WireStruct, frozen=True, gc=False):
    """An entry of the lists that 4802h and 4803h carry, 24 bytes (CXL r3.1 8.2.9.9.9.3)."""

    start_dpa: int
    length_bytes: int
