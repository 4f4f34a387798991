"""The guest's end of the wire to the host: a virtio-serial port, vsock, or (for tests) a socket.

A virtio-serial port is a device that is there or not (hot-plug, modules), can be open while nobody
listens on the host (reads give nothing at once, poll says hang-up), and keeps halves of messages of
whoever used it before. So: absent, idle, live; and what was to be sent to a host that has gone is
dropped, because the next one asks anew.
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import stat
from collections.abc import Callable

from tagmem.base.errors import InvalidInput
from tagmem.wire.guest import VSOCK_PORT

RETRY_SECONDS = 0.2
IDLE_SECONDS = 0.05
"""A port without a host is looked at this often: nothing wakes us when the host comes."""
FULL_BYTES = 256 * 1024
"""With more than this to be sent nothing is read, neither requests nor output of commands."""
READ_BYTES = 64 * 1024


class Channel:
    """One duplex byte stream that comes and goes; `opened`, `received`, `lost` are told of it."""

    def __init__(self, address: str, selector: selectors.BaseSelector) -> None:
        self._open = _opener(address)
        self._selector = selector
        self._fd = -1
        self._live = False
        self._next = 0.0
        self._out = bytearray()
        self._events = 0
        self.opened: Callable[[], None] = _nothing
        self.received: Callable[[bytes], None] = _ignore
        self.lost: Callable[[], None] = _nothing

    @property
    def full(self) -> bool:
        """Whether what produces messages should wait."""
        return len(self._out) > FULL_BYTES

    @property
    def live(self) -> bool:
        """Whether a host listens."""
        return self._live

    @property
    def flushed(self) -> bool:
        """Whether everything was handed over."""
        return not self._out

    def send(self, data: bytes) -> None:
        """Queue bytes for the host that listens now, if one does."""
        if self._live:
            self._out += data
            self._flush()

    def due(self) -> float | None:
        """When `tick` wants to be called."""
        return None if self._live else self._next

    def tick(self, now: float) -> None:
        """Open the device, or see whether a host has come; and say what to wait for."""
        if not self._live and now >= self._next:
            self._next = now + RETRY_SECONDS
            if self._fd < 0:
                self._fd = self._open()
            if self._fd >= 0:
                self._next = now + IDLE_SECONDS
                self._look()
        self._watch()

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        events = dict(poll.poll(0)).get(self._fd, 0)
        if events & (select.POLLNVAL | select.POLLERR):
            self._close()
        elif not events & select.POLLHUP:
            self._live = True
            self.opened()

    def _watch(self) -> None:
        wanted = 0
        if self._live:
            wanted = 0 if self.full else selectors.EVENT_READ
            wanted |= selectors.EVENT_WRITE if self._out else 0
        if wanted == self._events:
            return
        if not self._events:
            self._selector.register(self._fd, wanted, self._ready)
        elif not wanted:
            self._selector.unregister(self._fd)
        else:
            self._selector.modify(self._fd, wanted, self._ready)
        self._events = wanted

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and self._live:
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._gone(close=True)
                return
            if data:
                self.received(data)
            else:
                self._gone(close=not _is_device(self._fd))

    def _flush(self) -> None:
        while self._out:
            try:
                count = os.write(self._fd, self._out)
            except BlockingIOError:
                return
            except OSError:
                self._gone(close=True)
                return
            del self._out[:count]

    def _gone(self, *, close: bool) -> None:
        self._live = False
        self._out.clear()
        self._watch()
        if close:
            self._close()
        self.lost()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Give the device back."""
        self._live = False
        if self._fd >= 0:
            self._watch()
            self._close()


def _nothing() -> None: ...


def _ignore(_: bytes) -> None: ...


def _is_device(fd: int) -> bool:
    return stat.S_ISCHR(os.fstat(fd).st_mode)


def _opener(address: str) -> Callable[[], int]:
    """Something that gives a new descriptor, or -1 as long as there is none."""
    if address.startswith("unix:"):
        return lambda: _connect(address.removeprefix("unix:"))
    if address.startswith("vsock"):
        port = address.removeprefix("vsock").removeprefix(":") or str(VSOCK_PORT)
        if not port.isdecimal() or not 0 < int(port) < 1 << 32:
            raise InvalidInput("channel", "vsock or vsock:PORT", address)
        return _Listening(int(port)).accept
    if not address.startswith("/"):
        raise InvalidInput("channel", "a device path, unix:PATH or vsock[:PORT]", address)
    return lambda: _port(address)


def _port(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return -1


def _connect(path: str) -> int:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(path)
    except OSError:
        link.close()
        return -1
    link.setblocking(False)
    return link.detach()


class _Listening:
    """A vsock port that the host connects to."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def accept(self) -> int:
        try:
            if self._socket is None:
                listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
                listening.setblocking(False)
                listening.bind((socket.VMADDR_CID_ANY, self._port))
                listening.listen(1)
                self._socket = listening
            link, peer = self._socket.accept()
        except OSError:
            return -1
        if peer[0] != socket.VMADDR_CID_HOST:
            link.close()  # Nobody but the host gives orders here.
            return -1
        link.setblocking(False)
        return link.detach()
