"""A QEMU process as presenters see it: started by us or by somebody else, driven over QMP.

QEMU is a peer that is not believed: its answers are bounded, each has a deadline, and an answer
that is missing makes the outcome unknown. Its end is seen by its process (a pidfd), not by its
socket. A machine that we start outlives us: it is found again by its QMP socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from tagmem.base.errors import Conflict, NotFound, OutcomeUnknown, RemoteError
from tagmem.base.units import SECOND, Bytes, Nanoseconds
from tagmem.presenter import apart, survey
from tagmem.presenter.channel import Channel
from tagmem.presenter.contract import Lent, VmFacts, Windows
from tagmem.presenter.machine import VmSpec, argv, files

log = logging.getLogger(__name__)

ANSWER_BYTES_MAX = 4 << 20
"""One line of QMP; the longest that we ask for (query-pci of a full machine) is far below."""
COMMAND_SECONDS = 20.0
START_SECONDS = 30.0
QUIT_SECONDS = 3.0
_POLL_SECONDS = 0.02
_CLASSES = {
    "GenericError": 1,
    "CommandNotFound": 2,
    "DeviceNotActive": 3,
    "DeviceNotFound": 4,
    "KVMMissingCap": 5,
}

_RUNNING_ON: list[subprocess.Popen[bytes]] = []
"""Children that we let go of: they are not forgotten, they outlive us."""


class Vm:
    """`contract.Machine` on one QEMU process."""

    def __init__(self, name: str, qmp_path: str, windows: Windows | None = None) -> None:
        self.name = name
        self.qmp_path = qmp_path
        self.pid = 0
        self.log_path = ""
        self._windows = windows
        self._channel: Channel | None = None
        self._client: QMPClient | None = None
        self._pidfd = -1
        self._child: subprocess.Popen[bytes] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._deleted: set[str] = set()
        self._refused: set[str] = set()
        self._changed = asyncio.Event()
        self._drivers: tuple[str, ...] | None = None
        self.on_gone: Callable[[], None] = lambda: None
        self.lent: dict[str, Lent] = {}
        """What the guest was offered of CXL windows, by tag."""
        self.on_lent: Callable[[], Awaitable[None]] | None = None
        """Keeps `lent`; awaited before it counts."""

    # ---- coming to be

    @classmethod
    async def start(cls, spec: VmSpec, windows: Windows | None = None) -> Vm:
        """Start QEMU and connect to it. Raises Conflict with QEMU's own words when it ends at once,
        OutcomeUnknown when its QMP socket does not answer in time (it has been ended then).
        """
        vm = cls(spec.name, f"{spec.directory}/qmp", windows)
        vm.log_path = f"{spec.directory}/qemu.log"
        vm._child = child = _spawn(spec, vm.log_path)
        started = False
        try:
            await vm._connect(START_SECONDS, child.pid)
        except (OutcomeUnknown, NotFound) as error:
            code = child.poll()
            raise Conflict(f"VM {spec.name}: {vm._last_words() or error} (exit {code})") from error
        else:
            vm._open_channel(f"{spec.directory}/agent")
            started = True
            return vm
        finally:
            if not started:
                child.kill()
                child.wait()

    @classmethod
    async def adopt(
        cls,
        name: str,
        qmp_path: str,
        *,
        pid: int = 0,
        agent_path: str = "",
        windows: Windows | None = None,
    ) -> Vm:
        """Take up a QEMU that runs. `pid` where its socket was made by somebody else (libvirt).

        Raises NotFound when nobody listens there, OutcomeUnknown when nobody answers.
        """
        vm = cls(name, qmp_path, windows)
        await vm._connect(COMMAND_SECONDS, pid, patient=False)
        if agent_path:
            vm._open_channel(agent_path)
        return vm

    async def _connect(self, seconds: float, pid: int, *, patient: bool = True) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            client = QMPClient(self.name, readbuflen=ANSWER_BYTES_MAX)
            client.logger.setLevel(logging.CRITICAL)
            try:
                async with asyncio.timeout_at(end):
                    await client.connect(self.qmp_path)
                break
            except (QMPError, OSError, EOFError) as error:
                dead = self._child is not None and self._child.poll() is not None
                if dead or not patient or loop.time() >= end:
                    raise NotFound(f"VM {self.name}: nobody answers at {self.qmp_path}") from error
                await asyncio.sleep(_POLL_SECONDS)
            except TimeoutError:
                raise OutcomeUnknown(f"VM {self.name}: no answer at {self.qmp_path}") from None
        self._client = client
        self._listening = loop.create_task(self._listen(client))
        self.pid = pid or _peer(self.qmp_path)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise NotFound(f"VM {self.name}: process {self.pid}: {error.strerror}") from None
        loop.add_reader(self._pidfd, self._ended)

    def _open_channel(self, path: str) -> None:
        self._channel = Channel(path)
        self._channel.start()

    def _last_words(self) -> str:
        try:
            lines = Path(self.log_path).read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:400] if lines else ""

    # ---- its end

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._child is not None:
            self._child.poll()
        self._gone.set()
        self._changed.set()
        self.on_gone()

    @property
    def gone(self) -> bool:
        """Whether QEMU's process has ended."""
        return self._gone.is_set()

    async def wait_gone(self, deadline_ns: Nanoseconds) -> bool:
        """Whether QEMU's process ends within so many nanoseconds."""
        try:
            async with asyncio.timeout(deadline_ns / SECOND):
                await self._gone.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Let go of it; it runs on."""
        if self._channel is not None:
            await self._channel.close()
        if self._child is not None and self._child.poll() is None:
            _RUNNING_ON.append(self._child)
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening
        await self._hang_up()
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError, asyncio.CancelledError):
                await client.disconnect()

    async def stop(self, deadline_ns: Nanoseconds) -> None:
        """See `contract.Machine`: asked first, then killed."""
        if self.gone:
            return
        try:
            await self.execute("quit", {})
        except (RemoteError, OutcomeUnknown) as error:
            log.info("VM %s: quit: %s", self.name, error)
        if await self.wait_gone(min(deadline_ns, int(QUIT_SECONDS * SECOND))):
            return
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not await self.wait_gone(deadline_ns):
            raise OutcomeUnknown(
                f"VM {self.name}: process {self.pid} was killed and is still there"
            )

    # ---- QMP

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """See `contract.Machine`."""
        client = self._client
        if self.gone or client is None:
            raise OutcomeUnknown(f"VM {self.name} has ended")
        if command == "device_add":
            self._deleted.discard(arguments["id"])
        if command == "device_del":
            self._refused.discard(arguments["id"])
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                return await client.execute(command, dict(arguments) or None)
        except ExecuteError as error:
            code = _CLASSES.get(error.error_class, 0)
            raise RemoteError(f"QEMU of {self.name}", code, str(error)[:1000]) from None
        except TimeoutError:
            text = f"VM {self.name}: {command} was not answered in {COMMAND_SECONDS:g} s"
            raise OutcomeUnknown(text) from None
        except (QMPError, OSError, EOFError) as error:
            if not self.gone:
                await self.wait_gone(SECOND)
            text = f"VM {self.name}: no answer to {command}: {_shown(error)}"
            raise OutcomeUnknown(text) from error

    async def _listen(self, client: QMPClient) -> None:
        async for event in client.events:
            data = event.get("data")
            device = data.get("device") if isinstance(data, dict) else None
            name = event.get("event")
            if name == "DEVICE_DELETED" and isinstance(device, str):
                self._deleted.add(device)
            elif name in ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR") and device:
                self._refused.add(str(device))
            self._changed.set()

    async def deleted(self, device: str, deadline_ns: Nanoseconds) -> bool:
        """See `contract.Machine`. A guest that says no ends the wait."""
        end = asyncio.get_running_loop().time() + deadline_ns / SECOND
        while not (device in self._deleted or self.gone):
            self._changed.clear()
            if device in self._refused:
                return False
            try:
                async with asyncio.timeout_at(end):
                    await self._changed.wait()
            except TimeoutError:
                # The event may have come before we listened: QEMU's own list counts.
                return device not in await self._devices()
        return True

    async def news(self, deadline_ns: Nanoseconds) -> None:
        """Return when QEMU has told something more, or after so many nanoseconds."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_ns / SECOND):
                await self._changed.wait()

    async def _devices(self) -> Sequence[str]:
        return survey.names(await self.execute("qom-list", {"path": survey.PERIPHERAL}))

    async def size_of(self, device: str) -> Bytes:
        """See `contract.Machine`."""
        where = {"path": f"{survey.PERIPHERAL}/{device}", "property": "size"}
        return int(await self.execute("qom-get", where))

    async def facts(self) -> VmFacts:
        """See `contract.Machine`."""
        try:
            if self._drivers is None:
                self._drivers = await survey.drivers(self.execute)
            found = await survey.survey(self.name, self.execute, self._drivers)
        except OutcomeUnknown:
            if not self.gone:
                raise
            return VmFacts(self.name, (0, 0, 0), "gone")
        guest = self._channel.facts() if self._channel is not None else None
        found = survey.with_lent(found, self.lent.values())
        windows = self._windows
        return survey.completed(
            found,
            broker=windows is not None,
            guest=guest,
            window_regions=windows.regions() if windows is not None else 0,
        )

    async def lend(self, tag: str, lent: Lent | None) -> None:
        """See `contract.Machine`."""
        if lent is None:
            self.lent.pop(tag, None)
        else:
            self.lent[tag] = lent
        if self.on_lent is not None:
            await self.on_lent()

    async def pause(self) -> None:
        """Stop its processors."""
        await self.execute("stop", {})

    async def resume(self) -> None:
        """Let them run again."""
        await self.execute("cont", {})

    # ---- what it holds

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        """See `contract.Machine`. Raises OutcomeUnknown when its maps cannot be read."""
        if self.gone:
            return ()
        return await asyncio.to_thread(held_by, self.pid, tuple(paths))

    @property
    def guest(self) -> Channel | None:
        """See `contract.Machine`."""
        return self._channel

    @property
    def windows(self) -> Windows | None:
        """See `contract.Machine`."""
        return self._windows


