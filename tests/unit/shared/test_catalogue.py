"""The catalogue on one machine's memory: what is put is found, what is wrong is said."""

from __future__ import annotations

from zlib import crc32

import pytest
from tests.unit.shared.recording import RecordingLines

from tagmem.base.errors import Conflict, InvalidInput, NotFound
from tagmem.base.ids import Tag
from tagmem.shared.catalogue import (
    ALIGN_BYTES,
    COMMIT_AT,
    ENTRY_BYTES,
    LOG_AT,
    NAME_BYTES_MAX,
    OWNER_AT,
    SIZE_BYTES_MIN,
    Catalogue,
    Corrupt,
    Full,
    Initialising,
    NoCatalogue,
    OtherVersion,
    Overtaken,
    Reinitialised,
    Write,
    commit_word,
    read_commit_word,
)
from tagmem.shared.coherence import HardwareCoherent, Memory, SoftwareCoherent
from tagmem.shared.memory import MappedMemory
from tagmem.wire.catalogue import ObjectKind

TAG = Tag("6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f")
SIZE = 64 << 10


def mapped(backing: bytearray) -> MappedMemory:
    return MappedMemory(backing, HardwareCoherent())


def put(catalogue: Catalogue, name: str, data: bytes) -> None:
    catalogue.append(name, ObjectKind.BYTES, len(data), storing(data))


def storing(data: bytes) -> Write:
    def write(memory: Memory, offset: int) -> int:
        memory.store(offset, data)
        return crc32(data)

    return write


def got(catalogue: Catalogue, name: str) -> bytes:
    return bytes(catalogue.view(catalogue.look(name)))


def made(objects: int = 2, size: int = SIZE) -> tuple[bytearray, Catalogue]:
    backing = bytearray(size)
    catalogue = Catalogue.create(mapped(backing), TAG, owner=7)
    for number in range(objects):
        put(catalogue, f"object {number}", bytes([number + 1]) * (100 + number))
    return backing, catalogue


def test_a_reader_finds_what_the_writer_put_before_and_after_it_came() -> None:
    backing, writer = made(2)
    reader = Catalogue.open(mapped(backing))
    assert (reader.tag, reader.generation, reader.declared) == (TAG, 1, "hardware-coherent")
    assert list(reader.entries) == ["object 0", "object 1"]
    assert got(reader, "object 1") == b"\2" * 101
    put(writer, "late", b"news")
    assert "late" not in reader.entries
    assert got(reader, "late") == b"news"
    assert [entry.name for entry in Catalogue.open(mapped(backing)).entries.values()][-1] == "late"


def test_refresh_tells_what_is_new_and_only_that() -> None:
    backing, writer = made(1)
    reader = Catalogue.open(mapped(backing))
    assert reader.refresh() == ()
    put(writer, "a", b"1")
    put(writer, "b", b"")
    assert [entry.name for entry in reader.refresh()] == ["a", "b"]
    assert reader.refresh() == ()
    assert got(reader, "b") == b""


def test_objects_are_aligned_and_never_overlap() -> None:
    _, catalogue = made(5)
    low = SIZE
    for entry in catalogue.entries.values():
        assert entry.offset % ALIGN_BYTES == 0
        assert entry.offset + entry.length_bytes <= low
        low = entry.offset


def test_an_append_is_published_in_the_documented_order() -> None:
    lines = RecordingLines()
    backing = bytearray(SIZE)
    catalogue = Catalogue.create(MappedMemory(backing, SoftwareCoherent(lines)), TAG, owner=7)
    assert catalogue.declared == "software-coherent"
    lines.seen.clear()
    put(catalogue, "x", b"data")
    offset = catalogue.entries["x"].offset
    assert [step for step in lines.seen if step[0] != "invalidate"] == [
        ("write back", offset, 4),
        ("fence", 0, 0),
        ("write back", LOG_AT, ENTRY_BYTES),
        ("fence", 0, 0),
        ("write back", COMMIT_AT, 8),
        ("fence", 0, 0),
    ]


