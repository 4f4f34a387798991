"""The host agent as a real process, between a real appliance and an orchestrator: this test.

Real sockets, real bytes, real holders; `kill -9` while a tag is in use, and while it goes back.
"""

from __future__ import annotations

import mmap
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.appliance_client import Appliance, B, Client
from tests.system.waiting import SECONDS, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, unix_serve

from tagmem.base.ids import Tag
from tagmem.wire.agentapi import (
    Desired,
    Hello,
    Observed,
    SyncDone,
    Workload,
    decode_to_orchestrator,
    encode,
)

T1 = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")
T2 = Tag("00000000-0000-4000-8000-000000000002")
STUBBORN = "trap '' TERM; echo up; while :; do sleep 1; done"

CONFIG = """\
name = "{name}"
run = "{root}/run-{name}"
state = "{root}/agent-{name}"
orchestrator = "unix:{root}/api-{name}"

[[appliance]]
name = "z1"
socket = "{root}/{name}"
ld = {ld}
directory = "{directory}"

[limits]
expect_grace_ms = 300
"""


class Orchestrator:
    """Tells one agent what it wants, and hears what it says."""

    def __init__(self, path: Path) -> None:
        self.wanted: dict[str, Desired] = {}
        self.heard: queue.Queue[Observed] = queue.Queue()
        self.hellos: list[Hello] = []
        self._session: ServerConnection | None = None
        self._lock = threading.Lock()
        self._server = unix_serve(self._serve, str(path), compression=None)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _serve(self, session: ServerConnection) -> None:
        try:
            hello = decode_to_orchestrator(session.recv())
            assert isinstance(hello, Hello)
            with self._lock:
                self.hellos.append(hello)
                for desired in self.wanted.values():
                    session.send(encode(desired).decode())
                session.send(encode(SyncDone(1)).decode())
                self._session = session
            for data in session:
                observed = decode_to_orchestrator(data)
                assert isinstance(observed, Observed)
                self.heard.put(observed)
        except ConnectionClosed:
            return

    def want(self, desired: Desired) -> None:
        with self._lock:
            self.wanted[desired.tag] = desired
            if self._session is not None:
                try:
                    self._session.send(encode(desired).decode())
                except ConnectionClosed:
                    self._session = None  # It is said when the next agent dials.

    def hears(self, phase: str, tag: str = T1, **facts: Any) -> Observed:
        """The next observation like this."""
        seen: list[Observed] = []
        while True:
            try:
                observed = self.heard.get(timeout=SECONDS)
            except queue.Empty:
                raise AssertionError(f"no {phase} {facts} after {seen}") from None
            seen.append(observed)
            same = all(getattr(observed, name) == value for name, value in facts.items())
            if observed.tag == tag and observed.phase == phase and same:
                return observed

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


