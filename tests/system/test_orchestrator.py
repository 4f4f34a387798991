"""The orchestrator as a real process, before a real appliance: start, kill -9, restart, the end.

Hosts' agents are played through their WebSocket; everything else is what a user would start.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.system.appliance_client import Appliance
from tests.system.waiting import SECONDS, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, unix_connect

from tagmem.orchestrator.sessions import MESSAGE_BYTES_MAX
from tagmem.wire.agentapi import Desired, Hello, Observed, SyncDone, decode_to_agent, encode

BLOCK = 2 << 20
T1 = "11111111-2222-3333-4444-000000000001"


def tag_of(number: int) -> str:
    return str(UUID(int=0x4000_8000 << 64 | number))


class Orchestrator:
    """The process; may be killed and started again on the same state."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "api"
        self.config = root / "orchestrator.toml"
        self.config.write_text(
            f'state_dir = "{root}/orchestrator"\nlisten = []\nsocket = "{self.socket}"\n'
            f'[appliances.z1]\naddress = "unix:{root}/fm"\n'
            "[hosts.w1]\nlinks = { z1 = 0 }\n[hosts.w2]\nlinks = { z1 = 1 }\n"
        )
        self.log = root / "orchestrator.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command(self.config), stderr=log)
        wait_until(self.ready, f"z1 is ready; {self.log.read_text()}")

    def ready(self) -> bool:
        try:
            return bool(self.ask("GET", "/v1/health")[1]["appliances"].get("z1") == "ready")
        except OSError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            assert self.kill(signal.SIGTERM) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(SECONDS)
        try:
            connection.sock.connect(str(self.socket))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request over a connection of its own: status and document (None without one)."""
        connection = self.connect()
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            content = None if body is None else json.dumps(body)
            if content is not None:
                given["content-type"] = "application/json"
            connection.request(method, path, content, given)
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data else None
        finally:
            connection.close()

    @contextmanager
    def agent(self, host: str = "w1", ld: int = 0) -> Iterator[ClientConnection]:
        """A session that has said Hello."""
        url = f"ws://localhost/v1/hosts/{host}/session"
        with unix_connect(str(self.socket), url, compression=None) as session:
            session.send(encode(Hello(host, "boot", {"z1": ld})).decode())
            yield session


def command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tagmem", "orchestrator", "--config", str(config), *more]


def refusal(config: Path, *more: str) -> tuple[int, str]:
    """How a start ends that must not succeed."""
    ended = subprocess.run(
        command(config, *more), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return ended.returncode, ended.stderr


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def appliance(root: Path) -> Iterator[Appliance]:
    (root / "media").mkdir()
    made = Appliance(root, root / "media")
    made.start()
    yield made
    made.close()


@pytest.fixture
def orchestrator(root: Path, appliance: Appliance) -> Iterator[Orchestrator]:
    made = Orchestrator(root)
    made.start()
    yield made
    made.close()


def desired(session: ClientConnection) -> list[Desired]:
    """What is said up to SyncDone."""
    heard: list[Desired] = []
    while not isinstance(message := decode_to_agent(session.recv(SECONDS)), SyncDone):
        assert isinstance(message, Desired)
        heard.append(message)
    return heard


def test_what_was_answered_outlives_kill_9(orchestrator: Orchestrator) -> None:
    made: dict[str, Any] = {}

    def reserve(numbers: range) -> None:
        body = json.dumps({"size_bytes": BLOCK})
        headers = {"content-type": "application/json"}
        with closing(orchestrator.connect()) as connection:
            for number in numbers:
                tag = tag_of(number)
                try:
                    connection.request("PUT", f"/v1/capacities/{tag}", body, headers)
                    with connection.getresponse() as response:
                        document = json.loads(response.read())
                except (OSError, http.client.HTTPException):
                    break
                if response.status == 201:
                    made[tag] = document

    clients = [threading.Thread(target=reserve, args=(range(n, 100, 4),)) for n in range(1, 5)]
    for client in clients:
        client.start()
    wait_until(lambda: len(made) >= 8, "some are reserved")
    orchestrator.kill()
    for client in clients:
        client.join()
    orchestrator.start()
    kept = {item["tag"]: item for item in orchestrator.ask("GET", "/v1/capacities")[1]["items"]}
    assert made.items() <= kept.items()
    taken = sum(item["size_bytes"] for item in kept.values())
    shown = orchestrator.ask("GET", "/v1/appliances/z1")[1]
    assert shown["free_bytes"] == shown["size_bytes"] - taken
    # The events of everything that was answered are there, numbered without a gap.
    events = orchestrator.ask("GET", "/v1/events")[1]
    assert [event["id"] for event in events["items"]] == list(range(1, events["last"] + 1))
    created = {e["subject"] for e in events["items"] if e["type"] == "capacity.created"}
    assert created == set(kept)


def test_an_agent_gets_what_concerns_it_and_its_word_counts(orchestrator: Orchestrator) -> None:
    body = {"size_bytes": BLOCK, "hosts": ["w1"]}
    assert orchestrator.ask("PUT", f"/v1/capacities/{T1}", body)[0] == 201
    with orchestrator.agent() as session:
        (wanted,) = desired(session)
        assert (wanted.tag, wanted.goal, wanted.extents) == (T1, "attached", ((0, BLOCK),))
        seen = Observed(T1, wanted.revision, "refused", reason="the moon is full")
        session.send(encode(seen).decode())

        def reason() -> bool:
            shown = orchestrator.ask("GET", f"/v1/capacities/{T1}/attachments/w1")[1]
            return bool(shown["reason"] == "the moon is full")

        wait_until(reason, "the observation is the state")
        assert orchestrator.ask("GET", "/v1/hosts/w1")[1]["connected"] is True
        with orchestrator.agent() as newer:
            assert [each.tag for each in desired(newer)] == [T1]
            with pytest.raises(ConnectionClosed) as closed:
                session.recv(SECONDS)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4001


def test_an_agent_that_talks_nonsense_is_told_so(orchestrator: Orchestrator) -> None:
    with orchestrator.agent("w2", 1) as session:
        desired(session)
        session.send("{")
        with pytest.raises(ConnectionClosed) as closed:
            session.recv(SECONDS)
        received = closed.value.rcvd
        assert received is not None
        assert received.code == 1008
    assert orchestrator.ask("GET", "/v1/health")[0] == 200


def test_an_agent_that_talks_too_much_is_cut_off(orchestrator: Orchestrator) -> None:
    # The reason is 1009, but may not reach a peer that has not finished sending.
    with orchestrator.agent("w2", 1) as session:
        desired(session)
        with suppress(ConnectionClosed):
            session.send("x" * (MESSAGE_BYTES_MAX + 1))
        with pytest.raises(ConnectionClosed) as closed:
            session.recv(SECONDS)
        received = closed.value.rcvd
        assert received is None or received.code == 1009
    assert orchestrator.ask("GET", "/v1/health")[0] == 200


@contextmanager
def events(orchestrator: Orchestrator, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """The event stream."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(orchestrator.connect()) as connection:
        connection.request("GET", "/v1/events", headers={"accept": "text/event-stream", **given})
        with connection.getresponse() as response:
            yield response


