"""Simulated processes: the real machines and the real links, on simulated time, disks and wires.

A Process is what `engine.Engine` is in production: it takes the events that wait, steps them,
commits, and only then lets effects out. Here it may die at each of these points. What survives a
death is its MemoryStore and whatever the world outside the process keeps (media, devices, other
processes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tagmem.base.units import MICROSECOND, MILLISECOND, SECOND, Nanoseconds
from tagmem.ports import Batch, Effect, Event, Loaded, Machine, Step, Tick
from tagmem.store.memory import MemoryStore
from tagmem.testing.sim import Pipe, Simulation

BATCH_MAX = 32
Answer = Callable[[Any], None]


class Connection:
    """Both directions between a dialling process and a listening one, and its end for both."""

    def __init__(
        self,
        sim: Simulation,
        to_server: Callable[[Any], None],
        to_client: Callable[[Any], None],
        *,
        fifo: bool,
    ) -> None:
        self._sim = sim
        self.up = Pipe(sim, to_server, fifo=fifo)
        self.down = Pipe(sim, to_client, fifo=fifo)
        self.on_close: list[Callable[[str], None]] = []

    @property
    def open(self) -> bool:
        """Whether messages may still arrive."""
        return self.up.open

    def close(self, reason: str) -> None:
        """Lose what is under way; each end hears of it a moment later."""
        if not self.up.open:
            return
        self.up.close()
        self.down.close()
        for told in self.on_close:
            self._sim.after(self._sim.delay(), partial(told, reason))


class Process:
    """One daemon: a machine over a store, that can be killed and started again."""

    def __init__(
        self, sim: Simulation, name: str, make: Callable[[], Machine], store: MemoryStore
    ) -> None:
        self.sim = sim
        self.name = name
        self.machine = make()
        self.store = store
        self.alive = False
        self.life = 0
        """Counts starts: what an earlier life scheduled no longer counts."""
        self.crashes = 0
        self.doom: tuple[str, str] | None = None
        """Die at the next commit: (`before` or `after`, a class name among its events or effects;
        empty for any).
        """
        self.forgets_outbox = False
        """A planted bug: start without what was still to be done."""
        self._make = make
        self._inbox: list[tuple[Event, Answer | None]] = []
        self._scheduled = False
        self._woken_at: Nanoseconds | None = None

    # ---- life

    def start(self) -> None:
        """Start from what the store has."""
        self.life += 1
        self.alive = True
        self._inbox.clear()
        self._scheduled = False
        self._woken_at = None
        self.machine = self._make()
        loaded = self.load()
        self.machine.restore(loaded)
        self.sim.say(f"{self.name} starts")
        self.started(loaded)
        self.wake()

    def load(self) -> Loaded:
        """What a start finds."""
        loaded = self.store.load()
        outbox = () if self.forgets_outbox else loaded.outbox
        return Loaded(tuple(loaded.records), outbox, loaded.last_effect_id)

    def kill(self) -> None:
        """Die at once."""
        self.alive = False
        self.crashes += 1
        self.sim.say(f"{self.name} dies")
        self.stopped()

    def crash(self) -> None:
        """Die at once; come back after a while."""
        self.kill()
        pause = self.sim.random.randrange(1 * MILLISECOND, 3 * SECOND)
        self.sim.after(pause, self.start)

    def later(self, delay_ns: Nanoseconds, action: Callable[[], None]) -> None:
        """Run `action` after a delay, unless this life is over by then."""
        life = self.life

        def run() -> None:
            if self.alive and self.life == life:
                action()

        self.sim.after(delay_ns, run)

    # ---- for the parts on top

    def started(self, loaded: Loaded) -> None:
        """The machine is restored; open links."""

    def stopped(self) -> None:
        """The process is dead; its connections break."""

    def perform(self, effect: Effect) -> None:
        """Carry out one effect, after its commit."""
        raise NotImplementedError(f"{self.name} does not perform {effect}")

    def committed(self, events: list[Event], steps: list[Step]) -> None:
        """A batch is durable; its effects are about to be carried out."""

    def settled(self, events: list[Event], steps: list[Step]) -> None:
        """The effects of a batch are on their way."""

    def link_deadline(self) -> Nanoseconds | None:
        """When a link wants its tick."""
        return None

    def tick_links(self) -> None:
        """Let links notice what is overdue."""

    # ---- the loop

    def post(self, event: Event, answer: Answer | None = None) -> None:
        """Queue an event; `answer` gets the reply once it is durable."""
        if not self.alive:
            return
        self._inbox.append((event, answer))
        if not self._scheduled:
            self._scheduled = True
            self.later(self.sim.random.randrange(5, 200) * MICROSECOND, self._batch)

    def _batch(self) -> None:
        self._scheduled = False
        now = self.sim.now()
        taken, self._inbox = self._inbox[:BATCH_MAX], self._inbox[BATCH_MAX:]
        if self._inbox:
            self._scheduled = True
            self.later(10 * MICROSECOND, self._batch)
        events = [event for event, _ in taken]
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= now:
            taken.append((Tick(), None))
            events.append(Tick())
        steps = [self.machine.step(event, now) for event in events]
        if self._dies("before", events, steps):
            self.crash()
            return
        self.store.commit(Batch(steps, now))
        for step in steps:
            for note in step.notes:
                self.sim.say(f"{self.name}: {note.type} {note.subject[:8]} {_short(note.data)}")
        if self._dies("after", events, steps):
            self.crash()
            return
        self.committed(events, steps)
        done = {effect_id for step in steps for effect_id in step.done}
        for step in steps:
            for effect in step.effects:
                if effect.id not in done:
                    self.perform(effect)
        self.settled(events, steps)
        for step, (_, answer) in zip(steps, taken, strict=True):
            if answer is not None:
                answer(step.reply)
        self.wake()

    def _dies(self, moment: str, events: list[Event], steps: list[Step]) -> bool:
        """Whether this life ends just before, or just after, the commit of a batch."""
        if self.doom is not None:
            when, what = self.doom
            effects = [effect for step in steps for effect in step.effects]
            if when == moment and any(
                what in ("", type(each).__name__) for each in (*events, *effects)
            ):
                self.doom = None
                return True
        return self.sim.chance(self.sim.faults.crash / 2)

    def wake(self) -> None:
        """Have the machine or a link looked at when the next of their deadlines comes."""
        times = [self.machine.next_deadline(), self.link_deadline()]
        due = min((time for time in times if time is not None), default=None)
        if due is None or (self._woken_at is not None and self._woken_at <= due):
            return
        if due <= self.sim.now() and self._scheduled:
            return  # The batch that is coming ticks the machine, and looks again.
        self._woken_at = due
        self.later(max(0, due - self.sim.now()), self._on_time)

    def _on_time(self) -> None:
        self._woken_at = None
        now = self.sim.now()
        due = self.link_deadline()
        if due is not None and due <= now:
            self.tick_links()
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= now and not self._scheduled:
            self._scheduled = True
            self._batch()
        self.wake()


def _short(data: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in data.items() if value not in ("", None))
