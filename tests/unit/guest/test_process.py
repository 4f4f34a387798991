"""The agent as its own process: options, signals, and the end that the host is told of."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tagmem.base.errors import Conflict
from tagmem.guest.down import down
from tagmem.wire import guest as w
from tagmem.wire.guest_session import HostSession


class Process:
    def __init__(self, base: Path) -> None:
        self.base = base
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(base / "host.sock"))
        self._listening.listen()
        self._listening.settimeout(20)
        self.child = self.start(f"unix:{base}/host.sock")
        self.link, _ = self._listening.accept()
        self.link.settimeout(20)
        self.session = HostSession()

    def start(self, channel: str, folder: str = "run") -> subprocess.Popen[str]:
        run = ("--run-dir", str(self.base / folder))
        return subprocess.Popen(
            [sys.executable, "-m", "tagmem.guest", "--channel", channel, *run],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self, kind: type[Any]) -> Any:
        while True:
            for message in self.session.feed(self.link.recv(65536)):
                if isinstance(message, kind):
                    return message

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.link.close()
        self._listening.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    made.close()


def test_a_guest_that_shuts_down_takes_leave(process: Process) -> None:
    hello = process.hear(w.Hello)
    assert hello.kernel.startswith("Linux ")
    process.child.send_signal(signal.SIGTERM)
    assert process.hear(w.Leaving) == w.Leaving(0, "SIGTERM")
    assert process.child.wait(20) == 0


def test_an_agent_that_is_interrupted_ends_its_commands(process: Process) -> None:
    process.hear(w.Hello)
    _, data = process.session.request(w.Exec(0, ("sleep", "60")))
    process.link.sendall(data)
    started = process.hear(w.Started)
    process.child.send_signal(signal.SIGINT)
    assert process.child.wait(20) == 0
    assert not os.path.exists(f"/proc/{started.pid}")


def test_a_channel_that_cannot_be_is_refused(process: Process) -> None:
    with process.start("nowhere", "other") as child:
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 1
    assert "channel: must be a device path, unix:PATH or vsock[:PORT], got 'nowhere'" in errors


def test_a_guest_is_taken_down_by_name_of_its_run_directory(process: Process) -> None:
    process.hear(w.Hello)
    down(str(process.base / "run"), 20)
    assert process.child.wait(20) == 0
    assert process.hear(w.Leaving) == w.Leaving(0, "SIGTERM")
    down(str(process.base / "run"))


def test_names_that_no_agent_gives_back_are_told(tmp_path: Path) -> None:
    down(str(tmp_path / "none"))
    (tmp_path / "by-tag").mkdir()
    (tmp_path / "by-tag" / "some-tag").touch()
    with pytest.raises(Conflict, match="not given back: some-tag"):
        down(str(tmp_path))


def test_there_is_one_agent_per_run_directory(process: Process) -> None:
    process.hear(w.Hello)
    with process.start("unix:/nowhere") as second:
        _, errors = second.communicate(timeout=20)
    assert second.returncode == 1
    assert f"process {process.child.pid} is the agent" in errors
