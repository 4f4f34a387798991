"""Keeps a HostLink connected to its appliance's Unix socket: bytes, descriptors, deadlines,
back-off.

Descriptors travel beside bytes, so the socket is read with recvmsg; a descriptor that no answer
claims is closed.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from tagmem.agent.mailbox import HostLink, MediaAnswer
from tagmem.base.units import SECOND
from tagmem.ports import Clock, Effect, Event

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 * 1024
DESCRIPTORS_MAX = 16
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_PEER_CREDENTIALS = struct.Struct("3i")

OnMedia = Callable[[MediaAnswer, int], None]
"""Told of each answer to `ask_media`, with its descriptor or -1; the descriptor is then its own."""


class Connection:
    """One appliance; `run` until cancelled."""

    def __init__(
        self,
        link: HostLink,
        path: str,
        clock: Clock,
        post: Callable[[Event], None],
        on_media: OnMedia,
    ) -> None:
        self.link = link
        self.peer_pid = 0
        """The appliance's process while connected: it has the bytes open because it is the device.
        """
        self.last_error = "not connected yet"
        self._path = path
        self._clock = clock
        self._post = post
        self._on_media = on_media
        self._socket: socket.socket | None = None
        self._out = bytearray()
        self._descriptors: deque[int] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._over: asyncio.Future[str] | None = None
        self._writing = False

    async def run(self) -> None:
        """Connect, serve, and begin again."""
        failures = 0
        while True:
            reason = await self._session()
            failures = 0 if reason is None else failures + 1
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
            await asyncio.sleep(pause)

    async def _session(self) -> str | None:
        """One connection; None when it had come up, else why it had not."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            try:
                await loop.sock_connect(sock, self._path)
            except OSError as error:
                self._failed(f"{self._path}: {error.strerror}")
                return self.last_error
            credentials = sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
            )
            self.peer_pid = _PEER_CREDENTIALS.unpack(credentials)[0]
            self._socket, self._over = sock, loop.create_future()
            self.link.connected(self._clock.now())
            loop.add_reader(sock, self._readable)
            self._pump()
            reason = await self._over
        finally:
            self._close(loop, sock)
        self._failed(reason)
        for event in self.link.disconnected(self._clock.now(), reason):
            if not isinstance(event, MediaAnswer):
                self._post(event)
        return None

    def _failed(self, reason: str) -> None:
        if reason != self.last_error:
            log.warning("appliance %s: %s", self.link.appliance, reason)
        self.last_error = reason

    def _close(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        loop.remove_reader(sock)
        loop.remove_writer(sock)
        sock.close()
        self._socket, self._writing = None, False
        self._out.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, reason: str) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(reason)

    # ---- bytes

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                RECEIVE_BYTES, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"{self._path}: {error.strerror}")
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                self._descriptors.extend(descriptors)
        if not data:
            self._end("the appliance has closed the connection")
            return
        self._hear(self.link.feed(data, self._clock.now()))

    def _hear(self, events: list[Event | MediaAnswer]) -> None:
        for event in events:
            if isinstance(event, MediaAnswer):
                given = event.media is not None and bool(self._descriptors)
                self._on_media(event, self._descriptors.popleft() if given else -1)
            else:
                self._post(event)
        self._pump()

    def _pump(self) -> None:
        self._out += self.link.outgoing()
        if self.link.broken:
            self._end(self.link.broken)
            return
        self._write()
        self._schedule()

    def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._out and self._socket is not None:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                break
            except OSError as error:
                self._end(f"{self._path}: {error.strerror}")
                return
            del self._out[:sent]
        if self._socket is not None and bool(self._out) != self._writing:
            self._writing = bool(self._out)
            if self._writing:
                loop.add_writer(self._socket, self._write)
            else:
                loop.remove_writer(self._socket)

    def _schedule(self) -> None:
        deadline = self.link.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None and self._socket is not None:
            delay = max(0.0, (deadline - self._clock.now()) / SECOND)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._hear(self.link.tick(self._clock.now()))

    # ---- orders

    def perform(self, effect: Effect) -> None:
        """Carry out one effect; without a session it is void, and ordered again later."""
        self.link.perform(effect, self._clock.now())
        if self._socket is not None:
            self._pump()

    def ask_media(self, tag: str) -> bool:
        """Ask where the bytes of a tag are; False without a session."""
        asked = self.link.ask_media(tag, self._clock.now())
        if asked:
            self._pump()
        return asked


def close_quietly(descriptor: int) -> None:
    """For descriptors that nobody wants."""
    if descriptor >= 0:
        with suppress(OSError):
            os.close(descriptor)
