"""A guest, the appliance's media, and the broker, as the presenters' suite uses them.

One loop serves a whole module: it runs while a test runs, which is when anything can happen.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from tagmem.appliance.media import ByTagMedia
from tagmem.base.errors import InvalidInput, OutcomeUnknown
from tagmem.base.units import MIB, SECOND, Bytes
from tagmem.io import stream
from tagmem.lab.boot import Guest, Lab
from tagmem.lab.errors import GuestDied
from tagmem.lab.programs import HOLD, SILENCE
from tagmem.lab.spec import GuestSpec
from tagmem.ports import MediaPiece
from tagmem.presenter.broker import Broker
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import Detached, Need, Piece, Presentation, Request, Tagged, Windows
from tagmem.presenter.header import DATA_AT, HEADER_AT, dax_header
from tagmem.presenter.qemu import Vm
from tagmem.wire import guest as wire

T = TypeVar("T")
Spec = GuestSpec | Callable[[Path], GuestSpec]
"""A guest, or what it is once its folder is known."""

FAILED: list[str] = []
"""What has failed in this session: a guest's logs are kept where something did in its time."""
HEAD_BYTES = 2 * MIB
WAYS = all_presenters()
STAYING = frozenset(
    name for name, way in WAYS.items() if way.describe().removal not in ("host", "guest")
)
"""Those that a guest may keep until its end."""

