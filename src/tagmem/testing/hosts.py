"""A host as a simulated process, and what on it outlives its agent: devices, workloads, mappings.

A workload maps the bytes when it starts and writes to them as long as it lives; so whoever gives
memory away too early is caught by the next owner's bytes, not by a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from tagmem.agent import records as r
from tagmem.agent.loop import AgentMachine
from tagmem.agent.mailbox import HostLink, MediaAnswer
from tagmem.agent.policy import Limits
from tagmem.agent.vms import DetachGuests, GuestsAsked
from tagmem.base.units import MICROSECOND, MILLISECOND, SECOND, Nanoseconds
from tagmem.ports import Effect, Event, Holding, Loaded
from tagmem.store.memory import MemoryStore
from tagmem.testing.device import SimMedia
from tagmem.testing.nodes import Connection, Process
from tagmem.testing.sim import Simulation
from tagmem.wire.agentapi import (
    Desired,
    Hello,
    Rejected,
    SyncDone,
    WorkloadReport,
    decode_to_agent,
    encode,
)

REDIAL_NS: Nanoseconds = 20 * MILLISECOND
DialDevice = Callable[[str, int, Callable[[bytes], None]], Connection | None]
DialControl = Callable[[str, Callable[[bytes], None]], Connection | None]


class Workload:
    """A process on the host: it maps a file of media, and writes its tag's name there."""

    def __init__(
        self,
        identity: str,
        pid: int,
        tag: str,
        appliance: str,
        file: str,
        name: str = "app",
        *,
        read_only: bool = False,
    ) -> None:
        self.identity = identity
        self.pid = pid
        self.tag = tag
        self.appliance = appliance
        self.file = file
        self.name = name
        self.read_only = read_only
        self.running = True


