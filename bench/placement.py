"""Decisions of placement per second, from 1,000 to 1,000,000 extents, and what an extent costs in
memory.

A decision is the orchestrator's own: a capacity for one of 1,000 hosts, each of which reaches all
of 256 appliances, validated, placed, set aside in the books, with the command to the appliance.
Taking it back, which keeps the number of extents the same, is not timed. Sizes and free runs are
spread over three magnitudes, so that a fit that leaves nothing over, which ends the search, is
rare. The floor asks the same question of the same free runs in the least Python that finds the best
fit: one bisect per appliance, one insertion and one deletion.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from bisect import bisect_left, insort
from collections.abc import Iterator

from bench.measure import Pair, Sample, quantile
from bench.report import Figure, Report, compared, scaled
from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import Dpa, MediaOffset
from tagmem.domain.effects import CreateCapacity
from tagmem.domain.outcome import Outcome
from tagmem.domain.records import (
    ApplianceRecord,
    ApplianceState,
    CapacityRecord,
    CapacityState,
    Extent,
    HostRecord,
    LdRecord,
    RegionRecord,
    Sharing,
)
from tagmem.domain.requests import create
from tagmem.domain.state import State
from tagmem.domain.turn import Turn
from tagmem.ports import Loaded

APPLIANCES = 256
HOSTS = 1_000
BLOCK = 1 << 21
SIZES = (1_000, 10_000, 100_000, 1_000_000)
GROWTH_MAX = 2.0
SPREAD = 1_024
"""Extents and free runs have 1 to so many blocks, small ones more often."""
_SEED = 20_240_601
_START_BITS = 64


def tag_of(number: int) -> Tag:
    text = f"{number:032x}"
    return Tag(f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}")


def blocks(chance: random.Random) -> int:
    return int(SPREAD ** chance.random())


def records(extents: int, chance: random.Random) -> Iterator[tuple[str, str, object]]:
    """Rows of a store: appliances half full, with free runs of many lengths between the extents."""
    share = -(-extents // APPLIANCES)
    size = (share * 2 * SPREAD + 4 * SPREAD) * BLOCK
    region = RegionRecord(0, 0, size, BLOCK)
    lds = tuple(LdRecord(ld, (Dpa(0),)) for ld in range(HOSTS))
    links = {}
    for number in range(APPLIANCES):
        name = ApplianceId(f"a{number:03}")
        links[name] = 0
        state = ApplianceState.READY
        yield "appliance", name, ApplianceRecord(name, "unix:/none", state, (region,), lds[:1])
    for number in range(HOSTS):
        host = HostId(f"h{number:04}")
        yield "host", host, HostRecord(host, links)
    at = [0] * APPLIANCES
    for number in range(extents):
        place = number % APPLIANCES
        length = blocks(chance) * BLOCK
        at[place] += blocks(chance) * BLOCK
        extent = Extent(MediaOffset(at[place]), length)
        at[place] += length
        tag = tag_of(number + 1)
        yield (
            "capacity",
            tag,
            CapacityRecord(
                tag,
                length,
                True,
                Sharing.NONE,
                (),
                ApplianceId(f"a{place:03}"),
                0,
                (extent,),
                CapacityState.RESERVED,
                1,
                request_digest=f"{number:032x}",
            ),
        )


class Ours:
    """The orchestrator's books, asked for one reservation after the other."""

    def __init__(self, extents: int) -> None:
        rows = list(records(extents, random.Random(_SEED)))
        self.state = State.restored(Loaded(rows, (), 0))
        self.chance = random.Random(_SEED + 1)
        self.number = 1 << 64
        for host in self.state.hosts:
            # What is worked out once per host and then kept is not a decision's cost.
            self.decide(host)

    def decide(self, host: str) -> float:
        """Seconds of one decision."""
        self.number += 1
        tag = tag_of(self.number)
        event = CreateCapacity(tag, blocks(self.chance) * BLOCK, (host,), digest="0" * 32)
        begun = time.perf_counter()
        turn = Turn(self.state, 1)
        reply = create(turn, event)
        turn.finish(reply)
        taken = time.perf_counter() - begun
        assert reply.outcome is Outcome.CREATED
        self.state.end_effect(self.state.last_effect_id)
        self.state.apply("attachment", f"{tag}/{host}", None)
        self.state.apply("capacity", tag, None)
        return taken


