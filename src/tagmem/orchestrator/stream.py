"""GET /v1/events as server-sent events: from a position on, until the client or the process goes.

A stream keeps no queue. It reads the shared recent events, or the store when it is further
behind, so a client that reads slowly delays only itself; one that does not read at all is cut and
may resume where it was.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from tagmem.base.errors import StorageFailed
from tagmem.orchestrator.asgi import Receive, Send
from tagmem.orchestrator.watch import Feed, server_sent
from tagmem.wire.rest import EventDocument

KEEP_ALIVE_SECONDS = 15.0
"""How often an idle stream sends a comment, so that both ends notice when the other is gone."""
STALL_SECONDS = 30.0
"""How long a client may leave its connection unread."""
STREAMS_MAX = 1_024


class EventStream:
    """One client's stream."""

    open_now: ClassVar[int] = 0

    def __init__(
        self, feed: Feed, after: int, subject: str, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._stall_seconds = stall_seconds
        self._feed = feed
        self._after = after
        self._subject = subject

    async def run(self, receive: Receive, send: Send) -> None:
        """Send until it ends."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        EventStream.open_now += 1
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b": hello\n\n", "more_body": True})
            while not gone.done() and not self._feed.ended:
                async with asyncio.timeout(self._stall_seconds):
                    await self._send_waiting(send)
                await self._wait(gone, send)
            async with asyncio.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": b""})
        except (TimeoutError, StorageFailed):
            return  # cut: the connection is closed, and the client resumes with Last-Event-ID
        finally:
            EventStream.open_now -= 1
            gone.cancel()

    async def _send_waiting(self, send: Send) -> None:
        """Everything behind the position, one page after the other."""
        page = await self._feed.page(self._after)
        if not page:
            return
        self._after = page[-1].id
        body = b"".join(server_sent(event) for event in page if self._wanted(event))
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _wait(self, gone: asyncio.Task[None], send: Send) -> None:
        changed = self._feed.changed(self._after)
        done, _ = await asyncio.wait(
            {changed, gone},
            timeout=KEEP_ALIVE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done:
            changed.cancel()
            async with asyncio.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})

    def _wanted(self, event: EventDocument) -> bool:
        return concerns(event, self._subject)


def concerns(event: EventDocument, subject: str) -> bool:
    """Whether an event is about `subject`, or about something of it (`tag/host`)."""
    if not subject or event.subject == subject:
        return True
    return subject in event.subject.split("/") or event.data.get("tag") == subject


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