def test_a_stream_resumes_over_a_restart(orchestrator: Orchestrator) -> None:
    last = orchestrator.ask("GET", "/v1/events?limit=1")[1]["last"]
    orchestrator.ask("PUT", f"/v1/capacities/{T1}", {"size_bytes": BLOCK})
    orchestrator.kill()
    orchestrator.start()
    numbers: list[int] = []
    with events(orchestrator, last_event_id=str(last)) as stream:
        while (line := stream.readline()) != b"event: capacity.released\n":
            if line.startswith(b"id: "):
                numbers.append(int(line[4:]))
            if line == b"event: capacity.created\n":
                orchestrator.ask("DELETE", f"/v1/capacities/{T1}")
    assert numbers == list(range(last + 1, numbers[-1] + 1))


def test_the_end_is_orderly(orchestrator: Orchestrator) -> None:
    body = json.dumps({"size_bytes": BLOCK, "hosts": ["w1"]})
    headers = {"content-type": "application/json", "prefer": "wait=60"}
    with (
        closing(orchestrator.connect()) as held,
        events(orchestrator) as stream,
        orchestrator.agent() as session,
    ):
        desired(session)
        held.request("PUT", f"/v1/capacities/{T1}", body, headers)
        while stream.readline() != b"event: capacity.created\n":
            pass
        assert isinstance(decode_to_agent(session.recv(SECONDS)), Desired)
        assert orchestrator.kill(signal.SIGTERM) == 0
        # Who waited gets what there is, who listened gets an end, an agent gets a reason.
        answer = held.getresponse()
        assert (answer.status, json.loads(answer.read())["tag"]) == (202, T1)
        stream.read()
        with pytest.raises(ConnectionClosed) as closed:
            session.recv(SECONDS)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code in (1001, 1012)
        assert not orchestrator.socket.exists()


def test_a_second_process_is_turned_away(orchestrator: Orchestrator, root: Path) -> None:
    code, said = refusal(orchestrator.config)
    assert code == 4
    assert said.startswith("tagmem: error: state_dir:")
    assert f"in use by process {orchestrator.process and orchestrator.process.pid}" in said
    other = root / "other.toml"
    other.write_text(f'state_dir = "{root}/other"\nsocket = "{orchestrator.socket}"\nlisten = []\n')
    code, said = refusal(other)
    assert code == 4
    assert said.count("\n") == 1
    assert "the address is in use by another process" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other.write_text(f'state_dir = "{root}/other"\nlisten = "127.0.0.1:{port}"\n')
        code, said = refusal(other)
    assert (code, said.count("\n")) == (4, 1)
    assert f"http://127.0.0.1:{port}" in said
    assert orchestrator.ready()


def test_a_wrong_configuration_is_named(root: Path) -> None:
    config = root / "orchestrator.toml"
    for text, named in [
        ("colour = 1\n", "colour"),
        ("listen = 'nowhere'\n", "listen"),
        ("state_dir = [\n", "TOML"),
        ("[appliances.z1]\naddress = 'tcp:1'\n", "appliances.z1.address"),
        (f"state_dir = '{root}/orchestrator.toml'\nlisten = '127.0.0.1:0'\n", "state_dir"),
    ]:
        config.write_text(text)
        code, said = refusal(config)
        assert (code, said.count("\n")) == (2, 1), said
        assert named in said


def test_a_database_of_something_else_is_left_alone(root: Path) -> None:
    state = root / "state"
    state.mkdir()
    (state / "orchestrator.db").write_bytes(os.urandom(8192))
    before = (state / "orchestrator.db").read_bytes()
    config = root / "orchestrator.toml"
    config.write_text(f"state_dir = '{state}'\nlisten = []\nsocket = '{root}/api'\n")
    code, said = refusal(config)
    assert (code, said.count("\n")) == (6, 1), said
    assert (state / "orchestrator.db").read_bytes() == before
    assert not (root / "api").exists()