class Agent:
    """The process, which may be killed and started again."""

    def __init__(self, root: Path, name: str = "w1", ld: int = 0, *, linked: bool = True) -> None:
        self.name = name
        self.run = root / f"run-{name}"
        self.config = root / f"host-{name}.toml"
        directory = root / "media" / "hosts" / name if linked else ""
        text = CONFIG.format(root=root, name=name, ld=ld, directory=directory)
        self.config.write_text(text)
        self.log = root / f"log-{name}"
        self.orchestrator = Orchestrator(root / f"api-{name}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tagmem", "host", "--config", str(self.config)], stderr=log
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def attach(self, tag: str = T1, blocks: int = 2, **more: Any) -> None:
        revision = more.pop("revision", 1)
        self.orchestrator.want(Desired(tag, revision, "attached", "z1", blocks * B, **more))

    def release(self, tag: str = T1, blocks: int = 2, **more: Any) -> None:
        revision = more.pop("revision", 9)
        self.orchestrator.want(Desired(tag, revision, "released", "z1", blocks * B, **more))

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(SECONDS) == 0, self.log.read_text()
        self.orchestrator.close()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["by-tag", "by-dpa"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def appliance(root: Path) -> Iterator[Appliance]:
    (root / "media").mkdir()
    made = Appliance(root, root / "media")
    made.start()
    yield made
    made.close()


@pytest.fixture
def fm(appliance: Appliance) -> Client:
    return appliance.client("fm")


@pytest.fixture
def agent(root: Path, appliance: Appliance) -> Iterator[Agent]:
    made = Agent(root)
    made.start()
    yield made
    made.close()


def given_back(fm: Client, tag: Tag = T1) -> None:
    """The device itself says that nobody has it and that it reads zero."""
    wait_until(
        lambda: not any(t.tag == bytes.fromhex(tag.replace("-", "")) for t in fm.lists()[2]),
        "the tag is still listed",
    )


def test_a_tag_comes_is_used_and_goes(agent: Agent, fm: Client) -> None:
    agent.attach()
    agent.orchestrator.hears("expected", revision=1)
    assert fm.add(0, T1, 2) == 0
    seen = agent.orchestrator.hears("attached")
    assert seen.dax_path == str(agent.run / "dax0.1" / "dax0.1")
    assert (agent.run / "by-tag" / T1).stat().st_size == 2 * B
    with open(seen.dax_path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:5] = b"hello"
    agent.release()
    assert agent.orchestrator.hears("released", revision=9).proved
    assert not (agent.run / "dax0.1").exists()
    given_back(fm)


def test_what_was_not_announced_is_refused_with_the_reason(agent: Agent, fm: Client) -> None:
    agent.orchestrator.want(Desired(T2, 1, "attached", "z1", B))
    agent.orchestrator.hears("expected", T2)
    assert fm.add(0, T1, 2) == 0
    seen = agent.orchestrator.hears("refused", revision=0)
    refusal = agent.run / "refused" / T1
    wait_until(refusal.exists, "no sentence for those who wait for the tag")
    assert refusal.read_text() == f"{seen.reason}\n"
    assert "not announced within 0.3 s" in seen.reason
    assert fm.add(0, T2, 2) == 0
    seen = agent.orchestrator.hears("refused", T2)
    assert seen.reason == f"size must be {B} bytes as announced, offered {2 * B}"
    given_back(fm)
    given_back(fm, T2)


@pytest.mark.parametrize("killed", [False, True])
def test_a_holder_is_named_and_nothing_is_returned_until_it_lets_go(
    agent: Agent, fm: Client, killed: bool
) -> None:
    agent.attach()
    assert fm.add(0, T1, 2) == 0
    path = agent.orchestrator.hears("attached").dax_path
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        agent.release()
        seen = agent.orchestrator.hears("releasing", rung="detach")
        while not seen.holders:
            seen = agent.orchestrator.hears("releasing")
        assert [holder.pid for holder in seen.holders] == [os.getpid()]
        if killed:
            agent.kill()
            agent.start()
            seen = agent.orchestrator.hears("releasing")
            while not seen.holders:
                seen = agent.orchestrator.hears("releasing")
        assert len(fm.lists()[0].extents) == 1
        memory[:5] = b"alive"
    assert agent.orchestrator.hears("released").proved
    given_back(fm)


@pytest.mark.parametrize("killed", [False, True])
def test_a_workload_runs_once_is_adopted_and_is_stopped_by_force(
    agent: Agent, fm: Client, killed: bool
) -> None:
    script = f"{STUBBORN} < $TAGMEM_DAX"
    agent.attach(workload=Workload("w1", ("/bin/sh", "-c", script)))
    assert fm.add(0, T1, 2) == 0
    seen = agent.orchestrator.hears("attached")
    while seen.workload is None or seen.workload.state != "running":
        seen = agent.orchestrator.hears("attached")
    pid = seen.workload.pid
    log = Path(seen.workload.log_path)
    wait_until(lambda: log.read_text() == "up\n", "the workload has not said that it is up")
    if killed:
        agent.kill()
        agent.start()
        seen = agent.orchestrator.hears("attached")
        assert seen.workload is not None
        assert (seen.workload.state, seen.workload.pid) == ("running", pid)
    agent.release(deadlines_ns={"ask": 200_000_000, "stop": 5_000_000_000})
    agent.orchestrator.hears("releasing", rung="ask")
    agent.orchestrator.hears("releasing", rung="stop")
    seen = agent.orchestrator.hears("released")
    assert seen.proved
    assert seen.workload is not None
    assert (seen.workload.state, seen.workload.exit_code) == ("exited", 137)
    assert log.read_text() == "up\n", "it was started once"
    given_back(fm)


def test_capacity_taken_by_force_ends_its_workload(agent: Agent, fm: Client) -> None:
    agent.attach(workload=Workload("w1", ("/bin/sh", "-c", STUBBORN)))
    assert fm.add(0, T1, 2) == 0
    agent.orchestrator.hears("attached")
    assert fm.release(0, T1, 2, forced=True) == 0
    seen = agent.orchestrator.hears("released")
    assert seen.proved
    assert "by force" in seen.reason
    assert not list(agent.run.glob("dax*"))


def test_what_is_held_and_not_wanted_is_told_and_kept(agent: Agent, fm: Client) -> None:
    agent.attach()
    assert fm.add(0, T1, 2) == 0
    agent.orchestrator.hears("attached")
    agent.kill()
    shutil.rmtree(agent.config.parent / "agent-w1")
    agent.orchestrator.wanted.clear()
    agent.start()
    seen = agent.orchestrator.hears("attached", revision=0)
    assert Path(seen.dax_path).exists()
    assert len(fm.lists()[0].extents) == 1


def test_the_appliance_may_die_while_a_tag_is_given_back(
    agent: Agent, appliance: Appliance, fm: Client
) -> None:
    agent.attach()
    assert fm.add(0, T1, 2) == 0
    agent.orchestrator.hears("attached")
    appliance.kill()
    agent.release()
    seen = agent.orchestrator.hears("releasing")
    while "is not connected" not in seen.reason:
        seen = agent.orchestrator.hears("releasing")
    appliance.start()
    assert agent.orchestrator.hears("released").proved
    given_back(appliance.client("fm"))


def test_a_read_only_sharer_sees_the_same_bytes_and_cannot_write(
    root: Path, agent: Agent, fm: Client
) -> None:
    agent.attach(blocks=1, shared=True)
    assert fm.add(0, T1, 1, region=1) == 0
    path = Path(agent.orchestrator.hears("attached").dax_path)
    with path.open("r+b") as file:
        file.write(b"published")
    other = Agent(root, "w2", 1)
    other.start()
    try:
        other.attach(blocks=1, shared=True, read_only=True)
        assert fm.share(1, T1, 2) == 0
        seen = Path(other.orchestrator.hears("attached").dax_path)
        assert seen.read_bytes()[:9] == b"published"
        with pytest.raises(OSError, match="Read-only"):
            seen.open("r+b")
        other.release(blocks=1, shared=True)
        assert other.orchestrator.hears("released").proved
    finally:
        other.close()


@pytest.mark.parametrize("killed", [False, True])
def test_bytes_come_as_a_descriptor_where_no_directory_is_shared(
    root: Path, appliance: Appliance, killed: bool
) -> None:
    fm = appliance.client("fm")
    agent = Agent(root, linked=False)
    agent.start()
    try:
        agent.attach()
        assert fm.add(0, T1, 2) == 0
        path = agent.orchestrator.hears("attached").dax_path
        with open(path, "r+b"):
            agent.release()
            seen = agent.orchestrator.hears("releasing", rung="detach")
            while not seen.holders:
                seen = agent.orchestrator.hears("releasing")
            assert [holder.how for holder in seen.holders] == ["open"]
            if killed:
                # Without its appliance an agent that has forgotten cannot know where bytes are.
                agent.kill()
                appliance.kill()
                agent.start()
                seen = agent.orchestrator.hears("releasing")
                while "not connected" not in seen.reason:
                    seen = agent.orchestrator.hears("releasing")
                appliance.start()
                fm = appliance.client("fm")
                while not seen.holders:
                    seen = agent.orchestrator.hears("releasing")
                assert [holder.how for holder in seen.holders] == ["open"]
        assert agent.orchestrator.hears("released").proved
        given_back(fm)
    finally:
        agent.close()


def test_without_a_file_per_tag_there_is_a_device_without_a_path(root: Path) -> None:
    (root / "media").mkdir()
    appliance = Appliance(root, root / "media", "by-dpa")
    appliance.start()
    agent = Agent(root)
    agent.start()
    try:
        fm = appliance.client("fm")
        agent.attach()
        assert fm.add(0, T1, 2) == 0
        seen = agent.orchestrator.hears("attached")
        assert (Path(seen.dax_path) / "extents").read_text().startswith('[{"offset":')
        agent.release()
        assert agent.orchestrator.hears("released").proved
        given_back(fm)
    finally:
        agent.close()
        appliance.close()
