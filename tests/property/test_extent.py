"""The algebra of extents against a bitmap, which is too simple to be wrong."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.units import MediaOffset
from tagmem.domain import extent as algebra
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.records import Extent
from tagmem.domain.region import FreeMap, LengthIndex, Pool

SIZE = 64

extents = st.builds(
    lambda start, length: Extent(MediaOffset(start), min(length, SIZE - start)),
    st.integers(0, SIZE - 1),
    st.integers(1, 20),
)
lists = st.lists(extents, max_size=8)


def bits(found: object) -> set[int]:
    return {b for e in found for b in range(e.start, e.end)}  # type: ignore[attr-defined]


@given(lists, lists)
def test_sets_are_sets_of_bytes(left: list[Extent], right: list[Extent]) -> None:
    a, b = algebra.normal(left), algebra.normal(right)
    assert bits(a) == bits(left)
    assert all(one.end < other.start for one, other in pairwise(a))
    assert bits(algebra.merge(a, b)) == bits(left) | bits(right)
    assert bits(algebra.intersect(a, b)) == bits(left) & bits(right)
    assert bits(algebra.subtract(a, b)) == bits(left) - bits(right)
    assert algebra.overlaps(a, b) == bool(bits(left) & bits(right))
    assert algebra.covers(a, b) == (bits(right) <= bits(left))
    assert algebra.same_bytes(left, right) == (bits(left) == bits(right))
    assert algebra.total(a) == len(bits(left))
    for found in (algebra.merge(a, b), algebra.intersect(a, b), algebra.subtract(a, b)):
        assert found == algebra.normal(found)


@given(lists)
def test_an_overlapping_pair_is_found(left: list[Extent]) -> None:
    pair = algebra.overlapping_pair(left)
    assert (pair is not None) == (sum(e.length for e in left) != len(bits(left)))
    if pair is not None:
        assert bits(pair[:1]) & bits(pair[1:])


@given(extents, st.integers(-1, 30))
def test_split(one: Extent, length: int) -> None:
    if 0 < length < one.length:
        left, right = algebra.split(one, length)
        assert (left.start, left.end, right.end) == (one.start, right.start, one.end)
        assert left.length == length
    else:
        try:
            algebra.split(one, length)
        except ValueError:
            return
        raise AssertionError("a split into nothing")


@given(st.lists(st.tuples(extents, st.booleans()), max_size=30), st.integers(1, 30))
def test_a_free_map_is_a_bitmap(steps: list[tuple[Extent, bool]], length: int) -> None:
    index = LengthIndex()
    free = FreeMap(SIZE)
    free.join(index, 1)
    model = set(range(SIZE))
    for one, take in steps:
        wanted = bits((one,))
        legal = wanted <= model if take else not wanted & model
        try:
            (free.reserve if take else free.release)((one,))
        except InvariantViolated:
            assert not legal
            continue
        assert legal
        model = model - wanted if take else model | wanted
    runs = free.free_runs()
    assert bits(runs) == model
    assert tuple(runs) == algebra.normal(runs)
    assert free.free_bytes == len(model)
    assert free.largest_bytes == max((run.length for run in runs), default=0)
    assert index.lengths == sorted({run.length for run in runs})
    taken = [Extent(MediaOffset(b), 1) for b in set(range(SIZE)) - model]
    assert FreeMap(SIZE, taken).runs == free.runs
    _check_fits(free, runs, length)


def _check_fits(free: FreeMap, runs: list[Extent], length: int) -> None:
    fit = free.best_fit(length)
    able = [run for run in runs if run.length >= length]
    assert (fit is None) == (not able)
    if fit is not None:
        assert fit == Extent(min(able, key=lambda run: (run.length, run.start)).start, length)
    gathered = free.gather(length, 4)
    longest = sorted((run.length for run in runs), reverse=True)[:4]
    assert (gathered is None) == (sum(longest) < length)
    if gathered is not None:
        assert algebra.total(gathered) == len(bits(gathered)) == length
        assert all(free.is_free(one) for one in gathered)


@given(st.lists(extents, max_size=12), lists)
def test_a_pool_knows_whose_each_byte_is(wanted: list[Extent], foreign: list[Extent]) -> None:
    pool = Pool(SIZE, 1)
    model: dict[int, str] = {}
    for number, one in enumerate(wanted):
        if not bits((one,)) & model.keys():
            pool.reserve((one,), str(number))
            model |= dict.fromkeys(bits((one,)), str(number))
    pool.fill(pool.owned(), foreign)
    assert [pool.owner_at(at) for at in range(SIZE)] == [model.get(at) for at in range(SIZE)]
    for one in foreign:
        assert set(pool.owners_in(one)) == {model[b] for b in bits((one,)) if b in model}
    for one, owner in pool.owned():
        pool.release((one,), owner)
    assert pool.used_bytes == 0
    assert bits(pool.free.free_runs()) == set(range(SIZE)) - bits(foreign)
