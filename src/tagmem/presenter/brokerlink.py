"""The agent's end of the broker: starts the process, finds it again, and asks it.

The broker is started when the first window is wanted, found again by an agent that was restarted,
and started anew when it died. What a dead one had is lost to its successor: QEMU keeps the bytes
mapped and nobody can take them, so those windows are *out of hand*, which is told, until they are
unplugged or the VM has ended.

An older broker may be met after an update of tagmem. It serves what it has, and can be asked to
give it back; it gets nothing new, and is replaced when it has nothing left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown, TagmemError
from tagmem.base.lines import Lines
from tagmem.base.units import SECOND, Bytes, Nanoseconds
from tagmem.presenter import brokerapi as api
from tagmem.presenter.brokerserver import SOCKET
from tagmem.presenter.contract import Tagged
from tagmem.presenter.endpoint import Connection, Report, State
from tagmem.presenter.window import HEAD_BYTES, Goal

log = logging.getLogger(__name__)

START_SECONDS = 30.0
"""How long a broker that was started may take to answer."""
ANSWER_SECONDS = 10.0
"""Beyond a question's own deadline."""
_POLL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_IN_HAND = (State.CONNECTED, State.STARTED, State.STOPPED)

Connect = Callable[[str], Awaitable[Any]]
"""`io.stream.connect`. Raises OSError."""
Spawn = Callable[[], subprocess.Popen[bytes]]
"""Starts the broker's process; may block for a moment."""
Window = tuple[str, str]
"""(VM, device)"""


class Keeper(Protocol):
    """The broker as a host's VMs need it."""

    on_lost: Callable[[Collection[Window]], None]
    """Told of the windows that a broker had when it died."""

    def windows(self, vm: str) -> Any: ...
    def knows(self, vm: str, device: str) -> bool: ...
    def in_hand(self, vm: str, device: str) -> bool: ...
    async def find_again(self) -> Collection[Window]: ...
    async def look_after(
        self, vm: str, device: str, tagged: Tagged, goal: Goal, qemu_pid: int
    ) -> None: ...
    async def forget(self, vm: str, device: str) -> None: ...
    async def close(self) -> None: ...


