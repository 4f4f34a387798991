"""Byte streams over Unix sockets that file descriptors can travel on, for both ends of every CCI
port.

asyncio's own transports cannot send or receive descriptors (SCM_RIGHTS), so these are raw
non-blocking sockets under `add_reader`/`add_writer`. A Connection moves bytes; a Peer, given by the
caller, drives a session without I/O. Nothing here blocks, and what a peer does not read is counted,
not lost: the caller looks at `pending_bytes` and pauses reading.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tagmem.base.errors import Conflict, InvalidInput

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 * 1024
"""Read at once. Larger ones would be mapped and unmapped by the allocator each time."""
DESCRIPTORS_MAX = 16
"""Taken from one message; further ones are closed by the kernel."""
SOCKET_PATH_BYTES_MAX = 107
"""Of a Unix socket's address (108 bytes with its end)."""
SOCKET_MODE = 0o600
_CREDENTIALS = struct.Struct("3i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)


class Peer(Protocol):
    """What a connection tells: the session that it carries."""

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes, and descriptors that came beside them and now belong to the callee."""

    def drained(self) -> None:
        """Everything sent so far has left this process."""

    def closed(self, reason: str) -> None:
        """The connection ended; told once, also after `close`."""


class Connection:
    """One connected socket. Made by `connect` and `listen`; `attach` starts it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._peer: Peer | None = None
        self._queue: deque[tuple[bytes, int]] = deque()
        self._writing = False
        self._reading = False
        self.pending_bytes = 0
        """Bytes that the other side has not taken yet."""
        self.open = True

    @property
    def peer_pid(self) -> int:
        """The process at the other end; 0 when the kernel does not say."""
        packed = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(packed)[0])

    def attach(self, peer: Peer) -> None:
        """Start telling `peer` what comes."""
        self._peer = peer
        self.resume_reading()

    def send(self, data: bytes, descriptor: int = -1) -> None:
        """Send bytes, and beside them a copy of `descriptor`, which is closed here when it has
        left.
        """
        if not self.open:
            if descriptor >= 0:
                os.close(descriptor)
            return
        if data:
            self._queue.append((data, descriptor))
            self.pending_bytes += len(data)
            if not self._writing:
                self._write()

    def pause_reading(self) -> None:
        """Leave bytes with the kernel until `resume_reading`: back-pressure."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def resume_reading(self) -> None:
        """Read again."""
        if self.open and not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock, self._read)

    def close(self, reason: str = "closed") -> None:
        """End it now; what was not sent or read is discarded."""
        if not self.open:
            return
        self.open = False
        self.pause_reading()
        if self._writing:
            self._loop.remove_writer(self._sock)
        for _, descriptor in self._queue:
            if descriptor >= 0:
                os.close(descriptor)
        self._queue.clear()
        self._sock.close()
        if self._peer is not None:
            self._peer.closed(reason)

    def _read(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        descriptors = _descriptors(ancillary)
        if not data:
            _close_all(descriptors)
            self.close("the other side closed")
        elif self._peer is not None:
            self._peer.received(data, descriptors)
        else:
            _close_all(descriptors)

    def _write(self) -> None:
        while self._queue:
            data, descriptor = self._queue[0]
            try:
                sent = self._send(data, descriptor)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self.close(error.strerror or str(error))
                return
            if sent and descriptor >= 0:
                os.close(descriptor)
                descriptor = -1
            self.pending_bytes -= sent
            if sent < len(data):
                self._queue[0] = (data[sent:], descriptor)
                self._watch()
                return
            self._queue.popleft()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock)
            if self._peer is not None:
                self._peer.drained()

    def _send(self, data: bytes, descriptor: int) -> int:
        if descriptor < 0:
            return self._sock.send(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        return self._sock.sendmsg([data], rights)

    def _watch(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock, self._write)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def adopt(descriptor: int) -> Connection:
    """A connection of a socket that somebody gave us, which belongs to it from now on.

    Raises InvalidInput, the descriptor closed, when it is not a connected Unix stream socket.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a socket")
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        os.close(descriptor)
        raise InvalidInput("descriptor", "a Unix stream socket", error.strerror) from None
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise InvalidInput("descriptor", "a Unix stream socket", sock.family.name)
        sock.getpeername()
        return Connection(sock)
    except OSError as error:
        sock.close()
        raise InvalidInput("descriptor", "a connected socket", error.strerror) from None
    except InvalidInput:
        sock.close()
        raise


class Listener:
    """A listening Unix socket; each connection is given to `accept`."""

    def __init__(self, path: Path, accept: Callable[[Connection], None]) -> None:
        self._path = path
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._sock = _bound(path)
        self._loop.add_reader(self._sock, self._ready)

    def _ready(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: this caller is turned away, the others go on.
            log.warning("socket %s: %s", self._path, error.strerror)
            return
        self._accept(Connection(sock))

    def close(self) -> None:
        """Stop listening and take the socket's name away."""
        self._loop.remove_reader(self._sock)
        self._sock.close()
        with suppress(OSError):
            self._path.unlink()


def listen(path: Path | str, accept: Callable[[Connection], None]) -> Listener:
    """Listen at `path` (mode 0600). Raises Conflict when somebody does already, InvalidInput when
    it cannot be.
    """
    return Listener(Path(path), accept)


def _bound(path: Path) -> socket.socket:
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _remove_stale(path)
        # Bound under a private name and moved when its mode is right: nobody connects in between.
        private = path.with_name(f".{os.getpid()}")
        with suppress(FileNotFoundError):
            private.unlink()
        sock.bind(str(private))
        private.chmod(SOCKET_MODE)
        sock.listen(64)
        private.rename(path)
    except OSError as error:
        sock.close()
        raise InvalidInput("socket", f"a path to listen at ({error.strerror})", str(path)) from None
    except Conflict:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"socket {path}: a file of that name is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise Conflict(f"socket {path}: {error.strerror}") from None
    raise Conflict(f"socket {path}: another process listens there")


def check_path(path: Path | str, field: str = "socket") -> None:
    """Raise InvalidInput for a path that no socket can have."""
    size = len(os.fsencode(path))
    if not 0 < size <= SOCKET_PATH_BYTES_MAX:
        raise InvalidInput(field, f"a path of 1 to {SOCKET_PATH_BYTES_MAX} bytes", str(path))


async def connect(path: Path | str) -> Connection:
    """A connection to a Unix socket. Raises OSError when nobody listens there."""
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected = False
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
        connected = True
    finally:
        if not connected:
            sock.close()
    return Connection(sock)
