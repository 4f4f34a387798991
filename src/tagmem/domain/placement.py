"""Where a capacity goes: appliance, region and extents, as a pure function that can say why.

A *window* is one region of one appliance together with its pool. The windows that a set of hosts
reaches and that suit a request are worked out once and kept until a registration or an appliance's
state changes (`state.State.tiers`). A decision among many windows then asks the index of all free
lengths for the shortest that one of their pools has; among few, it looks into each. The least left
over wins; equal ones go to the first window in the order of appliance name and region, and in it to
the lowest address.

Reasons are worked out only when somebody asks, or when nothing fits: that is what `examine` does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from tagmem.base.ids import ApplianceId
from tagmem.base.limits import EXTENTS_PER_CAPACITY_MAX
from tagmem.base.units import Bytes, MediaOffset, format_size
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import ApplianceState, Extent, RegionRecord, Sharing
from tagmem.domain.region import START_BITS, LengthIndex, Pool

_START_MASK = (1 << START_BITS) - 1

SEARCHED_EACH = 8
"""Up to so many windows, looking into each is quicker than the index."""
LENGTHS_TRIED = 256
"""After so many lengths that none of a tier's pools has, each pool is looked into."""


class Request(msgspec.Struct, frozen=True):
    """What is to be placed."""

    size_bytes: Bytes
    hosts: tuple[str, ...] = ()
    tagged: bool = True
    sharing: Sharing = Sharing.NONE
    appliance: str = ""
    region: int | None = None
    contiguous: bool = True


class Window(NamedTuple):
    """One region of one appliance, and the pool that it shows."""

    appliance: ApplianceId
    state: ApplianceState
    region: RegionRecord
    pool: Pool
    read_only_view: bool
    """Some read-only sharable region shows the same pool, so what lies here can be published."""
    whole: bool
    """The region shows all of its pool."""


class Choice(NamedTuple):
    """A decision."""

    window: Window
    extents: tuple[Extent, ...]


class Verdict(Enum):
    """Why a window was or was not chosen."""

    CHOSEN = "chosen"
    FITS = "fits"
    NOT_NAMED = "another appliance or region was asked for"
    NOT_REACHABLE = "not reachable by every host"
    READ_ONLY = "read-only: nothing can be loaded there"
    SHARABLE = "sharable: untagged memory is not allowed there"
    NOT_SHARABLE = "not sharable"
    NOT_COHERENT = "not hardware-coherent"
    COHERENT = "hardware-coherent, but software-managed coherency was asked for"
    NO_READ_ONLY_VIEW = "no read-only region shows this pool"
    NOT_ALIGNED = "size is not a multiple of its block size"
    TOO_SMALL = "smaller than the request"
    FULL = "not enough free capacity"
    FRAGMENTED = "no free run is long enough"
    TOO_MANY_EXTENTS = "would take too many extents"
    DOUBT = "in doubt: its own extent lists have to be read first"
    LOST = "not connected"


class Candidate(NamedTuple):
    """One window, judged."""

    window: Window
    verdict: Verdict
    detail: str


def unsuitable(window: Window, request: Request) -> Verdict | None:
    """Why a region can never take such a request, whatever is free in it; None when it can."""
    region = window.region
    if region.read_only:
        return Verdict.READ_ONLY
    if not request.tagged:
        return Verdict.SHARABLE if region.sharable else None
    if request.sharing is Sharing.NONE:
        return None
    if not region.sharable:
        return Verdict.NOT_SHARABLE
    if request.sharing is Sharing.HARDWARE_COHERENT and not region.hardware_coherent:
        return Verdict.NOT_COHERENT
    if request.sharing is Sharing.SOFTWARE_COHERENT and region.hardware_coherent:
        return Verdict.COHERENT
    if request.sharing is Sharing.READ_ONLY and not window.read_only_view:
        return Verdict.NO_READ_ONLY_VIEW
    return None


class Tier(NamedTuple):
    """Windows of equal preference, prepared for the search by length."""

    windows: tuple[Window, ...]
    by_bit: dict[int, Window]
    """The first window on each pool, by the pool's bit in the index."""
    mask: int
    block_bytes: Bytes
    """The largest block of all; 0 where the index is of no use, as some window shows but a part."""


