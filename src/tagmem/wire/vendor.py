"""Commands of tagmem's own, for what an emulated appliance must say and CXL has no words for.

C000h Get Extent Media, host port: where the bytes of an accepted tag are. On a Unix socket one file
descriptor of the medium travels beside the response. Only for accepted tags, else Invalid Input.

C001h Get Sanitise Record, fabric-manager port: how far the sanitising of a released tag's media is,
and what its read-back found.

C002h Get Pool Map, fabric-manager port: which pool of media each region of an LD is a window on,
and in which order its DPAs run over it. Unsupported is taken as: in order, and region n on pool n.

C003h Fence, fabric-manager port: see to it that one host can no longer touch some capacity. Success
only when nothing on that host can; Busy while a holder remains.
"""

from __future__ import annotations

from enum import IntEnum

from tagmem.wire.fields import (
    array,
    bits,
    count,
    flag,
    raw,
    repeat,
    reserved,
    u8,
    u16,
    u64,
)
from tagmem.wire.layout import WireStruct, wire


class MediaLayout(IntEnum):
    """How an appliance keeps its bytes."""

    BY_TAG = 0
    BY_DPA = 1


class SanitiseState(IntEnum):
    """What became of a tag's media."""

    NONE = 0
    RUNNING = 1
    VERIFIED_ZERO = 2
    FAILED = 3


class SanitiseMethod(IntEnum):
    """How media are wiped before they are read back."""

    OVERWRITE = 0
    PUNCH = 1


@wire(raw(0x00, "tag", 16), size=16)
class GetExtentMediaRequest(WireStruct, frozen=True, gc=False):
    """Get Extent Media (C000h, tagmem)."""

    tag: bytes


@wire(u64(0x00, "media_offset"), u64(0x08, "length_bytes"), size=16)
class MediaPiece(WireStruct, frozen=True, gc=False):
    """A run of bytes in the file whose descriptor travels beside C000h, 16 bytes (tagmem)."""

    media_offset: int
    length_bytes: int


@wire(
    u8(0x00, "layout", MediaLayout),
    bits(0x01, 1, flag("read_only", 0)),
    reserved(0x02, 2),
    count(0x04, 4, "pieces"),
    array(0x08, "pieces", MediaPiece),
    size=8,
)
class GetExtentMediaResponse(WireStruct, frozen=True):
    """Get Extent Media response (C000h, tagmem): the pieces of the tag's content, in sequence
    order.
    """

    layout: MediaLayout
    read_only: bool
    pieces: tuple[MediaPiece, ...]


@wire(raw(0x00, "tag", 16), size=16)
class GetSanitiseRecordRequest(WireStruct, frozen=True, gc=False):
    """Get Sanitise Record (C001h, tagmem)."""

    tag: bytes


@wire(
    u8(0x00, "state", SanitiseState),
    u8(0x01, "method", SanitiseMethod),
    reserved(0x02, 6),
    u64(0x08, "sanitised_bytes"),
    u64(0x10, "read_back_bytes"),
    u64(0x18, "finished_at_ns"),
    size=32,
)
class GetSanitiseRecordResponse(WireStruct, frozen=True, gc=False):
    """Get Sanitise Record response (C001h, tagmem); `finished_at_ns` since 1970, 0 while not
    finished.
    """

    state: SanitiseState
    method: SanitiseMethod = SanitiseMethod.OVERWRITE
    sanitised_bytes: int = 0
    read_back_bytes: int = 0
    finished_at_ns: int = 0


class PoolOrder(IntEnum):
    """How a region's DPAs run over its pool."""

    IDENTITY = 0
    MIRRORED = 1
    """DPA = region base + region size - media offset - length."""


@wire(u16(0x00, "ld"), reserved(0x02, 2), size=4)
class GetPoolMapRequest(WireStruct, frozen=True, gc=False):
    """Get Pool Map (C002h, tagmem)."""

    ld: int


@wire(
    u8(0x00, "order", PoolOrder),
    u8(0x01, "region_count", high=8),
    reserved(0x02, 6),
    repeat(0x08, "pools", 1, 8),
    size=16,
)
class GetPoolMapResponse(WireStruct, frozen=True):
    """Get Pool Map response (C002h, tagmem): of `pools`, the first `region_count` count."""

    order: PoolOrder
    region_count: int
    pools: tuple[int, ...]


@wire(
    u16(0x00, "ld"),
    reserved(0x02, 6),
    raw(0x08, "tag", 16),
    u64(0x18, "start_dpa"),
    u64(0x20, "length_bytes"),
    reserved(0x28, 16),
    size=56,
)
class FenceRequest(WireStruct, frozen=True, gc=False):
    """Fence (C003h, tagmem). Start and length name untagged capacity, and are zero for a tag."""

    ld: int
    tag: bytes
    start_dpa: int = 0
    length_bytes: int = 0
