"""The catalogue of objects in shared memory, as bytes: its superblock and the entries of its log.

The format is tagmem's own, version 1; docs/shared-objects.md draws where each part lies. Checksums
are CRC-32 (ISO 3309, as zlib has it) over all bytes of the structure before the checksum, which is
its last field; `shared/catalogue` sums them up and judges the rest.
"""

from __future__ import annotations

from enum import IntEnum

from tagmem.wire.fields import raw, reserved, u16, u32, u64
from tagmem.wire.layout import WireStruct, wire


class CatalogueCoherence(IntEnum):
    """What the hosts' caches do for the memory that the catalogue is in."""

    HARDWARE = 1
    SOFTWARE = 2


class ObjectKind(IntEnum):
    """What an object's bytes are."""

    BYTES = 1
    ARRAY = 2
    TABLE = 3


@wire(
    raw(0x00, "magic", 8),
    u32(0x08, "version"),
    u16(0x0C, "coherence", CatalogueCoherence),
    reserved(0x0E, 2),
    raw(0x10, "tag", 16),
    u64(0x20, "size_bytes"),
    u64(0x28, "generation"),
    u64(0x30, "log_offset"),
    u32(0x38, "entry_bytes"),
    u32(0x3C, "checksum"),
    size=64,
)
class Superblock(WireStruct, frozen=True, gc=False):
    """Superblock of a catalogue, 64 bytes at offset 0 (tagmem). Magic and version stay where they
    are in every version.
    """

    magic: bytes
    version: int
    coherence: CatalogueCoherence
    tag: bytes
    size_bytes: int
    generation: int
    log_offset: int
    entry_bytes: int
    checksum: int


@wire(
    u64(0x00, "sequence"),
    u64(0x08, "generation"),
    u16(0x10, "kind", ObjectKind),
    u16(0x12, "name_bytes"),
    u32(0x14, "object_checksum"),
    u64(0x18, "offset"),
    u64(0x20, "length_bytes"),
    u32(0x28, "previous"),
    reserved(0x2C, 4),
    raw(0x30, "name", 128),
    reserved(0xB0, 76),
    u32(0xFC, "checksum"),
    size=256,
)
class CatalogueEntry(WireStruct, frozen=True, gc=False):
    """One object in the log of a catalogue, 256 bytes (tagmem). `previous` is the checksum of the
    entry before, of the superblock for the first, so that two histories never mix.
    """

    sequence: int
    generation: int
    kind: ObjectKind
    name_bytes: int
    object_checksum: int
    offset: int
    length_bytes: int
    previous: int
    name: bytes
    checksum: int
