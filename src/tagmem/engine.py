"""The one loop of every daemon: event -> step -> commit -> effects -> replies, in that order and no
other.

All events that wait are stepped together and share one commit (group commit). While the commit runs
in the store's thread, new events queue up and become the next batch, so a slow disk makes batches
larger rather than answers wrong. When a commit fails, nothing of its batch may be believed: its
submitters are told StorageFailed and the machine is restored from the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from tagmem.base.errors import StorageFailed
from tagmem.base.limits import ENGINE_BATCH_MAX, ENGINE_QUEUE_MAX
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.ports import Batch, Clock, Effect, Event, Loaded, Machine, Step, Store, Tick

log = logging.getLogger(__name__)

Perform = Callable[[Effect], None]
"""Carries out one effect without waiting; its result comes back as an event."""
Observer = Callable[[list[Step], int], None]
"""Told of each committed batch and the last history number."""
Render = Callable[[Any], Any]
T = TypeVar("T")
Queued = tuple[Event, "asyncio.Future[Any] | None", "Render | None"]


GATHER_FROM = 12
"""A batch of so many events shows that many askers wait at the same time."""
GATHER_SECONDS = 0.001
"""Then more are let come before the next commit: most of a commit's cost is the same for any
number of events. Whoever asks alone is never kept waiting."""

HERE_SECONDS_MAX = 0.002
"""While the last commit waited less for the disk, the next waits in the loop's own thread: handing
it to another one and back would take as long again. After a slow one the thread gets it, so that
the loop goes on hearing while the disk takes its time."""


class QueueFull(StorageFailed):
    """More events wait than the engine takes; try again later."""


def _answer(future: asyncio.Future[T], reader: Callable[[], T]) -> None:
    """Resolve `future`. A mistake in `reader` is its caller's alone and must not end the engine."""
    if future.done():
        return
    try:
        future.set_result(reader())
    except Exception as mistake:
        future.set_exception(mistake)


class Engine:
    """Drives one machine over one store."""

    def __init__(self, machine: Machine, store: Store, clock: Clock, perform: Perform) -> None:
        self.machine = machine
        self._store = store
        self._clock = clock
        self._perform = perform
        self._queue: list[Queued] = []
        self._wake = asyncio.Event()
        self._observers: list[Observer] = []
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._stopping = False
        self._committing = False
        self._last_batch = 0
        self._write_seconds = HERE_SECONDS_MAX
        self._readers: list[Callable[[], None]] = []
        self.committed_ns: Nanoseconds = 0
        """When the batch that observers are told of was decided."""

    @property
    def waiting(self) -> int:
        """How many events are queued."""
        return len(self._queue)

    @property
    def settled(self) -> bool:
        """Whether all that the machine says is durable: nothing waits, no commit is under way."""
        return not self._queue and not self._committing

    def observe(self, observer: Observer) -> None:
        """Call `observer` after each commit."""
        self._observers.append(observer)

    def restore(self) -> Loaded:
        """Restore the machine; the caller hands the outbox of what is returned to its links."""
        loaded = self._store.load()
        self.machine.restore(loaded)
        return loaded

    def post(self, event: Event) -> None:
        """Queue an event of the system's own; never refused, because losing one would lose the
        truth.
        """
        self._queue.append((event, None, None))
        self._wake.set()

    def report(self, event: Event) -> asyncio.Future[Any]:
        """Queue an event of the system's own, as `post`, and tell when it is durable.

        The future fails with StorageFailed when it is not; its owner then has to look again.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((event, future, None))
        self._wake.set()
        return future

    async def submit(self, event: Event, render: Render | None = None) -> Any:
        """Queue a request and wait until its answer is durable. Raises QueueFull or StorageFailed.

        `render` makes the answer from the machine's reply while the machine's state is just what
        has been committed; without it the answer is the reply itself.
        """
        if len(self._queue) >= ENGINE_QUEUE_MAX:
            raise QueueFull
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((event, future, render))
        self._wake.set()
        return await future

    async def read(self, reader: Callable[[], T]) -> T:
        """What `reader` finds in the machine when all of its state is durable.

        While a commit is under way the machine is ahead of the store: nothing of that may leave.
        """
        if not self._committing:
            return reader()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._readers.append(lambda: _answer(future, reader))
        return await future

    async def run(self) -> None:
        """Until `stop`, or until cancelled."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            if not self._queue:
                await self._wait()
            if self._last_batch >= GATHER_FROM:
                await asyncio.sleep(GATHER_SECONDS)
            now = self._clock.now()
            deadline = self.machine.next_deadline()
            if deadline is not None and deadline <= now:
                self._queue.append((Tick(), None, None))
            taken, self._queue = self._queue[:ENGINE_BATCH_MAX], self._queue[ENGINE_BATCH_MAX:]
            self._last_batch = len(taken)
            if not taken:
                continue
            steps = [self.machine.step(event, now) for event, _, _ in taken]
            await self._commit(loop, steps, taken, now)

    async def _wait(self) -> None:
        self._wake.clear()
        deadline = self.machine.next_deadline()
        if deadline is None:
            await self._wake.wait()
            return
        delay = max(0, deadline - self._clock.now()) / SECOND
        alarm = asyncio.get_running_loop().call_later(delay, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            alarm.cancel()

    async def _commit(
        self,
        loop: asyncio.AbstractEventLoop,
        steps: list[Step],
        taken: list[Queued],
        now: int,
    ) -> None:
        last_history = 0
        if any(step.changes or step.effects or step.done or step.notes for step in steps):
            self._committing = True
            try:
                last_history = await self._write(loop, Batch(steps, now))
            except StorageFailed as failure:
                self._committing = False
                self._fail(taken, failure)
                return
        self._committing = False
        self.committed_ns = now
        # What was ordered and declared done within one batch never came into the outbox.
        done = {effect_id for step in steps for effect_id in step.done}
        for step in steps:
            for effect in step.effects:
                if effect.id not in done:
                    self._perform(effect)
        for observer in self._observers:
            observer(steps, last_history)
        for step, (_, future, render) in zip(steps, taken, strict=True):
            if future is None or future.done():
                continue
            if render is None:
                future.set_result(step.reply)
            else:
                _answer(future, partial(render, step.reply))
        self._tell_readers()

    async def _write(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> int:
        # The many short calls of a commit are made here: from a thread, each of them would have to
        # wait for its turn to run Python again. Only the disk is waited for there.
        finish = self._store.begin(batch)
        # Not the loop's own clock, which stands still while its thread is busy.
        begun = time.monotonic()
        if self._write_seconds < HERE_SECONDS_MAX:
            last_history = finish()
        else:
            last_history = await loop.run_in_executor(self._writer, finish)
        self._write_seconds = time.monotonic() - begun
        return last_history

    def _tell_readers(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            reader()

    def _fail(self, taken: list[Queued], failure: StorageFailed) -> None:
        log.error("commit of %d events failed: %s", len(taken), failure)
        self.restore()
        self._tell_readers()
        for _, future, _ in taken:
            if future is not None and not future.done():
                future.set_exception(failure)
        lost = [event for event, asked, _ in taken if asked is None and not isinstance(event, Tick)]
        if lost:
            raise StorageFailed(
                f"{failure}; {len(lost)} observations could not be kept, so this process must "
                "restart and look again"
            )

    async def stop(self) -> None:
        """Let the batch under way finish, then end `run`."""
        self._stopping = True
        self._wake.set()
