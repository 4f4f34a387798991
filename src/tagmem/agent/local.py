"""What people and programs on this host ask its agent: one line of JSON, answered by lines of JSON.

At `<run>/agent.sock`, which only the agent's own user can open. `{"vm": VERB, ...}` is for the
hypervisors, `{"ask": "host"}` for the host's name. The last line of an answer has `"done": true` or
an `"error"`; lines before it are output of a command. Whoever hangs up abandons its question, not
what it set in motion.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tagmem.base.errors import InvalidInput, TagmemError, Unsupported, kind_of
from tagmem.base.lines import Lines
from tagmem.ports import Hypervisors

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 256 * 1024
PENDING_BYTES_MAX = 4 << 20
"""Of output that a reader has not taken: more ends its connection, not the agent."""
CONNECTIONS_MAX = 128
REQUESTS_MAX = 16
"""Of one connection that wait for their turn."""


class LocalConnection(Protocol):
    """A connected Unix socket (`io/stream.py`)."""

    pending_bytes: int

    def attach(self, peer: Any) -> None: ...

    def send(self, data: bytes) -> None: ...

    def close(self, reason: str = "closed") -> None: ...


class LocalListener(Protocol):
    """A listening Unix socket."""

    def close(self) -> None: ...


Listen = Callable[[str, Callable[[Any], None]], LocalListener]


class LocalApi:
    """The server; `start` in a running loop."""

    def __init__(self, path: str, hypervisors: Hypervisors | None, host: str = "") -> None:
        self._path = path
        self._host = host
        self._hypervisors = hypervisors
        self._listener: LocalListener | None = None
        self._peers: set[_Peer] = set()

    def start(self, listen: Listen) -> None:
        """Listen. Raises Conflict when somebody does already."""
        self._listener = listen(self._path, self._accept)

    def close(self) -> None:
        """Stop listening, hang up on everybody."""
        if self._listener is not None:
            self._listener.close()
        for peer in tuple(self._peers):
            peer.hang_up()

    def _accept(self, connection: LocalConnection) -> None:
        if len(self._peers) >= CONNECTIONS_MAX:
            connection.close("too many connections")
            return
        peer = _Peer(connection, self._answer, self._peers.discard)
        self._peers.add(peer)
        connection.attach(peer)

    async def _answer(self, line: bytes, peer: _Peer) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        try:
            if not isinstance(request, dict):
                raise InvalidInput("request", "one line with a JSON object", line[:80])
            if request.get("ask") == "host":
                peer.say({"host": self._host, "done": True})
                return
            if "vm" not in request:
                raise InvalidInput("request", "`vm`", sorted(request)[:4])
            if self._hypervisors is None:
                raise Unsupported("this agent has no hypervisor")
            told = await self._hypervisors.call(request, peer.say)
            peer.say({**told, "done": True})
        except TagmemError as error:
            peer.say({"error": str(error), "kind": kind_of(error)})


class _Peer:
    """One connection: requests one after another."""

    def __init__(
        self,
        connection: LocalConnection,
        answer: Callable[[bytes, _Peer], Any],
        forget: Callable[[_Peer], None],
    ) -> None:
        self._connection = connection
        self._answer = answer
        self._forget = forget
        self._lines = Lines(LINE_BYTES_MAX)
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while (line := await self._waiting.get()) is not None:
            await self._answer(line, self)

    def say(self, document: Mapping[str, Any]) -> None:
        """One line."""
        if self._connection.pending_bytes > PENDING_BYTES_MAX:
            self._connection.close("its answers are not read")
            return
        data = json.dumps(document, separators=(",", ":"), default=str).encode() + b"\n"
        self._connection.send(data)

    def hang_up(self) -> None:
        """From our side."""
        self._connection.close("the agent ends")

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes; nobody has a descriptor to give us."""
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            lines = self._lines.feed(data)
        except InvalidInput as error:
            self._connection.close(str(error))
            return
        for line in lines:
            if self._waiting.qsize() >= REQUESTS_MAX:
                self._connection.close("too many requests at once")
                return
            self._waiting.put_nowait(line)

    def drained(self) -> None:
        """Everything sent has left."""

    def closed(self, reason: str) -> None:
        """What is under way goes on: a start or an attach is not undone by a lost terminal."""
        self._forget(self)
        self._waiting.put_nowait(None)
