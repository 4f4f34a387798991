"""Hosts that share one memory, run in an order that a seed decides, on caches that lie.

Code of several hosts runs unchanged, as programs that are given a `Memory`; one at a time, and
another takes over between two accesses where the seed says so. That is all the concurrency there
is, so a seed is a schedule, and a failure comes again. Threads only keep each program's stack.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tagmem.coherence.caches import HABITS, Caches
from tagmem.coherence.hosts import SimulatedHost
from tagmem.coherence.luck import Finding, Luck
from tagmem.coherence.report import report, tell
from tagmem.shared.coherence import Memory

Program = Callable[[Memory, int], None]
"""What a host runs, given its memory and its number."""
Wrap = Callable[[Memory], Memory]
_TURN_ACCESSES = (1, 2, 5, 20, 60)
"""A host runs for up to so many accesses; which of these, a schedule chooses once."""


class PowerLost(BaseException):
    """Ends a program in the middle of whatever it does; its host's cache is gone."""


@dataclass
class Outcome:
    """How a schedule ended."""

    seed: int
    finding: Finding | None
    errors: list[BaseException] = field(default_factory=list)
    """What programs raised, other than for the loss of power."""

    def tell(self) -> str:
        """For a person, with the seed."""
        lines = [f"seed {self.seed}:"]
        if self.finding is not None:
            names = tuple(f"h{number}" for number in range(64))
            lines.append(tell(report(self.finding, names, _lines_of)))
        lines += [f"{type(error).__name__}: {error}" for error in self.errors]
        return "\n".join(lines)


class Schedule:
    """One run. `luck` and `caches` are there to be asked, by programs too."""

    def __init__(self, seed: int, size_bytes: int, pool: ThreadPoolExecutor) -> None:
        """`pool` has a thread for each host, and may serve many schedules, one at a time."""
        self.seed = seed
        self._pool = pool
        self._after: dict[int, frozenset[int]] = {}
        self.chance = random.Random(seed)
        self._size_bytes = size_bytes
        self._turns: list[threading.Lock] = []
        self._live: list[int] = []
        self._left = 0
        self._turn_accesses = self.chance.choice(_TURN_ACCESSES)
        self._end = threading.Lock()
        self._doomed: dict[int, int] = {}
        self.caches: Caches
        self.luck: Luck

    def doom(self, host: int, accesses: int) -> None:
        """Have a host lose its power after so many accesses."""
        self._doomed[host] = accesses

    def after(self, host: int, others: Iterable[int]) -> None:
        """Have a host begin when others have ended."""
        self._after[host] = frozenset(others)

    def run(
        self, programs: Sequence[Program], wrap: Wrap | None = None, racing: Iterable[range] = ()
    ) -> Outcome:
        """One host per program, each until its end. `wrap` plants mistakes."""
        chance = self.chance
        self.caches = Caches(
            self._size_bytes,
            len(programs),
            chance,
            chance.choice(HABITS),
            lines_max=chance.choice((0, 0, 16)),
        )
        self.luck = Luck(len(programs), racing)
        self._turns = [threading.Lock() for _ in programs]
        self._live = [host for host in range(len(programs)) if host not in self._after]
        for lock in (*self._turns, self._end):
            lock.acquire()
        ends = [
            self._pool.submit(self._host, host, program, wrap)
            for host, program in enumerate(programs)
        ]
        self._pass_on()
        self._end.acquire()
        errors = [error for end in ends if (error := end.exception()) is not None]
        return Outcome(self.seed, self.luck.end(), errors)

    def _host(self, host: int, program: Program, wrap: Wrap | None) -> None:
        memory: Memory = SimulatedHost(
            host, self.caches, self.luck, step=partial(self._access, host)
        )
        self._turns[host].acquire()
        try:
            program(memory if wrap is None else wrap(memory), host)
        except PowerLost:
            self.caches.reset(host)
            self.luck.reset(host)
        finally:
            self._ended(host)
            self._pass_on()

    def _ended(self, host: int) -> None:
        self._live.remove(host)
        for other, awaited in list(self._after.items()):
            self._after[other] = awaited - {host}
            if not self._after[other]:
                del self._after[other]
                self._live.append(other)

    def _access(self, host: int) -> None:
        """Before each access of a host."""
        left = self._doomed.get(host)
        if left is not None:
            if left <= 0:
                raise PowerLost
            self._doomed[host] = left - 1
        self._left -= 1
        if self._left < 0 and len(self._live) > 1:
            self._pass_on()
            self._turns[host].acquire()

    def _pass_on(self) -> None:
        """Let a host run; perhaps the one that ran."""
        if not self._live:
            self._end.release()
            return
        self._left = self.chance.randrange(self._turn_accesses)
        self._turns[self._live[self.chance.randrange(len(self._live))]].release()


def _lines_of(site: object) -> list[str]:
    """`hosts.site` as file:line, innermost first."""
    return [f"{file}:{line}" for file, line in site] if isinstance(site, tuple) else []
