"""Whose each byte of a pool is, so that no byte of media ever belongs to two tags.

The free runs are `region.FreeMap`'s; this adds the owners of the rest, and fits that start on a
block boundary, because regions with other block sizes may be windows on the same pool.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

from tagmem.base.units import Bytes, MediaOffset, align_up
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.records import Extent
from tagmem.domain.region import START_BITS, FreeMap

_START_MASK = (1 << START_BITS) - 1


class Space:
    """The map of one pool."""

    __slots__ = ("_owner", "_taken", "free", "size_bytes")

    def __init__(self, size_bytes: Bytes) -> None:
        self.size_bytes = size_bytes
        self.free = FreeMap(size_bytes)
        self._taken: list[int] = []
        self._owner: dict[int, tuple[int, int]] = {}

    def take(self, start: int, length: Bytes, owner: int) -> None:
        """Give a free range to `owner`. Raises InvariantViolated when a byte is not free."""
        self.free.reserve((Extent(MediaOffset(start), length),))
        insort(self._taken, start)
        self._owner[start] = (start + length, owner)

    def give_up(self, start: int, length: Bytes) -> None:
        """Free a range that was taken as one piece. Raises InvariantViolated when it was not."""
        self._forget(start, length)
        self.free.release((Extent(MediaOffset(start), length),))

    def divide(self, start: int, length: Bytes, parts: Sequence[tuple[int, int, int]]) -> None:
        """Replace one taken piece by `parts` (start, length, owner) that cover it exactly."""
        at = start
        for part_start, part_length, _ in sorted(parts):
            if part_start != at:
                raise InvariantViolated(f"parts do not cover {start}+{length}")
            at += part_length
        if at != start + length:
            raise InvariantViolated(f"parts do not cover {start}+{length}")
        self._forget(start, length)
        for part_start, part_length, owner in parts:
            insort(self._taken, part_start)
            self._owner[part_start] = (part_start + part_length, owner)

    def owners(self, start: int, length: Bytes) -> Iterator[tuple[int, int, int]]:
        """(start, end, owner) of each taken piece that overlaps the range, by address."""
        end = start + length
        at = max(0, bisect_right(self._taken, start) - 1)
        while at < len(self._taken) and self._taken[at] < end:
            piece = self._taken[at]
            piece_end, owner = self._owner[piece]
            if piece_end > start:
                yield piece, piece_end, owner
            at += 1

    @property
    def empty(self) -> bool:
        """Whether nothing is taken."""
        return not self._taken

    def contiguous(self, length: Bytes, block_bytes: Bytes) -> int | None:
        """Start of the best fit that begins on a block boundary; None when there is none."""
        runs = self.free.runs
        for index in range(bisect_left(runs, length << START_BITS), len(runs)):
            run = runs[index] & _START_MASK
            start = align_up(run, block_bytes)
            if start + length <= run + (runs[index] >> START_BITS):
                return start
        return None

    def scattered(self, length: Bytes, block_bytes: Bytes) -> list[tuple[int, int]] | None:
        """Whole blocks of the longest runs until `length` is reached, by address; None when too
        few.
        """
        found: list[tuple[int, int]] = []
        left = length
        for packed in reversed(self.free.runs):
            run = packed & _START_MASK
            start = align_up(run, block_bytes)
            room = run + (packed >> START_BITS) - start
            usable = min(left, room // block_bytes * block_bytes)
            if usable > 0:
                found.append((start, usable))
                left -= usable
            if left == 0:
                return sorted(found)
        return None

    def _forget(self, start: int, length: Bytes) -> None:
        if self._owner.get(start, (0, 0))[0] != start + length:
            raise InvariantViolated(f"{start}+{length} is not one taken piece")
        del self._owner[start]
        del self._taken[bisect_left(self._taken, start)]
