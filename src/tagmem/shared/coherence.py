"""What a program must do so that another host sees its stores, said as types: the one interface
that the catalogue is written against, whether the bytes are a mapping or a simulated memory whose
caches lie.

Three words for three things (CXL r3.1 2.4 and 3.3 on who keeps caches coherent):

- *write back*: the covered cache lines reach memory. Other hosts may see them from some moment
  between the store and the next `fence`; a cache may write a line back earlier by itself.
- *fence*: everything written back before it has reached memory when it returns, and no load or
  store moves over it.
- *invalidate*: the covered lines leave this host's caches, so that the next load of them comes
  from memory. It is complete when it returns. A line with stores of this host that were not
  written back is undefined afterwards: who writes a line does not invalidate it without a write
  back and a fence before.

So a writer *publishes* (write back, fence) and a reader *refreshes* (invalidate). All offsets are
bytes from the start of the memory; lines are covered whole, which is why nothing that two hosts
write may share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

LINE_BYTES = 64
"""A cache line of x86-64 and of most arm64; the layout of the catalogue keeps 256 apart."""

KindName = Literal["hardware-coherent", "software-coherent"]


class Lines(Protocol):
    """Cache lines of one memory, at offsets in it. Raises InvalidInput for a range outside."""

    @property
    def line_bytes(self) -> int:
        """Bytes of a line, a power of two."""
        ...

    @property
    def effective(self) -> bool:
        """Whether the operations do what they say; False where they do nothing at all."""
        ...

    def write_back(self, offset: int, length: int) -> None:
        """Start writing back every line that covers a byte of the range (CLWB, DC CVAC)."""
        ...

    def fence(self) -> None:
        """Return when what was written back is in memory (SFENCE, DSB), and keep loads in order."""
        ...

    def invalidate(self, offset: int, length: int) -> None:
        """Have the next load of every covered line come from memory (CLFLUSHOPT, DC CIVAC)."""
        ...


class HardwareCoherent:
    """Hosts that snoop each other: nothing is to be done, and nothing is (back-invalidate, or one
    machine).
    """

    kind: KindName = "hardware-coherent"
    line_bytes = LINE_BYTES
    effective = True

    def __init__(self, barrier: Callable[[], None] | None = None) -> None:
        self._barrier = barrier

    def write_back(self, offset: int, length: int) -> None:
        """Nothing: other hosts see stores by themselves."""

    def fence(self) -> None:
        """The barrier, where the processor has a weaker order than x86-64's; else nothing."""
        if self._barrier is not None:
            self._barrier()

    def invalidate(self, offset: int, length: int) -> None:
        """No line leaves the cache; only the order of loads is kept."""
        self.fence()


class SoftwareCoherent:
    """Hosts that do not snoop each other: what `lines` does is what other hosts see."""

    kind: KindName = "software-coherent"

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.line_bytes = lines.line_bytes
        self.effective = lines.effective

    def write_back(self, offset: int, length: int) -> None:
        """The lines' own."""
        self.lines.write_back(offset, length)

    def fence(self) -> None:
        """The lines' own."""
        self.lines.fence()

    def invalidate(self, offset: int, length: int) -> None:
        """The lines' own."""
        self.lines.invalidate(offset, length)


Coherence = HardwareCoherent | SoftwareCoherent


class Memory(Lines, Protocol):
    """Bytes that several hosts see, and the only way in which the catalogue touches them.

    A simulated memory may answer `load`, `view` and `load_word` from a stale cache, and may make a
    store visible to others at any moment or not at all before its write back. Every method raises
    InvalidInput for a range outside, and stores raise Conflict where the memory is read-only.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        ...

    @property
    def writable(self) -> bool:
        """Whether this host may store."""
        ...

    @property
    def kind(self) -> KindName:
        """What this host takes the memory for."""
        ...

    def load(self, offset: int, length: int) -> bytes:
        """A copy of the range as this host sees it now."""
        ...

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store a contiguous buffer. No order among its bytes is promised to other hosts."""
        ...

    def view(self, offset: int, length: int, *, writable: bool = False) -> memoryview:
        """The range itself, of single bytes, without copying. What is written through a writable
        view counts as stored when it is written, and is to be written back like any store. A
        read-only view shows what this host's cache has: `invalidate` before taking it.
        """
        ...

    def load_word(self, offset: int) -> int:
        """An aligned 8-byte word, little-endian, in one load: old or new, never a mixture. It may
        be stale; `invalidate` before it asks for the memory's.
        """
        ...

    def store_word(self, offset: int, value: int) -> None:
        """An aligned 8-byte word in one store. Commit and owner words are written so, and no other
        access races by design.
        """
        ...


def publish(memory: Memory, offset: int, length: int) -> None:
    """Have what this host stored in the range be seen by whoever refreshes it from now on."""
    memory.write_back(offset, length)
    memory.fence()


def refresh(memory: Memory, offset: int, length: int) -> None:
    """Have this host see everything that was published in the range up to now."""
    memory.invalidate(offset, length)