PEEK = """
import mmap, os, sys
path, size, at, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
fd = os.open(path, os.O_RDWR)
print(mmap.mmap(fd, size)[at:at + count].hex())
"""
POKE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory, at = mmap.mmap(fd, int(sys.argv[2])), int(sys.argv[3])
data = bytes.fromhex(sys.argv[4])
memory[at:at + len(data)] = data
"""


def header(tag: str, size: Bytes) -> tuple[Bytes, bytes]:
    """As the appliance leaves it in front of a tag: nothing where no DAX device could be made."""
    try:
        content = dax_header(tag, DATA_AT + size)
    except InvalidInput:
        content = b""
    return DATA_AT - HEADER_AT, content


class LateSockets:
    """`io.stream`, with which the first requests on so many channels leave half a second late."""

    def __init__(self) -> None:
        self.late = 0

    def listen(self, path: Path | str, accept: Callable[[Any], None]) -> stream.Listener:
        return stream.listen(path, accept)

    def adopt(self, descriptor: int) -> stream.Connection:
        connection = stream.adopt(descriptor)
        if self.late:
            self.late -= 1
            send, loop = connection.send, asyncio.get_running_loop()

            def later(data: bytes, beside: int = -1) -> None:
                loop.call_later(0.5, send, data, beside)
                vars(connection).pop("send", None)

            vars(connection)["send"] = later
        return connection


class World:
    """One booted guest and everything around it."""

    def __init__(self, runner: asyncio.Runner, spec: Spec) -> None:
        self._runner = runner
        self.folder = Path(tempfile.mkdtemp(prefix="tagmem-vm-", dir="/dev/shm"))
        self.host = self.folder / "host"
        self.pool = self.folder / "pool" / "media" / "pool0"
        """Of media by DPA, where the guest has a window of them."""
        self._next_dpa = 0
        self.media = ByTagMedia(self.folder, [str(self.host)], head_bytes=HEAD_BYTES, header=header)
        made = spec if isinstance(spec, GuestSpec) else spec(self.folder)
        self.guest: Guest = Lab().guest(made)
        self.broker: Broker | None = None
        self.sockets = LateSockets()
        self.shown: list[Presentation] = []
        self._vm: Vm | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    @property
    def vm(self) -> Vm:
        assert self._vm is not None
        return self._vm

    @property
    def windows(self) -> Windows:
        assert self.vm.windows is not None
        return self.vm.windows

    async def boot(self) -> None:
        await self.guest.start()
        self.broker = Broker(self.sockets, self.folder)
        self._vm = await Vm.adopt(
            self.guest.spec.name,
            str(self.guest.places.qmp),
            pid=self.guest.pid,
            agent_path=str(self.guest.places.agent),
            windows=self.broker.windows(self.guest.spec.name),
        )
        channel = self.vm.guest
        assert channel is not None
        await channel.greeted(90 * SECOND)

    async def end(self) -> None:
        if self._vm is not None:
            await self._vm.close()
        await self.guest.stop()
        if self.broker is not None:
            self.broker.close()

    def clear(self, *, keep_logs: bool) -> None:
        if keep_logs:
            sys.stderr.write(f"guest {self.guest.spec.name}: {self.guest.where()}\n")
        else:
            self.guest.remove_logs()
        self.media.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def without_agent(self) -> Iterator[None]:
        """The host does not know of the guest's agent."""
        channel, self.vm._channel = self.vm._channel, None
        try:
            yield
        finally:
            self.vm._channel = channel

    # ---- tags

    def make(self, size: Bytes, *, loaded: bool = True, dead_end: bool = True) -> Tagged:
        """A tag as a host has it: its file, linked where the appliance exposes it."""
        tag = str(uuid4())
        pieces = self.media.positions([(0, size, 0)])
        self.media.create(tag, 0, pieces)
        self.media.expose(tag, str(self.host))
        path = str(self.host / tag)
        parts = tuple(Piece(path, piece.offset, piece.length) for piece in pieces)
        return Tagged(
            tag, size, parts, loaded=loaded, dead_end=dead_end, head_room_bytes=HEAD_BYTES
        )

    def extent(self, size: Bytes, *, at: Bytes | None = None) -> Tagged:
        """A tag as a host has it of an appliance with media by DPA: part of a pool's file."""
        if at is None:
            at = self._next_dpa = self._next_dpa + 32 * MIB
        return Tagged(str(uuid4()), size, (Piece(str(self.pool), at, size),))

    def witness(self, tagged: Tagged) -> Path:
        """A second name of the bytes, by which to see what becomes of them."""
        path = self.folder / f"{tagged.tag}.seen"
        os.link(tagged.pieces[0].path, path)
        return path

    def sanitise(self, tagged: Tagged) -> int:
        """Wipe it as the appliance does; bytes that were read back as zero."""
        pieces = tuple(MediaPiece(piece.offset, piece.length) for piece in tagged.pieces)
        wiping = self.media.sanitise(tagged.tag, 0, pieces)
        while True:
            try:
                next(wiping)
            except StopIteration as end:
                return int(end.value.read_back_bytes)

    def write(self, tagged: Tagged, at: int, data: bytes) -> None:
        fd = os.open(tagged.pieces[0].path, os.O_RDWR)
        try:
            os.pwrite(fd, data, tagged.pieces[0].offset + at)
        finally:
            os.close(fd)

    def read(self, tagged: Tagged, at: int, count: int) -> bytes:
        fd = os.open(tagged.pieces[0].path, os.O_RDONLY)
        try:
            return os.pread(fd, count, tagged.pieces[0].offset + at)
        finally:
            os.close(fd)

    # ---- presenting

    def attach(self, way: str, tagged: Tagged, **need: bool) -> Presentation:
        shown = self.run(WAYS[way].attach(Request(tagged, Need(**need)), self.vm))
        self.shown.append(shown)
        return shown

    def tidy(self) -> None:
        """What a test that failed left in the VM goes, so that the next one is judged by itself."""
        left, self.shown = self.shown, []
        if self.vm.gone:
            return
        facts = self.run(self.vm.facts())
        if facts.state == "paused":
            self.run(self.vm.resume())
        for shown in left:
            if shown.device in facts.devices and shown.presenter not in STAYING:
                self.detach(shown, seconds=20, force=True)

    def detach(
        self,
        shown: Presentation,
        *,
        seconds: float = 10.0,
        force: bool = False,
        may_stop_vm: bool = False,
    ) -> Detached:
        way = WAYS[shown.presenter]
        return self.run(
            way.detach(
                shown,
                self.vm,
                deadline_ns=int(seconds * SECOND),
                force=force,
                may_stop_vm=may_stop_vm,
            )
        )

    # ---- in the guest

    async def silence(self, seconds: float) -> None:
        """From when this returns the agent does not answer, for about so many seconds."""
        await self._python(SILENCE, [str(seconds)])
        assert self.vm.guest is not None
        try:
            async with asyncio.timeout(10):
                while True:
                    await self.vm.guest.ask(wire.Find(0), SECOND // 2)
        except OutcomeUnknown:
            return

    async def answering(self) -> None:
        """The agent answers (again)."""
        assert self.vm.guest is not None
        answer = await self.vm.guest.ask(wire.Find(0), 60 * SECOND)
        assert isinstance(answer, wire.Found), answer

    async def find(self, shown: Presentation) -> wire.Memory | None:
        """What the agent knows of a tag."""
        assert self.vm.guest is not None
        answer = await self.vm.guest.ask(wire.Find(0), 60 * SECOND)
        assert isinstance(answer, wire.Found), answer
        found = [m for m in answer.memory if m.tag == shown.tagged.tag]
        return found[0] if found else None

    async def seek(self, shown: Presentation) -> wire.Memory:
        """What the agent knows of a tag that it was not told of."""
        assert self.vm.guest is not None
        request = wire.Attach(0, shown.tagged.tag, 5_000)
        answer = await self.vm.guest.ask(request, 60 * SECOND)
        assert isinstance(answer, wire.Attached), answer
        return answer.memory

    async def reboot(self) -> None:
        """The reset button; returns when the agent of the next boot answers."""
        channel = self.vm.guest
        assert channel is not None
        before = channel.boot_id
        await self.vm.execute("system_reset", {})
        async with asyncio.timeout(90):
            while channel.boot_id in ("", before):
                await channel.heard()

    async def panic(self) -> None:
        """The guest's kernel panics, and stays so."""
        assert self.vm.guest is not None
        code = "open('/proc/sysrq-trigger', 'w').write('c')"
        with suppress(OutcomeUnknown):
            await self.vm.guest.ask(wire.Exec(0, ("python3", "-c", code)), 2 * SECOND)
        with suppress(GuestDied):
            await self.guest.see(b"Kernel panic", 20)

    def python(self, code: str, *arguments: object) -> str:
        """What a piece of Python prints in the guest."""
        return self.run(self._python(code, [str(argument) for argument in arguments]))

    async def _python(self, code: str, arguments: list[str]) -> str:
        written: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

        def keep(answer: wire.Answer) -> None:
            if isinstance(answer, wire.Output):
                written[answer.stream] += answer.data

        assert self.vm.guest is not None
        request = wire.Exec(0, ("python3", "-c", code, *arguments))
        ended = await self.vm.guest.stream(request, keep, 60 * SECOND)
        assert isinstance(ended, wire.Exited), ended
        assert ended.code == 0, written[2].decode()
        return written[1].decode().strip()

    def peek(self, shown: Presentation, at: int, count: int) -> bytes:
        size = shown.tagged.size_bytes
        return bytes.fromhex(self.python(PEEK, shown.guest_path, size, at, count))

    def poke(self, shown: Presentation, at: int, data: bytes) -> None:
        self.python(POKE, shown.guest_path, shown.tagged.size_bytes, at, data.hex())

    def hold(self, shown: Presentation, seconds: float = 60.0) -> int:
        """A process in the guest maps the tag, and is not the agent's own; its number."""
        return int(self.python(HOLD, shown.guest_path, shown.tagged.size_bytes, seconds))


@contextmanager
def booted(spec: Spec) -> Iterator[World]:
    with asyncio.Runner() as runner:
        world = World(runner, spec)
        failed_before = len(FAILED)
        try:
            runner.run(world.boot())
            yield world
        finally:
            runner.run(world.end())
            world.clear(keep_logs=len(FAILED) > failed_before)
