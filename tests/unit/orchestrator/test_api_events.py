"""The event stream: resumable, from memory and from the store, cut at the end of the process."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec
import pytest
from tests.unit.orchestrator.world import BLOCK_BYTES, OTHER, TAG, World, http_scope, world

from tagmem.orchestrator.stream import EventStream
from tagmem.wire.rest import EventDocument


class Reader:
    """A client of GET /v1/events that accepts a stream."""

    def __init__(self, w: World, query: str = "", last: int | None = None) -> None:
        headers = {"accept": "text/event-stream"}
        if last is not None:
            headers["last-event-id"] = str(last)
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._events: deque[EventDocument] = deque()
        scope = http_scope("GET", f"/v1/events{query}", headers)
        application = w.orchestrator.application
        self.served = asyncio.create_task(application(scope, self._receive, self._sent.put))

    async def _receive(self) -> Any:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def go(self) -> None:
        self._gone.set()

    async def start(self) -> Any:
        start = await self._sent.get()
        assert (await self._sent.get())["body"] == b": hello\n\n"
        return start

    async def event(self) -> EventDocument | None:
        """The next event; None at the end of the stream."""
        while not self._events:
            sent = await self._sent.get()
            if not sent.get("more_body"):
                return None
            for block in sent["body"].decode().split("\n\n")[:-1]:
                fields = dict(line.split(": ", 1) for line in block.splitlines())
                event = msgspec.json.decode(fields["data"], type=EventDocument)
                assert fields["id"] == str(event.id)
                assert fields["event"] == event.type
                self._events.append(event)
        return self._events.popleft()


async def make(w: World, tag: str) -> None:
    await w.call("PUT", f"/v1/capacities/{tag}", {"size_bytes": BLOCK_BYTES})


def test_a_stream_begins_now_and_tells_what_happens() -> None:
    async def main() -> None:
        async with world() as w:
            reader = Reader(w)
            start = await reader.start()
            assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
            await make(w, TAG)
            event = await reader.event()
            assert event is not None
            assert (event.type, event.subject) == ("capacity.created", TAG)
            assert event.id == w.store.last_history()
            reader.go()
            await reader.served
            assert EventStream.open_now == 0

    asyncio.run(main())


@pytest.mark.parametrize("recent", [4096, 2])
def test_a_stream_resumes_without_gap_or_repeat(recent: int) -> None:
    async def main() -> None:
        async with world() as w:
            # With few kept in memory, the older ones come from the store.
            w.orchestrator.feed._recent = deque(maxlen=recent)
            await make(w, TAG)
            seen = w.store.last_history()
            await make(w, OTHER)
            await w.call("DELETE", f"/v1/capacities/{OTHER}")
            await w.call("DELETE", f"/v1/capacities/{TAG}")
            reader = Reader(w, last=seen)
            await reader.start()
            events = [await reader.event() for _ in range(w.store.last_history() - seen)]
            assert [event.id for event in events if event] == list(
                range(seen + 1, w.store.last_history() + 1)
            )
            reader.go()
            await reader.served

    asyncio.run(main())


def test_a_stream_of_one_subject() -> None:
    async def main() -> None:
        async with world() as w:
            reader = Reader(w, f"?after=0&subject={OTHER}")
            await reader.start()
            await make(w, TAG)
            await make(w, OTHER)
            event = await reader.event()
            assert event is not None
            assert event.subject == OTHER
            reader.go()
            await reader.served

    asyncio.run(main())


def test_the_end_of_the_process_ends_streams() -> None:
    async def main() -> None:
        async with world() as w:
            reader = Reader(w)
            await reader.start()
            w.orchestrator.feed.end()
            assert await reader.event() is None
            await reader.served

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut() -> None:
    async def main() -> None:
        async with world() as w:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)
                if len(sent) > 2:
                    await asyncio.Event().wait()

            async def receive() -> Any:
                return await asyncio.Event().wait()

            stream = EventStream(w.orchestrator.feed, 0, "", stall_seconds=0.01)
            await stream.run(receive, send)
            assert EventStream.open_now == 0
            assert sent[-1]["more_body"]

    asyncio.run(main())


def test_a_wrong_position_is_named() -> None:
    async def main() -> None:
        async with world() as w:
            headers = {"accept": "text/event-stream", "last-event-id": "-3"}
            answer = await w.call("GET", "/v1/events", headers=headers)
            assert (answer.status, answer.json["field"]) == (422, "Last-Event-ID")

    asyncio.run(main())
