"""A guest, an appliance's media and a broker around it: what experiments with presenters run on.

The pieces are the product's own; only the orchestrator is left out, so that what is timed is the
way into the guest and nothing else. What runs in the guest comes over the agent's channel as short
programs of the standard library.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from tagmem.appliance.media import ByDpaMedia, ByTagMedia
from tagmem.base.errors import OutcomeUnknown, TagmemError
from tagmem.base.units import MIB, SECOND, Bytes, Nanoseconds
from tagmem.io import stream
from tagmem.lab.boot import Guest, Lab
from tagmem.lab.errors import GuestDied, LabFailed
from tagmem.lab.spec import GuestSpec, with_cxl
from tagmem.presenter.broker import Broker
from tagmem.presenter.contract import (
    GuestChannel,
    Lent,
    Piece,
    Presentation,
    Presenter,
    Tagged,
    VmFacts,
    Windows,
)
from tagmem.presenter.machine import CxlSpec
from tagmem.presenter.qemu import Vm
from tagmem.wire import guest as wire

log = logging.getLogger(__name__)

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
"""Where files are memory: a disk's speed is not what is measured."""
POOL_BYTES = 2048 * MIB
POOL_STEP_BYTES = 32 * MIB
HEAD_BYTES = 2 * MIB
"""Room for a tag's header in front of its capacity."""
GREET_NS = 90 * SECOND
RUN_NS = 60 * SECOND
TIDY_NS = 20 * SECOND


