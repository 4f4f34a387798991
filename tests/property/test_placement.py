"""Placement against a search through every possibility; the quick and the plain way agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.ids import ApplianceId
from tagmem.base.units import MediaOffset
from tagmem.domain import placement
from tagmem.domain.outcome import Outcome
from tagmem.domain.placement import Request, Verdict, Window
from tagmem.domain.records import ApplianceState, Extent, RegionRecord, Sharing
from tagmem.domain.region import LengthIndex, Pool

SIZE = 48

pools = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 9)), max_size=8),
        st.sampled_from(ApplianceState),
        st.booleans(),
        st.sampled_from((SIZE, SIZE, 20)),
    ),
    min_size=1,
    max_size=14,
)
requests = st.builds(
    Request,
    st.integers(1, 12),
    sharing=st.sampled_from((Sharing.NONE, Sharing.SOFTWARE_COHERENT)),
    tagged=st.just(True),
    contiguous=st.booleans(),
)


def build(
    drawn: list[tuple[list[tuple[int, int]], ApplianceState, bool, int]],
) -> tuple[list[Window], LengthIndex]:
    index, windows = LengthIndex(), []
    for place, (used, state, sharable, shown) in enumerate(drawn):
        pool = Pool(SIZE, 1)
        pool.fill([], [Extent(MediaOffset(at), min(n, SIZE - at)) for at, n in used])
        pool.join(index, 1 << place)
        region = RegionRecord(0, 0, shown, 1, sharable=sharable)
        name = ApplianceId(f"a{place:02}")
        windows.append(Window(name, state, region, pool, False, shown == SIZE))
    return windows, index


def fits(window: Window, request: Request) -> list[int]:
    """The lengths of the runs of a window that could take the request."""
    wrong = window.state is not ApplianceState.READY or placement.unsuitable(window, request)
    if wrong:
        return []
    return [
        run.length
        for run in window.pool.free.free_runs()
        if run.length >= request.size_bytes
        and run.start + request.size_bytes <= window.region.size_bytes
    ]


@given(pools, requests)
def test_the_least_is_left_over(
    drawn: list[tuple[list[tuple[int, int]], ApplianceState, bool, int]], request_: Request
) -> None:
    windows, index = build(drawn)
    tiers = placement.tiers(windows, request_)
    size = request_.size_bytes
    quick = placement.place(tiers, size, contiguous=request_.contiguous, index=index)
    plain = placement.place(tiers, size, contiguous=request_.contiguous)
    assert quick == plain
    able = [
        (w.region.sharable, min(fits(w, request_)), w.appliance)
        for w in windows
        if fits(w, request_)
    ]
    if able:
        sharable, length, name = min(able)
        assert plain is not None
        assert len(plain.extents) == 1
        assert plain.window.appliance == name
        assert plain.window.region.sharable == sharable
        run = next(
            r for r in plain.window.pool.free.free_runs() if r.start == plain.extents[0].start
        )
        assert run.length == length
    elif request_.contiguous:
        assert plain is None
    if plain is not None:
        assert sum(extent.length for extent in plain.extents) == size
        assert all(plain.window.pool.free.is_free(extent) for extent in plain.extents)
        assert all(extent.end <= plain.window.region.size_bytes for extent in plain.extents)


@given(pools, requests)
def test_the_explanation_agrees(
    drawn: list[tuple[list[tuple[int, int]], ApplianceState, bool, int]], request_: Request
) -> None:
    windows, index = build(drawn)
    tiers = placement.tiers(windows, request_)
    choice = placement.place(
        tiers, request_.size_bytes, contiguous=request_.contiguous, index=index
    )
    reach = frozenset(window.appliance for window in windows)
    candidates = placement.examine(windows, request_, reach, choice)
    verdicts = [candidate.verdict for candidate in candidates]
    assert (Verdict.CHOSEN in verdicts) == (choice is not None)
    if choice is None:
        assert Verdict.FITS not in verdicts
        reply = placement.failure(candidates, request_, reach)
        assert not reply.outcome.ok
        waiting = {Verdict.DOUBT, Verdict.LOST} & set(verdicts)
        assert (reply.outcome is Outcome.APPLIANCE_IS_IN_DOUBT) == bool(waiting)
