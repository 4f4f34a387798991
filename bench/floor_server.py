"""The floor of a durable service: an HTTP server that decides nothing and makes every request
durable.

`python -m bench.floor_server SOCKET LOG`: each request's bytes are appended to LOG and answered 204
once they are on stable storage; requests that come during an fdatasync share the next one. uvloop,
one connection's bytes at a time, no framework: the least that a Python process can do and still
keep its word.
"""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import uvloop

_DONE = b"HTTP/1.1 204 No Content\r\n\r\n"
_LENGTH = b"content-length: "


class Log:
    """Appends with group commit."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._waiting: list[tuple[bytes, asyncio.Transport]] = []
        self._writer = ThreadPoolExecutor(1)
        self._busy = False

    def add(self, data: bytes, transport: asyncio.Transport) -> None:
        self._waiting.append((data, transport))
        if not self._busy:
            self._busy = True
            self._write()

    def _write(self) -> None:
        taken, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._writer, self._sync, b"".join(d for d, _ in taken))
        writing.add_done_callback(lambda _: self._written([t for _, t in taken]))

    def _sync(self, data: bytes) -> None:
        os.write(self._fd, data)
        os.fdatasync(self._fd)

    def _written(self, transports: list[asyncio.Transport]) -> None:
        for transport in transports:
            transport.write(_DONE)
        if self._waiting:
            self._write()
        else:
            self._busy = False


class Connection(asyncio.Protocol):
    """Cuts a connection's bytes into requests."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods and not the base class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            at = self._received.find(_LENGTH, 0, end)
            whole = end + 4
            if at >= 0:
                stop = self._received.find(b"\r", at)
                whole += int(self._received[at + len(_LENGTH) : stop])
            if len(self._received) < whole:
                return
            self._log.add(self._received[:whole], self._transport)
            self._received = self._received[whole:]


async def serve(path: str, log_path: str) -> None:
    log = Log(log_path)
    server = await asyncio.get_running_loop().create_unix_server(lambda: Connection(log), path)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