def _spawn(spec: VmSpec, log_path: str) -> subprocess.Popen[bytes]:
    """QEMU in a session of its own (and in its cgroup, where it has one): it outlives us."""
    line = argv(spec)
    directory = Path(spec.directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in ("qmp", "agent"):
        (directory / stale).unlink(missing_ok=True)
    for path, content in files(spec).items():
        Path(path).write_bytes(content)
    return apart.start(line, log_path, environment=dict(spec.environment), cgroup=spec.cgroup)


def _shown(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _peer(path: str) -> int:
    """Who listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        probe.connect(path)
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])


def started_at(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def held_by(pid: int, paths: Sequence[str]) -> tuple[str, ...]:
    """Which of the files a process maps or has open. A file that has no name any more is known by
    the one it had. Raises OutcomeUnknown when that cannot be read of a living process.
    """
    known = {path: _identity(path) for path in paths}
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
        opened = [_identity(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    except (FileNotFoundError, ProcessLookupError):
        return ()
    except OSError as error:
        raise OutcomeUnknown(f"process {pid}: {error.strerror}") from error
    mapped: set[int] = set()
    named: set[str] = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] != "0":
            mapped.add(int(fields[4]))
            named.add(fields[5].removesuffix(" (deleted)"))
    held = []
    for path, identity in known.items():
        by_identity = identity is not None and (identity in opened or identity[1] in mapped)
        if by_identity or (identity is None and path in named):
            held.append(path)
    return tuple(held)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