class BrokerLink:
    """The broker of this host, in its own process (`Keeper`)."""

    def __init__(self, directory: Path, connect: Connect, spawn: Spawn) -> None:
        self._path = str(directory / SOCKET)
        self._connect = connect
        self._spawn = spawn
        self._child: subprocess.Popen[bytes] | None = None
        self._talk: _Talk | None = None
        self._connecting = asyncio.Lock()
        self._reports: dict[Window, Report] = {}
        self._closing = False
        self._returning: asyncio.Task[None] | None = None
        self.greeting: api.Greeting | None = None
        self.on_lost: Callable[[Collection[Window]], None] = _ignore

    # -- coming and going --------------------------------------------------------------------------

    def windows(self, vm: str) -> LinkWindows:
        """The windows of one VM (`contract.Windows`)."""
        return LinkWindows(self, vm)

    def knows(self, vm: str, device: str) -> bool:
        """Whether the broker serves a window."""
        return self._talk is not None and (vm, device) in self._reports

    def regions(self, vm: str) -> int:
        """See `contract.Windows`."""
        return sum(report.regions for (name, _), report in self._reports.items() if name == vm)

    def in_hand(self, vm: str, device: str) -> bool:
        """Whether the bytes of a window could be taken now, or when its VM runs."""
        report = self._reports.get((vm, device))
        connected = self._talk is not None
        return connected and report is not None and _can_take(report)

    async def find_again(self) -> Collection[Window]:
        """The windows of the broker that runs; none where none does."""
        async with self._connecting:
            if self._talk is None:
                try:
                    await self._greet()
                except (OSError, InvalidInput):
                    return ()
        return tuple(self._reports)

    async def close(self) -> None:
        """Let go of it. It stays while it has windows."""
        self._closing = True
        if self._returning is not None:
            self._returning.cancel()
        talk = self._talk
        if talk is not None:
            if not self._reports:
                try:
                    await talk.ask(api.End(), ANSWER_SECONDS)
                except TagmemError as error:
                    log.info("the broker stays: %s", error)
            talk.hang_up()
        if self._child is not None:
            self._child.poll()

    async def _there(self) -> _Talk:
        """The broker, started if there is none. Raises OutcomeUnknown."""
        async with self._connecting:
            if self._talk is None:
                try:
                    await self._greet()
                except (OSError, InvalidInput):
                    await self._start()
            assert self._talk is not None
            return self._talk

    async def _start(self) -> None:
        if self._child is not None:
            self._child.poll()
        child = self._child = await asyncio.to_thread(self._spawn)
        end = asyncio.get_running_loop().time() + START_SECONDS
        while True:
            try:
                await self._greet()
                return
            except (OSError, InvalidInput) as error:
                late = asyncio.get_running_loop().time() >= end
                if late or child.poll() is not None:
                    raise OutcomeUnknown(
                        f"the broker does not come up: {error} (exit {child.poll()})"
                    ) from None
            await asyncio.sleep(_POLL_SECONDS)

    async def _greet(self) -> None:
        """Raises OSError when nobody is there, OutcomeUnknown when nobody answers."""
        talk = _Talk(await self._connect(self._path), self._heard, self._lost)
        done = False
        try:
            greeting = await talk.ask(api.Hello(), ANSWER_SECONDS)
            listed = await talk.ask(api.List(), ANSWER_SECONDS)
            done = True
        finally:
            if not done:
                talk.hang_up()
        assert isinstance(greeting, api.Greeting)
        assert isinstance(listed, api.Reports)
        self.greeting = greeting
        self._reports = {(r.vm, r.device): r for r in listed.windows}
        self._talk = talk
        log.info("broker %d of %s", greeting.pid, greeting.release)

    def _heard(self, report: Report) -> None:
        if report.state is State.CLOSED:
            self._reports.pop((report.vm, report.device), None)
        else:
            self._reports[report.vm, report.device] = report

    def _lost(self, talk: _Talk, reason: str) -> None:
        if talk is not self._talk:
            return
        self._talk = None
        if self._closing:
            return
        log.warning("the broker: %s", reason)
        self._returning = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        """It may have hung up only; if it died, what it had is out of hand."""
        before = self._reports
        while not self._closing:
            try:
                await self._there()
                break
            except TagmemError as error:
                log.warning("the broker: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
        lost = before.keys() - self._reports.keys()
        if lost:
            self.on_lost(tuple(lost))

    # -- questions ---------------------------------------------------------------------------------

    async def ask(self, question: api.AnyQuestion, deadline_ns: Nanoseconds = 0) -> api.AnyAnswer:
        """What it says. Raises what it refused with, OutcomeUnknown without an answer."""
        talk = await self._there()
        return await talk.ask(question, deadline_ns / SECOND + ANSWER_SECONDS)

    async def open(
        self,
        vm: str,
        device: str,
        tagged: Tagged,
        *,
        adopt: Goal | None = None,
        qemu_pid: int = 0,
    ) -> str:
        """See `Broker.open`. Raises Conflict when a broker of another version is still needed."""
        await self._replace_other_version()
        answer = await self.ask(api.Open(vm, device, tagged, adopt, qemu_pid))
        assert isinstance(answer, api.Opened)
        return answer.path

    async def look_after(
        self, vm: str, device: str, tagged: Tagged, goal: Goal, qemu_pid: int
    ) -> None:
        """Watch what a broker that died has left in a QEMU. Raises as `open`."""
        await self.open(vm, device, tagged, adopt=goal, qemu_pid=qemu_pid)

    async def forget(self, vm: str, device: str) -> None:
        """See `Broker.forget`."""
        if self._talk is not None or (vm, device) in self._reports:
            await self.ask(api.Forget(vm, device))
            self._reports.pop((vm, device), None)

    async def _replace_other_version(self) -> None:
        talk = await self._there()
        greeting = self.greeting
        if greeting is None or greeting.version == api.VERSION:
            return
        if self._reports:
            raise Conflict(
                f"the broker (process {greeting.pid}, tagmem {greeting.release}) is of another "
                f"version and has {len(self._reports)} windows: detach them, and it is replaced"
            )
        async with self._connecting:
            self._talk = None
            await talk.ask(api.End(), ANSWER_SECONDS)
            await talk.ended.wait()


class LinkWindows:
    """The windows of one VM, as presenters ask for them (`contract.Windows`)."""

    def __init__(self, link: BrokerLink, vm: str) -> None:
        self._link = link
        self._vm = vm

    async def open(self, device: str, tagged: Tagged, device_bytes: Bytes) -> str:
        """See `contract.Windows`."""
        if device_bytes != HEAD_BYTES + tagged.size_bytes:
            limit = f"{HEAD_BYTES} more than the tag has"
            raise InvalidInput("device_bytes", limit, device_bytes)
        return await self._link.open(self._vm, device, tagged)

    async def mapped(self, device: str, deadline_ns: Nanoseconds) -> None:
        """See `contract.Windows`."""
        deadline_ns = api.capped(deadline_ns)
        await self._link.ask(api.Mapped(self._vm, device, deadline_ns), deadline_ns)

    async def found(self, device: str, deadline_ns: Nanoseconds) -> bool | None:
        """See `contract.Windows`."""
        deadline_ns = api.capped(deadline_ns)
        told = await self._link.ask(api.Look(self._vm, device, deadline_ns), deadline_ns)
        assert isinstance(told, api.Looked)
        return told.found

    async def revoke(self, device: str, deadline_ns: Nanoseconds) -> None:
        """See `contract.Windows`."""
        deadline_ns = api.capped(deadline_ns)
        await self._link.ask(api.Revoke(self._vm, device, deadline_ns), deadline_ns)

    async def close(self, device: str) -> None:
        """See `contract.Windows`."""
        await self._link.forget(self._vm, device)

    def regions(self) -> int:
        """See `contract.Windows`."""
        return self._link.regions(self._vm)


class _Talk:
    """One connection to the broker."""

    def __init__(
        self,
        connection: Connection,
        heard: Callable[[Report], None],
        lost: Callable[[_Talk, str], None],
    ) -> None:
        self._connection = connection
        self._heard = heard
        self._lost = lost
        self._lines = Lines(api.LINE_BYTES_MAX * 16)
        self._waiting: dict[int, asyncio.Future[api.AnyAnswer]] = {}
        self._number = 0
        self.ended = asyncio.Event()
        connection.attach(self)

    async def ask(self, question: api.AnyQuestion, seconds: float) -> api.AnyAnswer:
        """The answer. Raises the refusal, or OutcomeUnknown."""
        if self.ended.is_set():
            raise OutcomeUnknown("the broker has hung up")
        self._number += 1
        number = self._number
        line = api.encode(api.Asked(number, question))
        if len(line) > api.LINE_BYTES_MAX:
            raise InvalidInput("pieces", f"told in {api.LINE_BYTES_MAX} bytes", len(line))
        answer: asyncio.Future[api.AnyAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._connection.send(line)
        try:
            async with asyncio.timeout(seconds):
                told = await answer
        except TimeoutError:
            text = f"the broker did not answer in {seconds:g} s"
            raise OutcomeUnknown(text) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(told, api.Failed):
            raise api.error_of(told)
        return told

    def hang_up(self) -> None:
        """From our side."""
        self._connection.close("the agent ends")

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """See `io.stream.Peer`."""
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            for line in self._lines.feed(data):
                told = api.decode(line, api.Told)
                if isinstance(told.tell, api.News):
                    self._heard(told.tell.window)
                    continue
                waiter = self._waiting.get(told.id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(told.tell)
        except InvalidInput as error:
            self._connection.close(f"it says what makes no sense: {error}")

    def drained(self) -> None:
        """See `io.stream.Peer`."""

    def closed(self, reason: str) -> None:
        """See `io.stream.Peer`."""
        self.ended.set()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(OutcomeUnknown(f"the broker hung up: {reason}"))
        self._lost(self, reason)


def _ignore(windows: Collection[Window]) -> None:
    """Nobody is to be told."""


def _can_take(report: Report) -> bool:
    return report.state in _IN_HAND and not report.must_stop_vm
