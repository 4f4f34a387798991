"""What a daemon says when it cannot start: which key, path or port, and never a traceback.

Real processes, because what counts is the exit code and the last words that a person sees.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.system.waiting import wait_until

ORCHESTRATOR = """\
listen = "127.0.0.1:{port}"
state_dir = "{root}/state"
"""
HOST = """\
name = "w1"
run = "{root}/run"
state = "{root}/state"
orchestrator = "unix:{root}/api"

[[appliance]]
name = "a0"
ld = 0
socket = "{root}/w1"
"""
APPLIANCE = """\
name = "a0"
state_dir = "{root}/state"
media_dir = "{root}/media"
fm_socket = "{root}/fm"

[[region]]
size = "4MiB"

[[host]]
name = "w1"
socket = "{root}/w1"
"""
DAEMONS = {"orchestrator": ORCHESTRATOR, "host": HOST, "appliance": APPLIANCE}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Daemon:
    """One kind of daemon with its configuration in a folder of its own."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind, self.port = root, kind, free_port()
        self.config = root / f"{kind}.toml"
        self.write(DAEMONS[kind].format(root=root, port=self.port))
        self._running: list[subprocess.Popen[bytes]] = []

    def write(self, text: str) -> None:
        self.config.write_text(text)

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.write(text.replace(old, new))

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tagmem", self.kind, "--config", str(self.config)]

    def start(self) -> None:
        process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        self._running.append(process)
        state = self.root / "state"
        wait_until(lambda: any(state.glob("*.db")), f"{self.kind} opens its database")

    def refused(self) -> str:
        """Start one that must not run; its last words."""
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode > 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def close(self) -> None:
        for process in self._running:
            process.terminate()
            process.wait(20)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[str], Daemon]]:
    made: list[Daemon] = []

    def make(kind: str) -> Daemon:
        made.append(Daemon(tmp_path, kind))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("kind", DAEMONS)
def test_an_unknown_key_is_named(kind: str, daemon: Callable[[str], Daemon]) -> None:
    one = daemon(kind)
    one.write("colour = 7\n" + one.config.read_text())
    said = one.refused()
    assert "colour" in said
    assert one.config.name in said
    assert not (one.root / "state").exists()


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_state_directory_in_use_names_the_process(
    kind: str, daemon: Callable[[str], Daemon]
) -> None:
    one = daemon(kind)
    one.start()
    said = one.refused()
    assert re.search(r"in use by process \d+", said)
    assert str(one.root / "state") in said


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_state_directory_that_cannot_be_written_is_named(
    kind: str, daemon: Callable[[str], Daemon]
) -> None:
    """Not even by root: /proc takes no new files."""
    one = daemon(kind)
    one.change(f'"{one.root}/state"', '"/proc/tagmem-state"')
    assert "/proc/tagmem-state" in one.refused()


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_state_directory_that_is_a_file_is_named(
    kind: str, daemon: Callable[[str], Daemon]
) -> None:
    one = daemon(kind)
    (one.root / "state").write_text("here already")
    assert str(one.root / "state") in one.refused()
    assert (one.root / "state").read_text() == "here already"


def test_a_port_in_use_is_named(daemon: Callable[[str], Daemon]) -> None:
    one = daemon("orchestrator")
    with socket.socket() as other:
        other.bind(("127.0.0.1", one.port))
        other.listen()
        said = one.refused()
    assert str(one.port) in said
    assert "in use" in said


def test_a_file_that_is_no_database_is_refused_and_left_alone(
    daemon: Callable[[str], Daemon],
) -> None:
    one = daemon("orchestrator")
    database = one.root / "state" / "orchestrator.db"
    database.parent.mkdir()
    database.write_bytes(b"not a database, " * 512)
    assert str(database) in one.refused()
    assert database.read_bytes() == b"not a database, " * 512
