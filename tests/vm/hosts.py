"""Two hosts' hypervisors on one machine, with one appliance's media, as the migration suite uses
them: whoever has a tag has a link of its own to the same file.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from tests.vm.waiting import until

from tagmem.appliance.media import ByTagMedia
from tagmem.base.errors import NotFound
from tagmem.base.units import MIB, Bytes
from tagmem.io import stream
from tagmem.ports import HostTag, MediaPiece
from tagmem.presenter import apart
from tagmem.presenter.brokerlink import BrokerLink
from tagmem.presenter.host import Hypervisor
from tagmem.presenter.house import Site
from tagmem.programs import machine_parts

T = TypeVar("T")

HEAD_BYTES = 2 * MIB
SIZE = 64 * MIB
RAM_BYTES = 512 * MIB

SITES = {
    "w1": Site("this machine"),
    "w2": Site("this machine"),
    "far": Site("another machine", "127.0.0.1"),
    "closed": Site("a machine with no address"),
}

# Counts in the tag for as long as it lives, in a session of its own; its number is told.
COUNT = """
import mmap, os, sys, time
ready, told = os.pipe()
if os.fork():
    os.write(1, os.read(ready, 16))
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for fd in 0, 1, 2:
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2]))
os.write(told, str(os.getpid()).encode())
number = 0
while True:
    number += 1
    memory[0:8] = number.to_bytes(8, "little")
    time.sleep(0.002)
"""


class Host:
    """One host: its hypervisor, what it keeps, its links to the tags that it has."""

    def __init__(self, pair: Pair, name: str, site: Site) -> None:
        self.pair = pair
        self.name = name
        self.site = site
        self.links = pair.folder / f"{name}-tags"
        self.run = pair.folder / name
        self.run.mkdir()
        self.kept: dict[str, str] = {}
        self.tags: dict[str, Bytes] = {}
        self.told: list[Mapping[str, Any]] = []
        self.brokers: list[subprocess.Popen[bytes]] = []
        self.hypervisor = self._made()

    def _made(self) -> Hypervisor:
        windows = self.run / "windows"
        windows.mkdir(mode=0o700, exist_ok=True)

        def spawn() -> subprocess.Popen[bytes]:
            line = (sys.executable, "-m", "tagmem", "broker", str(windows))
            started = apart.start(line, str(windows / "log"))
            self.brokers.append(started)
            return started

        link = BrokerLink(windows, stream.connect, spawn)
        return Hypervisor(
            self.run, self._keep, self._tag, link, machine_parts, self, site=self.site
        )

    async def _keep(self, key: str, document: str | None) -> None:
        if document is None:
            self.kept.pop(key, None)
        else:
            self.kept[key] = document

    def _tag(self, tag: str) -> HostTag:
        if tag not in self.tags:
            raise NotFound(f"tag {tag} is not attached to this host")
        size, path = self.tags[tag], str(self.links / tag)
        return HostTag(
            tag,
            size,
            path,
            (MediaPiece(HEAD_BYTES, size),),
            read_only=False,
            shared=False,
            dead_end=True,
            head_room_bytes=HEAD_BYTES,
        )

    async def call(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """`ports.Peers`: the other one, unless the way there is broken."""
        await self.pair.before_call(host, request)
        if host not in self.pair.hosts:
            raise NotFound(f"no host {host}")
        answer = await self.pair.hosts[host].hypervisor.serve(self.name, request)
        await self.pair.after_call(host, request)
        return answer

    async def ask(self, verb: str, **body: Any) -> Mapping[str, Any]:
        return await self.hypervisor.call({"vm": verb, **body}, self.told.append)

    async def restart(self) -> None:
        """The agent is killed and comes again: what it kept is all that it knows."""
        await self.hypervisor.close()
        self.hypervisor = self._made()
        await self.hypervisor.restore(dict(self.kept))

    def have(self, tag: str, size: Bytes) -> None:
        self.pair.media.expose(tag, str(self.links))
        self.tags[tag] = size

    async def python(self, name: str, code: str, *words: object) -> str:
        """What a piece of Python prints in a guest."""
        said = bytearray()

        def keep(told: Mapping[str, Any]) -> None:
            said.extend(base64.b64decode(told["data"]))

        argv = ["python3", "-c", code, *map(str, words)]
        ended = await self.hypervisor.call({"vm": "exec", "name": name, "argv": argv}, keep)
        assert ended["exit_code"] == 0, said.decode()
        return said.decode().strip()

    async def vms(self) -> dict[str, dict[str, Any]]:
        return {vm["name"]: vm for vm in (await self.ask("list"))["vms"]}

    async def gone(self, name: str) -> None:
        """The hypervisor has seen the end of a VM."""
        await until(lambda: f"vm/{name}" not in self.kept)
        assert name not in await self.vms()

    def phases(self) -> list[str]:
        """What a migration from here has told so far."""
        return [str(line["phase"]) for line in self.told if "phase" in line]


class Pair:
    """Hosts w1 and w2 on one machine, and two on others."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self.folder = Path(tempfile.mkdtemp(prefix="tagmem-move-", dir="/dev/shm"))
        places = [str(self.folder / f"{name}-tags") for name in SITES]
        self.media = ByTagMedia(self.folder, places, head_bytes=HEAD_BYTES)
        self.hosts: dict[str, Host] = {}
        self.before: Callable[[str, Mapping[str, Any]], Coroutine[Any, Any, None]] | None = None
        self.after: Callable[[str, Mapping[str, Any]], Coroutine[Any, Any, None]] | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    async def boot(self) -> None:
        for name, site in SITES.items():
            self.hosts[name] = Host(self, name, site)

    async def before_call(self, host: str, request: Mapping[str, Any]) -> None:
        if self.before is not None:
            await self.before(host, request)

    async def after_call(self, host: str, request: Mapping[str, Any]) -> None:
        if self.after is not None:
            await self.after(host, request)

    async def end(self) -> None:
        for host in self.hosts.values():
            for name, vm in (await host.vms()).items():
                if vm["pid"]:
                    with suppress(ProcessLookupError):
                        os.kill(vm["pid"], signal.SIGKILL)
                    await host.gone(name)
            await host.hypervisor.close()
            for broker in host.brokers:
                broker.terminate()
                broker.wait()
        self.media.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- tags and VMs

    def tag(self, *hosts: str, size: Bytes = SIZE) -> str:
        made = str(uuid4())
        self.media.create(made, 0, self.media.positions([(0, size, 0)]))
        for name in hosts:
            self.hosts[name].have(made, size)
        return made

    def write(self, tag: str, at: int, data: bytes) -> None:
        with (self.hosts["w1"].links / tag).open("r+b", buffering=0) as file:
            file.seek(HEAD_BYTES + at)
            file.write(data)

    def read(self, tag: str, at: int, count: int) -> bytes:
        with (self.hosts["w1"].links / tag).open("rb", buffering=0) as file:
            file.seek(HEAD_BYTES + at)
            return file.read(count)

    def count(self, tag: str) -> int:
        return int.from_bytes(self.read(tag, 0, 8), "little")

    async def counts(self, tag: str) -> None:
        """Whoever counts in the tag goes on doing so."""
        seen = self.count(tag)
        await until(lambda: self.count(tag) > seen)


@contextmanager
def pair() -> Iterator[Pair]:
    with asyncio.Runner() as runner:
        made = Pair(runner)
        try:
            runner.run(made.boot())
            yield made
        finally:
            runner.run(made.end())
