"""The algebra of extent sets: every rule about memory is in the end a question that these functions
answer.

A *set* here is a sorted tuple of disjoint extents that do not touch (`normal`); a capacity's own
extents keep their sequence order instead, and are normalised before they are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from tagmem.base.errors import TagmemError
from tagmem.base.units import Bytes, MediaOffset
from tagmem.domain.records import Extent

ExtentSet = tuple[Extent, ...]


class InvariantViolated(TagmemError):
    """The books contradict themselves; going on could hand out the same memory twice."""


def total(extents: Iterable[Extent]) -> Bytes:
    """The sum of the lengths; for a set, the bytes covered."""
    return sum(extent.length for extent in extents)


def normal(extents: Iterable[Extent]) -> ExtentSet:
    """The same bytes as a set: sorted, merged, without empty extents."""
    ordered = sorted(extents)
    if len(ordered) == 1 and ordered[0].length:
        return (ordered[0],)
    merged: list[Extent] = []
    for extent in ordered:
        if not extent.length:
            continue
        if merged and extent.start <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Extent(last.start, max(last.end, extent.end) - last.start)
        else:
            merged.append(extent)
    return tuple(merged)


def merge(left: Iterable[Extent], right: Iterable[Extent]) -> ExtentSet:
    """The bytes that are in either."""
    return normal((*left, *right))


def intersect(left: ExtentSet, right: ExtentSet) -> ExtentSet:
    """The bytes that are in both sets."""
    common: list[Extent] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start = max(left[i].start, right[j].start)
        end = min(left[i].end, right[j].end)
        if start < end:
            common.append(Extent(MediaOffset(start), end - start))
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return tuple(common)


def subtract(left: ExtentSet, right: ExtentSet) -> ExtentSet:
    """The bytes of the left set that are not in the right one."""
    rest: list[Extent] = []
    j = 0
    for extent in left:
        at = extent.start
        while j < len(right) and right[j].end <= at:
            j += 1
        k = j
        while k < len(right) and right[k].start < extent.end:
            if right[k].start > at:
                rest.append(Extent(at, right[k].start - at))
            at = MediaOffset(max(at, right[k].end))
            k += 1
        if at < extent.end:
            rest.append(Extent(at, extent.end - at))
    return tuple(rest)


def overlaps(left: ExtentSet, right: ExtentSet) -> bool:
    """Whether the sets share a byte."""
    return bool(intersect(left, right))


def covers(outer: ExtentSet, inner: ExtentSet) -> bool:
    """Whether every byte of `inner` is in `outer`."""
    return not subtract(inner, outer)


def same_bytes(left: Iterable[Extent], right: Iterable[Extent]) -> bool:
    """Whether both name the same bytes, however they are cut and ordered."""
    return normal(left) == normal(right)


def split(extent: Extent, length: Bytes) -> tuple[Extent, Extent]:
    """The first `length` bytes, and the rest. Raises ValueError unless both are non-empty."""
    if not 0 < length < extent.length:
        raise ValueError(f"length must be between 1 and {extent.length - 1}, got {length}")
    cut = MediaOffset(extent.start + length)
    return Extent(extent.start, length), Extent(cut, extent.length - length)


def overlapping_pair(extents: Sequence[Extent]) -> tuple[Extent, Extent] | None:
    """Two of the extents that share a byte, or None."""
    ordered = sorted(extents)
    for one, other in itertools.pairwise(ordered):
        if other.start < one.end:
            return one, other
    return None
