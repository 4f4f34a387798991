"""A simulated world's physics: time, network and disk, all from one seed, so that a failure can be
run again.

Nothing here knows tagmem's parts; `world.py` puts them in. Everything that happens is an entry in
one queue ordered by simulated time and then by age, so two runs of a seed are the same run.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import msgspec

from tagmem.base.units import MILLISECOND, Nanoseconds

Action = Callable[[], None]


class Faults(msgspec.Struct, frozen=True):
    """How badly the world behaves: probabilities per message or per commit, 0 to 1."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Chance that a message overtakes others; only on links that are not first in, first out."""
    disconnect: float = 0.0
    crash: float = 0.0
    """Chance, per commit, that the process dies just before it, or just after it with no effect
    done.
    """
    delay_max_ns: Nanoseconds = 2 * MILLISECOND


CALM = Faults()


class Simulation:
    """Simulated time and the queue of what happens next."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now_ns: Nanoseconds = 1_700_000_000_000_000_000
        self.faults = CALM
        self.transcript: list[str] = []
        self.events_run = 0
        self._queue: list[tuple[Nanoseconds, int, Action]] = []
        self._sequence = 0

    def now(self) -> Nanoseconds:
        """The Clock port."""
        return self.now_ns

    def at(self, when_ns: Nanoseconds, action: Action) -> None:
        """Run `action` at a simulated time (not before now)."""
        self._sequence += 1
        heapq.heappush(self._queue, (max(when_ns, self.now_ns), self._sequence, action))

    def after(self, delay_ns: Nanoseconds, action: Action) -> None:
        """Run `action` after a simulated delay."""
        self.at(self.now_ns + delay_ns, action)

    def chance(self, probability: float) -> bool:
        """A draw; always consumes one number only when it can matter."""
        return probability > 0 and self.random.random() < probability

    def delay(self) -> Nanoseconds:
        """How long one message takes."""
        return self.random.randrange(10_000, max(20_000, self.faults.delay_max_ns))

    def say(self, line: str) -> None:
        """One line of the transcript."""
        self.transcript.append(f"{(self.now_ns - 1_700_000_000_000_000_000) / 1e6:12.3f}  {line}")

    def run(self, until_ns: Nanoseconds, checker: Action) -> None:
        """Run what is due up to a time; `checker` runs after each action."""
        while self._queue and self._queue[0][0] <= until_ns:
            when, _, action = heapq.heappop(self._queue)
            self.now_ns = when
            action()
            self.events_run += 1
            checker()
        self.now_ns = max(self.now_ns, until_ns)


class Pipe:
    """One direction of a connection. Closing it loses what is under way, as a displaced session
    does.
    """

    def __init__(self, sim: Simulation, deliver: Callable[[Any], None], *, fifo: bool) -> None:
        self._sim = sim
        self.deliver = deliver
        """What takes each message at its arrival; who listens in puts itself before it."""
        self._fifo = fifo
        self._last_arrival = 0
        self.open = True

    def send(self, message: Any) -> None:
        """Send one message; faults apply to links that are not first in, first out."""
        if not self.open:
            return
        faults = self._sim.faults
        if not self._fifo and self._sim.chance(faults.loss):
            self._sim.say("  (lost)")
            return
        copies = 2 if not self._fifo and self._sim.chance(faults.duplicate) else 1
        for _ in range(copies):
            arrival = self._sim.now_ns + self._sim.delay()
            if self._fifo or not self._sim.chance(faults.reorder):
                arrival = max(arrival, self._last_arrival + 1)
                self._last_arrival = arrival
            self._sim.at(arrival, lambda: self._arrive(message))

    def _arrive(self, message: Any) -> None:
        if self.open:
            self.deliver(message)

    def close(self) -> None:
        """Nothing more arrives."""
        self.open = False
