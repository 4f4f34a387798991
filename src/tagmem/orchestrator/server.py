"""The HTTP server: sockets that are bound before anything else is touched, and an orderly end.

What one connection says and hears is in `http.py`; agents' WebSockets are in `websocket.py`, which
is loaded with the first agent, not with the process.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.orchestrator.app import Application
from tagmem.orchestrator.config import TcpEndpoint, UnixEndpoint
from tagmem.orchestrator.http import Connection
from tagmem.orchestrator.serving import Serving

BACKLOG = 1_024
KEEP_ALIVE_SECONDS = 75
GRACE_SECONDS = 5
"""How long requests under way may take at the end."""
SWEEP_SECONDS = 15.0
"""Between looks for connections that have been idle too long."""
UNIX_MODE = 0o660


class Listening:
    """Sockets that listen, and the names that Unix ones have in the file system."""

    def __init__(self, endpoints: Sequence[TcpEndpoint | UnixEndpoint]) -> None:
        """Raises Conflict for an address in use, InvalidInput for one that cannot be bound."""
        self.sockets: list[socket.socket] = []
        self._paths: list[str] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for endpoint in endpoints:
                if isinstance(endpoint, UnixEndpoint):
                    self.sockets.append(_bind_unix(endpoint))
                    self._paths.append(endpoint.path)
                else:
                    self.sockets.append(_bind_tcp(endpoint))
            undo.pop_all()

    def close(self) -> None:
        """Close them and take their names away. A second time does nothing."""
        for each in self.sockets:
            each.close()
        for path in self._paths:
            with suppress(OSError):
                os.unlink(path)
        self._paths.clear()


def _bind_tcp(endpoint: TcpEndpoint) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidInput("listen", "a name or address of this machine", str(endpoint)) from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise _refusal(endpoint, error) from None
    made.setblocking(False)
    return made


def _bind_unix(endpoint: UnixEndpoint) -> socket.socket:
    try:
        _clear(endpoint)
    except OSError as error:
        raise _refusal(endpoint, error) from None
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(endpoint.path)
        os.chmod(endpoint.path, UNIX_MODE)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise _refusal(endpoint, error) from None
    made.setblocking(False)
    return made


def _clear(endpoint: UnixEndpoint) -> None:
    """Take away what a killed process left behind; a socket that answers belongs to somebody."""
    try:
        if not stat.S_ISSOCK(os.lstat(endpoint.path).st_mode):
            raise Conflict(f"cannot listen on {endpoint}: a file that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(endpoint.path)
        except (ConnectionRefusedError, FileNotFoundError):
            with suppress(FileNotFoundError):
                os.unlink(endpoint.path)
            return
    raise _refusal(endpoint, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def _refusal(endpoint: TcpEndpoint | UnixEndpoint, error: OSError) -> Conflict | InvalidInput:
    if error.errno == errno.EADDRINUSE:
        return Conflict(f"cannot listen on {endpoint}: the address is in use by another process")
    why = error.strerror or str(error)
    return InvalidInput("listen", f"an address that this process may bind ({why})", str(endpoint))


class HttpServer:
    """The API's server, ended by SIGTERM or SIGINT with exit code 0, and by `stop`."""

    def __init__(self, application: Application, ending: Callable[[], None]) -> None:
        """`ending` is called when the end begins, before requests under way are waited for."""
        self._serving = Serving(application, asyncio.get_running_loop())
        self._ending = ending
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Begin the end."""
        self._ended.set()

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Until `stop`; then let requests under way end, and close."""
        serving = self._serving
        servers = [await self._listen(each) for each in sockets]
        with self._signals():
            sweep = serving.loop.call_later(SWEEP_SECONDS, self._sweep)
            await self._ended.wait()
            sweep.cancel()
            for server in servers:
                server.close()
            serving.ending = True
            self._ending()
            for connection in tuple(serving.connections):
                connection.end()
            await self._drain()

    async def _listen(self, listening: socket.socket) -> asyncio.Server:
        loop = self._serving.loop
        if listening.family == socket.AF_UNIX:
            return await loop.create_unix_server(self._connection, sock=listening, backlog=BACKLOG)
        return await loop.create_server(self._connection, sock=listening, backlog=BACKLOG)

    def _connection(self) -> Connection:
        return Connection(self._serving)

    def _sweep(self) -> None:
        """Close what has said nothing for too long, also in the middle of a head or body."""
        now = self._serving.loop.time()
        for connection in tuple(self._serving.connections):
            if connection.idle and now - connection.idle_since > KEEP_ALIVE_SECONDS:
                connection.end()
        if not self._ended.is_set():
            self._serving.loop.call_later(SWEEP_SECONDS, self._sweep)

    async def _drain(self) -> None:
        """Wait for the requests under way, for GRACE_SECONDS or until a second signal."""
        serving = self._serving
        hurry = asyncio.create_task(self._hurry.wait())
        until = serving.loop.time() + GRACE_SECONDS
        while serving.tasks and not hurry.done():
            left = until - serving.loop.time()
            if left <= 0:
                break
            await asyncio.wait(
                {hurry, *serving.tasks}, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
        hurry.cancel()
        for task in tuple(serving.tasks):
            task.cancel()
        if serving.tasks:
            await asyncio.wait(serving.tasks)
        for connection in tuple(serving.connections):
            connection.abort()

    @contextmanager
    def _signals(self) -> Generator[None, None, None]:
        """SIGTERM and SIGINT begin the end; a second one ends at once. Not beside the main thread,
        where no signal arrives.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._ended.is_set():
            self._hurry.set()
        self.stop()
