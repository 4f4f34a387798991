"""What is free in one pool of media, so that a fit is found without looking at what is taken.

Regions are windows on pools; several may show the same one, so the free map belongs to (appliance,
pool). Free runs are kept twice: by start, to merge neighbours, and by length, to find the best fit.
Both are sorted lists under bisect: inserting moves memory, which for the 10^4 runs that a pool may
have costs a few microseconds, less than any tree in Python would.

Across pools, a `LengthIndex` knows for each length that some free run has which pools have one, as
a bit mask. Without it a decision would have to search each of 256 pools, and with a million runs
those searches are cache misses.

A run is also one integer, `length << 64 | start`: integers compare faster than tuples, and the
smallest one not below `size << 64` *is* the best fit, lowest address first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

from tagmem.base.units import Bytes, MediaOffset
from tagmem.domain.extent import InvariantViolated, normal
from tagmem.domain.records import Extent

START_BITS = 64
_START_MASK = (1 << START_BITS) - 1


class LengthIndex:
    """Which pools have a free run of which length."""

    __slots__ = ("lengths", "masks")

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Every length that some free run has, ascending."""
        self.masks: dict[int, int] = {}
        """For each, the bits of the pools that have one."""

    def add(self, length: int, bit: int) -> None:
        """A pool has a run of this length (or another one)."""
        mask = self.masks.get(length)
        if mask is None:
            insort(self.lengths, length)
            mask = 0
        self.masks[length] = mask | bit

    def drop(self, length: int, bit: int) -> None:
        """A pool has no run of this length any more."""
        mask = self.masks[length] & ~bit
        if mask:
            self.masks[length] = mask
        else:
            del self.masks[length]
            del self.lengths[bisect_left(self.lengths, length)]


