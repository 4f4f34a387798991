"""A guest agent on recorded trees, real processes and a socket, driven turn by turn in the test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.unit.guest import trees

from tagmem.guest.agent import Agent, Options
from tagmem.guest.find import Roots
from tagmem.guest.system import System
from tagmem.io.holders import Holding, Proof, Prover, Target
from tagmem.wire import guest as w
from tagmem.wire.guest_session import HostSession

DEADLINE_SECONDS = 10.0
HOLD = """
import mmap, os, signal, sys
path, deaf = sys.argv[1:]
if deaf == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
fd = os.open(path, os.O_RDWR)
kept = mmap.mmap(fd, 4096)
os.close(fd)
print("ready", flush=True)
signal.pause()
"""


def _readable(pid: str) -> bool:
    try:
        os.listdir(f"/proc/{pid}/fd")
        Path(f"/proc/{pid}/maps").read_bytes()
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return False
    return True


class ReadableProver(Prover):
    """The real one, on the processes that this user may read: not all, on some machines."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), threads=True)
        self._folder = folder
        self._judged: set[str] = set()
        folder.mkdir()

    def _refresh(self) -> None:
        alive = {name for name in os.listdir("/proc") if name.isdecimal()}
        for name in self._judged ^ alive:
            link = self._folder / name
            if name not in alive:
                link.unlink(missing_ok=True)
            elif _readable(name):
                link.symlink_to(f"/proc/{name}")
        self._judged = alive

    def check(self, targets: Sequence[Target]) -> dict[str, Proof]:
        self._refresh()
        return super().check(targets)

    def kill(
        self, target: Target, number: int = 9, only: Callable[[int], bool] = lambda _: True
    ) -> tuple[Holding, ...]:
        self._refresh()
        return super().kill(target, number, only)


class FakeSystem(System):
    """A kernel whose slots empty the recorded tree."""

    def __init__(self, roots: Roots, base: Path) -> None:
        super().__init__(roots)
        self._base = base
        self.boot = "boot-1"
        self.ejected: list[str] = []
        self.claimed: list[tuple[str, str]] = []
        self.rebound: list[str] = []
        self.ended: list[str] = []
        self.refusal = ""

    def identity(self) -> tuple[str, str, str]:
        return self.boot, os.urandom(4).hex(), "Linux test"

    def features(self) -> tuple[str, ...]:
        return ("eject", "shutdown")

    def uevents(self) -> socket.socket | None:
        return None

    def eject(self, memory: w.Memory, done: Callable[[str], None]) -> None:
        self.ejected.append(memory.slot or memory.name)
        if not self.refusal and memory.name.startswith("dax"):
            trees.unplug(self._base, memory.name)
        elif not self.refusal:
            os.unlink(memory.path)
        done(self.refusal)

    def eject_slot(self, slot: str, done: Callable[[str], None]) -> None:
        self.ejected.append(slot)
        done(self.refusal)

    def claim(self, name: str, driver: str) -> None:
        self.claimed.append((name, driver))
        trees.bind(self._base, name)

    def rebind(self, namespace: str) -> None:
        self.rebound.append(namespace)
        trees.unplug_namespace(self._base, namespace)
        trees.plug(self._base, "pmem")

    def end(self, how: str) -> None:
        self.ended.append(how)


class World:
    """One guest, its agent, and a host that talks to it."""

    def __init__(self, base: Path, **options: Any) -> None:
        self.base = base
        self.roots = trees.roots_in(base)
        self._options = {"hand_back_seconds": 0.05} | options
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(base / "host.sock"))
        self.listening.listen()
        self.listening.setblocking(False)
        self.link: socket.socket | None = None
        self.session = HostSession(100)
        self.heard: list[Any] = []
        self.system = FakeSystem(self.roots, base)
        self._prover = ReadableProver(base / "proc")
        self.children: list[subprocess.Popen[str]] = []
        self.agent = self.start()

    def start(self) -> Agent:
        """A new agent, as after a crash of the one before."""
        options = Options(f"unix:{self.base}/host.sock", self.roots, **self._options)
        return Agent(options, self.system, self._prover)

    def restart(self) -> None:
        """The agent dies and comes again; the host's end of the port stays what it is."""
        self.agent.close()
        self.agent = self.start()
        self.agent.adopt()

    def send(self, request: w.Request) -> int:
        number, data = self.session.request(request)
        self.until(lambda: self.link is not None)
        assert self.link is not None
        self.link.sendall(data)
        return number

    def until(self, true: Callable[[], object]) -> None:
        """Let the agent turn until something is so."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not true():
            assert time.monotonic() < deadline, f"not in time; heard {self.heard[-5:]}"
            self.turn()

    def turn(self) -> None:
        self.agent.turn(0.005)
        if self.link is None:
            try:
                self.link, _ = self.listening.accept()
            except BlockingIOError:
                return
            self.link.setblocking(False)
        try:
            data = self.link.recv(1 << 20)
        except (BlockingIOError, ConnectionResetError):
            return
        if data:
            self.heard += self.session.feed(data)

    def answers(self, number: int) -> list[Any]:
        return [answer for answer in self.heard if answer.id == number]

    def ask(self, request: w.Request) -> Any:
        """The answer that ends a request."""
        number = self.send(request)
        self.until(lambda: number not in self.session.outstanding)
        return self.answers(number)[-1]

    def told(self, kind: type[Any]) -> list[Any]:
        """What came unasked, of one kind."""
        return [event for event in self.heard if isinstance(event, kind) and event.id == 0]

    def hang_up(self) -> None:
        """The host's agent dies; the next one connects anew."""
        assert self.link is not None
        self.link.close()
        self.link = None

    def hold(self, path: str, deaf: str = "") -> subprocess.Popen[str]:
        """A process of somebody else's that maps a device."""
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, path, deaf],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def by_tag(self) -> list[str]:
        """The names that applications find."""
        return sorted(os.listdir(f"{self.roots.run}/by-tag"))

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        self.agent.close()
        if self.link is not None:
            self.link.close()
        self.listening.close()
