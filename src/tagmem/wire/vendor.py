"""Commands of tagmem's own, for what an emulated appliance must say and CXL has no words for.

C000h Get Extent Media, host port: where the bytes of an accepted tag are. On a Unix socket one file
descriptor of the medium travels beside the response. Only for accepted tags, else Invalid Input.

C001h Get Sanitise Record, fabric-manager port: how far the sanitising of a released tag's media is,
and what its read-back found.
"""

from __future__ import annotations

from enum import IntEnum

from tagmem.wire.fields import array, bits, count, flag, raw, reserved, u8, u64
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