Tiers = tuple[Tier, ...]
"""In order of preference; a tier is used when nothing fits in those before it."""


def tier(windows: Sequence[Window]) -> Tier:
    """Prepare some windows."""
    by_bit: dict[int, Window] = {}
    for window in windows:
        by_bit.setdefault(window.pool.bit, window)
    whole = 0 not in by_bit and all(window.whole for window in windows)
    block = max((window.pool.block_bytes for window in windows), default=0) if whole else 0
    return Tier(tuple(windows), by_bit, sum(by_bit), block)


def tiers(windows: Sequence[Window], request: Request) -> Tiers:
    """Of the windows that every host reaches, those that are ready and suit the request.

    Exclusive capacity goes to regions that are not sharable while they have room, so that sharable
    media stays for those who can use nothing else.
    """
    fit = [w for w in windows if w.state is ApplianceState.READY and not unsuitable(w, request)]
    if request.sharing is not Sharing.NONE:
        return (tier(fit),)
    plain = [window for window in fit if not window.region.sharable]
    rest = [window for window in fit if window.region.sharable]
    return (tier(plain), tier(rest)) if rest else (tier(plain),)


def place(
    choices: Tiers, size: Bytes, *, contiguous: bool, index: LengthIndex | None = None
) -> Choice | None:
    """The best place for `size` bytes; None when there is none. With or without the index of all
    free lengths the answer is the same.
    """
    for one in choices:
        if index is None or len(one.windows) <= SEARCHED_EACH:
            found = _contiguous(one.windows, size)
        else:
            found = _by_length(one, size, index)
        if found is not None:
            return found
    if not contiguous:
        for one in choices:
            found = _scattered(one.windows, size)
            if found is not None:
                return found
    return None


def _by_length(one: Tier, size: Bytes, index: LengthIndex) -> Choice | None:
    """Look for the shortest length that a pool of the tier has, rather than into each pool."""
    if not one.block_bytes or size % one.block_bytes:
        return _contiguous(one.windows, size)
    lengths = index.lengths
    at = bisect_left(lengths, size)
    for length in lengths[at : at + LENGTHS_TRIED]:
        hit = index.masks[length] & one.mask
        if hit:
            window = one.by_bit[hit & -hit]
            runs = window.pool.free.runs
            run = runs[bisect_left(runs, length << START_BITS)]
            return Choice(window, (Extent(MediaOffset(run & _START_MASK), size),))
    if at + LENGTHS_TRIED >= len(lengths):
        return None
    return _contiguous(one.windows, size)


def _contiguous(windows: Sequence[Window], size: Bytes) -> Choice | None:
    want = size << START_BITS
    best = best_length = 0
    chosen: Window | None = None
    for window in windows:
        pool = window.pool
        runs = pool.free.runs
        if not runs or runs[-1] < want or size % pool.block_bytes:
            continue
        if window.whole:
            run = runs[bisect_left(runs, want)]
        else:
            run = pool.free.best_run(size, window.region.size_bytes)
            if run < 0:
                continue
        length = run >> START_BITS
        if chosen is None or length < best_length:
            best, best_length, chosen = run, length, window
            if length == size:
                break
    if chosen is None:
        return None
    return Choice(chosen, (Extent(MediaOffset(best & _START_MASK), size),))


def _scattered(windows: Sequence[Window], size: Bytes) -> Choice | None:
    roomy = [
        window
        for window in windows
        if window.pool.free.free_bytes >= size and size % window.pool.block_bytes == 0
    ]
    roomy.sort(key=lambda window: -window.pool.free.largest_bytes)
    for window in roomy:
        limit = None if window.whole else window.region.size_bytes
        extents = window.pool.free.gather(size, EXTENTS_PER_CAPACITY_MAX, limit)
        if extents is not None:
            return Choice(window, extents)
    return None


