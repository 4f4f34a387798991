"""How long until something can be done, and what it takes in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bench.load import ask, connect
from bench.measure import Pair, interleave
from bench.placement import tag_of
from bench.report import Figure, Report, compared, scaled
from bench.system import (
    APPLIANCE,
    BLOCK,
    ENVIRONMENT,
    POLL_SECONDS,
    NotReady,
    System,
    listens,
    resident_bytes,
    running,
    system,
    wait_for,
)
from bench.work import reserve
from tagmem.base.ids import ApplianceId, Tag
from tagmem.base.units import MediaOffset
from tagmem.domain.effects import DurableEffect
from tagmem.domain.records import KINDS, CapacityRecord, CapacityState, Extent, Sharing
from tagmem.ports import Batch, Change, Step
from tagmem.store.sqlite import SqliteStore

FIRST_SECONDS = 0.150
MANY, MANY_SECONDS = 1_000, 0.100
MOST, MOST_SECONDS = 100_000, 2.0
_SIZE = 256 << 30
_LEFT = 1_024
"""Blocks at the start that stay free for the allocations that are timed."""
_PASS = (sys.executable, "-c", "pass")


def _process(argv: Sequence[str]) -> Callable[[], float]:
    """A measure: seconds from start to end of a process."""

    def measure() -> float:
        begun = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        return time.perf_counter() - begun

    return measure


class FirstAllocation:
    """A measure: seconds from starting the orchestrator to a durable reservation."""

    def __init__(self, ready: System, *, fresh: bool) -> None:
        self._system = ready
        self._fresh = fresh
        self._number = 1 << 100

    def __call__(self) -> float:
        database = self._system.database("orchestrator")
        if self._fresh:
            for file in database.parent.glob("*"):
                file.unlink()
        self._number += 1
        data = reserve(tag_of(self._number))
        begun = time.perf_counter()
        with running(self._system.command("orchestrator"), self._system.log("orchestrator")):
            self._allocate(data, begun + 20)
            return time.perf_counter() - begun

    def _allocate(self, data: bytes, until: float) -> None:
        """Ask until the answer is yes: before, nobody listens, or the appliance is unread."""
        while time.perf_counter() < until:
            try:
                with connect(self._system.api) as sock:
                    if ask(sock, data).status == 201:
                        return
            except OSError:
                pass
            time.sleep(POLL_SECONDS)
        raise NotReady(f"no allocation within 20 s; {self._system.said()}")


def fill(ready: System, count: int) -> None:
    """Put reservations of one extent each into the store of an orchestrator that is not running."""
    store = SqliteStore(ready.database("orchestrator"), KINDS, DurableEffect)
    for first in range(0, count, 1_000):
        changes = []
        for number in range(first, min(first + 1_000, count)):
            tag = tag_of(number + 1)
            record = CapacityRecord(
                Tag(tag),
                BLOCK,
                True,
                Sharing.NONE,
                (),
                ApplianceId(APPLIANCE),
                0,
                (Extent(MediaOffset((number + _LEFT) * BLOCK), BLOCK),),
                CapacityState.RESERVED,
                1,
                request_digest=f"{number:032x}",
            )
            changes.append(Change("capacity", tag, record))
        store.commit(Batch([Step(changes=tuple(changes))], 1))
    store.close()


@contextmanager
def _appliance_alone() -> Iterator[System]:
    """A system whose appliance runs; the orchestrator is started by the measure."""
    with system(1, _SIZE) as ready, running(ready.command("appliance"), ready.log("appliance")):
        wait_for("the appliance", lambda: listens(f"unix:{ready.memory}/fm.sock"))
        yield ready


def _within(name: str, pair: Pair, limit: float) -> Figure:
    aim = f"under {limit * 1000:g} ms"
    return compared(name, pair, "s", aim, pair.ours.median < limit)


def _memory() -> list[Figure]:
    with system(1, 1 << 30) as ready, ready.started() as processes:
        sizes = {name: resident_bytes(each.pid) for name, each in processes.items()}
    waiting = "import sys; sys.stdin.read()"
    with subprocess.Popen((sys.executable, "-c", waiting), stdin=subprocess.PIPE) as bare:
        time.sleep(0.2)
        floor = resident_bytes(bare.pid)
        bare.communicate()
    return [
        Figure(
            f"resident memory: {name}", scaled(size, "B"), scaled(floor, "B"), f"{size / floor:.2f}"
        )
        for name, size in sizes.items()
    ]


def run(*, quick: bool) -> Report:
    rounds = 5 if quick else 31
    python = _process(_PASS)
    python()
    figures = [
        compared("`import tagmem`", _import("import tagmem", rounds), "s"),
        compared(
            "`import tagmem; tagmem.open`", _import("import tagmem; tagmem.open", rounds), "s"
        ),
        compared("`tagmem --help`", interleave(_help(), python, rounds), "s"),
    ]
    with _appliance_alone() as ready:
        first = FirstAllocation(ready, fresh=True)
        first()
        figures.append(
            _within(
                "orchestrator: start to first allocation",
                interleave(first, python, rounds),
                FIRST_SECONDS,
            )
        )
    for count, limit in ((MANY, MANY_SECONDS), (MOST, MOST_SECONDS)):
        with _appliance_alone() as ready:
            again = FirstAllocation(ready, fresh=False)
            again()
            fill(ready, count)
            pair = interleave(again, python, max(3, rounds if count == MANY else rounds // 3))
            name = f"orchestrator: restart with {count:,} tags to first allocation"
            figures.append(_within(name, pair, limit))
    figures += _memory()
    about = "The floor of a start is `python -c pass`, that of memory a Python process that waits."
    return Report("start", about, tuple(figures))


def _import(statement: str, rounds: int) -> Pair:
    return interleave(_process((sys.executable, "-c", statement)), _process(_PASS), rounds)


def _help() -> Callable[[], float]:
    return _process((sys.executable, "-m", "tagmem", "--help"))
