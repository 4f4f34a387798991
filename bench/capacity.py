"""Time to capacity: from the request to mapped bytes, against the bare cost of what must happen for
it.

The floor makes the same commits (as many writes of the same sizes, each with its fdatasync, counted
in the daemons' own logs), the same round trips over a socket to another process, and opens and maps
a file.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tagmem
from bench.load import Unexpected, ask, connect
from bench.measure import interleave, quantile
from bench.placement import tag_of
from bench.report import Figure, Report, compared, scaled
from bench.system import BLOCK, System, system
from bench.wal import commits
from bench.work import give_back, offer

AIM = 3.0
ROUND_TRIPS = 7
"""Client and orchestrator; 5604h; notification and 0100h at the host; 4802h; notification and 0100h
at the fabric manager; the orchestrator's word to the agent and the agent's report. Two
notifications and
the last pair go one way each, and count as half."""
_MESSAGE = bytes(200)


class Ours:
    """One client of a running system."""

    def __init__(self, ready: System) -> None:
        self._system = ready
        self._host = ready.hosts[0]
        self._sock = connect(ready.api)
        self._number = 1 << 90

    def __call__(self) -> float:
        """Seconds from the request to the first byte written; then everything is given back."""
        self._number += 1
        tag = tag_of(self._number)
        run_dir = self._system.run_dir(self._host)
        begun = time.perf_counter()
        answer = ask(self._sock, offer(tag, self._host))
        with tagmem.open(tag, run_dir=run_dir, timeout=5) as held:
            held.view[0] = 1
            taken = time.perf_counter() - begun
        if answer.status not in (200, 201):
            raise Unexpected(f"{answer.status}: {answer.body[:200]!r}")
        answer = ask(self._sock, give_back(tag))
        if answer.status != 204:
            raise Unexpected(f"{answer.status}: {answer.body[:200]!r}")
        return taken

    def commits(self) -> list[int]:
        """Bytes of each commit between request and mapping, over all daemons."""
        self._number += 1
        tag = tag_of(self._number)
        daemons = ("orchestrator", "appliance", self._host)
        time.sleep(0.1)  # whatever still follows from the last one
        before = {name: len(commits(self._system.database(name))) for name in daemons}
        ask(self._sock, offer(tag, self._host))
        sizes = [
            size
            for name in daemons
            for size in commits(self._system.database(name))[before[name] :]
        ]
        ask(self._sock, give_back(tag))
        return sizes


class Bare:
    """The floor."""

    def __init__(self, directory: Path, sizes: list[int], echo: socket.socket) -> None:
        self._log = os.open(directory / "log", os.O_RDWR | os.O_CREAT, 0o600)
        self._writes = [os.urandom(size) for size in sizes]
        self._echo = echo
        # A log's blocks are there already, as SQLite's are after its first round.
        os.posix_fallocate(self._log, 0, 64 << 20)
        for at in range(0, 64 << 20, 1 << 20):
            os.pwrite(self._log, bytes(1 << 20), at)
        os.fsync(self._log)
        self._at = 0

    def __call__(self) -> float:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            os.ftruncate(file.fileno(), BLOCK)
            begun = time.perf_counter()
            for data in self._writes:
                os.pwrite(self._log, data, self._at)
                os.fdatasync(self._log)
                self._at = (self._at + len(data)) % (60 << 20)
            for _ in range(ROUND_TRIPS):
                self._echo.sendall(_MESSAGE)
                self._echo.recv(4096)
            fd = os.open(file.name, os.O_RDWR)
            mapping = mmap.mmap(fd, BLOCK)
            os.close(fd)
            mapping[0] = 1
            taken = time.perf_counter() - begun
            mapping.close()
        return taken


@contextmanager
def _echo() -> Iterator[socket.socket]:
    """A socket to a process that sends back what it gets."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        while data := there.recv(4096):
            there.sendall(data)
        os._exit(0)
    there.close()
    try:
        yield here
    finally:
        here.close()
        os.waitpid(child, 0)


def run(*, quick: bool) -> Report:
    with (
        system(1, 4 << 30) as ready,
        _echo() as echo,
        ready.started(),
        tempfile.TemporaryDirectory(prefix="tagmem-bench-") as name,
    ):
        ours = Ours(ready)
        for _ in range(20):
            ours()
        counted = sorted(
            (ours.commits() for _ in range(11)), key=lambda sizes: (len(sizes), sum(sizes))
        )
        sizes = counted[len(counted) // 2]
        bare = Bare(Path(name), sizes, echo)
        bare()
        both = interleave(ours, bare, 30 if quick else 400)
    ratio = both.ratio.median
    p99 = (quantile(both.ours.values, 0.99), quantile(both.floor.values, 0.99))
    figures = (
        compared("request to mapped, p50", both, "s", f"p50 within {AIM:g} times", ratio <= AIM),
        Figure(
            "request to mapped, p99",
            scaled(p99[0], "s"),
            scaled(p99[1], "s"),
            f"{p99[0] / p99[1]:.2f}",
        ),
    )
    about = (
        f"One client, one host, {BLOCK >> 20} MiB. The floor is {len(sizes)} commits of "
        f"{scaled(sum(sizes), 'B')} together, one after the other, {ROUND_TRIPS} round trips to "
        "another process, and open, mmap and the first byte."
    )
    return Report("capacity", about, figures)