def judge(window: Window, request: Request, reachable: frozenset[str]) -> Verdict:
    """One window against one request; FITS when it could take it. `reachable`: by all hosts."""
    size = request.size_bytes
    free = window.pool.free
    if (request.appliance and window.appliance != request.appliance) or (
        request.region is not None and window.region.index != request.region
    ):
        return Verdict.NOT_NAMED
    if request.hosts and window.appliance not in reachable:
        return Verdict.NOT_REACHABLE
    reason = unsuitable(window, request)
    if reason is not None:
        return reason
    if size % window.pool.block_bytes:
        return Verdict.NOT_ALIGNED
    if size > window.region.size_bytes:
        return Verdict.TOO_SMALL
    if size > free.free_bytes:
        return Verdict.FULL
    limit = None if window.whole else window.region.size_bytes
    if free.best_fit(size, limit) is None:
        if request.contiguous:
            return Verdict.FRAGMENTED
        if free.gather(size, EXTENTS_PER_CAPACITY_MAX, limit) is None:
            return Verdict.TOO_MANY_EXTENTS
    if window.state is ApplianceState.DOUBT:
        return Verdict.DOUBT
    if window.state is ApplianceState.LOST:
        return Verdict.LOST
    return Verdict.FITS


def examine(
    windows: Sequence[Window], request: Request, reachable: frozenset[str], choice: Choice | None
) -> tuple[Candidate, ...]:
    """Every window with why it was or was not chosen."""
    return tuple(
        Candidate(window, verdict, _detail(window, verdict, request))
        for window in windows
        for verdict in (
            Verdict.CHOSEN
            if choice is not None and window == choice.window
            else judge(window, request, reachable),
        )
    )


def _detail(window: Window, verdict: Verdict, request: Request) -> str:
    free = window.pool.free
    if verdict is Verdict.NOT_ALIGNED:
        return f"{verdict.value} ({format_size(window.pool.block_bytes)})"
    if verdict is Verdict.TOO_SMALL:
        return f"{verdict.value}: {format_size(window.region.size_bytes)} in all"
    if verdict is Verdict.FULL:
        return f"{verdict.value}: {format_size(free.free_bytes)} free"
    if verdict is Verdict.FRAGMENTED:
        return f"{verdict.value}: the largest is {format_size(free.largest_bytes)}"
    if verdict is Verdict.TOO_MANY_EXTENTS:
        return f"{verdict.value}: more than {EXTENTS_PER_CAPACITY_MAX}"
    if verdict is Verdict.NOT_REACHABLE:
        return f"{verdict.value} of {', '.join(request.hosts)}"
    return str(verdict.value)


def failure(candidates: Sequence[Candidate], request: Request, reachable: frozenset[str]) -> Reply:
    """The answer when nothing fits: the reason of those that came closest."""
    size = request.size_bytes
    found = {candidate.verdict for candidate in candidates}
    suitable = [c for c in candidates if c.verdict not in _NEVER]
    blocks = [c.window.pool.block_bytes for c in candidates]
    if blocks and all(size % block for block in blocks):
        return _reply(Outcome.SIZE_IS_NOT_ALIGNED, f"a multiple of {min(blocks)}", size)
    sizes = [c.window.region.size_bytes for c in candidates]
    if sizes and size > max(sizes):
        return _reply(Outcome.SIZE_EXCEEDS_EVERY_REGION, f"at most {max(sizes)}", size)
    if request.hosts and not reachable:
        hosts = ",".join(request.hosts)
        return Reply(
            Outcome.HOST_CANNOT_REACH_APPLIANCE,
            detail=f"no appliance is reached by all of {hosts}",
            field="hosts",
            limit="hosts that reach one appliance in common",
            value=hosts,
        )
    if request.hosts and request.appliance and request.appliance not in reachable:
        return Reply(
            Outcome.HOST_CANNOT_REACH_APPLIANCE,
            detail=f"{request.appliance} is not reached by every host",
            field="appliance",
            limit="one of " + ", ".join(sorted(reachable)[:16]),
            value=request.appliance,
        )
    named = [c for c in candidates if c.verdict is not Verdict.NOT_NAMED]
    if request.region is not None and candidates and not named:
        return Reply(
            Outcome.REGION_IS_UNKNOWN,
            detail=f"no region {request.region} there",
            field="region",
            limit="one of " + ", ".join(str(i) for i in _indexes(candidates)),
            value=str(request.region),
        )
    if found & _WRONG_KIND and not suitable:
        return Reply(
            Outcome.TAG_IS_NOT_SHARABLE if request.tagged else Outcome.NOT_ENOUGH_FREE_CAPACITY,
            detail=_sentence(candidates, _WRONG_KIND),
            field="sharing" if request.tagged else "tagged",
            limit="what a reachable region allows",
            value=request.sharing.value if request.tagged else "false",
        )
    return _lack(candidates, found, suitable, size)


