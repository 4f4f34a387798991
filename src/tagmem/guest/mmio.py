"""Carries out what `dcd` wants done: accesses of exact width on mapped register files.

`struct` and slices on an mmap copy byte by byte, or as the C library likes; ctypes' integers are
one load or store each. Everything is aligned and within the mapping, or nothing is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from tagmem.base.errors import InvalidInput
from tagmem.guest.dcd import Pause, Read, Steps, Write

T = TypeVar("T")
_KINDS = {4: ctypes.c_uint32, 8: ctypes.c_uint64}


class Registers(Protocol):
    """A space of registers."""

    def read(self, offset: int, width: int) -> int:
        """Read `width` bytes at once."""

    def write(self, offset: int, width: int, value: int) -> None:
        """Write `width` bytes at once."""


class Mapped:
    """Registers in a file: a sysfs `resourceN`, or /dev/mem at `offset`. Raises OSError."""

    def __init__(self, path: str, offset: int = 0, span: int = 0) -> None:
        fd = os.open(path, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
        try:
            self.span = span or os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.span, mmap.MAP_SHARED, offset=offset)
        finally:
            os.close(fd)

    def _at(self, offset: int, width: int) -> ctypes._SimpleCData[int]:
        kind = _KINDS.get(width)
        if kind is None or offset % width or not 0 <= offset <= self.span - width:
            limit = f"aligned, of 4 or 8 bytes, within {self.span:#x}"
            raise InvalidInput("access", limit, f"{width} bytes at {offset:#x}")
        return kind.from_buffer(self._map, offset)

    def read(self, offset: int, width: int) -> int:
        """Read `width` bytes at once."""
        return self._at(offset, width).value

    def write(self, offset: int, width: int, value: int) -> None:
        """Write `width` bytes at once."""
        self._at(offset, width).value = value

    def close(self) -> None:
        """Unmap."""
        self._map.close()


def perform(
    steps: Steps[T],
    spaces: Mapping[str, Registers],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Carry an operation out; its result, or what it raises."""
    answer = 0
    try:
        access = next(steps)
        while True:
            if isinstance(access, Read):
                answer = spaces[access.space].read(access.offset, access.width)
            elif isinstance(access, Write):
                spaces[access.space].write(access.offset, access.width, access.value)
            elif isinstance(access, Pause):
                sleep(access.seconds)
            access = steps.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result
