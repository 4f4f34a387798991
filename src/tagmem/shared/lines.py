"""Cache lines of a mapping, by the processor's own instructions: `Lines` over lines.c.

The C part is a plain shared library beside this file, built with the package (hatch_build.py), that
knows nothing of Python. Ranges are checked here, before it sees an address. Where it is missing
(another processor, no compiler when the package was built) nothing here pretends: `cpu_lines`
raises Unsupported and says why, and `NoLines` is for who wants to go on all the same.
"""

from __future__ import annotations

import ctypes
import mmap
from enum import IntFlag
from functools import cache
from pathlib import Path

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.base.units import is_power_of_two
from tagmem.client.mapping import address_of
from tagmem.shared.coherence import LINE_BYTES

LIBRARY = Path(__file__).with_name("liblines.so")


class Way(IntFlag):
    """An instruction that writes a line back."""

    CLFLUSH = 1
    """x86-64: writes back and drops, one line after the other."""
    CLFLUSHOPT = 2
    """x86-64: writes back and drops."""
    CLWB = 4
    """x86-64: writes back, and may keep."""
    ARM_DC = 8
    """arm64: DC CVAC writes back, DC CIVAC writes back and drops."""


_WRITE_BACK = (Way.CLWB, Way.CLFLUSHOPT, Way.CLFLUSH, Way.ARM_DC)
_INVALIDATE = (Way.CLFLUSHOPT, Way.CLFLUSH, Way.ARM_DC)
"""Best first. CLWB may keep a line, so it never invalidates."""


class Instructions:
    """The shared library, and what this processor has."""

    def __init__(self, path: Path = LIBRARY) -> None:
        """Raises Unsupported where there is none, or where it has no instructions for us."""
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            raise Unsupported(
                f"no cache-line instructions: {path.name} was not built with this installation "
                "(x86-64 and arm64 have one; a C compiler builds it)"
            ) from None
        library.tagmem_lines_ways.restype = ctypes.c_uint
        library.tagmem_lines_bytes.restype = ctypes.c_size_t
        library.tagmem_lines_fence.restype = None
        for function in (library.tagmem_lines_write_back, library.tagmem_lines_invalidate):
            function.restype = ctypes.c_int64
            function.argtypes = (
                ctypes.c_uint,
                ctypes.c_size_t,
                ctypes.c_size_t,
                ctypes.c_size_t,
            )
        self._library = library
        self.ways = Way(library.tagmem_lines_ways())
        self.line_bytes = int(library.tagmem_lines_bytes())
        self.write_back_way = choose(self.ways, _WRITE_BACK)
        self.invalidate_way = choose(self.ways, _INVALIDATE)
        if not is_power_of_two(self.line_bytes):
            raise Unsupported(f"this processor says that a line has {self.line_bytes} B")

    def write_back(self, address: int, length: int, way: Way | None = None) -> int:
        """Lines written back. The caller has checked the range. Raises Unsupported (the way)."""
        way = way or self.write_back_way
        return _done(
            self._library.tagmem_lines_write_back(way, address, length, self.line_bytes), way
        )

    def invalidate(self, address: int, length: int, way: Way | None = None) -> int:
        """Lines dropped. The caller has checked the range. Raises Unsupported (the way)."""
        way = way or self.invalidate_way
        return _done(
            self._library.tagmem_lines_invalidate(way, address, length, self.line_bytes), way
        )

    def fence(self) -> None:
        """SFENCE, or DSB SY."""
        self._library.tagmem_lines_fence()


def choose(ways: Way, best_first: tuple[Way, ...]) -> Way:
    """The first that is there. Raises Unsupported."""
    for way in best_first:
        if way & ways:
            return way
    raise Unsupported(f"this processor has none of {', '.join(w.name or '' for w in best_first)}")


def _done(lines: int, way: Way) -> int:
    if lines < 0:
        raise Unsupported(f"this processor cannot do this with {way.name}")
    return lines


@cache
def instructions() -> Instructions:
    """Those of this machine. Raises Unsupported."""
    return Instructions()


class CpuLines:
    """Lines of a buffer that is mapped here."""

    effective = True

    def __init__(self, buffer: mmap.mmap | bytearray | memoryview, of: Instructions) -> None:
        """Keeps `buffer` exported until `release`, so that its address stays what it is."""
        self._view = memoryview(buffer).cast("B")
        self._address = address_of(buffer)
        self._of = of
        self.line_bytes = of.line_bytes

    def write_back(self, offset: int, length: int) -> None:
        """Raises InvalidInput outside of the buffer."""
        self._of.write_back(self._at(offset, length), length)

    def fence(self) -> None:
        """Complete what was written back."""
        self._of.fence()

    def invalidate(self, offset: int, length: int) -> None:
        """Raises InvalidInput outside of the buffer."""
        self._of.invalidate(self._at(offset, length), length)

    def release(self) -> None:
        """Let go of the buffer; any range is outside of it from now on."""
        self._view.release()
        self._view = memoryview(b"")

    def _at(self, offset: int, length: int) -> int:
        size = len(self._view)
        if not 0 <= offset <= size:
            raise InvalidInput("offset", f"0 to {size} (bytes)", offset)
        if not 0 <= length <= size - offset:
            raise InvalidInput("length", f"0 to {size - offset} (bytes)", length)
        return self._address + offset


class NoLines:
    """Lines of a machine without instructions for them: it does nothing at all, and says so.

    Right where hosts snoop each other after all, as processes of one machine do; elsewhere other
    hosts may never see what is stored, and this host may never see theirs.
    """

    line_bytes = LINE_BYTES
    effective = False

    def write_back(self, offset: int, length: int) -> None:
        """Nothing is written back."""

    def fence(self) -> None:
        """Nothing is ordered."""

    def invalidate(self, offset: int, length: int) -> None:
        """Nothing is invalidated."""


def cpu_lines(buffer: mmap.mmap | bytearray | memoryview) -> CpuLines:
    """Lines of a buffer, by the best instructions of this machine. Raises Unsupported."""
    return CpuLines(buffer, instructions())
