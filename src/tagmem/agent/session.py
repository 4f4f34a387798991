"""The agent's side of the orchestrator's WebSocket: dial, say hello, hear wishes, tell
observations.

Only the newest observation of each tag waits to be sent, so an orchestrator that is away or slow
costs one message per tag at most. Calls between hosts go the same way (`peers.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

from tagmem.agent import records as r
from tagmem.agent.peers import PeerDesk
from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_tag
from tagmem.ports import Event
from tagmem.wire.agentapi import (
    Desired,
    Hello,
    Message,
    Observed,
    PeerAnswer,
    PeerRequest,
    Rejected,
    decode_to_agent,
    encode,
)

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 256 * 1024
BACK_OFF_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
REJECTED_SECONDS = 5.0
PING_SECONDS = 10.0


class OrchestratorSession:
    """One orchestrator, dialled again and again; `run` until cancelled."""

    def __init__(
        self,
        url: str,
        hello: Hello,
        post: Callable[[Event], None],
        peers: PeerDesk,
    ) -> None:
        self._url = url
        self._peers = peers
        self._hello = hello
        self._post = post
        self._pending: dict[str, Observed] = {}
        self._said: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._hang_up = ""
        self.connected = False
        self.last_error = "not connected yet"

    def push(self, observed: Observed) -> None:
        """Tell this, in place of what waits to be told of the same tag."""
        self._pending[observed.tag] = observed
        self._wake.set()

    def _say(self, message: Message) -> None:
        """Of calls between hosts, of which few are under way at a time."""
        self._said.append(message)
        self._wake.set()

    def hang_up(self, reason: str) -> None:
        """End the present session; another is tried later."""
        self._hang_up = reason
        self._wake.set()

    async def run(self) -> None:
        """Dial, serve, and begin again."""
        failures = 0
        while True:
            was_up = False
            try:
                async with self._dial() as socket:
                    was_up = True
                    await self._serve(socket)
                    reason = self._hang_up or "the orchestrator has ended the session"
            except (OSError, TimeoutError, WebSocketException, InvalidHandshake) as error:
                reason = f"{type(error).__name__}: {error}"
            except InvalidURI as error:
                raise InvalidInput("orchestrator", "a URL", str(error)) from None
            self.connected = False
            if reason != self.last_error:
                log.warning("orchestrator %s: %s", self._url, reason)
            self.last_error = reason
            failures = 0 if was_up and not self._hang_up else failures + 1
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
            await asyncio.sleep(REJECTED_SECONDS if self._hang_up else pause)
            self._hang_up = ""

    def _dial(self) -> Any:
        path = f"/v1/hosts/{self._hello.host}/session"
        options: dict[str, Any] = {
            "compression": None,
            "max_size": MESSAGE_BYTES_MAX,
            "ping_interval": PING_SECONDS,
            "ping_timeout": PING_SECONDS,
            "proxy": None,
        }
        if self._url.startswith("unix:"):
            options.pop("proxy")
            return unix_connect(
                self._url.removeprefix("unix:"), f"ws://orchestrator{path}", **options
            )
        parts = urlsplit(self._url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        return connect(f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}{path}", **options)

    async def _serve(self, socket: ClientConnection) -> None:
        self._pending.clear()
        self._said.clear()
        await socket.send(encode(self._hello).decode())
        self._post(r.SessionOpened())
        self.connected, self.last_error = True, ""
        sender = asyncio.create_task(self._send(socket), name="observations")
        try:
            async for data in socket:
                if not self._hear(data):
                    return
        finally:
            sender.cancel()
            self._peers.closed()

    def _hear(self, data: str | bytes) -> bool:
        """Post one message; False ends the session."""
        try:
            message = decode_to_agent(data)
            if isinstance(message, Desired):
                self._post(r.DesiredReceived(_checked(message)))
            elif isinstance(message, Rejected):
                self._hang_up = f"rejected: {message.reason}"
                return False
            elif isinstance(message, PeerRequest | PeerAnswer):
                self._peers.hear(message)
            else:
                self._peers.opened(self._say if message.peer_calls else None)
                self._post(r.SyncEnded(message.epoch))
        except (msgspec.MsgspecError, InvalidInput) as error:
            self._hang_up = f"the orchestrator said what cannot be understood: {error}"
            return False
        return True

    async def _send(self, socket: ClientConnection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._hang_up:
                await socket.close(1008, self._hang_up[:100])
                return
            while self._pending or self._said:
                if self._said:
                    message = self._said.popleft()
                else:
                    message = self._pending.pop(next(iter(self._pending)))
                try:
                    await socket.send(encode(message).decode())
                except WebSocketException:
                    return  # The reader sees the end of the session, and says so.


def _checked(desired: Desired) -> Desired:
    """Raises InvalidInput for a tag that is none, so that no odd text becomes a file's name."""
    if parse_tag(desired.tag) != desired.tag:
        raise InvalidInput("tag", "a UUID in canonical form", desired.tag)
    if desired.size_bytes < 0:
        raise InvalidInput("size_bytes", "at least 0", desired.size_bytes)
    return desired
