"""The command line and the client against the real orchestrator: its machine, engine and HTTP
server.

The appliance and the hosts' agents are played here, at once and without fault. What these tests
hold is that both sides of the API mean the same.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.orchestrator.world import HandFabric, World

from tagmem.cli.main import invoke
from tagmem.client.session import Client
from tagmem.domain.effects import AddStarted, HostAnswered, InitiateAdd
from tagmem.domain.records import Holder, WorkloadStatus
from tagmem.ports import Effect, Step
from tagmem.wire import rest

TAG = "6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f"
MIB = 1 << 20
OUTPUT = b"2 MiB of memory, and a line of output\n"

Tagmem = Callable[..., tuple[int, str, str]]


class PlayedFabric(HandFabric):
    """Carries out each effect as a good appliance and a good agent would."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.world: World | None = None
        self.log = log
        self.held: tuple[Holder, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    def perform(self, effect: Effect) -> None:
        super().perform(effect)
        self.play(self._perform(effect))

    def play(self, task: Any) -> None:
        made = asyncio.ensure_future(task)
        self._tasks.add(made)
        made.add_done_callback(self._tasks.discard)

    async def _perform(self, effect: Effect) -> None:
        world = self.world
        assert world is not None
        if isinstance(effect, InitiateAdd):
            await world.submit(AddStarted(effect.id, effect.tag, effect.host))
            first = effect.extents[0]
            await world.submit(
                HostAnswered(effect.appliance, effect.ld, effect.tag, first, effect.extents)
            )
            await world.observe(effect.tag, effect.host, "attached", dax_path="/dax0.1")

    def observe(self, steps: list[Step], _last: int) -> None:
        """A release has begun: the agent answers as soon as it is told."""
        for note in (note for step in steps for note in step.notes):
            if note.type == "capacity.rung" and note.data["rung"] == "ask":
                self.play(self._release(note.subject, note.data["host"]))

    async def _release(self, tag: str, host: str) -> None:
        assert self.world is not None
        if self.held:
            await self.world.observe(tag, host, "releasing", rung="stop", holders=self.held)
        else:
            await self.world.give_back(tag, host)


class Running:
    """An orchestrator that serves on a Unix socket, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix:{folder}/api.sock"
        (folder / "log").write_bytes(OUTPUT)
        self.fabric = PlayedFabric(folder / "log")
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self.world: World | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        world = self.world = World(fabric=self.fabric)
        self.fabric.world = world
        world.engine.observe(self.fabric.observe)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.url.removeprefix("unix:"))
            listening.listen()
            listening.setblocking(False)
            served = asyncio.create_task(world.orchestrator.run([listening]))
            await world.prepare()
            await world.connect("h0")
            self._ready.set()
            await served

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        assert self.loop is not None
        assert self.world is not None
        self.loop.call_soon_threadsafe(self.world.orchestrator.stop)
        self._thread.join(20)

    def observe(self, tag: str, host: str, phase: str, **more: Any) -> None:
        assert self.loop is not None
        assert self.world is not None
        asyncio.run_coroutine_threadsafe(
            self.world.observe(tag, host, phase, **more), self.loop
        ).result(10)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("api"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def tagmem(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Tagmem:
    monkeypatch.setenv("TAGMEM_URL", running.url)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = invoke(list(arguments))
        return (code, *capfd.readouterr())

    return call


def create(tagmem: Tagmem, *arguments: str) -> Any:
    code, out, err = tagmem("capacity", "create", "2M", "--host", "h0", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_a_capacity_from_creation_to_release(tagmem: Tagmem) -> None:
    code, out, err = tagmem("capacity", "create", "--size", "2M", "--host", "h0", "--tag", TAG)
    assert code == 0, err
    assert json.loads(out)["attachments"][0]["ready"] is True
    assert [line.split("s  ", 1)[1].split()[0] for line in err.splitlines()] == [
        "created",
        "offered",
        "attached",
        "ready",
    ]
    code, again, _ = tagmem("capacity", "create", "--size", "2M", "--host", "h0", "--tag", TAG)
    assert (code, json.loads(again)["tag"]) == (0, TAG)
    code, _, err = tagmem("capacity", "create", "--size", "4M", "--host", "h0", "--tag", TAG)
    assert code == 4
    assert "see `tagmem capacity show TAG`" in err
    assert [c["tag"] for c in json.loads(tagmem("capacity", "list", "--host", "h0")[1])] == [TAG]
    assert f"A {TAG}  2 MiB  accepted on h0" in tagmem("appliance", "show", "a0", "-o", "table")[1]
    code, out, err = tagmem("capacity", "release", TAG)
    assert code == 0, err
    assert json.loads(out)["state"] == "released"
    assert tagmem("capacity", "show", TAG)[0] == 3


def test_bad_input_names_field_limit_and_value(tagmem: Tagmem) -> None:
    code, _, err = tagmem("capacity", "create", "--size", "1000", "--host", "h0")
    assert code == 2
    assert "size" in err
    assert "1000" in err
    assert len(err.splitlines()) == 1
    assert tagmem("capacity", "create", "--size", "2M", "--host", "nobody")[0] == 3
    assert tagmem("capacity", "create", "--size", "64G", "--host", "h0")[0] in (2, 6)
    assert tagmem("explain", "2M", "--host", "h0")[0] == 0


def test_a_workload_runs_and_its_output_comes_back(tagmem: Tagmem, running: Running) -> None:
    tag = create(tagmem)["tag"]

    def host() -> None:
        """The agent, which starts what it is told to and says how it ends."""
        with Client(running.url) as client:
            for event in client.events(0):
                if event.type == "workload.launched" and event.subject == tag:
                    break
            wanted = client.capacity(tag).attachments[0].workload
            assert wanted is not None
        for state, code in (("running", None), ("exited", 7)):
            status = WorkloadStatus(wanted.id, state, 4711, code, "", str(running.fabric.log))
            running.observe(tag, "h0", "attached", dax_path="/dax0.1", workload=status)

    thread = threading.Thread(target=host)
    thread.start()
    code, out, err = tagmem("run", tag, "--", "app", "--with", "{dax}")
    thread.join(10)
    assert (code, out.encode()) == (7, OUTPUT), err
    assert tagmem("capacity", "release", tag)[0] == 0


def test_a_release_that_is_held_names_the_holder(tagmem: Tagmem, running: Running) -> None:
    tag = create(tagmem)["tag"]
    running.fabric.held = (Holder(4711, "memcached", "maps"),)
    try:
        code, _, err = tagmem("capacity", "release", tag, "--up-to", "stop", "--timeout", "100ms")
    finally:
        running.fabric.held = ()
    assert code == 5
    assert "held by pid 4711 memcached (maps)" in err


def test_hosts_appliances_and_events(tagmem: Tagmem) -> None:
    hosts = json.loads(tagmem("host", "list")[1])
    assert [(h["id"], h["links"]) for h in hosts] == [("h0", {"a0": 0}), ("h1", {"a0": 1})]
    assert json.loads(tagmem("host", "register", "h2", "--link", "a0=2")[1])["id"] == "h2"
    assert json.loads(tagmem("appliance", "list")[1])[0]["state"] == "ready"
    assert tagmem("appliance", "refresh", "a0")[0] == 0
    assert json.loads(tagmem("appliance", "quarantine")[1]) == []
    events = json.loads(tagmem("events")[1])
    assert events[0]["type"] == "appliance.registered"
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert tagmem("host", "show", "nobody")[0] == 3


def test_streams_resume_where_they_were(running: Running) -> None:
    with Client(running.url) as client:
        last = client.last_event()
        first = next(client.events(0))
        assert first.id == 1
        client.create(rest.CapacityRequest(2 * MIB))
        assert next(client.events(last)).id == last + 1
