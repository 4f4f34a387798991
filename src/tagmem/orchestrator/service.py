"""The orchestrator as a running whole: engine, links to appliances, agents' sessions, HTTP.

It is given its adapters (store, clock, sockets) and knows none of them by name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from tagmem.base.errors import InvalidInput
from tagmem.domain.effects import RegisterAppliance, RegisterHost, TellHost
from tagmem.domain.outcome import Reply
from tagmem.engine import Engine
from tagmem.orchestrator.api import Api
from tagmem.orchestrator.app import Application
from tagmem.orchestrator.config import OrchestratorConfig
from tagmem.orchestrator.metrics import Metrics
from tagmem.orchestrator.routes import ROUTES
from tagmem.orchestrator.server import HttpServer
from tagmem.orchestrator.sessions import Sessions
from tagmem.orchestrator.view import MachineView, Readable
from tagmem.orchestrator.watch import Feed, Waiters
from tagmem.ports import Clock, Effect, Event, Loaded, Machine, Store

log = logging.getLogger(__name__)


class ReadableMachine(Machine, Readable, Protocol):
    """A machine whose state can be read."""


class Fabric(Protocol):
    """The links to all appliances."""

    def start(self, loaded: Loaded) -> None:
        """Connect to the appliances on record and take up the outbox."""

    def perform(self, effect: Effect) -> None:
        """Carry out one effect without waiting; its result is posted as an event."""

    async def close(self) -> None:
        """End all links. What was under way stays in the outbox."""


FabricFactory = Callable[[Engine, MachineView], Fabric]


class Orchestrator:
    """One orchestrator process, less its adapters."""

    def __init__(
        self,
        config: OrchestratorConfig,
        machine: ReadableMachine,
        store: Store,
        clock: Clock,
        fabric: FabricFactory,
        version: str,
    ) -> None:
        self._config = config
        self.engine = Engine(machine, store, clock, self._perform)
        self._loaded = self.engine.restore()
        self._server: HttpServer | None = None
        self.view = MachineView(machine)
        self.waiters = Waiters()
        self.feed = Feed(self.engine, store)
        self.engine.observe(self.waiters.observe)
        self.metrics = Metrics(self.engine, version)
        self.sessions = Sessions(
            self.engine,
            self.view,
            self_registration=config.self_registration,
            changed=lambda host: self.waiters.wake(f"host/{host}"),
        )
        self.fabric = fabric(self.engine, self.view)
        self.api = Api(
            self.engine,
            self.view,
            self.sessions,
            self.waiters,
            self.feed,
            self.metrics,
            version=version,
            started_ns=clock.now(),
            deadlines_ns=config.ladder.deadlines_ns(),
        )
        self.application = Application(ROUTES, self.api, self.sessions, self.metrics.answers)

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, TellHost):
            self.sessions.tell(effect.host, effect.tag)
        else:
            self.fabric.perform(effect)

    async def run(self, sockets: Sequence[socket.socket]) -> None:
        """Serve until told to stop. Raises StorageFailed when an observation could not be kept."""
        self._server = server = HttpServer(self.application, self._ending)
        engine = asyncio.create_task(self.engine.run())
        engine.add_done_callback(lambda _: server.stop())
        try:
            self.fabric.start(self._loaded)
            await self._register()
            log.info("listening on %s", ", ".join(_name(each) for each in sockets))
            await server.serve(sockets=list(sockets))
        finally:
            await self.fabric.close()
            await self.engine.stop()
            # A failed engine raises here: the process must end and look again at what there is.
            await engine

    def stop(self) -> None:
        """Begin the end of `run`, in order."""
        if self._server is not None:
            self._server.stop()

    async def _register(self) -> None:
        """What the configuration names is registered; a repeat changes nothing."""
        events: list[Event] = [
            RegisterAppliance(name, section.address)
            for name, section in self._config.appliances.items()
        ]
        events += [RegisterHost(name, host.links) for name, host in self._config.hosts.items()]
        for event in events:
            reply: Reply = await self.engine.submit(event)
            if not reply.outcome.ok:
                why = reply.detail or reply.outcome.title
                raise InvalidInput("config", "in keeping with what is registered", why)

    def _ending(self) -> None:
        self.waiters.end()
        self.feed.end()
        self.sessions.end()


def _name(listening: socket.socket) -> str:
    address = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{address}"
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
