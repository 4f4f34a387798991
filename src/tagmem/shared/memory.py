"""A mapping as `Memory`: plain loads and stores through buffers, each range checked before anything
is touched, so that what is read from a hostile memory can never lead outside of it.

Words are single aligned 8-byte loads and stores: CPython moves a `Q` item of a memoryview with one
8-byte copy, which is one instruction on the machines that are supported.
"""

from __future__ import annotations

import mmap
import sys

from tagmem.base.errors import Conflict, InvalidInput, Unsupported
from tagmem.shared.coherence import Coherence, KindName

WORD_BYTES = 8


class MappedMemory:
    """A buffer that hosts share, with the coherence that they have."""

    def __init__(
        self, buffer: mmap.mmap | bytearray | bytes | memoryview, coherence: Coherence
    ) -> None:
        """Views keep `buffer` alive. Raises Unsupported on a big-endian machine."""
        if sys.byteorder != "little":
            raise Unsupported("shared memory is little-endian, and this machine is not")
        self._bytes = memoryview(buffer).cast("B")
        self._coherence = coherence
        self._words = self._bytes[: len(self._bytes) // WORD_BYTES * WORD_BYTES].cast("Q")

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return len(self._bytes)

    @property
    def writable(self) -> bool:
        """Whether stores are allowed."""
        return not self._bytes.readonly

    @property
    def kind(self) -> KindName:
        """What the coherence is."""
        return self._coherence.kind

    @property
    def line_bytes(self) -> int:
        """Bytes of a cache line."""
        return self._coherence.line_bytes

    @property
    def effective(self) -> bool:
        """Whether write-back and invalidation do what they say."""
        return self._coherence.effective

    def load(self, offset: int, length: int) -> bytes:
        """A copy of the range. Raises InvalidInput outside of the memory."""
        self._check(offset, length)
        return bytes(self._bytes[offset : offset + length])

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store a contiguous buffer. Raises InvalidInput, Conflict."""
        source = memoryview(data).cast("B")
        self._check(offset, len(source), store=True)
        self._bytes[offset : offset + len(source)] = source

    def view(self, offset: int, length: int, *, writable: bool = False) -> memoryview:
        """The range itself. Raises InvalidInput, Conflict."""
        self._check(offset, length, store=writable)
        view = self._bytes[offset : offset + length]
        return view if writable else view.toreadonly()

    def load_word(self, offset: int) -> int:
        """One 8-byte load. Raises InvalidInput where it is not aligned."""
        return self._words[self._word(offset)]

    def store_word(self, offset: int, value: int) -> None:
        """One 8-byte store. Raises InvalidInput, Conflict."""
        index = self._word(offset, store=True)
        if not 0 <= value < 1 << 64:
            raise InvalidInput("word", "0 to 2**64 - 1", value)
        self._words[index] = value

    def write_back(self, offset: int, length: int) -> None:
        """Raises InvalidInput outside of the memory."""
        self._check(offset, length)
        self._coherence.write_back(offset, length)

    def fence(self) -> None:
        """The coherence's own."""
        self._coherence.fence()

    def invalidate(self, offset: int, length: int) -> None:
        """Raises InvalidInput outside of the memory."""
        self._check(offset, length)
        self._coherence.invalidate(offset, length)

    def release(self) -> None:
        """Let go of the buffer; views that were given out keep it alive."""
        self._words.release()
        self._bytes.release()

    def _check(self, offset: int, length: int, *, store: bool = False) -> None:
        size = len(self._bytes)
        if not 0 <= offset <= size:
            raise InvalidInput("offset", f"0 to {size} (bytes)", offset)
        if not 0 <= length <= size - offset:
            raise InvalidInput("length", f"0 to {size - offset} (bytes)", length)
        if store and self._bytes.readonly:
            raise Conflict("the memory is mapped read-only on this host")

    def _word(self, offset: int, *, store: bool = False) -> int:
        if offset % WORD_BYTES:
            raise InvalidInput("offset", f"a multiple of {WORD_BYTES} (bytes)", offset)
        self._check(offset, WORD_BYTES, store=store)
        return offset // WORD_BYTES
