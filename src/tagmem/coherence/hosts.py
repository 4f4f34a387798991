"""`Memory` of `tagmem.shared` on caches that lie: the library's own code runs on it unchanged, and
every access is judged.

A read-only view shows the host's bytes of the moment when it was taken, as a mapping would if no
line of it moved. A writable one is watched: what was written through it counts as stored when the
host touches the memory next, or says write back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.coherence.caches import LINE_BYTES, Caches
from tagmem.coherence.luck import Luck, lines
from tagmem.shared.coherence import KindName

WORD_BYTES = 8
_DEPTH_MAX = 4


@dataclass
class _Window:
    """A writable view that was given out."""

    offset: int
    data: bytearray
    shadow: bytes


class SimulatedHost:
    """One host's `Memory`. `step` is called before each access: where others may come between."""

    kind: KindName = "software-coherent"
    line_bytes = LINE_BYTES
    effective = True

    def __init__(
        self,
        number: int,
        caches: Caches,
        luck: Luck,
        *,
        writable: bool = True,
        step: Callable[[], None] | None = None,
    ) -> None:
        self._number = number
        self._caches = caches
        self._luck = luck
        self._step = step
        self._writable = writable
        self._windows: list[_Window] = []

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return len(self._caches.memory)

    @property
    def writable(self) -> bool:
        """Whether this host may store."""
        return self._writable

    def load(self, offset: int, length: int) -> bytes:
        """A copy of what this host sees."""
        self._begin(offset, length)
        self._luck.load(self._number, offset, length, site())
        return self._caches.load(self._number, offset, length)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Into this host's cache."""
        source = memoryview(data).cast("B")
        self._begin(offset, len(source), store=True)
        self._luck.store(self._number, offset, len(source), site())
        self._caches.store(self._number, offset, source)

    def view(self, offset: int, length: int, *, writable: bool = False) -> memoryview:
        """A snapshot; a writable one is watched."""
        self._begin(offset, length, store=writable)
        if not writable:
            self._luck.load(self._number, offset, length, site())
            return memoryview(self._caches.load(self._number, offset, length))
        data = self._caches.load(self._number, offset, length)
        window = _Window(offset, bytearray(data), data)
        self._windows.append(window)
        return memoryview(window.data)

    def load_word(self, offset: int) -> int:
        """A racing load: never judged."""
        self._word(offset)
        value = int.from_bytes(self._caches.load(self._number, offset, WORD_BYTES), "little")
        self._luck.load_word(self._number, offset, value)
        return value

    def store_word(self, offset: int, value: int) -> None:
        """A racing store."""
        self._word(offset, store=True)
        self._luck.store_word(self._number, offset, value, site())
        self._caches.store(self._number, offset, value.to_bytes(WORD_BYTES, "little"))

    def write_back(self, offset: int, length: int) -> None:
        """Lines of the range start their way."""
        self._begin(offset, length)
        self._luck.write_back(self._number, offset, length)
        self._caches.write_back(self._number, offset, length)

    def fence(self) -> None:
        """They have arrived."""
        self._begin(0, 0)
        self._luck.fence(self._number)
        self._caches.fence(self._number)

    def invalidate(self, offset: int, length: int) -> None:
        """Lines of the range are dropped, those of writable views as well."""
        self._begin(offset, length)
        self._luck.invalidate(self._number, offset, length)
        self._caches.invalidate(self._number, offset, length)

    def _begin(self, offset: int, length: int, *, store: bool = False) -> None:
        size = len(self._caches.memory)
        if not 0 <= offset <= size:
            raise InvalidInput("offset", f"0 to {size} (bytes)", offset)
        if not 0 <= length <= size - offset:
            raise InvalidInput("length", f"0 to {size - offset} (bytes)", length)
        if store and not self._writable:
            raise Conflict("the memory is mapped read-only on this host")
        if self._windows:
            self._collect()
        if self._step is not None:
            self._step()

    def _word(self, offset: int, *, store: bool = False) -> None:
        if offset % WORD_BYTES:
            raise InvalidInput("offset", f"a multiple of {WORD_BYTES} (bytes)", offset)
        self._begin(offset, WORD_BYTES, store=store)

    def _collect(self) -> None:
        """What was written through views since, as stores of whole runs within a line."""
        for window in self._windows:
            if window.data == window.shadow:
                continue
            for line in lines(window.offset, len(window.data)):
                start = max(line * LINE_BYTES - window.offset, 0)
                end = min((line + 1) * LINE_BYTES - window.offset, len(window.data))
                now, then = window.data[start:end], window.shadow[start:end]
                changed = [at for at in range(end - start) if now[at] != then[at]]
                if changed:
                    first, after = changed[0], changed[-1] + 1
                    at = window.offset + start + first
                    self._luck.store(self._number, at, after - first, site())
                    self._caches.store(self._number, at, now[first:after])
            window.shadow = bytes(window.data)


Site = tuple[tuple[str, int], ...]


def site() -> Site:
    """The callers outside of this file, innermost first, as (code, line)."""
    found: list[tuple[str, int]] = []
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the cheap way to a caller's line
    while frame is not None and len(found) < _DEPTH_MAX:
        if frame.f_code.co_filename != __file__:
            found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)
