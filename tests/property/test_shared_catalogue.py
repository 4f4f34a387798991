"""A catalogue in memory that was damaged or forged: an error, or what was put; nothing else."""

from __future__ import annotations

from zlib import crc32

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import TagmemError
from tagmem.base.ids import Tag
from tagmem.shared.catalogue import ENTRY_BYTES, LOG_AT, Catalogue
from tagmem.shared.coherence import HardwareCoherent, Memory
from tagmem.shared.memory import MappedMemory
from tagmem.wire.catalogue import CatalogueEntry, ObjectKind, Superblock

TAG = Tag("6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f")
SIZE = 12 << 10
OBJECTS = {"alpha": bytes(range(256)) * 3, "beta": b"", "gamma": b"\xff" * 1000}


def written() -> bytearray:
    backing = bytearray(SIZE)
    catalogue = Catalogue.create(MappedMemory(backing, HardwareCoherent()), TAG, owner=7)
    for name, data in OBJECTS.items():

        def write(memory: Memory, offset: int, data: bytes = data) -> int:
            memory.store(offset, data)
            return crc32(data)

        catalogue.append(name, ObjectKind.BYTES, len(data), write)
    catalogue.close()
    return backing


WRITTEN = bytes(written())
USED = [
    *range(64),
    *range(256, 264),
    *range(512, 520),
    *range(LOG_AT, LOG_AT + 4 * ENTRY_BYTES),
    *range(SIZE - 2560, SIZE),
]
"""Where anything is, so that flips do not mostly hit what is free."""


def read_all(backing: bytearray | bytes) -> dict[str, bytes]:
    catalogue = Catalogue.open(MappedMemory(backing, HardwareCoherent()))
    return {entry.name: bytes(catalogue.view(entry)) for entry in catalogue.entries.values()}


def test_undamaged_it_is_what_was_put() -> None:
    assert read_all(WRITTEN) == OBJECTS


@given(st.lists(st.tuples(st.sampled_from(USED), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_end_in_an_error_or_change_nothing(flips: list[tuple[int, int]]) -> None:
    backing = bytearray(WRITTEN)
    for at, bit in flips:
        backing[at] ^= 1 << bit
    try:
        assert read_all(backing) == OBJECTS
    except TagmemError:
        return


@given(st.integers(0, SIZE))
def test_truncated_memory_ends_in_an_error(size: int) -> None:
    try:
        assert read_all(WRITTEN[:size]) == OBJECTS
        assert size == SIZE
    except TagmemError:
        assert size < SIZE


@given(st.binary(max_size=SIZE), st.integers(0, SIZE))
def test_garbage_ends_in_an_error_or_changes_nothing(garbage: bytes, at: int) -> None:
    backing = bytearray(WRITTEN)
    end = min(at + len(garbage), SIZE)
    backing[at:end] = garbage[: end - at]
    try:
        assert read_all(backing) == OBJECTS
    except TagmemError:
        return


U64 = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 2 * SIZE), st.just((1 << 64) - 256))
ENTRY_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "sequence": U64,
        "generation": U64,
        "name_bytes": st.integers(0, 0xFFFF),
        "object_checksum": st.integers(0, 0xFFFFFFFF),
        "offset": st.one_of(U64, st.integers(0, SIZE // 256).map(lambda n: n * 256)),
        "length_bytes": U64,
        "previous": st.integers(0, 0xFFFFFFFF),
        "name": st.binary(min_size=128, max_size=128),
    },
)


@given(st.integers(0, len(OBJECTS) - 1), ENTRY_FIELDS)
def test_forged_entries_never_lead_out_of_the_memory(
    index: int, changes: dict[str, int | bytes]
) -> None:
    """With the right checksum, as a writer that lies would have it."""
    backing = bytearray(WRITTEN)
    at = LOG_AT + index * ENTRY_BYTES
    entry = CatalogueEntry.decode(bytes(backing[at : at + ENTRY_BYTES]))
    draft = msgspec.structs.replace(entry, **changes).encode()[:-4]
    backing[at : at + ENTRY_BYTES] = draft + crc32(draft).to_bytes(4, "little")
    try:
        found = read_all(backing)
    except TagmemError:
        return
    assert all(len(data) <= SIZE for data in found.values())
    assert sum(map(len, found.values())) <= SIZE


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "size_bytes": U64,
            "generation": U64,
            "log_offset": U64,
            "entry_bytes": st.integers(0, 0xFFFFFFFF),
            "version": st.integers(0, 0xFFFFFFFF),
        },
    )
)
def test_forged_superblocks_never_lead_out_of_the_memory(changes: dict[str, int]) -> None:
    backing = bytearray(WRITTEN)
    size = Superblock.LAYOUT.size
    superblock = Superblock.decode(bytes(backing[:size]))
    draft = msgspec.structs.replace(superblock, **changes).encode()[:-4]
    backing[:size] = draft + crc32(draft).to_bytes(4, "little")
    try:
        assert read_all(backing) == OBJECTS
    except TagmemError:
        return
