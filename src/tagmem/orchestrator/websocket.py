"""A WebSocket connection for ASGI, loaded with the first agent. Framing is the library's.

Text messages only, which is all that agents send. Pings find a dead peer; messages that the
application has not taken yet stop the reading of more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote

from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from tagmem.orchestrator.asgi import Message, Scope
from tagmem.orchestrator.serving import Serving
from tagmem.orchestrator.sessions import MESSAGE_BYTES_MAX

log = logging.getLogger(__name__)

PING_SECONDS = 20.0
"""Between pings; a peer that has not answered one by the next is gone."""
CLOSE_SECONDS = 5.0
"""How long the peer's half of the closing handshake may take."""
MESSAGES_WAITING_MAX = 64
_GOING_AWAY = 1012
_NO_STATUS = 1005


class WebSocket(asyncio.Protocol):
    """One agent's connection."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._protocol = ServerProtocol(max_size=MESSAGE_BYTES_MAX, logger=log)
        self._response: Response | None = None
        self._messages: deque[Message] = deque()
        self._parts: list[bytes] = []
        self._wake: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._gone = False
        self._timer: asyncio.TimerHandle | None = None
        self._awaiting_pong = False
        self.idle_since = 0.0

    @property
    def idle(self) -> bool:
        """Never: pings find out whether somebody is there."""
        return False

    # ---- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._serving.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._serving.connections.discard(self)
        self._leave(_NO_STATUS, "")
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = self._serving.loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                self._open(event)
            elif isinstance(event, Frame):
                self._frame(event)
        self._flush()
        if self._protocol.close_expected():
            self._closing()

    def _open(self, request: Request) -> None:
        response = self._protocol.accept(request)
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            self._protocol.send_response(response)
            return
        self._response = response
        path, _, query = request.path.partition("?")
        scope: Scope = {
            "type": "websocket",
            "path": unquote(path),
            "query_string": query.encode("latin-1"),
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in request.headers.raw_items()
            ],
        }
        self._put({"type": "websocket.connect"})
        self._serving.start(self._run(scope))

    def _frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._parts.append(bytes(frame.data))
            if frame.fin:
                whole, self._parts = b"".join(self._parts), []
                self._receive(whole)
        elif frame.opcode is Opcode.PONG:
            self._awaiting_pong = False
        elif frame.opcode is Opcode.CLOSE:
            received = self._protocol.close_rcvd
            self._leave(
                received.code if received else _NO_STATUS, received.reason if received else ""
            )

    def _receive(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self._protocol.fail(1007, "not UTF-8")
            return
        self._put({"type": "websocket.receive", "text": text})
        if len(self._messages) >= MESSAGES_WAITING_MAX and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self.transport.write(data)
            else:
                # Only our half: what the peer is still sending is read and dropped, because a
                # close over unread bytes would take our close frame back from the wire.
                self._leave(_NO_STATUS, "")
                if not self.transport.is_closing():
                    self.transport.write_eof()
                    self._set_timer(CLOSE_SECONDS, self.transport.abort)

    # ---- ping, and the end

    def _ping(self) -> None:
        if self._gone or self._protocol.state is not State.OPEN:
            return
        if self._awaiting_pong:
            self._protocol.fail(1011, "no answer to a ping")
            self._flush()
            self._closing()
            return
        self._awaiting_pong = True
        self._protocol.send_ping(b"")
        self._flush()
        self._set_timer(PING_SECONDS, self._ping)

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._serving.loop.call_later(seconds, then)

    def _closing(self) -> None:
        """Our close frame is out: wait for the peer's end, but not for ever."""
        self._leave(_NO_STATUS, "")
        self._set_timer(CLOSE_SECONDS, self.transport.abort)

    def _leave(self, code: int, reason: str) -> None:
        """Tell the application, once, that nothing more will come."""
        if self._gone:
            return
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
        self._put({"type": "websocket.disconnect", "code": code, "reason": reason})

    def end(self) -> None:
        """The server is going: the peer may come again soon."""
        if self._protocol.state is State.OPEN:
            self._close(_GOING_AWAY, "")
            self._leave(_GOING_AWAY, "")
        elif self._response is None:
            self.transport.close()

    def abort(self) -> None:
        """End now."""
        self.transport.abort()

    def _close(self, code: int, reason: str) -> None:
        try:
            self._protocol.send_close(code, reason)
        except InvalidState:
            return
        self._flush()
        self._set_timer(CLOSE_SECONDS, self.transport.abort)

    # ---- ASGI

    async def _run(self, scope: Scope) -> None:
        try:
            await self._serving.application(scope, self.receive, self.send)
        except Exception:
            log.exception("the session at %s failed", scope["path"])
        if self._response is not None:
            self._reject()
        elif self._protocol.state is State.OPEN:
            self._close(1011, "")

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def receive(self) -> Message:
        """The next message of the peer; at the end, again and again that it is gone."""
        while not self._messages:
            if self._gone:
                return {"type": "websocket.disconnect", "code": _NO_STATUS}
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        message = self._messages.popleft()
        if self._paused and not self._messages:
            self._paused = False
            self.transport.resume_reading()
        return message

    async def send(self, message: Message) -> None:
        """Accept, a text, or the end. What is sent to a peer that is gone is dropped."""
        kind = message["type"]
        if self._response is not None:
            if kind == "websocket.accept":
                response, self._response = self._response, None
                self._protocol.send_response(response)
                self._flush()
                self._set_timer(PING_SECONDS, self._ping)
            else:
                self._reject()
            return
        if self._protocol.state is not State.OPEN:
            return
        if kind == "websocket.close":
            self._close(message.get("code", 1000), message.get("reason", ""))
            return
        self._protocol.send_text(message["text"].encode())
        self._flush()
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def _reject(self) -> None:
        """The application will not have it: an HTTP answer instead of the handshake."""
        self._response = None
        self._protocol.send_response(self._protocol.reject(HTTPStatus.FORBIDDEN, "refused\n"))
        self._flush()
        self.transport.close()
