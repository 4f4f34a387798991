"""A queue in memory that somebody else writes: what is served, and every way to break it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.wire.vring import (
    CHAIN_MAX,
    INDIRECT,
    NEXT,
    NO_INTERRUPT,
    WRITE,
    Descriptor,
    QueueBroken,
    RingHead,
    Segment,
    SplitRing,
    UsedElement,
)

NUM = 8
TABLE, AVAILABLE, USED, DATA, SIZE = 0, 0x100, 0x200, 0x300, 0x400


class Ram:
    """A kilobyte of guest memory."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, address: int, size_bytes: int) -> bytes:
        if address + size_bytes > SIZE:
            raise QueueBroken("outside")
        return bytes(self.data[address : address + size_bytes])

    def write(self, address: int, data: bytes) -> None:
        if address + len(data) > SIZE:
            raise QueueBroken("outside")
        self.data[address : address + len(data)] = data

    def put(self, index: int, address: int, length: int, flags: int = 0, after: int = 0) -> None:
        self.write(TABLE + 16 * index, Descriptor(address, length, flags, after).encode())

    def offer(self, *heads: int, flags: int = 0, count: int | None = None) -> None:
        for at, head in enumerate(heads):
            self.write(AVAILABLE + 4 + 2 * at, head.to_bytes(2, "little"))
        self.write(AVAILABLE, RingHead(flags, len(heads) if count is None else count).encode())


def ring(ram: Ram, base: int = 0) -> SplitRing:
    return SplitRing(ram, NUM, TABLE, AVAILABLE, USED, base)


def test_a_request_is_taken_read_and_answered() -> None:
    ram = Ram()
    ram.put(3, DATA, 4, NEXT, 5)
    ram.put(5, DATA + 16, 2, WRITE | NEXT, 6)
    ram.put(6, DATA + 32, 2, WRITE)
    ram.write(DATA, b"ask!")
    ram.offer(3)
    queue = ring(ram)
    (chain,) = queue.take()
    assert queue.take() == []
    assert chain.readable == (Segment(DATA, 4),)
    assert queue.read(chain, 3) == b"ask"
    assert queue.read(chain, 9) == b"ask!"
    assert queue.completed == 0
    queue.answer(chain, b"done")
    assert ram.read(DATA + 16, 2) + ram.read(DATA + 32, 2) == b"done"
    assert RingHead.decode(ram.read(USED, 4)).index == 1
    assert UsedElement.decode(ram.read(USED + 4, 8)) == UsedElement(3, 4)
    assert queue.completed == 1


def test_an_answer_that_does_not_fit_is_cut() -> None:
    ram = Ram()
    ram.put(0, DATA, 2, WRITE)
    ram.offer(0)
    queue = ring(ram)
    (chain,) = queue.take()
    queue.answer(chain, b"done")
    assert UsedElement.decode(ram.read(USED + 4, 8)).length_bytes == 2


def test_indexes_wrap() -> None:
    ram = Ram()
    ram.put(1, DATA, 4, WRITE)
    base = 0xFFFF
    ram.write(AVAILABLE + 4 + 2 * (base % NUM), (1).to_bytes(2, "little"))
    ram.write(AVAILABLE, RingHead(0, 0).encode())
    queue = ring(ram, base)
    (chain,) = queue.take()
    queue.answer(chain, b"")
    assert queue.completed == 0


def test_the_driver_says_whether_it_wants_to_be_told() -> None:
    ram = Ram()
    assert ring(ram).wants_interrupt()
    ram.offer(flags=NO_INTERRUPT)
    assert not ring(ram).wants_interrupt()


@pytest.mark.parametrize("num", [0, 3, 2048, -8])
def test_sizes_that_no_ring_has(num: int) -> None:
    with pytest.raises(QueueBroken, match="size"):
        SplitRing(Ram(), num, TABLE, AVAILABLE, USED, 0)


def test_more_requests_than_entries() -> None:
    ram = Ram()
    ram.offer(count=NUM + 1)
    with pytest.raises(QueueBroken, match="waiting"):
        ring(ram).take()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(DATA, 4, NEXT, 0)], "more than"),
        ([(DATA, 4, NEXT, NUM)], "below"),
        ([(DATA, 4, INDIRECT, 0)], "indirect"),
        ([(DATA, 4, WRITE | NEXT, 1), (DATA, 4, 0, 0)], "after one to write"),
    ],
)
def test_chains_that_break_a_rule(parts: list[tuple[int, int, int, int]], words: str) -> None:
    ram = Ram()
    for index, part in enumerate(parts):
        ram.put(index, *part)
    ram.offer(0)
    with pytest.raises(QueueBroken, match=words):
        ring(ram).take()


def test_a_head_outside_the_table() -> None:
    ram = Ram()
    ram.offer(NUM)
    with pytest.raises(QueueBroken, match="below"):
        ring(ram).take()


def test_a_ring_outside_of_memory() -> None:
    queue = SplitRing(Ram(), NUM, TABLE, SIZE, USED, 0)
    with pytest.raises(QueueBroken, match="outside"):
        queue.take()


@given(st.binary(min_size=SIZE, max_size=SIZE), st.integers(0, 0xFFFF))
def test_any_memory_is_served_or_refused(memory: bytes, base: int) -> None:
    ram = Ram()
    ram.data[:] = memory
    queue = ring(ram, base)
    try:
        chains = queue.take()
        assert len(chains) <= NUM
        for chain in chains:
            assert len(chain.readable) + len(chain.writable) <= CHAIN_MAX
            assert len(queue.read(chain, 4)) <= 4
            queue.answer(chain, b"1234")
    except QueueBroken:
        pass
    assert len(ram.data) == SIZE
