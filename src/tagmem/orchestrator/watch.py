"""Who waits for what has not happened yet: held answers, and the event stream.

Both are woken by the engine's commits and by nothing else; nobody polls. What they are told is
made from the committed state, in the moment of the commit, so it can be neither too early nor of
another time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from tagmem.engine import Engine
from tagmem.orchestrator.asgi import Response
from tagmem.ports import HistoryEntry, Step, Store
from tagmem.wire.rest import EventDocument

Judge = Callable[[], Response | None]
"""Looks at the state and gives the answer, or None while there is none. May raise Refused."""

RECENT_EVENTS_MAX = 4_096
"""Events kept in memory; a stream that is further behind reads the store."""
HISTORY_PAGE = 512
WAITERS_MAX = 16_384

_encode = msgspec.json.Encoder().encode


class Waiters:
    """Requests whose answer is held until something has become of their subject."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[asyncio.Future[Response], Judge]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, subject: str, judge: Judge) -> asyncio.Future[Response] | None:
        """A future that resolves when `judge` has an answer; None when too many wait already."""
        if self._count >= WAITERS_MAX:
            return None
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(subject, {})[future] = judge
        self._count += 1
        return future

    def forget(self, subject: str, future: asyncio.Future[Response]) -> None:
        """Its request is over. Harmless when it was answered."""
        waiting = self._waiting.get(subject)
        if waiting is not None and waiting.pop(future, None) is not None:
            self._count -= 1
            if not waiting:
                del self._waiting[subject]

    def observe(self, steps: list[Step], last_history: int) -> None:
        """After a commit: judge again whatever waits for a changed record."""
        if not self._waiting:
            return
        for subject in {
            subject_of(change.kind, change.key) for step in steps for change in step.changes
        }:
            self.wake(subject)

    def wake(self, subject: str) -> None:
        """Judge again whatever waits for `subject`."""
        for future, judge in list(self._waiting.get(subject, {}).items()):
            if future.done():
                self.forget(subject, future)
                continue
            try:
                answer = judge()
            except Exception as error:
                # A judge is a handler's code: its error is that request's answer.
                future.set_exception(error)
                self.forget(subject, future)
                continue
            if answer is not None:
                future.set_result(answer)
                self.forget(subject, future)

    def end(self) -> None:
        """The process is going: every request is answered with what there is now."""
        for waiting in list(self._waiting.values()):
            for future in waiting:
                future.cancel()
        self._waiting.clear()
        self._count = 0


def subject_of(kind: str, key: str) -> str:
    """What a changed record is about, as waiters name it: a tag, or kind/name for anything else."""
    if kind == "capacity":
        return key
    if kind == "attachment":
        return key.partition("/")[0]
    return f"{kind}/{key}"


class Feed:
    """The public events: the newest in memory, shared by all streams, the older ones in the store.

    A stream is only a position, so a slow one costs nothing but its own lag.
    """

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._recent: deque[EventDocument] = deque(maxlen=RECENT_EVENTS_MAX)
        self._changed: list[asyncio.Future[None]] = []
        self.last = store.last_history()
        self.ended = False
        engine.observe(self.observe)

    def observe(self, steps: list[Step], last_history: int) -> None:
        """After a commit: take its notes into the stream."""
        notes = [note for step in steps for note in step.notes]
        if not notes:
            return
        at_ns = self._engine.committed_ns
        for number, note in enumerate(notes, start=last_history - len(notes) + 1):
            self._recent.append(EventDocument(number, at_ns, note.type, note.subject, note.data))
        self.last = last_history
        self._notify()

    def end(self) -> None:
        """The process is going: every stream ends, and its client resumes elsewhere or later."""
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            if not future.done():
                future.set_result(None)

    def changed(self, after: int) -> asyncio.Future[None]:
        """Resolves when there is an event behind `after`, or the feed has ended."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.last > after or self.ended:
            future.set_result(None)
        else:
            self._changed = [waiting for waiting in self._changed if not waiting.done()]
            self._changed.append(future)
        return future

    async def page(self, after: int, limit: int = HISTORY_PAGE) -> Sequence[EventDocument]:
        """Up to `limit` events behind `after`, oldest first."""
        if after >= self.last:
            return ()
        if self._recent and after >= self._recent[0].id - 1:
            skip = after - self._recent[0].id + 1
            return [
                self._recent[index] for index in range(skip, min(len(self._recent), skip + limit))
            ]
        loop = asyncio.get_running_loop()
        entries = await loop.run_in_executor(None, self._store.history, after, limit)
        return [_document(entry) for entry in entries if entry.seq <= self.last]


def _document(entry: HistoryEntry) -> EventDocument:
    return EventDocument(entry.seq, entry.at_ns, entry.type, entry.subject, entry.data)


def server_sent(event: EventDocument) -> bytes:
    """One event as text/event-stream has it."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.type.encode(), _encode(event))
