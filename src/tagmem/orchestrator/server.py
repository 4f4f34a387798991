"""The HTTP server: sockets that are bound before anything else is touched, and an orderly end.

The server's WebSocket half is loaded with the first agent, not with the process: it costs a sixth
of the time until the first allocation.
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
from typing import Any

import uvicorn

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.orchestrator.app import Application
from tagmem.orchestrator.config import TcpEndpoint, UnixEndpoint
from tagmem.orchestrator.sessions import MESSAGE_BYTES_MAX

BACKLOG = 1_024
KEEP_ALIVE_SECONDS = 75
GRACE_SECONDS = 5
"""How long requests under way may take at the end."""
PING_SECONDS = 20.0
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


class _WebSocket(asyncio.Protocol):
    """Stands for the server's WebSocket protocol, and loads it when one is opened."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

        return WebSocketsSansIOProtocol(*args, **kwargs)


class HttpServer(uvicorn.Server):
    """uvicorn, ended by SIGTERM or SIGINT with exit code 0, and by `stop`."""

    def __init__(self, application: Application, ending: Callable[[], None]) -> None:
        """`ending` is called when the end begins, before requests under way are waited for."""
        super().__init__(
            uvicorn.Config(
                application,
                interface="asgi3",
                http="httptools",
                ws=_WebSocket,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                ws_max_size=MESSAGE_BYTES_MAX,
                ws_max_queue=64,
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=PING_SECONDS,
                ws_per_message_deflate=False,
            )
        )
        self._ending = ending
        self._ended = asyncio.Event()

    def stop(self) -> None:
        """Begin the end."""
        self.should_exit = True
        self._ended.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
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
        self.force_exit = self.should_exit
        self.stop()

    async def main_loop(self) -> None:
        """Until `stop`. The date header is brought up to date once a second."""
        counter = 0
        while not await self.on_tick(counter):
            counter = (counter + 10) % 864_000
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ended.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests under way end, then close."""
        self._ending()
        await super().shutdown(sockets)
