"""The whole system in one process, from a seed: orchestrator, appliance, hosts, a client, and
faults.

A run has three parts. In the *storm* messages are lost, repeated and overtake each other,
connections break, and any process may die at any commit, while a client creates, attaches, launches
and releases. Then comes *calm*: no faults, everybody is up, and the client gives everything back.
At the *end* nothing may be left: that is checked, as the invariants are after every event on the
way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from uuid import UUID

from tagmem.base.units import MIB, MILLISECOND, SECOND, Nanoseconds
from tagmem.domain import effects, invariants
from tagmem.domain.device_records import DeviceSpec, LdSpec, RegionSpec
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import ApplianceState
from tagmem.domain.state import State
from tagmem.ports import Event
from tagmem.testing.nodes import Connection
from tagmem.testing.pod import APPLIANCE, NOTHING_PLANTED, Planted, Pod
from tagmem.testing.sim import CALM, Faults, Simulation

BLOCK_BYTES = 2 * MIB
POOL_BYTES = 64 * MIB
HOSTS = ("w1", "w2")
TAGS_MAX = 12
LINES_TOLD = 40
CHECK_EVERY = 16
"""Events between two looks at everything; after the others only what is cheap is looked at."""


class Unsettled(InvariantViolated):
    """Faults have stopped, everything was given back, and something is still not at rest."""


class _Telling:
    """Adds the seed and the last lines of the transcript to whatever goes wrong."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim

    def __enter__(self) -> None:
        """Nothing has gone wrong yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            lines = self._sim.transcript
            error.add_note(f"seed {self._sim.seed}; the last of {len(lines)} lines:")
            for line in lines[-LINES_TOLD:]:
                error.add_note(line)


class World(Pod):
    """One simulated pod in a storm."""

    regions: tuple[RegionSpec, ...] = (RegionSpec(0, POOL_BYTES, BLOCK_BYTES),)
    names: tuple[str, ...] = HOSTS

    def __init__(self, seed: int, planted: Planted = NOTHING_PLANTED) -> None:
        lds = tuple(LdSpec(name, mirrored=name == "w2") for name in self.names)
        super().__init__(Simulation(seed), DeviceSpec(self.regions, lds), self.names, planted)
        self.client = self.make_client()
        self._countdown = CHECK_EVERY

    def make_client(self) -> Client:
        """Who asks for memory."""
        return Client(self)

    def opened(self, wire: Connection, client: str, server: str) -> None:
        """Connections break sometimes."""
        if self.sim.chance(self.sim.faults.disconnect):
            pause = self.sim.random.randrange(1, 2000) * MILLISECOND
            self.sim.after(pause, partial(wire.close, "the connection broke"))

    # ---- running

    def run(self, storm_ns: Nanoseconds = 20 * SECOND, calm_ns: Nanoseconds = 120 * SECOND) -> None:
        """Storm, calm, end. Raises InvariantViolated with the seed in its notes."""
        sim = self.sim
        sim.faults = _weather(sim)
        sim.say(f"seed {sim.seed} {sim.faults}")
        with _Telling(sim):
            self.appliance.start()
            self.orchestrator.start()
            for host in self.hosts.values():
                host.start()
            self.orchestrator.post(effects.RegisterAppliance(APPLIANCE, "sim"))
            self.client.begin()
            sim.run(sim.now() + storm_ns, self._check)
            sim.faults = CALM
            sim.say("calm")
            self._register_again()
            self.client.give_back()
            sim.run(sim.now() + calm_ns, self._check)
            self._end()

    def _register_again(self) -> None:
        event = effects.RegisterAppliance(APPLIANCE, "sim")
        self.sim.after(5 * SECOND, lambda: self.orchestrator.post(event))
        for host in self.hosts.values():
            host.end_all()

    # ---- checking

    def _check(self) -> None:
        self._countdown -= 1
        if self._countdown == 0:
            self._countdown = CHECK_EVERY
            self.check()

    def _end(self) -> None:
        """Everything was given back, wiped, and is known to be."""
        self.check()
        state, device = self.state, self.appliance.machine.state
        left: list[str] = [
            *(f"capacity {tag} is {c.state.value}" for tag, c in state.capacities.items()),
            *(f"quarantine {key}" for key in state.quarantines),
            *(f"effect {effect}" for effect in state.outbox.values()),
            *(f"allocation {row.file} {row.state.name}" for row in device.allocations.values()),
            *(f"block {block} has bytes of {tag}" for block, tag in self._dirty()),
            *(f"{h.name} shows {tag}" for h in self.hosts.values() for tag in h.devices),
            *(f"the client waits for {tag}" for tag in self.client.waiting()),
        ]
        if state.appliances[APPLIANCE].state is not ApplianceState.READY:
            left.append("the appliance is in doubt")
        if left:
            raise Unsettled("not at rest: " + "; ".join(left))
        loaded = self.orchestrator.load()
        invariants.check_same(state, State.restored(loaded))

    def _dirty(self) -> list[tuple[tuple[int, int], str]]:
        return list(self.media[APPLIANCE].blocks.items())


def _weather(sim: Simulation) -> Faults:
    """How bad it gets, drawn from the seed: from almost calm to awful."""
    draw = sim.random.random
    grade = sim.random.choice((0.0, 0.3, 1.0, 1.0))
    return Faults(
        loss=0.06 * draw() * grade,
        duplicate=0.08 * draw() * grade,
        reorder=0.20 * draw() * grade,
        disconnect=0.8 * draw() * grade,
        crash=0.05 * draw() * grade,
        delay_max_ns=sim.random.choice((1, 5, 60)) * MILLISECOND,
    )


class Client:
    """Somebody who wants memory, loses answers, and asks again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sim = world.sim
        self.tags: list[str] = []
        self.ending = False
        self._launches = 0

    def waiting(self) -> list[str]:
        """Tags that were asked back and are not known to be gone."""
        return list(self.tags)

    def begin(self) -> None:
        """Ask for something now and then."""
        self.sim.after(self.sim.random.randrange(1, 300) * MILLISECOND, self.something)

    def something(self) -> None:
        """One thing that people ask for."""
        if self.ending:
            return
        choice = self.sim.random.random()
        if choice < 0.45 and len(self.tags) < TAGS_MAX:
            self.create()
        elif self.tags:
            tag = self.sim.random.choice(self.tags)
            if choice < 0.6:
                self._launch(tag)
            elif choice < 0.7:
                self.ask(effects.AttachCapacity(tag, self.sim.random.choice(self.world.names)))
            elif choice < 0.8:
                self.ask(effects.StopWorkload(tag, self.sim.random.choice(self.world.names)))
            elif choice < 0.83:
                self.ask(effects.RefreshAppliance(APPLIANCE))
            else:
                self._release(tag)
        self.begin()

    def ask(self, event: Event, answer: Callable[[Reply], None] | None = None) -> None:
        """Send a request; it, or its answer, may be lost or repeated."""
        sim, faults = self.sim, self.sim.faults
        copies = 2 if sim.chance(faults.duplicate) else 1
        for _ in range(copies):
            if not sim.chance(faults.loss):
                sim.after(sim.delay(), lambda: self.world.orchestrator.post(event, answer))

    def create(self) -> None:
        """Ask for a capacity."""
        random = self.sim.random
        tag = str(UUID(int=random.getrandbits(128), version=4))
        self.tags.append(tag)
        hosts = (random.choice(self.world.names),) if random.random() < 0.85 else ()
        size = random.choice((1, 1, 2, 3, 4, 8, 20)) * BLOCK_BYTES
        contiguous = random.random() < 0.5
        event = effects.CreateCapacity(tag, size, hosts, contiguous=contiguous)
        self.sim.say(f"client: create {tag[:8]} {size // MIB} MiB for {','.join(hosts)}")
        self.ask(event)

    def _launch(self, tag: str) -> None:
        self._launches += 1
        host = self.sim.random.choice(self.world.names)
        identity = f"{self._launches:08d}-work"
        self.ask(effects.LaunchWorkload(tag, host, identity, ("app",)))

    def _release(self, tag: str) -> None:
        up_to = self.sim.random.choice(("ask", "stop", "detach", "detach", "restart", "force"))
        deadlines = {"ask": 200 * MILLISECOND, "stop": 300 * MILLISECOND, "detach": SECOND}
        event = effects.ReleaseCapacity(tag, up_to=up_to, deadlines_ns=deadlines)
        self.ask(event, partial(self._released, tag))

    def _released(self, tag: str, reply: Reply) -> None:
        """TAG_IS_UNKNOWN is the only certain end; a tag that never came to be is also unknown."""
        if self.ending and reply.outcome is Outcome.TAG_IS_UNKNOWN and tag in self.tags:
            self.tags.remove(tag)

    def give_back(self) -> None:
        """Ask for the return of everything, and go on asking until it is gone."""
        self.ending = True
        for tag in self.tags:
            self._release(tag)
        if self.tags:
            self.sim.after(2 * SECOND, self.give_back)
