"""Keeps a HostLink connected to its appliance: bytes, descriptors, deadlines, back-off.

A descriptor travels beside the bytes of the answer that it belongs to; one that no answer claims is
closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from tagmem.agent.mailbox import HostLink, MediaAnswer
from tagmem.base.errors import InvalidInput
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.ports import Clock, Effect, Event

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

OnMedia = Callable[[MediaAnswer, int], None]
"""Told of each answer to `ask_media`, with its descriptor or -1; the descriptor is then its own."""


class Peer(Protocol):
    """What a stream tells."""

    def received(self, data: bytes, descriptors: list[int]) -> None: ...

    def drained(self) -> None: ...

    def closed(self, reason: str) -> None: ...


class Stream(Protocol):
    """A connected socket (`io.stream.Connection`)."""

    @property
    def peer_pid(self) -> int: ...

    def attach(self, peer: Peer) -> None: ...

    def send(self, data: bytes) -> None: ...

    def close(self, reason: str = ...) -> None: ...


Dial = Callable[[str], Awaitable[Stream]]


class Connection:
    """One appliance; `run` until cancelled."""

    def __init__(
        self,
        link: HostLink,
        path: str,
        clock: Clock,
        post: Callable[[Event], None],
        on_media: OnMedia,
        dial: Dial,
    ) -> None:
        self.link = link
        self.peer_pid = 0
        """The appliance's process: it has the bytes open because it is the device."""
        self.last_error = "not connected yet"
        self._path = path
        self._clock = clock
        self._post = post
        self._on_media = on_media
        self._dial = dial
        self._stream: Stream | None = None
        self._descriptors: deque[int] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: Nanoseconds | None = None
        self._pump_due = False
        self._over: asyncio.Future[str] | None = None

    async def run(self) -> None:
        """Connect, serve, and begin again."""
        failures = 0
        while True:
            try:
                stream = await self._dial(self._path)
            except (OSError, InvalidInput) as error:
                self._failed(f"{self._path}: {getattr(error, 'strerror', None) or error}")
                failures += 1
            else:
                await self._serve(stream)
                failures = 0
            await asyncio.sleep(BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)])

    async def _serve(self, stream: Stream) -> None:
        self._over = asyncio.get_running_loop().create_future()
        self._stream = stream
        self.peer_pid = stream.peer_pid
        try:
            self.link.connected(self._clock.now())
            stream.attach(self)
            self._pump()
            reason = await self._over
        finally:
            self._stream = None
            stream.close("the session is over")
            self._forget()
        self._failed(reason)
        for event in self.link.disconnected(self._clock.now(), reason):
            if not isinstance(event, MediaAnswer):
                self._post(event)

    def _forget(self) -> None:
        while self._descriptors:
            close_quietly(self._descriptors.popleft())
        self._stop_timer()

    def _failed(self, reason: str) -> None:
        if reason != self.last_error:
            log.warning("appliance %s: %s", self.link.appliance, reason)
        self.last_error = reason

    def _end(self, reason: str) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(reason)

    # ---- what the stream tells

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes of the device."""
        self._descriptors.extend(descriptors)
        if self._stream is not None:
            self._hear(self.link.feed(data, self._clock.now()))

    def drained(self) -> None:
        """Commands are few and small; nothing waits for room."""

    def closed(self, reason: str) -> None:
        """The stream has ended."""
        self._end(reason)

    # ---- driving the link

    def _hear(self, events: list[Event | MediaAnswer]) -> None:
        for event in events:
            if isinstance(event, MediaAnswer):
                given = event.media is not None and bool(self._descriptors)
                self._on_media(event, self._descriptors.popleft() if given else -1)
            else:
                self._post(event)
        self._pump()

    def _pump_soon(self) -> None:
        """A commit brings many effects: what they make is sent at once."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._stream is None:
            return
        self._stream.send(self.link.outgoing())
        if self.link.broken:
            self._end(self.link.broken)
            return
        self._set_timer(self.link.next_deadline())

    def _set_timer(self, due: Nanoseconds | None) -> None:
        if due == self._timer_at:
            return
        # A deadline that moved away (an answer came) leaves the old timer: it ticks in vain once.
        if due is not None and self._timer_at is not None and due > self._timer_at:
            return
        self._stop_timer()
        if due is not None:
            self._timer_at = due
            delay = max(0, due - self._clock.now()) / SECOND
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_at = None

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._hear(self.link.tick(self._clock.now()))

    # ---- orders

    def perform(self, effect: Effect) -> None:
        """Carry out one effect; without a session it is void, and ordered again later."""
        if self._stream is not None:
            self.link.perform(effect, self._clock.now())
            self._pump_soon()

    def ask_media(self, tag: str) -> bool:
        """Ask where the bytes of a tag are; False without a session."""
        if self._stream is None or not self.link.ask_media(tag, self._clock.now()):
            return False
        self._pump()
        return True


def close_quietly(descriptor: int) -> None:
    """For descriptors that nobody wants."""
    if descriptor >= 0:
        with suppress(OSError):
            os.close(descriptor)