class Bare:
    """Sorted free runs by appliance, and nothing else."""

    def __init__(self, state: State) -> None:
        self.runs = [list(pool.free.runs) for pool in state.pools.values()]
        self.chance = random.Random(_SEED + 1)

    def decide(self) -> float:
        size = blocks(self.chance) * BLOCK
        begun = time.perf_counter()
        want = size << _START_BITS
        best = -1
        chosen = self.runs[0]
        for runs in self.runs:
            if runs[-1] < want:
                continue
            run = runs[bisect_left(runs, want)]
            if best < 0 or run < best:
                best, chosen = run, runs
                if run >> _START_BITS == size:
                    break
        del chosen[bisect_left(chosen, best)]
        rest = best - want + size
        if rest >> _START_BITS:
            insort(chosen, rest)
        taken = time.perf_counter() - begun
        if rest >> _START_BITS:
            del chosen[bisect_left(chosen, rest)]
        insort(chosen, best)
        return taken


def _measure(ours: Ours, count: int) -> tuple[Pair, Sample]:
    """Decisions of both in turn, in slices; and every one of ours."""
    bare = Bare(ours.state)
    hosts = list(ours.state.hosts)
    singles: list[float] = []
    mine: list[float] = []
    theirs: list[float] = []
    slice_ = 250
    gc.collect()
    gc.freeze()
    for turn in range(count // slice_):
        times = [ours.decide(hosts[(turn + n) % HOSTS]) for n in range(slice_)]
        singles += times
        mine.append(slice_ / sum(times))
        theirs.append(slice_ / sum(bare.decide() for _ in range(slice_)))
    gc.unfreeze()
    return Pair(Sample(tuple(mine)), Sample(tuple(theirs))), Sample(tuple(singles))


def _bytes_per_extent(extents: int) -> tuple[float, float]:
    """Memory per extent: the placement's books alone, and with the capacities' records."""
    gc.collect()
    tracemalloc.start()
    rows = list(records(extents, random.Random(_SEED)))
    with_rows = tracemalloc.get_traced_memory()[0]
    state = State.restored(Loaded(rows, (), 0))
    del rows
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del state
    return (held - with_rows) / extents, held / extents


def run(*, quick: bool) -> Report:
    sizes = SIZES[:3] if quick else SIZES
    figures: list[Figure] = []
    medians: list[float] = []
    for extents in sizes:
        ours = Ours(extents)
        pair, singles = _measure(ours, 2_000 if quick else 10_000)
        medians.append(singles.median)
        figures.append(compared(f"decisions, {extents:,} extents", pair, "/s"))
        p50, p99 = singles.median, quantile(singles.values, 0.99)
        figures.append(
            Figure(
                f"one decision, {extents:,} extents", f"{scaled(p50, 's')}, p99 {scaled(p99, 's')}"
            )
        )
        del ours
    growth = medians[-1] / medians[0]
    figures.append(
        Figure(
            f"growth of one decision (median), {sizes[0]:,} to {sizes[-1]:,} extents",
            f"{growth:.2f}",
            aim=f"at most {GROWTH_MAX:g}",
            met=growth <= GROWTH_MAX,
        )
    )
    books, whole = _bytes_per_extent(100_000)
    figures.append(Figure("memory per extent: placement's books", scaled(books, "B")))
    figures.append(Figure("memory per extent: with its capacity's record", scaled(whole, "B")))
    about = (
        f"{APPLIANCES} appliances, {HOSTS:,} hosts. Ours validate, place and keep the books; "
        "the floor "
        "finds and takes the best fit in sorted lists of the same free runs, and knows "
        "nothing else."
    )
    return Report("placement", about, tuple(figures))
