"""What every connection of the API's server shares: the application, tasks under way, and whether
the end has begun.

Apart from the server itself because both kinds of connection, HTTP and WebSocket, need it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import msgspec

from tagmem.orchestrator.asgi import Receive, Scope, Send

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Client(Protocol):
    """A connection, as the server sees it."""

    idle_since: float

    @property
    def idle(self) -> bool: ...

    def end(self) -> None: ...

    def abort(self) -> None: ...


class Serving:
    """One server's connections and tasks."""

    def __init__(self, application: Asgi, loop: asyncio.AbstractEventLoop) -> None:
        self.application = application
        self.loop = loop
        self.connections: set[Client] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.ending = False

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that the end waits for."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def refused_bytes(detail: str) -> bytes:
    """The rest of an answer, behind its status line, to what never reached a handler; it ends the
    connection.
    """
    document = {"type": "about:blank", "title": "The request cannot be read", "detail": detail}
    body = msgspec.json.encode(document)
    head = "content-type: application/problem+json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
