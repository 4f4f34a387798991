"""Lines of an emulated host whose cache lies: `Lines` that moves them by hand between the host's
own view of a tag and the memory that all hosts have.

On a region with `stale_caches` (appliance.toml) each host has a view, which is what its programs
map, and a shadow, which is what of it came from memory last: where they differ, the view is dirty.
Nothing passes between view and memory but by what is done here, and by what a cache does by itself
at such a moment, from a seed: a dirty line is evicted, a clean one is fetched anew. So a store that
nobody writes back is not seen on another host, on one machine, today.

Coarser than `tagmem check-coherence`, which stops every access; but it needs no tracing, works in
every process and guest that maps the tag, and costs nothing between flushes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from tagmem.base.errors import InvalidInput
from tagmem.client.mapping import Capacity
from tagmem.shared.coherence import LINE_BYTES
from tagmem.shared.lines import CpuLines, cpu_lines

MEDIUM, SHADOW, SEED = "medium", "shadow", "stale_caches"
"""Beside the view, in the device's directory."""
_CHUNK_BYTES = 1 << 16
_BY_ITSELF = 1 / 8
"""How often, at an operation, the cache does something that nobody asked for."""
_RECENT_MAX = 32


class StaleLines:
    """The view of one host. For one thread at a time; processes and hosts lock each other out."""

    effective = True
    line_bytes = LINE_BYTES

    def __init__(self, folder: str, name: str, *, offset: int, size_bytes: int) -> None:
        """`folder` is a device's directory, `name` its view; the tag's bytes lie from `offset` in
        all three files. Raises OSError.
        """
        self._size = size_bytes
        self._offset = offset
        self._maps: list[mmap.mmap] = []
        self._lock = -1
        try:
            self._view = self._open(f"{folder}/{name}")
            self._shadow = self._open(f"{folder}/{SHADOW}")
            self._medium = self._open(f"{folder}/{MEDIUM}")
            self._lock = os.open(f"{folder}/{MEDIUM}", os.O_RDWR | os.O_CLOEXEC)
            with open(f"{folder}/{SEED}", encoding="ascii") as file:
                self._chance = Random(f"{file.read().strip()} {name}")
        except OSError:
            self.release()
            raise
        self._flight: dict[int, bytes] = {}
        self._recent: list[int] = []

    def _open(self, path: str) -> memoryview:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            end = self._offset + self._size
            if os.fstat(fd).st_size < end:
                raise FileNotFoundError(f"{path} is shorter than {end} B: it was taken back")
            mapped = mmap.mmap(fd, end)
        finally:
            os.close(fd)
        self._maps.append(mapped)
        return memoryview(mapped)[self._offset :]

    def write_back(self, offset: int, length: int) -> None:
        """Dirty lines of the range start their way. Raises InvalidInput outside of the tag."""
        with self._moving(offset, length):
            for line in self._dirty(offset, length):
                self._flight[line] = bytes(self._view[_span(line)])

    def fence(self) -> None:
        """They have arrived."""
        with self._moving(0, 0):
            for line in list(self._flight):
                self._land(line)

    def invalidate(self, offset: int, length: int) -> None:
        """The range's lines come from memory. A dirty one is lost or evicted, as it happens.

        Raises InvalidInput outside of the tag.
        """
        with self._moving(offset, length):
            for line in self._dirty(offset, length):
                if self._chance.random() < 0.5:
                    self._evict(line)
            begin = offset // LINE_BYTES * LINE_BYTES
            end = min(-(-(offset + length) // LINE_BYTES) * LINE_BYTES, self._size)
            if length:
                self._view[begin:end] = self._medium[begin:end]
                self._shadow[begin:end] = self._medium[begin:end]

    def write_back_all(self) -> None:
        """All that the host has not written back: what it does before it gives the tag away."""
        with self._moving(0, 0):
            for line in self._dirty(0, self._size):
                self._evict(line)

    def release(self) -> None:
        """Let go of the files. What was on its way and not fenced stays in the view."""
        for name in ("_view", "_shadow", "_medium"):
            view = getattr(self, name, None)
            if view is not None:
                view.release()
        while self._maps:
            self._maps.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # ---- moving

    @contextmanager
    def _moving(self, offset: int, length: int) -> Iterator[None]:
        """Alone with memory; afterwards the cache may do something by itself."""
        if not 0 <= offset <= self._size:
            raise InvalidInput("offset", f"0 to {self._size} (bytes)", offset)
        if not 0 <= length <= self._size - offset:
            raise InvalidInput("length", f"0 to {self._size - offset} (bytes)", length)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
            self._stir(offset, length)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _stir(self, offset: int, length: int) -> None:
        chance = self._chance
        if length:
            last = (offset + length - 1) // LINE_BYTES
            self._recent.append(chance.randrange(offset // LINE_BYTES, last + 1))
            del self._recent[:-_RECENT_MAX]
        if self._flight and chance.random() < _BY_ITSELF:
            self._land(chance.choice(sorted(self._flight)))
        if self._recent and chance.random() < _BY_ITSELF:
            line = chance.choice(self._recent)
            span = _span(line)
            if self._view[span] != self._shadow[span]:
                self._evict(line)
            else:
                self._view[span] = self._medium[span]
                self._shadow[span] = self._medium[span]

    def _dirty(self, offset: int, length: int) -> Iterator[int]:
        """Lines of a range whose view is not what came from memory."""
        at = offset // LINE_BYTES * LINE_BYTES
        while at < offset + length:
            end = min(at + _CHUNK_BYTES, -(-(offset + length) // LINE_BYTES) * LINE_BYTES)
            if self._view[at:end] != self._shadow[at:end]:
                for line in range(at // LINE_BYTES, -(-end // LINE_BYTES)):
                    if self._view[_span(line)] != self._shadow[_span(line)]:
                        yield line
            at = end

    def _evict(self, line: int) -> None:
        self._flight.pop(line, None)
        self._medium[_span(line)] = self._view[_span(line)]
        self._shadow[_span(line)] = self._view[_span(line)]

    def _land(self, line: int) -> None:
        data = self._flight.pop(line)
        self._medium[_span(line)] = data
        # Stored again meanwhile, it stays dirty: the shadow is what memory has.
        self._shadow[_span(line)] = data


def _span(line: int) -> slice:
    return slice(line * LINE_BYTES, (line + 1) * LINE_BYTES)


def lines_of(capacity: Capacity) -> CpuLines | StaleLines:
    """Lines of an opened tag: the processor's, or those of an emulated host whose cache lies.

    Raises Unsupported (no cache-line instructions here).
    """
    if not capacity.stale_caches:
        return cpu_lines(capacity.map)
    folder, name = os.path.split(capacity.path)
    return StaleLines(folder, name, offset=capacity.pieces[0][0], size_bytes=capacity.size)