class FreeMap:
    """The free runs of one pool, merged and sorted."""

    __slots__ = ("_bit", "_ends", "_index", "_starts", "free_bytes", "runs", "size_bytes")

    def __init__(self, size_bytes: Bytes, used: Iterable[Extent] = ()) -> None:
        """Raises InvariantViolated when `used` leaves the pool; overlaps in it are taken once."""
        self.size_bytes = size_bytes
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self.runs: list[int] = []
        """Every free run as `length << 64 | start`, shortest first; read by placement."""
        self.free_bytes = 0
        self._index: LengthIndex | None = None
        self._bit = 0
        at = 0
        for extent in normal(used):
            if extent.start < 0 or extent.end > size_bytes:
                raise InvariantViolated(f"extent {extent} lies outside a pool of {size_bytes}")
            if extent.start > at:
                self._append(at, extent.start)
            at = extent.end
        if at < size_bytes:
            self._append(at, size_bytes)
        self.runs.sort()

    def _append(self, start: int, end: int) -> None:
        self._starts.append(start)
        self._ends[start] = end
        self.runs.append((end - start) << START_BITS | start)
        self.free_bytes += end - start

    def join(self, index: LengthIndex | None, bit: int) -> None:
        """Keep `index` told of the lengths of this pool's runs, under `bit`; None: of nothing."""
        if self._index is not None:
            for length in {run >> START_BITS for run in self.runs}:
                self._index.drop(length, self._bit)
        self._index, self._bit = index, bit
        if index is not None:
            for length in {run >> START_BITS for run in self.runs}:
                index.add(length, bit)

    @property
    def largest_bytes(self) -> Bytes:
        """The longest free run."""
        return self.runs[-1] >> START_BITS if self.runs else 0

    @property
    def run_count(self) -> int:
        """How many free runs there are: fragmentation."""
        return len(self.runs)

    def free_runs(self) -> list[Extent]:
        """Every free run, by address."""
        return [Extent(MediaOffset(s), self._ends[s] - s) for s in self._starts]

    def best_run(self, length: Bytes, limit: Bytes | None = None) -> int:
        """The shortest run whose first `length` bytes lie below `limit`, as in `runs`; -1 when
        there is none.
        """
        runs = self.runs
        for index in range(bisect_left(runs, length << START_BITS), len(runs)):
            if limit is None or (runs[index] & _START_MASK) + length <= limit:
                return runs[index]
        return -1

    def best_fit(self, length: Bytes, limit: Bytes | None = None) -> Extent | None:
        """Where `length` bytes fit with least left over, below `limit`; None when nowhere."""
        run = self.best_run(length, limit)
        return None if run < 0 else Extent(MediaOffset(run & _START_MASK), length)

    def gather(
        self, length: Bytes, extents_max: int, limit: Bytes | None = None
    ) -> tuple[Extent, ...] | None:
        """Several runs that make up `length`, longest first, the last one a best fit; None when too
        many.
        """
        chosen: list[Extent] = []
        rest = length
        for run in reversed(self.runs):
            start, run_length = run & _START_MASK, run >> START_BITS
            if limit is not None:
                run_length = min(run_length, limit - start)
            if run_length <= 0:
                continue
            if len(chosen) == extents_max:
                return None
            if run_length >= rest:
                chosen.append(self._last_piece(start, rest, limit))
                return tuple(chosen)
            chosen.append(Extent(MediaOffset(start), run_length))
            rest -= run_length
        return None

    def _last_piece(self, start: int, length: Bytes, limit: Bytes | None) -> Extent:
        # Runs longer than this one are all chosen, so a best fit is this run or a shorter one.
        return self.best_fit(length, limit) or Extent(MediaOffset(start), length)

    def reserve(self, extents: Sequence[Extent]) -> None:
        """Take given extents. Raises InvariantViolated, with nothing taken, when a byte is not
        free.
        """
        for extent in extents:
            if not self.is_free(extent):
                raise InvariantViolated(f"extent {extent} is not free")
        for extent in extents:
            index = bisect_right(self._starts, extent.start) - 1
            start = self._starts[index]
            end = self._ends[start]
            if extent.end > end or extent.start < start:
                raise InvariantViolated(f"extent {extent} was given twice")
            self._drop(index, start, end)
            if extent.start > start:
                self._add(start, extent.start)
            if extent.end < end:
                self._add(extent.end, end)

    def release(self, extents: Sequence[Extent]) -> None:
        """Give extents back, merged with free neighbours. Raises InvariantViolated when a byte is
        free already.
        """
        for extent in extents:
            start, end = int(extent.start), extent.end
            index = bisect_right(self._starts, start)
            if (
                start < 0
                or end > self.size_bytes
                or (index and self._ends[self._starts[index - 1]] > start)
                or (index < len(self._starts) and self._starts[index] < end)
            ):
                raise InvariantViolated(f"extent {extent} is free already or outside the pool")
            if index < len(self._starts) and self._starts[index] == end:
                after = self._starts[index]
                end = self._ends[after]
                self._drop(index, after, end)
            if index and self._ends[self._starts[index - 1]] == start:
                before = self._starts[index - 1]
                self._drop(index - 1, before, start)
                start = before
            self._add(start, end)

    def is_free(self, extent: Extent) -> bool:
        """Whether every byte of the extent is free."""
        index = bisect_right(self._starts, extent.start) - 1
        return index >= 0 and extent.length > 0 and extent.end <= self._ends[self._starts[index]]

    def _add(self, start: int, end: int) -> None:
        insort(self._starts, start)
        self._ends[start] = end
        insort(self.runs, (end - start) << START_BITS | start)
        self.free_bytes += end - start
        if self._index is not None:
            self._index.add(end - start, self._bit)

    def _drop(self, index: int, start: int, end: int) -> None:
        del self._starts[index]
        del self._ends[start]
        length, runs = end - start, self.runs
        at = bisect_left(runs, length << START_BITS | start)
        del runs[at]
        self.free_bytes -= length
        if self._index is None:
            return
        # Runs of one length are neighbours in `runs`, so two looks tell whether this was the last.
        after = at < len(runs) and runs[at] >> START_BITS == length
        before = at > 0 and runs[at - 1] >> START_BITS == length
        if not (after or before):
            self._index.drop(length, self._bit)


