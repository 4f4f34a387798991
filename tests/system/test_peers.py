"""Calls between hosts with real processes: an orchestrator, a host's agent, and another's that the
test plays. Stopped and killed while it is asked.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.system.appliance_client import Appliance
from tests.system.test_orchestrator import Orchestrator, appliance, root
from tests.system.waiting import SECONDS, wait_until
from websockets.sync.client import ClientConnection

from tagmem.base.limits import PEER_CALLS_MAX
from tagmem.wire.agentapi import PeerAnswer, PeerCall, SyncDone, decode_to_agent, encode

__all__ = ["appliance", "root"]


class Host:
    """The agent of w2."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "w2.log"
        self.config = root / "w2.toml"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, orchestrator: Orchestrator, accept: str) -> None:
        root = self.root
        self.config.write_text(
            f'name = "w2"\nrun = "{root}/run-w2"\nstate = "{root}/agent-w2"\n'
            f'orchestrator = "unix:{root}/api"\nuse_cgroup = false\n'
            f'[[appliance]]\nname = "z1"\nsocket = "{root}/w2"\nld = 1\n'
            f'directory = "{root}/media/hosts/w2"\n'
            f"[vms]\naccept_migrations = {accept}\n"
        )
        argv = [sys.executable, "-m", "tagmem", "host", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stderr=log)
        wait_until(lambda: connected(orchestrator), "w2 is connected")

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGTERM)
            assert self.process.wait(SECONDS) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


def connected(orchestrator: Orchestrator, host: str = "w2") -> bool:
    return bool(orchestrator.ask("GET", f"/v1/hosts/{host}")[1]["connected"])


@pytest.fixture
def host(root: Path) -> Iterator[Host]:
    made = Host(root)
    yield made
    made.close()


@pytest.fixture
def orchestrator(root: Path, appliance: Appliance) -> Iterator[Orchestrator]:
    made = Orchestrator(root)
    made.start()
    yield made
    made.close()


def synced(session: ClientConnection) -> None:
    while not isinstance(message := decode_to_agent(session.recv(SECONDS)), SyncDone):
        pass
    assert message.peer_calls


def send(session: ClientConnection, number: int, request: Any, host: str = "w2") -> None:
    call = PeerCall(number, host, msgspec.Raw(msgspec.json.encode(request)))
    session.send(encode(call).decode())


def answer(session: ClientConnection) -> PeerAnswer:
    message = decode_to_agent(session.recv(SECONDS))
    assert isinstance(message, PeerAnswer), message
    return message


def test_a_host_answers_another_through_the_orchestrator(
    orchestrator: Orchestrator, host: Host
) -> None:
    with orchestrator.agent() as session:
        synced(session)
        send(session, 1, {"vm": "nothing"})
        assert "no agent of a host w2 is connected" in answer(session).error
        host.start(orchestrator, '["w1"]')
        send(session, 2, {"vm": "nothing"})
        told = answer(session)
        assert (told.id, told.kind) == (2, "invalid")
        assert "vm: must be one of look, incoming" in told.error


def test_a_host_that_dies_while_it_is_asked_leaves_an_unknown_outcome(
    orchestrator: Orchestrator, host: Host
) -> None:
    host.start(orchestrator, "true")
    with orchestrator.agent() as session:
        synced(session)
        host.send(signal.SIGSTOP)
        for number in range(PEER_CALLS_MAX + 1):
            send(session, number, {"vm": "nothing"})
        assert answer(session).kind == "conflict"
        host.send(signal.SIGKILL)
        told = [answer(session) for _ in range(PEER_CALLS_MAX)]
        assert [each.kind for each in told] == ["unknown"] * PEER_CALLS_MAX
        wait_until(lambda: not connected(orchestrator), "w2 is gone")
        host.start(orchestrator, "true")
        send(session, 50, {"vm": "nothing"})
        assert answer(session).kind == "invalid"


def test_a_host_is_asked_by_nobody_unless_it_says_so(
    orchestrator: Orchestrator, host: Host
) -> None:
    host.start(orchestrator, "false")
    with orchestrator.agent() as session:
        synced(session)
        send(session, 1, {"vm": "nothing"})
        told = answer(session)
        assert told.kind == "unsupported"
        assert "accept_migrations" in told.error