class HostProcess(Process):
    """A host's agent. `links` maps appliances to LDs."""

    def __init__(
        self,
        sim: Simulation,
        name: str,
        links: dict[str, int],
        media: dict[str, SimMedia],
        dial_device: DialDevice,
        dial_control: DialControl,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(sim, name, partial(AgentMachine, limits), MemoryStore(r.KINDS))
        self.links = links
        self.devices: dict[str, str] = {}
        """Tag to DAX path; the run directory outlives the agent."""
        self.read_only: set[str] = set()
        """The tags whose device cannot be written through."""
        self.workloads: dict[str, Workload] = {}
        """Every workload ever started, by its id."""
        self.strangers: list[Workload] = []
        """Processes that nobody here started, and that map a tag."""
        self.obedient = True
        """Whether workloads may end when they are asked to."""
        self._media = media
        self._dial_device = dial_device
        self._dial_control = dial_control
        self._mailboxes: dict[str, HostLink] = {}
        self._wires: dict[str, Connection] = {}
        self._session: Connection | None = None
        self._pids = 1000
        self._busy_until: dict[str, Nanoseconds] = {}

    # ---- life

    def started(self, loaded: Loaded) -> None:
        """Look at what the host has, and dial everybody."""
        latest = {work.tag: work for work in self.workloads.values()}
        adopted = {tag: _report(work) for tag, work in latest.items()}
        self.post(r.Started(dict(self.devices), adopted))
        self._wires.clear()
        self._session = None
        self._mailboxes = {name: HostLink(name) for name in self.links}
        for name in self.links:
            self._connect(name)
        self._dial_orchestrator()

    def stopped(self) -> None:
        """Every connection breaks; workloads live on."""
        for wire in self._wires.values():
            wire.close(f"{self.name} died")
        if self._session is not None:
            self._session.close(f"{self.name} died")

    # ---- the orchestrator

    def _dial_orchestrator(self) -> None:
        life = self.life
        wire = self._dial_control(self.name, partial(self._told, life))
        if wire is None:
            self.later(REDIAL_NS, self._dial_orchestrator)
            return
        self._session = wire
        wire.on_close.append(lambda _: self._session_lost(wire, life))
        self.post(r.SessionOpened())
        wire.up.send(encode(Hello(self.name, "boot", dict(self.links))))

    def _session_lost(self, wire: Connection, life: int) -> None:
        if self.alive and self.life == life and self._session is wire:
            self._session = None
            self.later(REDIAL_NS, self._dial_orchestrator)

    def _told(self, life: int, data: bytes) -> None:
        if not self.alive or self.life != life:
            return
        message = decode_to_agent(data)
        if isinstance(message, Desired):
            self.post(r.DesiredReceived(message))
        elif isinstance(message, SyncDone):
            self.post(r.SyncEnded(message.epoch))
        elif isinstance(message, Rejected):
            self.sim.say(f"{self.name} rejected: {message.reason}")

    # ---- appliances

    def _connect(self, name: str) -> None:
        wire = self._dial_device(name, self.links[name], partial(self._receive, name, self.life))
        if wire is None:
            self.later(REDIAL_NS, lambda: self._connect(name))
            return
        self._wires[name] = wire
        wire.on_close.append(partial(self._hung_up, name, wire, self.life))
        self._mailboxes[name].connected(self.sim.now())
        self._flush(name, [])

    def _receive(self, name: str, life: int, data: bytes) -> None:
        if self.alive and self.life == life and name in self._wires:
            self._flush(name, self._mailboxes[name].feed(data, self.sim.now()))

    def _hung_up(self, name: str, wire: Connection, life: int, reason: str) -> None:
        if self.alive and self.life == life and self._wires.get(name) is wire:
            del self._wires[name]
            self._flush(name, self._mailboxes[name].disconnected(self.sim.now(), reason))
            self.later(REDIAL_NS, lambda: self._connect(name))

    def _flush(self, name: str, events: Sequence[Event | MediaAnswer]) -> None:
        for event in events:
            if isinstance(event, Event):
                self.post(event)
        link, wire = self._mailboxes[name], self._wires.get(name)
        if wire is not None:
            data = link.outgoing()
            if data:
                wire.up.send(data)
            if link.broken:
                wire.close(link.broken)
        self.wake()

    def link_deadline(self) -> Nanoseconds | None:
        """The earliest of all mailboxes that are connected."""
        times = (self._mailboxes[name].next_deadline() for name in self._wires)
        return min((time for time in times if time is not None), default=None)

    def tick_links(self) -> None:
        """Tick those that are due."""
        for name in list(self._wires):
            due = self._mailboxes[name].next_deadline()
            if due is not None and due <= self.sim.now():
                self._flush(name, self._mailboxes[name].tick(self.sim.now()))

    # ---- effects

    def perform(self, effect: Effect) -> None:
        """To a mailbox, to the orchestrator, or to this host."""
        if isinstance(effect, r.Answer | r.Acknowledge | r.ReadDevice | r.ReturnExtents):
            self._mailboxes[effect.appliance].perform(effect, self.sim.now())
            self._flush(effect.appliance, [])
        elif isinstance(effect, r.Report):
            if self._session is not None:
                self._session.up.send(encode(effect.observed))
        elif isinstance(effect, r.EndSession):
            if self._session is not None:
                self._session.close(effect.reason)
        else:
            # Orders for one tag never overtake each other, as in the service's workers.
            tag: str = effect.tag  # type: ignore[attr-defined]  # every order names its tag
            pause = self.sim.random.randrange(10, 3000) * MICROSECOND
            begun = max(self.sim.now() + pause, self._busy_until.get(tag, 0) + 1)
            self._busy_until[tag] = begun
            self.later(begun - self.sim.now(), lambda: self._on_host(effect))

    def _on_host(self, effect: Effect) -> None:
        if isinstance(effect, r.Surface):
            self._surface(effect)
        elif isinstance(effect, r.Withdraw):
            self.devices.pop(effect.tag, None)
            self.post(r.Withdrawn(effect.tag, effect.ticket))
        elif isinstance(effect, r.CheckHolders):
            found = tuple(Holding(w.pid, w.name, "maps") for w in self.holding(effect.tag))
            self.post(r.HoldersChecked(effect.tag, effect.ticket, found, True))
        elif isinstance(effect, r.KillHolders):
            for work in self.holding(effect.tag):
                self._end(work)
        elif isinstance(effect, DetachGuests):
            self.post(GuestsAsked(effect.tag, ""))
        elif isinstance(effect, r.Launch):
            self._launch(effect)
        elif isinstance(effect, r.Signal):
            self._signal(effect)

    def holding(self, tag: str) -> list[Workload]:
        """Processes that map a tag's bytes."""
        everybody = (*self.workloads.values(), *self.strangers)
        return [work for work in everybody if work.tag == tag and work.running]

    def hold(self, tag: str, name: str) -> bool:
        """A process that the agent did not start maps a tag. False: the tag is not to be had."""
        appliance = next((a for a in self.links if self._file(a, tag) is not None), None)
        if tag not in self.devices or appliance is None:
            return False
        self._pids += 1
        file = self._file(appliance, tag) or ""
        reads = tag in self.read_only
        stranger = Workload(
            f"stranger-{self._pids}", self._pids, tag, appliance, file, name, read_only=reads
        )
        self.strangers.append(stranger)
        self.sim.say(f"{self.name}: process {stranger.pid} ({name}) maps {tag[:8]}")
        self._work(stranger)
        return True

    def let_go(self, tag: str) -> None:
        """Such processes end."""
        for stranger in self.strangers:
            if stranger.tag == tag:
                self._end(stranger)

    def _surface(self, effect: r.Surface) -> None:
        ld = self.links[effect.appliance]
        file = self._media[effect.appliance].file_of(ld, effect.tag)
        if file is None:
            reason = "the appliance shows no bytes"
            self.post(r.SurfaceFailed(effect.tag, effect.ticket, reason))
            return
        path = f"/run/{self.name}/{effect.tag}"
        self.devices[effect.tag] = path
        (self.read_only.add if effect.read_only else self.read_only.discard)(effect.tag)
        self.post(r.Surfaced(effect.tag, effect.ticket, path))

    def _launch(self, effect: r.Launch) -> None:
        known = self.workloads.get(effect.workload.id)
        if known is None:
            appliance = next((a for a in self.links if self._file(a, effect.tag) is not None), None)
            if effect.tag not in self.devices or appliance is None:
                failed = WorkloadReport(effect.workload.id, "failed", reason="no device")
                self.post(r.WorkloadChanged(effect.tag, failed))
                return
            self._pids += 1
            file = self._file(appliance, effect.tag) or ""
            reads = effect.tag in self.read_only
            known = Workload(
                effect.workload.id, self._pids, effect.tag, appliance, file, read_only=reads
            )
            self.workloads[known.identity] = known
            self.sim.say(f"{self.name}: process {known.pid} ({known.name}) maps {effect.tag[:8]}")
            self._work(known)
        self.post(r.WorkloadChanged(effect.tag, _report(known)))

    def _file(self, appliance: str, tag: str) -> str | None:
        return self._media[appliance].file_of(self.links[appliance], tag)

    def _work(self, work: Workload) -> None:
        """Write, and go on while the process lives, whatever happens to the agent."""
        if not work.running:
            return
        media = self._media[work.appliance]
        act = media.read if work.read_only else media.write
        if not act(work.file, work.tag):
            self.sim.say(f"{self.name}: process {work.pid} ({work.name}) gets SIGBUS")
            self._end(work)
            return
        pause = self.sim.random.randrange(1, 40) * MILLISECOND
        self.sim.after(pause, lambda: self._work(work))

    def _signal(self, effect: r.Signal) -> None:
        work = self.workloads.get(effect.workload_id)
        if work is None:
            gone = WorkloadReport(effect.workload_id, "failed", reason="it was never started")
            self.post(r.WorkloadChanged(effect.tag, gone))
        elif not work.running:
            self.post(r.WorkloadChanged(effect.tag, _report(work)))
        elif effect.how == "kill" or (self.obedient and self.sim.chance(0.7)):
            pause = self.sim.random.randrange(1, 400) * MILLISECOND
            self.sim.after(pause, lambda: self._end(work))

    def _end(self, work: Workload) -> None:
        if work.running:
            work.running = False
            self.sim.say(f"{self.name}: process {work.pid} ({work.name}) ends")
            self.post(r.WorkloadChanged(work.tag, _report(work)))

    def end_all(self, after_ns: Nanoseconds = 1 * SECOND) -> None:
        """Every process of the host is told to end, as people do before they give up a host."""
        for work in self.workloads.values():
            if work.running:
                self.sim.after(after_ns, partial(self._end, work))


def _report(work: Workload) -> WorkloadReport:
    state = WorkloadReport(work.identity, "running", pid=work.pid)
    if work.running:
        return state
    return msgspec.structs.replace(state, state="exited", exit_code=0)