class Metered:
    """A VM (`contract.Machine`) that notes how long QEMU took for each command."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.commands: list[tuple[str, str, float]] = []
        """Command, the type of what it makes, seconds."""

    async def facts(self) -> VmFacts:
        """See `contract.Machine`; its questions are not counted."""
        return await self._vm.facts()

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """See `contract.Machine`."""
        begun = time.perf_counter()
        try:
            return await self._vm.execute(command, arguments)
        finally:
            what = str(arguments.get("driver") or arguments.get("qom-type") or "")
            self.commands.append((command, what, time.perf_counter() - begun))

    async def deleted(self, device: str, deadline_ns: Nanoseconds) -> bool:
        """See `contract.Machine`."""
        return await self._vm.deleted(device, deadline_ns)

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        """See `contract.Machine`."""
        return await self._vm.holds(paths)

    async def size_of(self, device: str) -> Bytes:
        """See `contract.Machine`."""
        return await self._vm.size_of(device)

    async def wait_gone(self, deadline_ns: Nanoseconds) -> bool:
        """See `contract.Machine`."""
        return await self._vm.wait_gone(deadline_ns)

    async def lend(self, tag: str, lent: Lent | None) -> None:
        """See `contract.Machine`."""
        await self._vm.lend(tag, lent)

    async def stop(self, deadline_ns: Nanoseconds) -> None:
        """See `contract.Machine`."""
        await self._vm.stop(deadline_ns)

    @property
    def guest(self) -> GuestChannel | None:
        """See `contract.Machine`."""
        return self._vm.guest

    @property
    def windows(self) -> Windows | None:
        """See `contract.Machine`."""
        return self._vm.windows


class Program:
    """A program that runs in the guest, and when each of its lines came."""

    def __init__(self, bench: Bench, code: str, arguments: Sequence[object]) -> None:
        self._bench = bench
        self._request = wire.Exec(0, ("python3", "-c", code, *map(str, arguments)))
        self._text = b""
        self._news = asyncio.Event()
        self.lines: list[tuple[float, str]] = []
        """When it came (perf_counter), and the line."""
        self.errors = b""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> int:
        try:
            channel = self._bench.channel
            ended = await channel.stream(self._request, self._said, RUN_NS)
            if not isinstance(ended, wire.Exited):
                raise LabFailed(f"the guest does not run it: {ended!r:.200}")
            return ended.code
        finally:
            self._news.set()

    def _said(self, answer: wire.Answer) -> None:
        if not isinstance(answer, wire.Output):
            return
        if answer.stream == 2:
            self.errors += answer.data
            return
        *whole, self._text = (self._text + answer.data).split(b"\n")
        self.lines += [(time.perf_counter(), line.decode(errors="replace")) for line in whole]
        self._news.set()

    async def line(self, number: int) -> tuple[float, str]:
        """The line of that number, once it is there. Raises LabFailed when it never will be."""
        while len(self.lines) <= number:
            if self._task.done():
                await self._task
                words = self.errors.decode(errors="replace").strip().splitlines()
                raise LabFailed(f"in the guest: {words[-1] if words else 'it ended too early'}")
            self._news.clear()
            await self._news.wait()
        return self.lines[number]

    async def output(self) -> str:
        """Everything that it wrote. Raises LabFailed when it fails."""
        code = await self._task
        if code:
            words = self.errors.decode(errors="replace").strip().splitlines()
            raise LabFailed(f"in the guest: {words[-1] if words else f'exit {code}'}")
        return "\n".join(text for _, text in self.lines)

    async def drop(self) -> None:
        """Wait no longer for it; it ends by itself."""
        self._task.cancel()
        with suppress(asyncio.CancelledError, TagmemError):
            await self._task


class Bench:
    """One booted guest and everything around it."""

    def __init__(self, lab: Lab, spec: GuestSpec, *, cxl_ports: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tagmem-lab-", dir=MEMORY))
        self.host = self.folder / "host"
        self.media = ByTagMedia(self.folder, [str(self.host)], head_bytes=HEAD_BYTES)
        self.pool = self.folder / "pool" / "media" / "pool0"
        """Of media by DPA, where the guest has a window of them."""
        self._next_dpa = 0
        if cxl_ports:
            pool = ByDpaMedia(self.folder / "pool", [], {0: POOL_BYTES})
            pool.renew()
            pool.close()
            spec = with_cxl(spec, CxlSpec(cxl_ports, str(self.pool), POOL_BYTES))
        self.guest: Guest = lab.guest(spec)
        self.broker: Broker | None = None
        self._vm: Vm | None = None

    @property
    def vm(self) -> Vm:
        """Raises LabFailed before it was booted."""
        if self._vm is None:
            raise LabFailed("the guest was not booted")
        return self._vm

    @property
    def channel(self) -> Any:
        """The way to the guest's agent."""
        channel = self.vm.guest
        if channel is None:
            raise LabFailed("the guest has no agent")
        return channel

    async def boot(self) -> wire.Hello:
        """Start the guest, wait for its agent. Raises LabFailed, OutcomeUnknown."""
        await self.guest.start()
        self.broker = Broker(stream, self.folder)
        name = self.guest.spec.name
        self._vm = await Vm.adopt(
            name,
            str(self.guest.places.qmp),
            pid=self.guest.pid,
            agent_path=str(self.guest.places.agent),
            windows=self.broker.windows(name),
        )
        hello: wire.Hello = await self.channel.greeted(GREET_NS)
        return hello

    async def end(self) -> None:
        """End the guest, and remove everything of it."""
        if self._vm is not None:
            await self._vm.close()
        await self.guest.stop()
        if self.broker is not None:
            self.broker.close()
        self.guest.remove_logs()
        self.media.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- tags

    def make(self, size: Bytes, *, loaded: bool = True) -> Tagged:
        """A tag as a host has it: its file, linked where the appliance exposes it."""
        tag = str(uuid4())
        pieces = self.media.positions([(0, size, 0)])
        self.media.create(tag, 0, pieces)
        self.media.expose(tag, str(self.host))
        path = str(self.host / tag)
        parts = tuple(Piece(path, piece.offset, piece.length) for piece in pieces)
        return Tagged(tag, size, parts, loaded=loaded, dead_end=True, head_room_bytes=HEAD_BYTES)

    def extent(self, size: Bytes) -> Tagged:
        """A tag as a host has it of an appliance with media by DPA: part of a pool's file."""
        at = self._next_dpa
        self._next_dpa += -(-size // POOL_STEP_BYTES) * POOL_STEP_BYTES
        return Tagged(str(uuid4()), size, (Piece(str(self.pool), at, size),))

    def write(self, tagged: Tagged, at: int, data: bytes) -> None:
        """Bytes into the appliance's media."""
        fd = os.open(tagged.pieces[0].path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, tagged.pieces[0].offset + at)
        finally:
            os.close(fd)

    def drop(self, tagged: Tagged) -> None:
        """The tag's file goes, as far as QEMU has let go of it."""
        if tagged.pieces[0].path == str(self.pool):
            return
        self.media.conceal(tagged.tag, str(self.host))
        self.media.drop(tagged.tag, 0)

    async def force_release(self, shown: Presentation) -> None:
        """What QEMU's own schema has for taking an extent by force."""
        piece = shown.tagged.pieces[0]
        arguments = {
            "path": f"/machine/peripheral/{shown.device}",
            "host-id": 0,
            "removal-policy": "prescriptive",
            "forced-removal": True,
            "region": 0,
            "extents": [{"offset": piece.offset, "len": piece.length}],
        }
        await self.vm.execute("cxl-release-dynamic-capacity", arguments)

    async def held(self, shown: Presentation) -> bool:
        """Whether QEMU's process still has the tag's bytes."""
        return bool(await self.vm.holds([shown.tagged.pieces[0].path]))

    # ---- in the guest

    def start(self, code: str, *arguments: object) -> Program:
        """Start a piece of Python in the guest."""
        return Program(self, code, arguments)

    async def python(self, code: str, *arguments: object) -> str:
        """What a piece of Python prints in the guest. Raises LabFailed."""
        return await self.start(code, *arguments).output()

    async def silent(self, code: str, seconds: float) -> None:
        """From when this returns the agent does not answer, for about so many seconds."""
        await self.python(code, seconds)
        for _ in range(80):
            try:
                await self.channel.ask(wire.Find(0), SECOND // 2)
            except OutcomeUnknown:
                return
            await asyncio.sleep(0.1)
        raise LabFailed("the guest's agent answers still")

    async def answering(self) -> None:
        """Wait for the agent to answer (again)."""
        await self.channel.ask(wire.Find(0), RUN_NS)

    async def found(self, shown: Presentation) -> wire.Memory | None:
        """What the guest's agent knows of a tag."""
        answer = await self.channel.ask(wire.Find(0), RUN_NS)
        if not isinstance(answer, wire.Found):
            return None
        return next((m for m in answer.memory if m.tag == shown.tagged.tag), None)

    async def panic(self) -> None:
        """The guest's kernel panics, and stays so."""
        code = "open('/proc/sysrq-trigger', 'w').write('c')"
        with suppress(OutcomeUnknown):
            await self.channel.ask(wire.Exec(0, ("python3", "-c", code)), 2 * SECOND)
        with suppress(GuestDied):
            await self.guest.see(b"Kernel panic", 20)
        if "Kernel panic" not in self.guest.console():
            raise LabFailed("the guest's kernel did not panic")

    # ---- tidying

    async def tidy(self, way: Presenter, left: Sequence[Presentation]) -> list[Presentation]:
        """Take out what experiments left in the VM; what could not be taken out."""
        kept = []
        facts = await self.vm.facts()
        if facts.state == "paused":
            await self.vm.resume()
        for shown in left:
            if shown.device not in facts.devices:
                continue
            try:
                ended = await way.detach(shown, self.vm, deadline_ns=TIDY_NS, force=True)
            except TagmemError as error:
                log.warning("%s is not taken out: %s", shown.device, error)
                kept.append(shown)
                continue
            if not ended.done:
                log.warning("%s is not taken out: %s", shown.device, ended)
            if not ended.done or ended.presentation is not None:
                kept.append(shown)
        return kept
