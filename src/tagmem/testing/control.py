"""The orchestrator as a simulated process: its machine, its fabric links, its agents' sessions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tagmem.base.ids import ApplianceId, HostId
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.domain.effects import (
    ApplianceSnapshot,
    ConnectAppliance,
    DurableEffect,
    HostConnected,
    HostDisconnected,
    RegisterHost,
    TellHost,
)
from tagmem.domain.machine import OrchestratorMachine
from tagmem.domain.outcome import Reply
from tagmem.domain.records import KINDS
from tagmem.orchestrator.links import FmLink, Phase
from tagmem.orchestrator.sessions import observed_event
from tagmem.orchestrator.view import MachineView
from tagmem.ports import Effect, Event, Loaded, Step
from tagmem.store.memory import MemoryStore
from tagmem.testing.nodes import Connection, Process
from tagmem.testing.sim import Simulation
from tagmem.wire.agentapi import Hello, Observed, SyncDone, decode_to_orchestrator, encode

REDIAL_NS: Nanoseconds = 20 * MILLISECOND
Dial = Callable[[str, Callable[[bytes], None]], Connection | None]


HALF_OPEN_NS: Nanoseconds = 90 * SECOND
"""How long an agent may take to notice that its orchestrator is gone: longer than a ladder."""


class OrchestratorProcess(Process):
    """Decides who may hold what. `dial` opens a connection to an appliance's FM port."""

    machine: OrchestratorMachine

    def __init__(
        self,
        sim: Simulation,
        dial: Dial,
        make: Callable[[], OrchestratorMachine] = OrchestratorMachine,
    ) -> None:
        super().__init__(sim, "orchestrator", make, MemoryStore(KINDS, DurableEffect))
        self._dial = dial
        self._links: dict[str, FmLink] = {}
        self._wires: dict[str, Connection] = {}
        self.accepted: list[Connection] = []
        """Agents' connections of this life, whether or not they have said who they are."""
        self._sessions: dict[str, Connection] = {}
        self.view = MachineView(self.machine)

    # ---- life

    def started(self, loaded: Loaded) -> None:
        """Take up the outbox, and dial every appliance on record."""
        self.view = MachineView(self.machine)
        self._links.clear()
        self._wires.clear()
        self._sessions.clear()
        for name in self.machine.state.appliances:
            self._open_link(name)
        for effect in loaded.outbox:
            self.perform(effect)

    def stopped(self) -> None:
        """Every connection breaks."""
        for wire in (*self._wires.values(), *self._sessions.values()):
            wire.close("the orchestrator died")
        for wire in self.accepted:
            # One that had not spoken yet is left half open, and noticed by its keep-alive.
            self.sim.after(HALF_OPEN_NS, partial(wire.close, "nobody answers"))
        self.accepted.clear()

    # ---- effects

    def perform(self, effect: Effect) -> None:
        """To a host's session, or to an appliance's link."""
        if isinstance(effect, TellHost):
            self._tell(effect.host, effect.tag)
            return
        if isinstance(effect, ConnectAppliance):
            if effect.appliance not in self._links:
                self._open_link(effect.appliance)
            return
        name: str = effect.appliance  # type: ignore[attr-defined]  # every other effect has one
        link = self._links.get(name)
        if link is not None:
            link.perform(effect, self.sim.now())
            self._flush(name)

    def committed(self, events: list[Event], steps: list[Step]) -> None:
        """What is done need not be carried out again."""
        done = [effect_id for step in steps for effect_id in step.done]
        if done:
            for name, link in self._links.items():
                link.forget(done, self.sim.now())
                self._flush(name)

    def settled(self, events: list[Event], steps: list[Step]) -> None:
        """A snapshot's step is committed: its link may go on."""
        for event in events:
            if isinstance(event, ApplianceSnapshot) and event.appliance in self._links:
                self._links[event.appliance].resume(self.sim.now())
                self._flush(event.appliance)

    # ---- appliances

    def _open_link(self, name: str) -> None:
        self._links[name] = FmLink(ApplianceId(name))
        self._connect(name)

    def _connect(self, name: str) -> None:
        link = self._links[name]
        wire = self._dial(name, partial(self._receive, name, self.life))
        if wire is None:
            self.later(REDIAL_NS, lambda: self._connect(name))
            return
        self._wires[name] = wire
        wire.on_close.append(partial(self._hung_up, name, wire, self.life))
        link.connected(self.sim.now())
        self._flush(name)

    def _receive(self, name: str, life: int, data: bytes) -> None:
        if self.alive and self.life == life:
            self._links[name].feed(data, self.sim.now())
            self._flush(name)

    def _hung_up(self, name: str, wire: Connection, life: int, reason: str) -> None:
        if self.alive and self.life == life and self._wires.get(name) is wire:
            del self._wires[name]
            self._links[name].disconnected(reason, self.sim.now())
            self._flush(name)
            self.later(REDIAL_NS, lambda: self._connect(name))

    def _flush(self, name: str) -> None:
        link, wire = self._links[name], self._wires.get(name)
        for event in link.events():
            self.post(event)
        data = link.outgoing()
        if wire is not None:
            if data:
                wire.up.send(data)
            if link.wants_close or link.phase is Phase.DOWN:
                wire.close(link.wants_close or "down")
        self.wake()

    def link_deadline(self) -> Nanoseconds | None:
        """The earliest of all links."""
        times = (link.next_deadline() for link in self._links.values())
        return min((time for time in times if time is not None), default=None)

    def tick_links(self) -> None:
        """Tick those that are due."""
        for name, link in list(self._links.items()):
            due = link.next_deadline()
            if due is not None and due <= self.sim.now():
                link.tick(self.sim.now())
                self._flush(name)

    # ---- agents

    def take_agent_message(self, wire: Connection, data: bytes) -> None:
        """One message of an agent's session."""
        if not self.alive:
            return
        message = decode_to_orchestrator(data)
        if isinstance(message, Hello):
            host = HostId(message.host)
            links = {ApplianceId(name): ld for name, ld in message.links.items()}
            self.post(RegisterHost(host, dict(message.links)))
            answer = partial(self._opened, host, wire)
            self.post(HostConnected(host, message.boot_id, links), answer)
            return
        if not isinstance(message, Observed):
            return  # Simulated hosts do not call each other.
        for host_name, session in self._sessions.items():
            if session is wire:
                self.post(observed_event(HostId(host_name), message))

    def _opened(self, host: HostId, wire: Connection, reply: Reply) -> None:
        if not wire.open or not reply.outcome.ok:
            wire.close(reply.detail)
            return
        old = self._sessions.get(host)
        self._sessions[host] = wire
        if old is not None and old is not wire:
            old.close("displaced")
        wire.on_close.append(partial(self._agent_gone, host, wire, self.life))
        for tag in self.view.tags_on(host):
            self._tell(host, tag)
        wire.down.send(encode(SyncDone()))

    def _agent_gone(self, host: HostId, wire: Connection, life: int, reason: str) -> None:
        if self.alive and self.life == life and self._sessions.get(host) is wire:
            del self._sessions[host]
            self.post(HostDisconnected(host))

    def _tell(self, host: str, tag: str) -> None:
        session, wanted = self._sessions.get(host), self.view.desired(host, tag)
        if session is not None and wanted is not None:
            session.down.send(encode(wanted))
