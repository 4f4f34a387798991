"""HTTP/1.1 on one connection, for ASGI: what lies between a socket and `app.Application`.

A server framework would answer the same, but takes a fifth of the time until the process's first
allocation to load, and writes each answer in two pieces. The bytes are cut by httptools (llhttp);
here are the bounds, the order of answers, keep-alive, and the end of a connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools

from tagmem.orchestrator.asgi import Message, Scope
from tagmem.orchestrator.serving import Serving, refused_bytes

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 64 * 1024
"""Of a request's line and headers together."""
BODY_BYTES_WAITING_MAX = 64 * 1024
"""Of a body that the handler has not taken yet; no more is read from the socket meanwhile."""
PIPELINED_MAX = 16
"""Requests of one connection that wait for the answer before theirs."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_NO_BODY = frozenset({204, 304})


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class _Date:
    """The Date header, made anew once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            year, month, day, hour, minute, past, weekday, _, _ = time.gmtime(second)
            # RFC 9110 5.6.7, in English whatever the locale says.
            date = f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year}"
            self._line = f"date: {date} {hour:02}:{minute:02}:{past:02} GMT\r\n".encode()
        return self._line


_date = _Date()


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other, in their order."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = True
        self._head_bytes = 0
        self._reading: Exchange | None = None
        self._active: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._paused = False
        self._upgrading = False
        self.idle_since = serving.loop.time()

    # ---- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods and not the base class.
        self.transport = cast(asyncio.Transport, transport)
        self.writable: asyncio.Future[None] | None = None
        self._serving.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._serving.connections.discard(self)
        for exchange in (self._active, self._reading, *self._waiting):
            if exchange is not None:
                exchange.disconnect()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.writable = self._serving.loop.create_future()

    def resume_writing(self) -> None:
        writable, self.writable = self.writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrading:
                self._upgrade(data[upgrade.args[0] :])
                return
        except (httptools.HttpParserError, ValueError) as error:
            # A callback's ValueError comes wrapped; what is said first is what is wrong.
            self._refuse(400, str(error.__context__ or error))
            return
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(431, f"headers may have {HEAD_BYTES_MAX} bytes")

    # ---- from the parser

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._parser.should_upgrade() and self._wants_websocket():
            self._upgrading = True
            return
        path, _, query = self._target().partition(b"?")
        text = path.decode("ascii")
        scope: Scope = {
            "type": "http",
            "method": self._parser.get_method().decode("ascii"),
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "headers": self._headers,
            "http_version": self._parser.get_http_version(),
        }
        keep_alive = self._parser.should_keep_alive() and not self._serving.ending
        exchange = Exchange(self, scope, keep_alive=keep_alive)
        self._reading = exchange
        if self._active is None:
            self._begin(exchange)
            return
        self._waiting.append(exchange)
        if len(self._waiting) >= PIPELINED_MAX:
            self.pause()

    def on_body(self, body: bytes) -> None:
        if self._reading is not None:
            self._reading.add(body)

    def on_message_complete(self) -> None:
        # The next request may come in the same bytes.
        self._in_head = True
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.end_of_input()

    def _target(self) -> bytes:
        """The path and query, also where the whole URL is named. Raises ValueError for neither."""
        if self._url[:1] == b"/":
            return self._url
        url = httptools.parse_url(self._url)
        path: bytes = url.path or b"/"
        return path + b"?" + url.query if url.query else path

    def _wants_websocket(self) -> bool:
        return any(
            name == b"upgrade" and value.lower() == b"websocket" for name, value in self._headers
        )

    # ---- order

    def _begin(self, exchange: Exchange) -> None:
        self._active = exchange
        self._serving.start(exchange.run())

    def ended(self, exchange: Exchange) -> None:
        """An answer is complete, or will never be: go on with the next request, or end."""
        if exchange is not self._active:
            return
        self._active = None
        if not exchange.keep_alive or self._serving.ending:
            self.transport.close()
            return
        self.idle_since = self._serving.loop.time()
        if self._waiting:
            self._begin(self._waiting.popleft())
        self.resume()

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self._active is None

    def pause(self) -> None:
        """Read no more for now."""
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    def end(self) -> None:
        """The server is going: an idle connection ends now, a busy one after its answer."""
        if self._active is None:
            self.transport.close()
        else:
            self._active.keep_alive = False

    def abort(self) -> None:
        """End now, whatever is under way."""
        self.transport.abort()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what is no HTTP, and end: where the next request begins cannot be known."""
        if self._active is None:
            self.transport.write(_STATUS_LINES[status] + _date.line() + refused_bytes(detail))
        self.transport.close()

    def _upgrade(self, rest: bytes) -> None:
        """Hand the connection over to WebSocket, which is loaded with the first one."""
        from tagmem.orchestrator.websocket import WebSocket

        lines = [b"GET %s HTTP/1.1" % self._url]
        lines += [b"%s: %s" % header for header in self._headers]
        self._serving.connections.discard(self)
        session = WebSocket(self._serving)
        self.transport.set_protocol(session)
        session.connection_made(self.transport)
        session.data_received(b"\r\n".join([*lines, b"", b""]) + rest)


class Exchange:
    """One request and its answer, as ASGI has them."""

    __slots__ = (
        "_body",
        "_chunked",
        "_connection",
        "_continue",
        "_delivered",
        "_disconnected",
        "_finished",
        "_more",
        "_start",
        "_started",
        "_wake",
        "keep_alive",
        "scope",
    )

    def __init__(self, connection: Connection, scope: Scope, *, keep_alive: bool) -> None:
        self.scope = scope
        self.keep_alive = keep_alive
        self._connection = connection
        self._body = b""
        self._more = True
        self._delivered = False
        self._disconnected = False
        self._wake: asyncio.Future[None] | None = None
        self._continue = (b"expect", b"100-continue") in scope["headers"]
        self._start: Message | None = None
        self._started = False
        self._finished = False
        self._chunked = False

    async def run(self) -> None:
        """Have the application answer. What it leaves open is cut, so that nobody takes it for
        whole.
        """
        serving = self._connection._serving  # noqa: SLF001 - two halves of one thing
        try:
            await serving.application(self.scope, self.receive, self.send)
        except Exception:
            log.exception("the handler of %s %s failed", self.scope["method"], self.scope["path"])
        if not self._finished:
            self.keep_alive = False
            if not self._started and not self._disconnected:
                detail = refused_bytes("the server failed to answer this")
                self._connection.transport.write(_STATUS_LINES[500] + _date.line() + detail)
            elif self._started:
                # A client that reads nothing would keep a mere close waiting for ever.
                self._connection.abort()
        self._connection.ended(self)

    # ---- in

    def add(self, body: bytes) -> None:
        """A piece of the body has come."""
        self._body += body
        if len(self._body) > BODY_BYTES_WAITING_MAX:
            self._connection.pause()
        self._stir()

    def end_of_input(self) -> None:
        """The body is whole."""
        self._more = False
        self._stir()

    def disconnect(self) -> None:
        """The client is gone."""
        self._disconnected = True
        self._stir()

    def _stir(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def receive(self) -> Message:
        """ASGI: the next piece of the request, or that the client is gone."""
        if self._continue and not self._started:
            self._continue = False
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._disconnected and not self._finished:
            if not self._delivered and (self._body or not self._more):
                body, self._body = self._body, b""
                self._delivered = not self._more
                self._connection.resume()
                return {"type": "http.request", "body": body, "more_body": self._more}
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return {"type": "http.disconnect"}

    # ---- out

    async def send(self, message: Message) -> None:
        """ASGI: a piece of the answer. The head is written with the first piece of the body."""
        if self._disconnected:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        more: bool = message.get("more_body", False)
        data = self._piece(message.get("body", b""), more=more)
        transport = self._connection.transport
        if data:
            transport.write(data)
        if not more:
            self._finished = True
            self._stir()
            return
        writable = self._connection.writable
        if writable is not None:
            await asyncio.shield(writable)

    def _piece(self, body: bytes, *, more: bool) -> bytes:
        head = b""
        if not self._started:
            self._started = True
            head = self._head(body, more=more)
        if self.scope["method"] == "HEAD":
            return head
        if not self._chunked:
            return head + body
        chunk = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
        return head + chunk + (b"" if more else b"0\r\n\r\n")

    def _head(self, body: bytes, *, more: bool) -> bytes:
        start = cast(dict[str, Any], self._start)
        status: int = start["status"]
        lines = [_STATUS_LINES[status], _date.line()]
        sized = status in _NO_BODY
        for name, value in start["headers"]:
            lines.append(b"%s: %s\r\n" % (name, value))
            if name == b"content-length":
                sized = True
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
        if not sized:
            if more and self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            elif more:
                self.keep_alive = False
            else:
                lines.append(b"content-length: %d\r\n" % len(body))
        if self._more:
            # What the client is still sending will not be read as another request.
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        return b"".join((*lines, b"\r\n"))
