"""The broker as a process: answers the host's agent over a Unix socket, and outlives it.

A guest's window must be served as long as the guest has it, whatever becomes of the agent: QEMU
cannot be connected to a second time. So this process is small, does one thing, is in a session and
a cgroup of its own, and ends only when nobody needs it any more: no agent is connected, and no QEMU
that has a window lives.

The agent is believed as far as its user goes, and bounded all the same: lines, questions under way,
windows, unread answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from tagmem.base.errors import Conflict, InvalidInput, TagmemError
from tagmem.base.ids import parse_name, parse_tag
from tagmem.base.lines import Lines
from tagmem.presenter import brokerapi as api
from tagmem.presenter.broker import Broker
from tagmem.presenter.endpoint import Connection, Report, Sockets

log = logging.getLogger(__name__)

SOCKET = "control"
LOOK_SECONDS = 1.0
"""Between two looks at whether anybody needs this process."""
UNNEEDED_LOOKS = 5
"""So often in a row, before it ends: an agent that was restarted comes back within."""
FIRST_LOOKS = 30
"""Before the first agent has come."""


class BrokerServer:
    """One broker and its agents. Made inside a running loop; raises Conflict when there is one
    already.
    """

    def __init__(self, sockets: Sockets, directory: Path, release: str) -> None:
        self._release = release
        self._peers: set[_Peer] = set()
        self._ending = asyncio.Event()
        self._told_to_end = False
        self.broker = Broker(sockets, directory, self._changed)
        self._listener = sockets.listen(directory / SOCKET, self._accept)

    def end(self) -> None:
        """Stop serving: `run` returns. QEMUs keep what they have mapped."""
        self._ending.set()

    def end_soon(self) -> None:
        """End when no QEMU has a window: until then nobody could take its bytes."""
        log.info("asked to end, which waits for %d windows", len(self.broker.reports()))
        self._told_to_end = True
        if not self._serving():
            self.end()

    def _serving(self) -> bool:
        return any(map(_alive, self.broker.reports()))

    async def run(self) -> None:
        """Until `end`, or until nobody needs it."""
        patience = FIRST_LOOKS
        left = patience
        while not self._ending.is_set() and left > 0:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._ending.wait()
            except TimeoutError:
                needed = self._serving() or bool(self._peers and not self._told_to_end)
                patience = UNNEEDED_LOOKS if needed else patience
                left = patience if needed else left - 1
        self._listener.close()
        for peer in tuple(self._peers):
            peer.hang_up("the broker ends")
        self.broker.close()

    def _accept(self, connection: Connection) -> None:
        if len(self._peers) >= api.CLIENTS_MAX:
            connection.close("too many agents")
            return
        peer = _Peer(self, connection)
        self._peers.add(peer)
        connection.attach(peer)

    def gone(self, peer: _Peer) -> None:
        """An agent has hung up."""
        self._peers.discard(peer)

    def _changed(self, report: Report) -> None:
        for peer in tuple(self._peers):
            peer.say(api.Told(api.NEWS, api.News(report)))

    async def answer(self, asked: api.AnyQuestion) -> api.AnyAnswer:
        """What a question leads to. Raises TagmemError."""
        match asked:
            case api.Hello():
                return api.Greeting(api.VERSION, self._release, os.getpid())
            case api.List():
                return api.Reports(tuple(self.broker.reports()))
            case api.Open():
                return api.Opened(self._open(asked))
            case api.Mapped():
                await self.broker.mapped(asked.vm, asked.device, asked.deadline_ns)
            case api.Look():
                found = await self.broker.found(asked.vm, asked.device, asked.deadline_ns)
                return api.Looked(found)
            case api.Revoke():
                await self.broker.revoke(asked.vm, asked.device, asked.deadline_ns)
            case api.Forget():
                self.broker.forget(asked.vm, asked.device)
            case api.End():
                if windows := len(self.broker.reports()):
                    raise Conflict(f"{windows} windows are served")
                self.end()
        return api.Done()

    def _open(self, asked: api.Open) -> str:
        parse_name(asked.vm, "vm")
        parse_tag(asked.tagged.tag)
        for piece in asked.tagged.pieces:
            if not piece.path.startswith("/") or "\0" in piece.path:
                raise InvalidInput("piece", "in a file with an absolute path", piece.path)
        if len(self.broker.reports()) >= api.WINDOWS_MAX:
            raise Conflict(f"there are {api.WINDOWS_MAX} windows, which is the most")
        return self.broker.open(
            asked.vm, asked.device, asked.tagged, adopt=asked.adopt, qemu_pid=asked.qemu_pid
        )


def _alive(report: Report) -> bool:
    """Whether a QEMU may need this window."""
    return report.qemu_pid > 0 and os.path.exists(f"/proc/{report.qemu_pid}")


class _Peer:
    """One agent: its questions are answered side by side."""

    def __init__(self, server: BrokerServer, connection: Connection) -> None:
        self._server = server
        self._connection = connection
        self._lines = Lines(api.LINE_BYTES_MAX)
        self._tasks: set[asyncio.Task[None]] = set()

    def say(self, told: api.Told) -> None:
        """One line."""
        if self._connection.pending_bytes > api.PENDING_BYTES_MAX:
            self._connection.close("its answers are not read")
            return
        self._connection.send(api.encode(told))

    def hang_up(self, reason: str) -> None:
        """From our side."""
        self._connection.close(reason)

    async def _answer(self, asked: api.Asked) -> None:
        try:
            told: api.AnyAnswer = await self._server.answer(asked.ask)
        except TagmemError as error:
            told = api.failure(error)
        self.say(api.Told(asked.id, told))

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes; the bytes of tags come by their paths, so that this process has none open."""
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            questions = [api.decode(line, api.Asked) for line in self._lines.feed(data)]
        except InvalidInput as error:
            log.warning("an agent: %s", error)
            self._connection.close(str(error))
            return
        if len(self._tasks) + len(questions) > api.QUESTIONS_MAX:
            self._connection.close("too many questions at once")
            return
        for asked in questions:
            task = asyncio.get_running_loop().create_task(self._answer(asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def drained(self) -> None:
        """Everything told has left."""

    def closed(self, reason: str) -> None:
        """Nobody waits for answers any more. A window that was to be revoked stays so."""
        log.info("an agent has gone: %s", reason)
        for task in self._tasks:
            task.cancel()
        self._server.gone(self)
