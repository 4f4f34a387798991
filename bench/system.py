"""Real daemons for the benchmarks: started as anybody would start them, state on a real disk, media
in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.load import ask, connect, request

APPLIANCE = "a0"
BLOCK = 2 << 20
READY_SECONDS = 20.0
POLL_SECONDS = 0.000_5
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
"""Daemons are measured as they run: with their bytecode compiled before."""


class NotReady(Exception):
    """A daemon did not come up in time."""


@contextmanager
def running(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended in order when the block is left."""
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(what: str, ready: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
    """Look until it is so. Raises NotReady."""
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise NotReady(f"{what}: not within {seconds:g} s")
        time.sleep(POLL_SECONDS)


def listens(address: str) -> bool:
    """Whether somebody accepts connections there."""
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own or shared, as `top` shows it."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class System:
    """Directories and configuration files of one orchestrator, one appliance and some hosts."""

    def __init__(
        self, disk: Path, memory: Path, hosts: int, size_bytes: int, *, shared: bool = False
    ) -> None:
        """`shared`: of hardware-coherent media, which every other host sees backwards."""
        self.disk = disk
        self.memory = memory
        self.hosts = tuple(f"h{number}" for number in range(hosts))
        self.size_bytes = size_bytes
        self.shared = shared
        self.api = f"unix:{memory}/api.sock"
        self._write()

    def _write(self) -> None:
        memory, disk = self.memory, self.disk
        links = "".join(
            f"[hosts.{host}]\nlinks = {{ {APPLIANCE} = {ld} }}\n"
            for ld, host in enumerate(self.hosts)
        )
        (disk / "orchestrator.toml").write_text(
            f'state_dir = "{disk}/orchestrator"\nlisten = []\nsocket = "{memory}/api.sock"\n'
            f'[appliances.{APPLIANCE}]\naddress = "unix:{memory}/fm.sock"\n{links}',
            "utf-8",
        )
        ports = "".join(
            f'[[host]]\nname = "{host}"\nsocket = "{memory}/{host}.sock"\n'
            f'directory = "{memory}/exposed/{host}"\n'
            + ('order = "mirrored"\n' if self.shared and ld % 2 else "")
            for ld, host in enumerate(self.hosts)
        )
        (disk / "appliance.toml").write_text(
            f'name = "{APPLIANCE}"\nstate_dir = "{disk}/appliance"\nmedia_dir = "{memory}/media"\n'
            f'fm_socket = "{memory}/fm.sock"\n'
            f"[[region]]\nsize = {self.size_bytes}\nblock_size = {BLOCK}\n"
            + ("sharable = true\nhardware_coherent = true\n" if self.shared else "")
            + ports,
            "utf-8",
        )
        for ld, host in enumerate(self.hosts):
            (disk / f"{host}.toml").write_text(
                f'name = "{host}"\nrun = "{self.run_dir(host)}"\nstate = "{disk}/{host}"\n'
                f'orchestrator = "{self.api}"\n'
                f'[[appliance]]\nname = "{APPLIANCE}"\nsocket = "{memory}/{host}.sock"\nld = {ld}\n'
                f'directory = "{memory}/exposed/{host}"\n',
                "utf-8",
            )

    def run_dir(self, host: str) -> Path:
        return self.memory / "run" / host

    def database(self, daemon: str) -> Path:
        """The file that a daemon commits to; its log lies beside it."""
        names = {"orchestrator": "orchestrator.db", "appliance": "appliance.db"}
        return self.disk / daemon / names.get(daemon, "agent.db")

    def command(self, daemon: str) -> list[str]:
        verb = daemon if daemon in ("orchestrator", "appliance") else "host"
        return [sys.executable, "-m", "tagmem", verb, "--config", str(self.disk / f"{daemon}.toml")]

    def log(self, daemon: str) -> Path:
        return self.disk / f"{daemon}.log"

    def health(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.get("/v1/health"))
        return found

    def get(self, path: str) -> bytes:
        with connect(self.api) as sock:
            return ask(sock, request("GET", path)).body

    def is_ready(self, hosts: int) -> bool:
        """Whether the orchestrator answers, has read the appliance, and has so many agents."""
        if not listens(self.api):
            return False
        health = self.health()
        return health["status"] == "ok" and health["hosts_connected"] == hosts

    def said(self) -> str:
        """The end of what each daemon has logged."""
        return "\n".join(log.read_text("utf-8")[-2_000:] for log in self.disk.glob("*.log"))

    @contextmanager
    def started(self, *, agents: bool = True) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
        """The daemons, connected to one another; their processes by name."""
        hosts = self.hosts if agents else ()
        with ExitStack() as stack:
            processes = {}
            for daemon in ("appliance", "orchestrator", *hosts):
                argv = self.command(daemon)
                processes[daemon] = stack.enter_context(running(argv, self.log(daemon)))
            try:
                wait_for("the system", lambda: self.is_ready(len(hosts)))
            except NotReady:
                print(self.said())
                raise
            yield processes


@contextmanager
def system(hosts: int, size_bytes: int, *, shared: bool = False) -> Iterator[System]:
    """A fresh system's directories; nothing is started yet."""
    with (
        tempfile.TemporaryDirectory(prefix="tagmem-bench-") as disk,
        tempfile.TemporaryDirectory(prefix="tagmem-bench-", dir="/dev/shm") as memory,
    ):
        yield System(Path(disk), Path(memory), hosts, size_bytes, shared=shared)


@contextmanager
def floor_server() -> Iterator[str]:
    """The address of a server that is durable and does nothing else."""
    with (
        tempfile.TemporaryDirectory(prefix="tagmem-bench-") as disk,
        tempfile.TemporaryDirectory(prefix="tagmem-bench-", dir="/dev/shm") as memory,
    ):
        argv = [sys.executable, "-m", "bench.floor_server", f"{memory}/sock", f"{disk}/log"]
        with running(argv, Path(disk) / "floor.log"):
            wait_for("the floor's server", lambda: listens(f"unix:{memory}/sock"))
            yield f"unix:{memory}/sock"