def test_a_reader_invalidates_before_it_reads_and_each_object_once() -> None:
    lines = RecordingLines()
    backing, _ = made(1)
    reader = Catalogue.open(MappedMemory(backing, SoftwareCoherent(lines)))
    lines.seen.clear()
    entry = reader.look("object 0")
    assert lines.seen == [("invalidate", COMMIT_AT, 8)]
    reader.view(entry)
    assert ("invalidate", entry.offset, entry.length_bytes) in lines.seen
    lines.seen.clear()
    reader.view(entry)
    assert lines.seen == [("invalidate", COMMIT_AT, 8)]


def test_a_torn_append_is_not_there_and_the_next_takes_its_place() -> None:
    backing, writer = made(1)
    writer.close()
    at = LOG_AT + ENTRY_BYTES
    backing[at : at + ENTRY_BYTES // 2] = b"\xaa" * (ENTRY_BYTES // 2)
    reader = Catalogue.open(mapped(backing))
    assert list(reader.entries) == ["object 0"]
    put(Catalogue.open(mapped(backing), owner=9), "next", b"whole")
    assert got(reader, "next") == b"whole"


def test_a_failed_write_leaves_nothing() -> None:
    backing, writer = made(1)

    def failing(memory: Memory, offset: int) -> int:
        memory.store(offset, b"half")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        writer.append("broken", ObjectKind.BYTES, 8, failing)
    assert list(Catalogue.open(mapped(backing)).entries) == ["object 0"]
    put(writer, "broken", b"now")


def test_memory_without_a_catalogue_and_of_another_version() -> None:
    with pytest.raises(NoCatalogue, match="all zero"):
        Catalogue.open(mapped(bytearray(SIZE)))
    with pytest.raises(NoCatalogue, match="something else"):
        Catalogue.open(mapped(bytearray(b"x" * SIZE)))
    with pytest.raises(NoCatalogue):
        Catalogue.open(mapped(bytearray(64)))
    backing, _ = made()
    backing[8] = 2
    with pytest.raises(OtherVersion, match="version 2"):
        Catalogue.open(mapped(backing))


def test_a_half_made_catalogue_is_told_from_none() -> None:
    backing, _ = made()
    backing[COMMIT_AT : COMMIT_AT + 8] = bytes(8)
    with pytest.raises(Initialising):
        Catalogue.open(mapped(backing))


def test_memory_that_is_in_use_is_not_taken_by_accident() -> None:
    backing, _ = made()
    with pytest.raises(Conflict, match="a catalogue in this memory"):
        Catalogue.create(mapped(backing), TAG, owner=9)
    with pytest.raises(Conflict, match="something"):
        Catalogue.create(mapped(bytearray(b"x" * SIZE)), TAG, owner=9)
    with pytest.raises(InvalidInput):
        Catalogue.create(mapped(bytearray(SIZE_BYTES_MIN - 1)), TAG, owner=9)


def test_readers_and_the_old_writer_notice_a_new_generation() -> None:
    backing, writer = made(2)
    reader = Catalogue.open(mapped(backing))
    entry = reader.look("object 0")
    anew = Catalogue.create(mapped(backing), TAG, owner=9, replace=True)
    assert anew.generation == 2
    put(anew, "object 0", b"other")
    for action in (reader.refresh, lambda: reader.look("object 0"), lambda: reader.view(entry)):
        with pytest.raises(Reinitialised):
            action()
    with pytest.raises(Overtaken):
        put(writer, "more", b"")
    assert got(Catalogue.open(mapped(backing)), "object 0") == b"other"


def test_one_writer_at_a_time_as_far_as_it_can_be_seen() -> None:
    backing, first = made(1)
    with pytest.raises(Conflict, match="take_over"):
        Catalogue.open(mapped(backing), owner=9)
    second = Catalogue.open(mapped(backing), owner=9, take_over=True)
    with pytest.raises(Overtaken):
        put(first, "mine", b"1")
    first.close()
    put(second, "mine", b"2")
    second.close()
    assert int.from_bytes(backing[OWNER_AT : OWNER_AT + 8], "little") == 0
    put(Catalogue.open(mapped(backing), owner=11), "third", b"3")


def test_a_writer_that_came_while_an_object_was_written_is_not_written_over() -> None:
    backing, first = made(1)

    def interrupted(memory: Memory, offset: int) -> int:
        Catalogue.open(mapped(backing), owner=9, take_over=True)
        return storing(b"1")(memory, offset)

    with pytest.raises(Overtaken):
        first.append("mine", ObjectKind.BYTES, 1, interrupted)
    assert list(Catalogue.open(mapped(backing)).entries) == ["object 0"]


def test_a_rewritten_history_is_noticed() -> None:
    backing, writer = made(1)
    reader = Catalogue.open(mapped(backing))
    writer.close()
    other = bytearray(backing)
    put(Catalogue.open(mapped(backing), owner=1), "a", b"1")
    reader.refresh()
    late = Catalogue.open(mapped(other), owner=2)
    put(late, "b", b"2")
    put(late, "c", b"3")
    backing[:] = other
    with pytest.raises(Corrupt, match="does not follow"):
        reader.refresh()


def test_a_full_catalogue_says_how_much_is_free() -> None:
    backing = bytearray(SIZE_BYTES_MIN + 1024)
    catalogue = Catalogue.create(mapped(backing), TAG, owner=7)
    room = catalogue.free_bytes
    assert room == 1024
    with pytest.raises(Full, match=f"{room} B are free"):
        put(catalogue, "large", bytes(room + 1))
    put(catalogue, "fits", b"x" * room)
    assert catalogue.free_bytes == 0
    with pytest.raises(Full):
        put(catalogue, "none", b"")
    assert got(Catalogue.open(mapped(backing)), "fits") == b"x" * room


def test_names_are_bounded_text_and_immutable() -> None:
    _, catalogue = made(1)
    for name in ("", "x" * (NAME_BYTES_MAX + 1), "é" * 65, "a\nb", "a\0", "\ud800"):
        with pytest.raises(InvalidInput, match="name"):
            put(catalogue, name, b"")
    put(catalogue, "é" * 64, b"")
    with pytest.raises(Conflict, match="already"):
        put(catalogue, "object 0", b"other")
    with pytest.raises(NotFound, match="object 0"):
        catalogue.look("absent")


def test_a_reader_does_not_write() -> None:
    backing, _ = made()
    with pytest.raises(Conflict, match="writable=True"):
        put(Catalogue.open(mapped(backing)), "x", b"")
    assert not Catalogue.open(mapped(backing)).writer


def test_a_damaged_object_is_not_handed_out() -> None:
    backing, writer = made(1)
    entry = writer.look("object 0")
    reader = Catalogue.open(mapped(backing))
    backing[entry.offset] ^= 1
    with pytest.raises(Corrupt, match="object 0"):
        reader.view(entry)
    assert len(reader.view(entry, verify=False)) == 100


def test_the_mapping_may_be_larger_than_the_catalogue_and_not_smaller() -> None:
    backing, _ = made()
    assert list(Catalogue.open(mapped(backing + bytes(4096))).entries)
    with pytest.raises(Corrupt, match="mapped"):
        Catalogue.open(mapped(backing[: SIZE - 256]))


def test_commit_words_have_a_check_of_their_own() -> None:
    for generation, count in ((1, 0), (65536, 5), (3, (1 << 32) - 1)):
        word = commit_word(generation, count)
        assert 0 < word < 1 << 64
        assert read_commit_word(word) == (generation & 0xFFFF, count)
        for bit in range(64):
            with pytest.raises(Corrupt):
                read_commit_word(word ^ 1 << bit)
