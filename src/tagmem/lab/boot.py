"""Boots guests, waits until their agent is ready, and leaves logs behind when they fail.

KVM is used where a guest has really booted under it: a device that can be opened proves little on
machines that are guests themselves. Everything that a failure needs to be understood (console, QMP
as QEMU saw it, its stderr, its command line) lies in one folder, which goes when all went well.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from tagmem.base.errors import Conflict, RemoteError
from tagmem.base.units import MIB
from tagmem.lab import firmware, nested, qemus
from tagmem.lab import image as images
from tagmem.lab.channel import Channel
from tagmem.lab.errors import GuestDied, LabFailed
from tagmem.lab.image import Image
from tagmem.lab.packages import Report, cache_dir, silent
from tagmem.lab.qemus import Qemu
from tagmem.lab.spec import Accel, GuestSpec, Places, command_line
from tagmem.wire import guest as wire

READY = b"tagmem guest: on "
"""What the guest agent writes on the console when it begins."""
STARTED = b"tagmem-init: Linux"
"""What init.sh writes first."""
PANIC = b"Kernel panic - not syncing"

QMP_SECONDS = 30.0
READY_SECONDS = 120.0
PROBE_SECONDS = 20.0
STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_TAIL_BYTES = 1_500
_EVENTS_MAX = 4_096


@dataclass(frozen=True)
class Material:
    """What a guest is booted from, on this machine."""

    qemu: Qemu
    accel: Accel
    kernel: Path
    initrd: Path


class Lab:
    """What guests are made from, brought here once: both QEMUs as they are asked for, and an image.

    Bringing takes half a minute at first, and a millisecond afterwards; `report` hears of it.
    """

    def __init__(self, cache: Path | None = None, report: Report = silent) -> None:
        self.cache = cache or cache_dir()
        self.report = report
        self._probes: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        """One probe at a time; a lock belongs to one event loop, and a lab may outlive several."""

    def qemu(self, name: str) -> Qemu:
        """One of the QEMUs; brought if it is missing. Blocks while that lasts."""
        return qemus.get(name, self.cache, self.report)

    def image(self) -> Image:
        """The guest image; made if it is missing. Blocks while that lasts."""
        return images.get(self.cache, self.report)

    async def material(self, spec: GuestSpec, folder: Path) -> Material:
        """What a guest of this kind is booted from; `initrd` is written into the folder.

        For whoever starts QEMU in a way of his own: `kernel_line(spec)` is what the kernel is told.
        """
        qemu = await asyncio.to_thread(self.qemu, spec.qemu)
        image = await asyncio.to_thread(self.image)
        accel = spec.accel or await self.accel(qemu)
        initrd = await asyncio.to_thread(self._initrd, spec, folder, qemu, image)
        if spec.firmware == "edk2":
            places = Places(folder).firmware
            await asyncio.to_thread(firmware.place, places, self.cache, self.report)
        return Material(qemu, accel, image.kernel, initrd)

    def _initrd(self, spec: GuestSpec, folder: Path, qemu: Qemu, image: Image) -> Path:
        if not spec.nested:
            return images.initrd(image, folder, self.cache, files=spec.files)
        inner = images.initrd(image, folder, self.cache)
        modules = nested.python_modules(self.cache, self.report)
        files = {**nested.files(qemu, image, inner, modules), **spec.files}
        return images.initrd(image, folder, self.cache, code=images.HOST_CODE, files=files)

    async def accel(self, qemu: Qemu) -> Accel:
        """`kvm` where a guest has booted under it on this machine, else `tcg`; asked once."""
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "tcg"
        image = await asyncio.to_thread(self.image)
        key = f"{platform.release()} {qemu.version} {image.release}"
        known = self.cache / "kvm.json"
        async with self._probes.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            answers = _read_answers(known)
            if key not in answers:
                self.report(f"booting a guest under KVM to see whether it works, QEMU {qemu.name}")
                answers[key] = await self._boots_under_kvm(qemu)
                partial = known.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps({**_read_answers(known), **answers}, indent=1))
                partial.rename(known)
        return "kvm" if answers[key] else "tcg"

    async def _boots_under_kvm(self, qemu: Qemu) -> bool:
        spec = GuestSpec(
            name="kvm-probe", qemu=qemu.name, memory_bytes=512 * MIB, cpus=1, root_ports=0,
            accel="kvm", agent=False, modules=(),
        )  # fmt: skip
        guest = Guest(self, spec)
        try:
            await guest.start()
            await guest.see(STARTED, PROBE_SECONDS)
        except LabFailed:
            return False
        finally:
            await guest.kill()
            guest.remove_logs()
        return True

    def guest(self, spec: GuestSpec, folder: Path | None = None) -> Guest:
        """A guest that is not started yet; `async with` starts it, waits for it, and ends it."""
        return Guest(self, spec, folder)


def _read_answers(path: Path) -> dict[str, bool]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if v is True or v is False}


class Guest:
    """One QEMU process and what is known of the guest in it."""

    def __init__(self, lab: Lab, spec: GuestSpec, folder: Path | None = None) -> None:
        self.lab = lab
        self.spec = spec
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix=f"tagmem-{spec.name}-"))
        folder.mkdir(parents=True, exist_ok=True)
        self.places = Places(folder)
        self.accel: Accel = "tcg"
        self.qemu: Qemu | None = None
        self.boot_seconds = 0.0
        """From the start of QEMU to the agent's first word."""
        self.events: list[Mapping[str, Any]] = []
        """QMP events, oldest first; the last few thousand."""
        self._process: asyncio.subprocess.Process | None = None
        self._qmp = QMPClient(spec.name)
        self._listener = EventListener()
        self._listening: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._channel: Channel | None = None
        self._started = 0.0
        self._seen = 0

    # ---- life

    async def start(self) -> None:
        """Start QEMU and speak QMP with it. Raises LabFailed or GuestDied."""
        if self._process is not None:
            raise Conflict(f"guest {self.spec.name} was started already")
        made = await self.lab.material(self.spec, self.places.folder)
        qemu, initrd = made.qemu, made.initrd
        self.accel, self.qemu = made.accel, qemu
        line = command_line(self.spec, qemu, made.accel, made.kernel, initrd, self.places)
        self.places.command.write_text(shlex.join(line) + "\n")
        self._started = time.monotonic()
        with self.places.errors.open("wb") as errors:
            # A guest does not outlive the process that it was started for.
            self._process = await asyncio.create_subprocess_exec(
                "setpriv", "--pdeathsig", "KILL", "--", *line,
                stdin=asyncio.subprocess.DEVNULL, stdout=errors, stderr=errors,
                env={**os.environ, **qemu.environment},
            )  # fmt: skip
        await self._connect()
        initrd.unlink(missing_ok=True)  # QEMU has it mapped, for reboots too

    async def ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait for the guest agent to begin; called again, to begin anew (after a reboot).

        Raises GuestDied when it does not.
        """
        self._seen = await self.see(READY, seconds, after=self._seen)
        self.boot_seconds = self.boot_seconds or time.monotonic() - self._started

    async def stop(self) -> None:
        """End the guest as a pulled plug would, and QEMU with it."""
        await self._close_channel()
        if self.alive:
            with suppress(QMPError, RemoteError, TimeoutError):
                await asyncio.wait_for(self._qmp.execute("quit"), STOP_SECONDS)
            with suppress(TimeoutError):
                await self.ended(STOP_SECONDS)
        await self.kill()

    async def kill(self) -> None:
        """End QEMU now, whatever it does."""
        await self._close_channel()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
            self._listening = None
        with suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()
        (self.places.folder / "initrd").unlink(missing_ok=True)

    async def ended(self, seconds: float = READY_SECONDS) -> int:
        """Wait until QEMU ends; its exit status. Raises TimeoutError."""
        if self._process is None:
            raise Conflict(f"guest {self.spec.name} was not started")
        return await asyncio.wait_for(self._process.wait(), seconds)

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return 0 if self._process is None else self._process.pid

    def remove_logs(self) -> None:
        """Remove the guest's folder."""
        shutil.rmtree(self.places.folder, ignore_errors=True)

    async def __aenter__(self) -> Self:
        entered = False
        try:
            await self.start()
            if not self.spec.incoming and self.spec.agent:
                await self.ready()
            entered = True
        finally:
            if not entered:  # cancelled or failed, no QEMU is left behind
                await self.kill()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        if error is None:
            self.remove_logs()
        else:
            error.add_note(f"guest {self.spec.name}: {self.where()}")

    # ---- the console

    def console(self) -> str:
        """What the guest wrote on its console so far."""
        try:
            return self.places.console.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    async def see(self, words: bytes, seconds: float, *, after: int = 0) -> int:
        """Wait for words on the console; where they end. `after` skips what came before.

        Raises GuestDied when QEMU ends, the guest's kernel panics or the time is over first.
        """
        deadline = time.monotonic() + seconds
        while True:
            alive = self.alive
            seen = self._console_bytes()
            found = seen.find(words, after)
            if found >= 0:
                return found + len(words)
            if not alive:
                raise self._died("QEMU ended")
            if seen.find(PANIC, after) >= 0:
                raise self._died("the guest's kernel panicked")
            if time.monotonic() > deadline:
                wanted = words.decode(errors="replace")
                raise self._died(f"no {wanted!r} on the console within {seconds:g} s")
            await asyncio.sleep(_LOOK_SECONDS)

    def where(self) -> str:
        """Names the logs that are there."""
        kept = [str(path) for path in self.places.logs if path.exists()]
        return f"its logs are {', '.join(kept)}"

    def _console_bytes(self) -> bytes:
        try:
            return self.places.console.read_bytes()
        except FileNotFoundError:
            return b""

    def _died(self, what: str) -> GuestDied:
        status = None if self._process is None else self._process.returncode
        said = [f"guest {self.spec.name} ({self.accel}, QEMU {self.spec.qemu}): {what}"]
        if status is not None:
            said[0] += f", exit status {status}"
        for path in (self.places.errors, self.places.console):
            with suppress(OSError):
                tail = path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
                if tail:
                    said.append(f"--- {path.name}\n{tail}")
        return GuestDied("\n".join([*said, f"--- {self.where()}"]))

    # ---- QMP

    async def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command; what it returned.

        Raises RemoteError with QEMU's words when it refuses, GuestDied when QEMU is gone.
        """
        try:
            return await self._qmp.execute(name, dict(arguments or {}) or None)
        except ExecuteError as error:
            raise RemoteError(f"QEMU of {self.spec.name}", 1, f"{name}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            with suppress(TimeoutError):
                await self.ended(1.0)
            raise self._died(f"QMP broke during {name}: {error}") from error

    async def event(
        self, name: str, seconds: float = QMP_SECONDS, *, after: int = 0
    ) -> Mapping[str, Any]:
        """The first event of that name, waited for. `after` skips so many of `events`.

        Raises GuestDied when it does not come, or QEMU ends.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._news.clear()
            for event in self.events[after:]:
                if event["event"] == name:
                    return event
            left = deadline - time.monotonic()
            if left <= 0 or not self.alive:
                raise self._died(f"no event {name} within {seconds:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(left, 1.0))

    async def _connect(self) -> None:
        deadline = time.monotonic() + QMP_SECONDS
        while True:
            alive = self.alive
            if self.places.lab_qmp.exists():
                try:
                    await self._qmp.connect(str(self.places.lab_qmp))
                    break
                except (QMPError, OSError) as error:
                    if not alive or time.monotonic() > deadline:
                        raise self._died(f"no QMP: {error}") from error
            elif not alive:
                raise self._died("QEMU did not start")
            elif time.monotonic() > deadline:
                raise self._died(f"no QMP socket within {QMP_SECONDS:g} s")
            await asyncio.sleep(_LOOK_SECONDS)
        self._qmp.register_listener(self._listener)
        self._listening = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        async for event in self._listener:
            self.events.append(dict(event))
            del self.events[:-_EVENTS_MAX]
            self._news.set()

    # ---- the agent

    async def agent(self) -> Channel:
        """The lab's conversation with the guest agent; it has the channel from now on."""
        if self._channel is None:
            self._channel = Channel(self.places.agent)
        return self._channel

    async def release_agent(self) -> Path:
        """Leave the channel to somebody else; where it is."""
        await self._close_channel()
        return self.places.agent

    async def python(self, code: str) -> str:
        """What a piece of Python printed in the guest."""
        return await (await self.agent()).python(code)

    async def poweroff(self, seconds: float = READY_SECONDS) -> int:
        """Have the guest give back what it has and power off; QEMU's exit status."""
        channel = await self.agent()
        request = wire.Shutdown(0, "poweroff", ask_ms=1_000, stop_ms=1_000)
        answer = await channel.ask(request, seconds)
        if isinstance(answer, wire.Held | wire.Failed):
            raise LabFailed(f"guest {self.spec.name} does not power off: {answer!r:.300}")
        return await self.ended(seconds)

    async def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
