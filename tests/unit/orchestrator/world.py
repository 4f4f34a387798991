"""An orchestrator without sockets: the real machine, engine and API over a store in memory.

The appliance and the hosts' agents are played by the test: what they would report is posted as
events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import GIB, MIB, Dpa
from tagmem.domain.effects import (
    AddStarted,
    ApplianceConnected,
    ApplianceSnapshot,
    CapacityReturned,
    DurableEffect,
    HostAnswered,
    HostConnected,
    HostObserved,
    InitiateAdd,
    InitiateRelease,
    RegisterAppliance,
    RegisterHost,
    ReleaseStarted,
)
from tagmem.domain.machine import OrchestratorMachine
from tagmem.domain.records import KINDS, LdRecord, RegionRecord
from tagmem.domain.state import tag_and_host
from tagmem.orchestrator.config import OrchestratorConfig
from tagmem.orchestrator.service import Orchestrator
from tagmem.ports import Effect, Event, Loaded, Step
from tagmem.store.memory import MemoryStore

T = TypeVar("T")

TAG = Tag("11111111-2222-3333-4444-555555555555")
OTHER = Tag("11111111-2222-3333-4444-666666666666")
POOL_BYTES = GIB
BLOCK_BYTES = 2 * MIB
START_NS = 1_800_000_000_000_000_000


class StepClock:
    """A microsecond passes each time one looks."""

    def __init__(self) -> None:
        self._now = START_NS

    def now(self) -> int:
        self._now += 1_000
        return self._now


class HandFabric:
    """Keeps the effects for the test to answer."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []

    def start(self, loaded: Loaded) -> None:
        self.effects.extend(loaded.outbox)

    def perform(self, effect: Effect) -> None:
        self.effects.append(effect)

    async def close(self) -> None:
        return None


@dataclass
class Answer:
    """What a client sees."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


@dataclass
class World:
    """One orchestrator with appliance `a0` (two LDs) and hosts `h0`, `h1`."""

    store: MemoryStore = field(default_factory=lambda: MemoryStore(KINDS, DurableEffect))
    fabric: HandFabric = field(default_factory=HandFabric)
    config: OrchestratorConfig = field(default_factory=OrchestratorConfig)

    def __post_init__(self) -> None:
        self.orchestrator = Orchestrator(
            self.config,
            OrchestratorMachine(),
            self.store,
            StepClock(),
            lambda _engine, _view: self.fabric,
            "0.0",
        )
        self.engine = self.orchestrator.engine
        self._committed: asyncio.Event | None = None
        self.engine.observe(self._observe)

    def _observe(self, steps: list[Step], last_history: int) -> None:
        if self._committed is not None:
            self._committed.set()

    async def begin(self, request: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a request, and go on once what it asked for has been decided."""
        self._committed = asyncio.Event()
        task = asyncio.create_task(request)
        await self._committed.wait()
        return task

    async def prepare(self) -> None:
        a0 = ApplianceId("a0")
        links = ({"a0": 0}, {"a0": 1})
        region = RegionRecord(0, 0, POOL_BYTES, BLOCK_BYTES)
        lds = (LdRecord(0, (Dpa(0),)), LdRecord(1, (Dpa(16 * GIB),), mirrored=True))
        await self.submit(RegisterAppliance("a0", "unix:/a0"))
        await self.submit(ApplianceConnected(a0, (region,), lds))
        await self.submit(ApplianceSnapshot(a0, (), ()))
        for number, link in enumerate(links):
            await self.submit(RegisterHost(f"h{number}", dict(link)))

    async def submit(self, event: Event) -> Any:
        return await self.engine.submit(event)

    async def connect(self, host: str = "h0") -> None:
        links = {ApplianceId(a): ld for a, ld in self.orchestrator.view.hosts[host].links.items()}
        await self.submit(HostConnected(HostId(host), "boot", links))

    def _last(self, kind: type[Effect], tag: str, host: str) -> Any:
        for effect in reversed(self.fabric.effects):
            if isinstance(effect, kind) and tag_and_host(effect) == (tag, host):
                return effect
        raise AssertionError(f"no {kind.__name__} for {tag} on {host}")

    async def offer(self, tag: str, host: str = "h0") -> InitiateAdd:
        """The appliance starts the add."""
        add: InitiateAdd = self._last(InitiateAdd, tag, host)
        await self.submit(AddStarted(add.id, add.tag, add.host))
        return add

    async def accept(self, tag: str, host: str = "h0") -> None:
        """The host accepts, and its agent surfaces the DAX device."""
        add = await self.offer(tag, host)
        accepted = HostAnswered(add.appliance, add.ld, add.tag, add.extents[0], add.extents)
        await self.submit(accepted)
        await self.observe(tag, host, "attached", dax_path="/run/tagmem/dax0.1/dax0.1")

    async def refuse(self, tag: str, host: str = "h0", reason: str = "no slot free") -> None:
        """The host refuses, and its agent says why."""
        add = await self.offer(tag, host)
        await self.observe(tag, host, "refused", reason=reason)
        await self.submit(HostAnswered(add.appliance, add.ld, add.tag, add.extents[0], ()))

    async def observe(self, tag: str, host: str, phase: str, **more: Any) -> None:
        attached = self.orchestrator.view.attachment(tag, host)
        assert attached is not None
        await self.submit(HostObserved(HostId(host), Tag(tag), attached.revision, phase, **more))

    async def give_back(self, tag: str, host: str = "h0") -> None:
        """The agent proves and releases; the appliance sanitises and says so."""
        held = self.orchestrator.view.capacities[tag]
        attached = self.orchestrator.view.attachment(tag, host)
        assert attached is not None
        await self.observe(tag, host, "released", proved=True)
        for effect in list(self.fabric.effects):
            if isinstance(effect, InitiateRelease) and effect.tag == tag:
                await self.submit(ReleaseStarted(effect.id, effect.tag, effect.host, effect.forced))
        await self.submit(CapacityReturned(held.appliance, attached.ld, Tag(tag), held.extents))

    async def call(
        self,
        method: str,
        target: str,
        json: Any = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request through the ASGI application."""
        content = body if body is not None else b"" if json is None else msgspec.json.encode(json)
        given = {"host": "test", "content-length": str(len(content)), **(headers or {})}
        if json is not None or body is not None:
            given.setdefault("content-type", "application/json")
        scope = http_scope(method, target, given)
        received = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if received:
                return received.pop()
            await asyncio.Event().wait()
            return None

        async def send(message: Any) -> None:
            sent.append(message)

        await self.orchestrator.application(scope, receive, send)
        start, *parts = sent
        return Answer(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(part["body"] for part in parts),
        )


def http_scope(method: str, target: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """What an ASGI server says of a request."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }


@asynccontextmanager
async def world(*, prepared: bool = True, **settings: Any) -> AsyncIterator[World]:
    """A running one."""
    made = World(**settings)
    engine = asyncio.create_task(made.engine.run())
    try:
        if prepared:
            await made.prepare()
        yield made
    finally:
        await made.engine.stop()
        await engine
