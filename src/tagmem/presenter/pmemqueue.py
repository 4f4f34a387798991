"""The one queue of a persistent-memory device: guests ask that what they wrote is on the medium.

A device with a DAX device on it is never asked; a file system in the guest asks on each fsync. The
ring is read where the loop runs; the flush itself may take long and is done in a thread, once for
all requests that wait. A queue that was stopped meanwhile is not touched again: its requests count
as not done, and are done again when it is started.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress

from tagmem.presenter.guestmemory import GuestMemory
from tagmem.wire.fields import DecodeError
from tagmem.wire.vhost_backend import RingSetup
from tagmem.wire.virtio_pmem import (
    REQUEST_FLUSH,
    RESPONSE_EIO,
    RESPONSE_OK,
    PmemRequest,
    PmemResponse,
)
from tagmem.wire.vring import RING_ENTRIES_MAX, Chain, QueueBroken, SplitRing

log = logging.getLogger(__name__)

_EVENT_BYTES = 8
_EVENT = (1).to_bytes(_EVENT_BYTES, "little")


class PmemQueue:
    """Serves the queue. `sync` flushes, in a thread, and says whether it could; `completed` is told
    how far it got.
    """

    def __init__(
        self,
        memory: GuestMemory,
        sync: Callable[[], bool],
        completed: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._memory = memory
        self._sync = sync
        self._completed = completed
        self._ring: SplitRing | None = None
        self._kick = -1
        self._call = -1
        self._error = -1
        self._reading = False
        self._flushing: asyncio.Task[None] | None = None
        self.broken = ""
        """What the guest did wrong; the queue is not served until it is started again."""
        self.flushes = 0

    def set_kick(self, descriptor: int) -> None:
        """Take the eventfd that says there are requests; -1 for none."""
        self._unwatch()
        _replace(self._kick, descriptor)
        self._kick = descriptor
        self._watch()

    def set_call(self, descriptor: int) -> None:
        """Take the eventfd that tells the guest of answers."""
        _replace(self._call, descriptor)
        self._call = descriptor

    def set_error(self, descriptor: int) -> None:
        """Take the eventfd that says that the queue is broken."""
        _replace(self._error, descriptor)
        self._error = descriptor

    def start(self, setup: RingSetup) -> None:
        """Serve the queue at these addresses."""
        self.stop()
        self.broken = ""
        try:
            self._ring = self._find(setup)
        except QueueBroken as error:
            self._break(str(error))
            return
        self._watch()
        # Requests may have been made before, whose kick another back-end took.
        self._serve()

    def stop(self) -> None:
        """Do not touch the queue any more. A flush that runs goes on, its answer is not given."""
        self._unwatch()
        self._ring = None

    def close(self) -> None:
        """Stop, and close the eventfds."""
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.set_error(-1)

    def _find(self, setup: RingSetup) -> SplitRing:
        if setup.num > RING_ENTRIES_MAX:
            raise QueueBroken(f"size: must be at most {RING_ENTRIES_MAX}, got {setup.num}")
        places = (
            (setup.descriptors, 16 * setup.num),
            (setup.available, 6 + 2 * setup.num),
            (setup.used, 6 + 8 * setup.num),
        )
        descriptors, available, used = (self._memory.guest_address(*place) for place in places)
        return SplitRing(self._memory, setup.num, descriptors, available, used, setup.base)

    def _watch(self) -> None:
        if self._kick < 0 or self._ring is None or self._reading or self._flushing:
            return
        try:
            os.set_blocking(self._kick, False)
            self._loop.add_reader(self._kick, self._kicked)
        except (OSError, ValueError) as error:
            self._break(f"kick descriptor: {error}")
            return
        self._reading = True

    def _unwatch(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._kick)
            self._reading = False

    def _kicked(self) -> None:
        try:
            ended = not os.read(self._kick, _EVENT_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            ended = True
        if ended:
            self._break("kick descriptor: ended")
        else:
            self._serve()

    def _serve(self) -> None:
        if self._ring is None or self._flushing is not None:
            return
        try:
            chains = self._ring.take()
            wanted = [self._wants_flush(self._ring, chain) for chain in chains]
        except QueueBroken as error:
            self._break(str(error))
            return
        if chains:
            # One flush at a time: a guest that kicks without end waits for its own disk.
            self._unwatch()
            work = self._flush(self._ring, chains, wanted)
            self._flushing = self._loop.create_task(work, name="flush of a guest's window")

    def _wants_flush(self, ring: SplitRing, chain: Chain) -> bool:
        try:
            request = PmemRequest.decode(ring.read(chain, PmemRequest.LAYOUT.size))
        except DecodeError:
            return False
        return request.type == REQUEST_FLUSH

    async def _flush(self, ring: SplitRing, chains: list[Chain], wanted: list[bool]) -> None:
        synced = any(wanted) and await asyncio.to_thread(self._sync)
        self._flushing = None
        self.flushes += 1
        if self._ring is not ring:
            self._watch()
            self._serve()
            return
        try:
            for chain, flush in zip(chains, wanted, strict=True):
                result = RESPONSE_OK if flush and synced else RESPONSE_EIO
                ring.answer(chain, PmemResponse(result).encode())
                self._completed(ring.completed)
            if ring.wants_interrupt():
                _signal(self._call)
        except QueueBroken as error:
            self._break(str(error))
            return
        self._watch()
        self._serve()

    def _break(self, reason: str) -> None:
        """The guest's mistake: its queue is dead until it starts it again. Mappings stay."""
        log.warning("a guest broke its queue: %s", reason)
        self.stop()
        self.broken = reason
        _signal(self._error)


def _signal(descriptor: int) -> None:
    if descriptor >= 0:
        with suppress(OSError):
            os.set_blocking(descriptor, False)
            os.write(descriptor, _EVENT)


def _replace(old: int, new: int) -> None:
    if old >= 0 and old != new:
        os.close(old)