def _lack(
    candidates: Sequence[Candidate], found: set[Verdict], suitable: Sequence[Candidate], size: Bytes
) -> Reply:
    if found & _WAITING or not suitable:
        names = sorted({c.window.appliance for c in candidates if c.verdict in _WAITING})
        detail = ", ".join(names[:8]) or "no appliance has been read yet"
        return Reply(Outcome.APPLIANCE_IS_IN_DOUBT, detail=f"in doubt or not connected: {detail}")
    if found & {Verdict.NOT_ALIGNED, Verdict.TOO_SMALL} == {c.verdict for c in suitable}:
        if Verdict.NOT_ALIGNED in found:
            blocks = min(c.window.pool.block_bytes for c in suitable)
            return _reply(Outcome.SIZE_IS_NOT_ALIGNED, f"a multiple of {blocks}", size)
        largest = max(c.window.region.size_bytes for c in suitable)
        return _reply(Outcome.SIZE_EXCEEDS_POOL, f"at most {largest}", size)
    most = max(c.window.pool.free.free_bytes for c in suitable)
    longest = max(c.window.pool.free.largest_bytes for c in suitable)
    if Verdict.TOO_MANY_EXTENTS in found:
        limit = f"at most {EXTENTS_PER_CAPACITY_MAX} extents"
        return _reply(Outcome.TOO_MANY_EXTENTS, limit, size)
    if Verdict.FRAGMENTED in found:
        limit = f"at most {longest}, the longest free run now (or may be scattered)"
        return _reply(Outcome.NO_CONTIGUOUS_CAPACITY, limit, size)
    limit = f"at most {most}, what is free in one region now"
    return _reply(Outcome.NOT_ENOUGH_FREE_CAPACITY, limit, size)


_WRONG_KIND = frozenset(
    {
        Verdict.READ_ONLY,
        Verdict.SHARABLE,
        Verdict.NOT_SHARABLE,
        Verdict.NOT_COHERENT,
        Verdict.COHERENT,
        Verdict.NO_READ_ONLY_VIEW,
    }
)
_NEVER = _WRONG_KIND | {Verdict.NOT_NAMED, Verdict.NOT_REACHABLE}
_WAITING = frozenset({Verdict.DOUBT, Verdict.LOST})


def _reply(outcome: Outcome, limit: str, size: Bytes) -> Reply:
    return Reply(
        outcome,
        detail=f"size_bytes must be {limit}, got {size}",
        field="size_bytes",
        limit=limit,
        value=str(size),
    )


def _indexes(candidates: Sequence[Candidate]) -> list[int]:
    return sorted({c.window.region.index for c in candidates})


def _sentence(candidates: Sequence[Candidate], kinds: frozenset[Verdict]) -> str:
    reasons: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.verdict in kinds:
            name = f"{candidate.window.appliance} region {candidate.window.region.index}"
            reasons.setdefault(candidate.detail, []).append(name)
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        parts.append(f"{', '.join(names[:4])}{more}: {reason}")
    return "; ".join(parts)


class Explanation(NamedTuple):
    """Where a request would go, and why: what `tagmem explain` shows."""

    reply: Reply
    choice: Choice | None
    candidates: tuple[Candidate, ...]

    @property
    def sentence(self) -> str:
        """The decision in words."""
        if self.choice is None:
            return f"Nowhere: {self.reply.detail or self.reply.outcome.title}."
        window, extents = self.choice
        count = "one extent" if len(extents) == 1 else f"{len(extents)} extents"
        free = format_size(window.pool.free.free_bytes)
        where = f"{window.appliance} region {window.region.index}"
        others = len(self.candidates)
        fit = f"the best fit of {others} regions" if others > 1 else "the only region"
        return f"{where}, in {count}: {fit} ({free} free there)."
