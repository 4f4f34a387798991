"""The one loop of every daemon: event -> step -> commit -> effects -> replies, in that order and no other.

All events that wait are stepped together and share one commit (group commit). While the commit runs in the
store's thread, new events queue up and become the next batch, so a slow disk makes batches larger rather
than answers wrong. When a commit fails, nothing of its batch may be believed: its submitters are told
StorageFailed and the machine is restored from the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tagmem.base.errors import StorageFailed
from tagmem.base.limits import ENGINE_BATCH_MAX, ENGINE_QUEUE_MAX
from tagmem.base.units import SECOND
from tagmem.ports import Batch, Clock, Effect, Event, Loaded, Machine, Step, Store, Tick

log = logging.getLogger(__name__)

Perform = Callable[[Effect], None]
"""Carries out one effect without waiting; its result comes back as an event."""
Observer = Callable[[list[Step], int], None]
"""Told of each committed batch and the last history number."""


class QueueFull(StorageFailed):
    """More events wait than the engine takes; try again later."""


class Engine:
    """Drives one machine over one store."""

    def __init__(self, machine: Machine, store: Store, clock: Clock, perform: Perform) -> None:
        self.machine = machine
        self._store = store
        self._clock = clock
        self._perform = perform
        self._queue: list[tuple[Event, asyncio.Future[Any] | None]] = []
        self._wake = asyncio.Event()
        self._observers: list[Observer] = []
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._stopping = False

    def observe(self, observer: Observer) -> None:
        """Call `observer` after each commit."""
        self._observers.append(observer)

    def restore(self) -> Loaded:
        """Restore the machine; returns what was loaded, whose outbox the caller hands to its links."""
        loaded = self._store.load()
        self.machine.restore(loaded)
        return loaded

    def post(self, event: Event) -> None:
        """Queue an event of the system's own; never refused, because losing one would lose the truth."""
        self._queue.append((event, None))
        self._wake.set()

    async def submit(self, event: Event) -> Any:
        """Queue a request and wait until its answer is durable. Raises QueueFull or StorageFailed."""
        if len(self._queue) >= ENGINE_QUEUE_MAX:
            raise QueueFull
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((event, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Until `stop`, or until cancelled."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            if not self._queue:
                await self._wait()
            now = self._clock.now()
            deadline = self.machine.next_deadline()
            if deadline is not None and deadline <= now:
                self._queue.append((Tick(), None))
            taken, self._queue = self._queue[:ENGINE_BATCH_MAX], self._queue[ENGINE_BATCH_MAX:]
            if not taken:
                continue
            steps = [self.machine.step(event, now) for event, _ in taken]
            await self._commit(loop, steps, taken, now)

    async def _wait(self) -> None:
        self._wake.clear()
        deadline = self.machine.next_deadline()
        if deadline is None:
            await self._wake.wait()
            return
        delay = max(0, deadline - self._clock.now()) / SECOND
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _commit(
        self,
        loop: asyncio.AbstractEventLoop,
        steps: list[Step],
        taken: list[tuple[Event, asyncio.Future[Any] | None]],
        now: int,
    ) -> None:
        last_history = 0
        if any(step.changes or step.effects or step.done or step.notes for step in steps):
            try:
                batch = Batch(steps, now)
                last_history = await loop.run_in_executor(self._writer, self._store.commit, batch)
            except StorageFailed as failure:
                self._fail(taken, failure)
                return
        for step in steps:
            for effect in step.effects:
                self._perform(effect)
        for observer in self._observers:
            observer(steps, last_history)
        for step, (_, future) in zip(steps, taken, strict=True):
            if future is not None and not future.done():
                future.set_result(step.reply)

    def _fail(
        self, taken: list[tuple[Event, asyncio.Future[Any] | None]], failure: StorageFailed
    ) -> None:
        log.error("commit of %d events failed: %s", len(taken), failure)
        self.restore()
        for _, future in taken:
            if future is not None and not future.done():
                future.set_exception(failure)
        lost = [event for event, future in taken if future is None and not isinstance(event, Tick)]
        if lost:
            raise StorageFailed(
                f"{failure}; {len(lost)} observations could not be kept, so this process must restart and look again"
            )

    async def stop(self) -> None:
        """Let the batch under way finish, then end `run`."""
        self._stopping = True
        self._wake.set()
