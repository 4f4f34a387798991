"""A mapping as memory: what a range may be, words, views, which sync point reaches the lines."""

from __future__ import annotations

import pytest
from tests.unit.shared.recording import RecordingLines

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.shared.coherence import HardwareCoherent, SoftwareCoherent, publish, refresh
from tagmem.shared.memory import MappedMemory


def test_publish_writes_back_and_fences_and_refresh_invalidates() -> None:
    lines = RecordingLines()
    memory = MappedMemory(bytearray(256), SoftwareCoherent(lines))
    publish(memory, 64, 100)
    refresh(memory, 0, 8)
    assert lines.seen == [("write back", 64, 100), ("fence", 0, 0), ("invalidate", 0, 8)]
    assert memory.kind == "software-coherent"


def test_hardware_coherence_needs_nothing_but_order() -> None:
    barriers: list[int] = []
    memory = MappedMemory(bytearray(64), HardwareCoherent(lambda: barriers.append(1)))
    publish(memory, 0, 64)
    refresh(memory, 0, 64)
    assert len(barriers) == 2
    assert memory.effective


def test_views_are_the_memory_and_words_are_little_endian() -> None:
    backing = bytearray(64)
    memory = MappedMemory(backing, HardwareCoherent())
    memory.view(8, 4, writable=True)[:] = b"abcd"
    memory.store_word(16, 0x0102)
    assert backing[8:18] == b"abcd\0\0\0\0\x02\x01"
    assert memory.load_word(16) == 0x0102
    assert memory.load(8, 4) == b"abcd"
    assert memory.view(0, 64).readonly


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 65), (65, 0), (60, 5)])
def test_no_access_leaves_the_memory(offset: int, length: int) -> None:
    memory = MappedMemory(bytearray(64), HardwareCoherent())
    for access in (memory.load, memory.view, memory.write_back, memory.invalidate):
        with pytest.raises(InvalidInput):
            access(offset, length)


@pytest.mark.parametrize("offset", [-8, 4, 57, 64])
def test_a_word_is_aligned_and_inside(offset: int) -> None:
    memory = MappedMemory(bytearray(64), HardwareCoherent())
    with pytest.raises(InvalidInput):
        memory.load_word(offset)
    with pytest.raises(InvalidInput):
        memory.store_word(offset, 1)


def test_read_only_memory_takes_no_store() -> None:
    memory = MappedMemory(bytes(64), HardwareCoherent())
    with pytest.raises(Conflict):
        memory.store(0, b"x")
    with pytest.raises(Conflict):
        memory.store_word(0, 1)
    with pytest.raises(Conflict):
        memory.view(0, 1, writable=True)