class Pool:
    """One pool of one appliance: what is free, and whose the rest is."""

    __slots__ = (
        "_index",
        "_starts",
        "_taken",
        "bit",
        "block_bytes",
        "free",
        "quarantined",
        "used_bytes",
    )

    def __init__(self, size_bytes: Bytes, block_bytes: Bytes) -> None:
        self.block_bytes = block_bytes
        self.free = FreeMap(size_bytes)
        self.bit = 0
        """This pool's bit in the length index."""
        self._index: LengthIndex | None = None
        self.quarantined: tuple[Extent, ...] = ()
        """Bytes that something unknown holds; neither free nor ours."""
        self.used_bytes = 0
        self._starts: list[int] = []
        self._taken: dict[int, tuple[int, str]] = {}

    def fill(self, owned: Iterable[tuple[Extent, str]], quarantined: Sequence[Extent]) -> None:
        """Start over from what is owned and quarantined. Raises InvariantViolated for an overlap of
        owners.
        """
        ordered = sorted(owned)
        self._starts = [extent.start for extent, _ in ordered]
        self._taken = {extent.start: (extent.end, owner) for extent, owner in ordered}
        end = 0
        for extent, owner in ordered:
            if extent.start < end:
                raise InvariantViolated(f"{extent} of {owner} overlaps another capacity's")
            end = extent.end
        self.used_bytes = sum(extent.length for extent, _ in ordered)
        self.quarantined = normal(quarantined)
        self.free.join(None, 0)
        self.free = FreeMap(
            self.free.size_bytes, [*(extent for extent, _ in ordered), *self.quarantined]
        )
        self.free.join(self._index, self.bit)

    def join(self, index: LengthIndex | None, bit: int) -> None:
        """Take part in an index of lengths under `bit`."""
        self._index, self.bit = index, bit
        self.free.join(index, bit)

    def reserve(self, extents: Sequence[Extent], owner: str) -> None:
        """Set extents aside for `owner`. Raises InvariantViolated when a byte is not free."""
        self.free.reserve(extents)
        for extent in extents:
            insort(self._starts, extent.start)
            self._taken[extent.start] = (extent.end, owner)
            self.used_bytes += extent.length

    def release(self, extents: Sequence[Extent], owner: str) -> None:
        """Take them back. Raises InvariantViolated when they are not `owner`'s."""
        for extent in extents:
            if self._taken.get(extent.start) != (extent.end, owner):
                raise InvariantViolated(f"{extent} does not belong to {owner}")
        for extent in extents:
            del self._taken[extent.start]
            del self._starts[bisect_left(self._starts, extent.start)]
            self.used_bytes -= extent.length
        if self.quarantined:
            # Foreign extents may overlap ours; only the whole picture says what is free now.
            self.fill(self.owned(), self.quarantined)
        else:
            self.free.release(extents)

    def owned(self) -> list[tuple[Extent, str]]:
        """Every extent that is set aside, by address, with its owner."""
        return [
            (Extent(MediaOffset(start), self._taken[start][0] - start), self._taken[start][1])
            for start in self._starts
        ]

    def owner_at(self, offset: int) -> str | None:
        """Whose byte this is; None when nobody's of ours."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        end, owner = self._taken[self._starts[index]]
        return owner if offset < end else None

    def owners_in(self, extent: Extent) -> list[str]:
        """The owners of the bytes of an extent, each once, by address."""
        index = max(0, bisect_right(self._starts, extent.start) - 1)
        found: dict[str, None] = {}
        for start in self._starts[index:]:
            if start >= extent.end:
                break
            end, owner = self._taken[start]
            if end > extent.start:
                found[owner] = None
        return list(found)
