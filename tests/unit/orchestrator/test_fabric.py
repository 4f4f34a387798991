"""The shell around the links: it connects, comes back, and waits for a kept snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.unit.orchestrator.peer import Peer, add

from tagmem.base.errors import StorageFailed
from tagmem.base.ids import ApplianceId
from tagmem.base.units import MICROSECOND, Nanoseconds
from tagmem.domain.effects import (
    AddStarted,
    ApplianceConnected,
    ApplianceDisconnected,
    ApplianceSnapshot,
    ConnectAppliance,
    DurableEffect,
)
from tagmem.domain.records import KINDS, ApplianceRecord, ApplianceState
from tagmem.engine import Engine
from tagmem.io.clock import SystemClock
from tagmem.orchestrator.fabric import Links
from tagmem.ports import Change, Effect, Event, Loaded, Note, Step, Stream, StreamPeer
from tagmem.store.memory import MemoryStore
from tagmem.wire.fmapi import InitiateDcAddRequest

Z0 = ApplianceId("z0")


class Wire:
    """A stream that is the peer itself: what is sent is answered in the next turn of the loop."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.told: StreamPeer | None = None
        self.open = True

    def attach(self, peer: StreamPeer) -> None:
        self.told = peer

    def send(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._answer, data)

    def _answer(self, data: bytes) -> None:
        if self.open and self.told is not None:
            back = self.peer.feed(data)
            if back:
                self.told.received(back, [])

    def close(self, reason: str = "closed") -> None:
        if self.open and self.told is not None:
            self.open = False
            self.told.closed(reason)


class Recorder:
    """A machine that writes down what it is told; `react` says what it does about it."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.react: Callable[[Event], Step] = lambda _: Step(notes=(Note("was.told", "x"),))
        self.changed = asyncio.Event()

    def restore(self, loaded: Loaded) -> None:
        return

    def step(self, event: Event, now: Nanoseconds) -> Step:
        self.told.append(event)
        self.changed.set()
        return self.react(event)

    def next_deadline(self) -> Nanoseconds | None:
        return None

    async def until(self, kind: type[Event], times: int = 1) -> None:
        async with asyncio.timeout(5):
            while sum(isinstance(event, kind) for event in self.told) < times:
                self.changed.clear()
                await self.changed.wait()

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.told]


class House:
    """Engine, store, links and one scripted appliance."""

    def __init__(self, *, outbox: tuple[Effect, ...] = ()) -> None:
        self.peer = Peer()
        self.machine = Recorder()
        self.store = MemoryStore(KINDS, DurableEffect)
        self.wires: list[Wire] = []
        self.refusals = 0
        record = ApplianceRecord(Z0, "unix:/z0", ApplianceState.LOST)
        self.loaded = Loaded([("appliance", Z0, record)], outbox, 9)
        clock = SystemClock()
        self.engine = Engine(self.machine, self.store, clock, self._perform)
        self.links = Links(self.engine, clock, self.dial, pause_first_ns=100 * MICROSECOND)

    def _perform(self, effect: Effect) -> None:
        self.links.perform(effect)

    async def dial(self, address: str) -> Stream:
        assert address == "unix:/z0"
        if self.refusals:
            self.refusals -= 1
            raise ConnectionRefusedError(111, "Connection refused")
        self.peer.connect()
        self.wires.append(Wire(self.peer))
        return self.wires[-1]

    async def live(self, story: Callable[[], object]) -> None:
        running = asyncio.create_task(self.engine.run())
        self.links.start(self.loaded)
        told = story()
        assert asyncio.iscoroutine(told)
        await told
        await self.links.close()
        await self.engine.stop()
        await running


def play(story: Callable[[House], object], *, outbox: tuple[Effect, ...] = ()) -> None:
    async def whole() -> None:
        house = House(outbox=outbox)
        await house.live(lambda: story(house))

    asyncio.run(whole())


def test_it_connects_and_what_is_left_in_the_outbox_follows_the_snapshot() -> None:
    async def story(house: House) -> None:
        await house.machine.until(AddStarted)
        assert house.machine.kinds() == ["ApplianceConnected", "ApplianceSnapshot", "AddStarted"]

    play(story, outbox=(add(5),))


def test_what_the_snapshots_step_declares_done_is_never_sent() -> None:
    async def story(house: House) -> None:
        house.machine.react = lambda event: (
            Step(done=(5,)) if isinstance(event, ApplianceSnapshot) else Step()
        )
        await house.machine.until(AddStarted)
        assert house.peer.count(InitiateDcAddRequest) == 1
        assert AddStarted(6, add(6, 1).tag, add(6, 1).host) in house.machine.told

    play(story, outbox=(add(5), add(6, 1)))


def test_an_effect_that_its_own_batch_declares_done_is_never_sent() -> None:
    async def story(house: House) -> None:
        await house.machine.until(ApplianceSnapshot)
        steps = iter((Step(effects=(add(10),)), Step(done=(10,)), Step(effects=(add(11),))))
        house.machine.react = lambda event: (
            next(steps, Step()) if isinstance(event, ApplianceDisconnected) else Step()
        )
        for name in ("a", "b", "c"):
            house.engine.post(ApplianceDisconnected(ApplianceId(name), ""))
        await house.machine.until(AddStarted)
        assert house.peer.count(InitiateDcAddRequest) == 1

    play(story)


def test_an_appliance_that_is_not_there_is_told_once_and_tried_again() -> None:
    async def story(house: House) -> None:
        house.refusals = 4
        await house.machine.until(ApplianceConnected)
        lost = [event for event in house.machine.told if isinstance(event, ApplianceDisconnected)]
        assert lost == [ApplianceDisconnected(Z0, "Connection refused")]

    play(story)


def test_a_connection_that_ends_is_made_again() -> None:
    async def story(house: House) -> None:
        await house.machine.until(ApplianceSnapshot)
        house.wires[0].close("reset by peer")
        await house.machine.until(ApplianceSnapshot, 2)
        assert ApplianceDisconnected(Z0, "reset by peer") in house.machine.told
        assert len(house.wires) == 2

    play(story)


def test_an_appliance_that_is_registered_later_gets_its_link() -> None:
    async def story(house: House) -> None:
        house.links.perform(ConnectAppliance(0, Z0, "unix:/z0"))
        await house.machine.until(ApplianceSnapshot)
        assert len(house.wires) == 1

    async def whole() -> None:
        house = House()
        house.loaded = Loaded([], (), 0)
        await house.live(lambda: story(house))

    asyncio.run(whole())


def test_a_snapshot_that_cannot_be_kept_is_taken_again() -> None:
    """The machine is set back behind it, so commands may not follow from it."""

    async def story(house: House) -> None:
        def react(event: Event) -> Step:
            if not isinstance(event, ApplianceSnapshot):
                return Step()
            first = sum(isinstance(each, ApplianceSnapshot) for each in house.machine.told) == 1
            house.store.refusal = "no space left" if first else None
            record = ApplianceRecord(Z0, "unix:/z0", ApplianceState.READY)
            return Step((Change("appliance", Z0, record),))

        house.machine.react = react
        await house.machine.until(AddStarted)
        assert len(house.wires) == 2
        assert house.store.commits == 1

    play(story, outbox=(add(5),))


def test_an_observation_that_cannot_be_kept_ends_the_engine() -> None:
    async def whole() -> None:
        house = House()
        house.store.refusal = "no space left"
        running = asyncio.create_task(house.engine.run())
        house.links.start(house.loaded)
        failed = False
        try:
            await running
        except StorageFailed:
            failed = True
        await house.links.close()
        assert failed

    asyncio.run(whole())
