"""The broker: owns guests' windows onto tags, and takes the bytes back without the guest's help.

It is the back-end of QEMU's vhost-user device. For each window it listens on a Unix socket that
QEMU connects to; when the guest's driver starts the device it maps header and bytes; `revoke`
unmaps the bytes, puts scrap memory in the hole, and returns when the kernel says that QEMU has
nothing of them any more (`procfs`). A guest that hangs, or has panicked, is not asked.

What it cannot do, and says: a device that is stopped (paused VM) is not told anything, because
QEMU 11.1 crashes on it; and a request that is under way at the moment when QEMU stops the device
can still crash it. When this process dies QEMU keeps its mappings, and QEMU 11.1 aborts when its
character device connects again (`reconnect`), so a broker that takes over can prove what QEMU has,
and take nothing: the device is unplugged, or the VM stopped. In each case the bytes are held until
the VM runs again, the device is gone, or QEMU is: `revoke` raises OutcomeUnknown until then, and
nothing may be freed.

On a host it runs in a process of its own (`brokerserver`), so that no agent's end is its own; here
it is given what makes sockets.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from tagmem.base.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, RemoteError
from tagmem.base.units import SECOND, Bytes, Nanoseconds
from tagmem.presenter import procfs
from tagmem.presenter.contract import Tagged
from tagmem.presenter.endpoint import Endpoint, Report, Sockets, State, Watcher
from tagmem.presenter.window import HEAD_BYTES, Goal

__all__ = ["Broker", "Report", "State", "VmWindows", "Watcher"]

POLL_SECONDS = 0.002
"""Between two looks at whether QEMU has let go; it takes 25 ms."""
STUCK_NS = SECOND // 4
"""How long a process may still be letting go after it can be asked no more."""


def _ignore(report: Report) -> None:
    """Nobody watches."""


class Broker:
    """Every window of this host. Made inside a running loop; `close` ends it."""

    def __init__(self, sockets: Sockets, directory: Path, watcher: Watcher = _ignore) -> None:
        self._sockets = sockets
        self._directory = directory
        self._watcher = watcher
        self._endpoints: dict[tuple[str, str], Endpoint] = {}

    def windows(self, vm: str) -> VmWindows:
        """The windows of one VM (`contract.Windows`)."""
        return VmWindows(self, vm)

    def reports(self) -> list[Report]:
        """What is known of every window."""
        return [endpoint.report() for endpoint in self._endpoints.values()]

    def socket_path(self, vm: str, device: str) -> str:
        """Where QEMU is to connect: the same after a restart, and short enough for a socket."""
        name = hashlib.sha256(f"{vm}/{device}".encode()).hexdigest()[:16]
        return str(self._directory / f"{name}.sock")

    def open(
        self,
        vm: str,
        device: str,
        tagged: Tagged,
        *,
        adopt: Goal | None = None,
        qemu_pid: int = 0,
    ) -> str:
        """Serve a window; the path of its socket.

        `adopt` is the goal that a broker before this one had for a window that QEMU may have still;
        `qemu_pid` is then its process, which is looked at until it connects again. Raises Conflict
        for a window that is served already, InvalidInput.
        """
        if (vm, device) in self._endpoints:
            raise Conflict(f"window {device} of {vm} is served already")
        try:
            endpoint = Endpoint(vm, device, tagged, self._watcher)
        except OSError as error:
            raise InvalidInput("pieces", f"files to open ({error.strerror})", tagged.tag) from None
        if adopt is not None:
            endpoint.window.assume(adopt)
            endpoint.pid = qemu_pid
        path = self.socket_path(vm, device)
        try:
            endpoint.listen(self._sockets, path)
        except (InvalidInput, Conflict):
            endpoint.close("cannot listen")
            raise
        self._endpoints[vm, device] = endpoint
        return path

    async def mapped(self, vm: str, device: str, deadline_ns: Nanoseconds) -> None:
        """Return when the guest can see the bytes. Raises RemoteError when QEMU refused,
        OutcomeUnknown when nothing has come of it in time, Conflict when they were revoked.
        """
        endpoint = self._find(vm, device)
        end = self._now() + deadline_ns
        while True:
            if endpoint.window.goal is not Goal.PRESENTED or endpoint.state is State.CLOSED:
                raise Conflict(f"window {device} of {vm} was revoked or closed")
            if endpoint.window.failed:
                raise RemoteError(f"QEMU of {vm}", 1, endpoint.window.failed)
            if endpoint.state is State.STARTED and endpoint.window.settled:
                return
            left = end - self._now()
            if left <= 0:
                raise OutcomeUnknown(f"window {device} of {vm} is {_told(endpoint)}")
            await endpoint.change(left / SECOND)

    async def found(self, vm: str, device: str, deadline_ns: Nanoseconds) -> bool | None:
        """Whether the guest has read the tag's header, within so long; the guest is not asked. None
        when it looked before the header was there.

        Its kernel looks for the header once, some milliseconds after the start of the device. On a
        host so busy that QEMU's thread did not run meanwhile there was nothing to be seen, and the
        guest has a raw device: unplugging and plugging it again, or binding nd_pmem anew in the
        guest, is the cure. A guest without the driver has not looked yet.
        """
        endpoint = self._find(vm, device)
        end = self._now() + deadline_ns
        while (read := await asyncio.to_thread(endpoint.header_read)) is False:
            if self._now() >= end or endpoint.state is State.CLOSED:
                break
            await endpoint.change(POLL_SECONDS)
        return read

    async def revoke(
        self, vm: str, device: str, deadline_ns: Nanoseconds, *, scrap: bool = True
    ) -> Nanoseconds:
        """Take the bytes out of a window for good; how long it took until QEMU had nothing of them.

        Nothing is asked of the guest. Raises OutcomeUnknown while QEMU has some of them: they are
        not to be freed, and only the VM's end is left, unless it resumes or connects again; the
        window stays revoked, so that it is then taken at once.
        """
        endpoint = self._find(vm, device)
        begun = self._now()
        end = begun + deadline_ns
        endpoint.window.goal = Goal.REVOKED
        endpoint.window.scrap = scrap
        endpoint.advance()
        while held := await self._held(endpoint):
            now = self._now()
            if now >= end or (endpoint.report().must_stop_vm and now >= begun + STUCK_NS):
                raise OutcomeUnknown(
                    f"QEMU of {vm} (process {endpoint.pid}) {held}; the window is {_told(endpoint)}"
                )
            await endpoint.change(POLL_SECONDS)
        took = self._now() - begun
        # The hole is filled before this is told, if it can be: a guest that runs on needs it.
        while self._now() < end and endpoint.state is State.STARTED:
            if endpoint.window.failed or endpoint.window.settled:
                break
            await endpoint.change(POLL_SECONDS)
        endpoint.tell(endpoint.state, endpoint.reason)
        return took

    def present(self, vm: str, device: str) -> None:
        """Have the bytes in the window again after a `revoke`. Raises InvalidInput."""
        endpoint = self._find(vm, device)
        try:
            endpoint.find_files()
        except OSError as error:
            tag = endpoint.tagged.tag
            raise InvalidInput("pieces", f"files to open ({error.strerror})", tag) from None
        endpoint.window.goal = Goal.PRESENTED
        endpoint.advance()

    def forget(self, vm: str, device: str) -> None:
        """Stop serving a window. QEMU's device should be gone: it keeps what it has mapped."""
        endpoint = self._endpoints.pop((vm, device), None)
        if endpoint is not None:
            endpoint.close()

    def close(self) -> None:
        """Stop serving all of them."""
        for vm, device in tuple(self._endpoints):
            self.forget(vm, device)

    async def _held(self, endpoint: Endpoint) -> procfs.Holds:
        if not endpoint.pid and endpoint.window.certain and not endpoint.window.mapped:
            return procfs.Holds()  # nobody ever connected
        # A file may have other tags' bytes as well, in other windows of the same QEMU.
        others = {
            identity
            for other in self._endpoints.values()
            if other is not endpoint and other.pid == endpoint.pid
            for identity in other.ranges
            if other.window.goal is Goal.PRESENTED
        }
        opened = endpoint.ranges.keys() - others
        return await asyncio.to_thread(procfs.holds, endpoint.pid, endpoint.ranges, opened)

    def _find(self, vm: str, device: str) -> Endpoint:
        endpoint = self._endpoints.get((vm, device))
        if endpoint is None:
            raise NotFound(f"no window {device} of {vm} is served")
        return endpoint

    @staticmethod
    def _now() -> Nanoseconds:
        return int(asyncio.get_running_loop().time() * SECOND)


