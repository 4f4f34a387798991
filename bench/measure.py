"""What every benchmark does alike: take turns with a floor, and say how far the figures spread.

A machine that others use too gives no number twice. A ratio of two things measured in turn is worth
more: whatever slows the one slows the other. So each figure here is *ours* against a *floor*, which
is the least that anybody could do for the same result, and both are taken a, b, b, a, a, b, …
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Measure = Callable[[], float]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated between neighbours.

    Raises ValueError for no values or a share outside 0 to 1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(
            f"share must be from 0 to 1 of at least one value, got {share} of {len(values)}"
        )
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Sample:
    """Several readings of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The lower quartile; with `high` the spread that is reported."""
        return quantile(self.values, 0.25)

    @property
    def high(self) -> float:
        return quantile(self.values, 0.75)

    def at(self, share: float) -> float:
        return quantile(self.values, share)


@dataclass(frozen=True, slots=True)
class Pair:
    """Ours and the floor, reading by reading."""

    ours: Sample
    floor: Sample

    @property
    def ratio(self) -> Sample:
        """Ours divided by the floor beside it: what noise of the machine is in both drops out."""
        both = zip(self.ours.values, self.floor.values, strict=True)
        return Sample(tuple(ours / floor for ours, floor in both))


def interleave(ours: Measure, floor: Measure, rounds: int) -> Pair:
    """Take `rounds` readings of each in turn; who goes first alternates too."""
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(rounds):
        first, second = (ours, floor) if number % 2 == 0 else (floor, ours)
        one, other = first(), second()
        mine.append(one if number % 2 == 0 else other)
        theirs.append(other if number % 2 == 0 else one)
    return Pair(Sample(tuple(mine)), Sample(tuple(theirs)))


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, without the garbage collector in between."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    finally:
        if enabled:
            gc.enable()


def rate(count: int, work: Callable[[], object]) -> Measure:
    """A measure: how many per second, where one call of `work` does `count`."""
    return lambda: count / seconds(work)
