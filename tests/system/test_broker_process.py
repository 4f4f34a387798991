"""The broker as a process: it outlives its agent, is found again, and is replaced when it dies.

A front-end with real memory stands in for QEMU.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tagmem.base.errors import Conflict, NotFound, OutcomeUnknown
from tagmem.base.units import MIB, SECOND
from tagmem.io import stream
from tagmem.presenter import apart
from tagmem.presenter import brokerapi as api
from tagmem.presenter.brokerlink import BrokerLink, Window
from tagmem.presenter.brokerserver import SOCKET, BrokerServer
from tagmem.presenter.contract import Piece, Tagged
from tagmem.presenter.window import Goal
from tagmem.testing.vhost_frontend import Driver

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
DEVICE = f"tm-{TAG}"
SIZE = 6 * MIB
DATA_AT = 2 * MIB
LONG = 10 * SECOND
SHORT = SECOND // 20


class World:
    """One host: a folder, a tag, agents that come and go, and what was started."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
        self.media = self.folder / "media"
        with self.media.open("wb") as file:
            file.write(b"FIRST")
            file.truncate(SIZE)
        self.tagged = Tagged(TAG, SIZE, (Piece(str(self.media), 0, SIZE),))
        self.started: list[subprocess.Popen[bytes]] = []
        self.lost: list[Window] = []

    def spawn(self) -> subprocess.Popen[bytes]:
        line = (sys.executable, "-m", "tagmem", "broker", str(self.folder))
        self.started.append(apart.start(line, str(self.folder / "log")))
        return self.started[-1]

    def agent(self) -> BrokerLink:
        link = BrokerLink(self.folder, stream.connect, self.spawn)

        def lost(windows: Collection[Window]) -> None:
            self.lost += windows

        link.on_lost = lost
        return link

    async def attached(self, agent: BrokerLink, driver: Driver) -> None:
        await asyncio.to_thread(driver.order, "connect")
        await asyncio.to_thread(driver.order, "start")
        await agent.windows("vm1").mapped(DEVICE, LONG)

    def holds(self, pid: int) -> bool:
        listed = Path(f"/proc/{pid}/maps").read_text()
        opened = [os.path.realpath(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        return str(self.media) in listed or str(self.media) in opened

    def clear(self) -> None:
        for child in self.started:
            child.kill()
            child.wait(10)
        shutil.rmtree(self.folder)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.clear()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - polls what other processes do
            await asyncio.sleep(0)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scene()

    asyncio.run(main())


def test_an_agent_that_dies_leaves_its_windows_in_hand(world: World) -> None:
    async def scene() -> None:
        first = world.agent()
        assert await first.find_again() == ()
        path = await first.windows("vm1").open(DEVICE, world.tagged, SIZE + 2 * MIB)
        with Driver(path) as driver:
            await world.attached(first, driver)
            broker = world.started[0].pid
            assert os.getsid(broker) == broker
            assert not world.holds(broker)
            assert first.in_hand("vm1", DEVICE)
            await first.close()
            # Asked to end it stays, because QEMU has a window.
            os.kill(broker, signal.SIGTERM)
            again = world.agent()
            assert await again.find_again() == (("vm1", DEVICE),)
            assert again.in_hand("vm1", DEVICE)
            assert again.greeting is not None
            assert again.greeting.pid == broker
            await again.windows("vm1").revoke(DEVICE, LONG)
            assert not world.holds(driver.pid)
            assert await asyncio.to_thread(driver.read, DATA_AT, 5) == bytes(5)
            await again.windows("vm1").close(DEVICE)
            with pytest.raises(NotFound):
                await again.windows("vm1").mapped(DEVICE, SHORT)
            await again.close()
        await until(lambda: world.started[0].poll() == 0)
        assert not world.lost

    play(scene)


def test_a_broker_that_dies_is_replaced_and_what_it_had_is_told(world: World) -> None:
    async def scene() -> None:
        agent = world.agent()
        windows = agent.windows("vm1")
        path = await windows.open(DEVICE, world.tagged, SIZE + 2 * MIB)
        with Driver(path) as driver:
            await world.attached(agent, driver)
            world.started[0].kill()
            await until(lambda: bool(world.lost))
            assert world.lost == [("vm1", DEVICE)]
            assert len(world.started) == 2
            assert not agent.in_hand("vm1", DEVICE)
            # QEMU has the bytes, and nobody can take them: nothing is claimed.
            assert await asyncio.to_thread(driver.read, DATA_AT, 5) == b"FIRST"
            await agent.look_after("vm1", DEVICE, world.tagged, Goal.PRESENTED, driver.pid)
            assert not agent.in_hand("vm1", DEVICE)
            with pytest.raises(OutcomeUnknown, match="1 mappings"):
                await windows.revoke(DEVICE, SHORT)
            await asyncio.to_thread(driver.kill)
            await windows.revoke(DEVICE, LONG)
            await windows.close(DEVICE)
        await agent.close()

    play(scene)


def test_without_agent_and_without_qemu_it_ends(world: World) -> None:
    async def scene() -> None:
        agent = world.agent()
        path = await agent.windows("vm1").open(DEVICE, world.tagged, SIZE + 2 * MIB)
        with Driver(path) as driver:
            await world.attached(agent, driver)
            await agent.close()
        assert world.started[0].poll() is None
        os.kill(world.started[0].pid, signal.SIGTERM)
        await until(lambda: world.started[0].poll() == 0)

    play(scene)


def test_there_is_one_broker(world: World) -> None:
    async def scene() -> None:
        agent = world.agent()
        await agent.windows("vm1").open(DEVICE, world.tagged, SIZE + 2 * MIB)
        second = world.spawn()
        assert await asyncio.to_thread(second.wait, 30) != 0
        with pytest.raises(Conflict, match="served already"):
            await agent.windows("vm1").open(DEVICE, world.tagged, SIZE + 2 * MIB)
        await agent.close()

    play(scene)


class OldServer(BrokerServer):
    """Of a version whose words for opening nobody knows any more."""

    async def answer(self, asked: api.AnyQuestion) -> api.AnyAnswer:
        if isinstance(asked, api.Hello):
            return api.Greeting(0, "0.0", os.getpid())
        return await super().answer(asked)


def test_a_broker_of_another_version_gives_back_and_is_then_replaced(world: World) -> None:
    async def scene() -> None:
        old = OldServer(stream, world.folder, "0.0")
        path = old.broker.open("vm1", DEVICE, world.tagged)
        running = asyncio.create_task(old.run())
        agent = world.agent()
        windows = agent.windows("vm1")
        with Driver(path) as driver:
            assert await agent.find_again() == (("vm1", DEVICE),)
            await asyncio.to_thread(driver.order, "connect")
            await asyncio.to_thread(driver.order, "start")
            await windows.mapped(DEVICE, LONG)
            with pytest.raises(Conflict, match="another version and has 1 windows"):
                await windows.open("tm-other", world.tagged, SIZE + 2 * MIB)
            await windows.revoke(DEVICE, LONG)
            await windows.close(DEVICE)
        assert not world.started
        await windows.open(DEVICE, world.tagged, SIZE + 2 * MIB)
        assert len(world.started) == 1
        await running
        assert agent.greeting is not None
        assert agent.greeting.pid == world.started[0].pid
        await agent.close()

    play(scene)


@pytest.mark.parametrize(
    "hostile",
    [
        b"\0" * 300_000,
        b"{]\n",
        b'{"id":1,"ask":{"do":"shell"}}\n',
        b'{"id":-5,"ask":{"do":"hello"}}\n',
        b"[" * 100_000 + b"\n",
        b'{"id":1,"ask":{"do":"mapped","vm":"v","device":"d","deadline_ns":1e30}}\n',
        b'{"id":1,"ask":{"do":"look","vm":"v","device":"' + b"x" * 200 + b'","deadline_ns":1}}\n',
        b'{"id":1,"ask":{"do":"hello"}}\n' * 2_000,
    ],
    ids=("endless", "no-json", "unknown", "id", "deep", "deadline", "name", "flood"),
)
def test_a_hostile_agent_is_hung_up_on_and_others_go_on(world: World, hostile: bytes) -> None:
    async def scene() -> None:
        agent = world.agent()
        windows = agent.windows("vm1")
        path = await windows.open(DEVICE, world.tagged, SIZE + 2 * MIB)
        reader, writer = await asyncio.open_unix_connection(str(world.folder / SOCKET))
        try:
            writer.write(hostile)
            async with asyncio.timeout(10):
                while await _some(reader):
                    pass
        finally:
            writer.close()
        with Driver(path) as driver:
            await world.attached(agent, driver)
            await windows.revoke(DEVICE, LONG)
        await windows.close(DEVICE)
        await agent.close()

    play(scene)


async def _some(reader: asyncio.StreamReader) -> Any:
    try:
        return await reader.read(1 << 20)
    except ConnectionError:
        return b""


def test_files_that_are_none_are_refused(world: World) -> None:
    async def scene() -> None:
        agent = world.agent()
        os.mkfifo(world.folder / "pipe")
        for path in ("/dev/zero", str(world.folder / "pipe"), "media", str(world.folder)):
            wrong = Tagged(TAG, SIZE, (Piece(path, 0, SIZE),))
            with pytest.raises(Exception, match="piece"):
                await agent.windows("vm1").open(DEVICE, wrong, SIZE + 2 * MIB)
        await agent.close()

    play(scene)