class VmWindows:
    """The windows of one VM, as presenters ask for them (`contract.Windows`)."""

    def __init__(self, broker: Broker, vm: str) -> None:
        self._broker = broker
        self._vm = vm

    async def open(self, device: str, tagged: Tagged, device_bytes: Bytes) -> str:
        """Serve a window; the path of its socket. Raises Conflict, InvalidInput."""
        if device_bytes != HEAD_BYTES + tagged.size_bytes:
            limit = f"{HEAD_BYTES} more than the tag has"
            raise InvalidInput("device_bytes", limit, device_bytes)
        return self._broker.open(self._vm, device, tagged)

    async def mapped(self, device: str, deadline_ns: Nanoseconds) -> None:
        """See `Broker.mapped`."""
        await self._broker.mapped(self._vm, device, deadline_ns)

    async def found(self, device: str, deadline_ns: Nanoseconds) -> bool | None:
        """See `Broker.found`."""
        return await self._broker.found(self._vm, device, deadline_ns)

    async def revoke(self, device: str, deadline_ns: Nanoseconds) -> None:
        """See `Broker.revoke`."""
        await self._broker.revoke(self._vm, device, deadline_ns)

    async def close(self, device: str) -> None:
        """See `Broker.forget`."""
        self._broker.forget(self._vm, device)

    def regions(self) -> int:
        """See `contract.Windows`."""
        return sum(report.regions for report in self._broker.reports() if report.vm == self._vm)


def _told(endpoint: Endpoint) -> str:
    report = endpoint.report()
    return f"{report.state.value} ({report.reason})" if report.reason else report.state.value
