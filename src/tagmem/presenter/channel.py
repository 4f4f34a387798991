"""The host's end of the way to a guest's agent: a Unix socket of QEMU's virtio-serial port.

One connection, made again when it ends (QEMU's socket takes one at a time); what was asked over the
old one is then unknown. The guest is not believed: the session in `wire/guest.py` bounds and judges
what it says; here it can only be late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from tagmem.base.errors import OutcomeUnknown
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.presenter.contract import GuestFacts
from tagmem.wire import guest
from tagmem.wire.guest_session import HostSession, Late, Lost

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
RETRY_SECONDS = 0.2
TOLD_MAX = 256
"""Unasked messages that are kept for `told`; the oldest go first."""


class Channel:
    """`contract.GuestChannel` over a Unix socket; `run` keeps it connected."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._session = HostSession(first_id=time.monotonic_ns() & 0xFFFFFFFF | 1)
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Queue[guest.Answer | Lost]] = {}
        self._task: asyncio.Task[None] | None = None
        self._greeted = asyncio.Event()
        self._news = asyncio.Event()
        self.told: list[guest.Answer] = []
        """What the guest said unasked: memory that came, memory that vanished, its leaving."""
        self.said: Callable[[guest.Answer], None] = lambda _: None
        """Called for each of these, and for every greeting."""

    def start(self) -> None:
        """Begin connecting, in the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Hang up; what is outstanding is lost."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def facts(self) -> GuestFacts | None:
        """What the agent said of itself; None while it has not, or is gone."""
        hello = self._session.hello
        return None if hello is None else GuestFacts(hello.kernel, hello.features)

    @property
    def boot_id(self) -> str:
        """Which boot of the guest it is; empty while no agent has said."""
        return "" if self._session.hello is None else self._session.hello.boot_id

    async def greeted(self, deadline_ns: Nanoseconds) -> guest.Hello:
        """Who answers, once somebody does. Raises OutcomeUnknown."""
        try:
            async with asyncio.timeout(deadline_ns / SECOND):
                await self._greeted.wait()
        except TimeoutError:
            raise OutcomeUnknown("no agent answers in the guest") from None
        hello = self._session.hello
        if hello is None:
            raise OutcomeUnknown("the guest's agent has gone again")
        return hello

    async def heard(self) -> None:
        """Return when the guest has said something more."""
        self._news.clear()
        await self._news.wait()

    async def ask(self, request: guest.Request, deadline_ns: Nanoseconds) -> guest.Answer:
        """See `contract.GuestChannel`."""
        return await self.stream(request, lambda _: None, deadline_ns)

    async def stream(
        self,
        request: guest.Request,
        meanwhile: Callable[[guest.Answer], None],
        deadline_ns: Nanoseconds | None,
    ) -> guest.Answer:
        """As `ask`; what comes before the last answer (a command's output) goes to `meanwhile`.

        None waits as long as it takes.
        """
        seconds = None if deadline_ns is None else deadline_ns / SECOND
        number = 0
        try:
            async with asyncio.timeout(seconds):
                if self._writer is None:
                    await self._greeted.wait()
                if self._writer is None:
                    raise OutcomeUnknown("the guest's agent has gone again")
                number, data = self._session.request(request)
                queue = self._answers[number] = asyncio.Queue()
                self._writer.write(data)
                while True:
                    answer = await queue.get()
                    if isinstance(answer, Lost):
                        raise OutcomeUnknown(f"the guest's agent did not answer: {answer.reason}")
                    if isinstance(answer, guest.Started | guest.Output):
                        meanwhile(answer)
                        continue
                    return answer
        except TimeoutError:
            what = type(request).__name__.lower()
            raise OutcomeUnknown(f"the guest did not answer {what} in {seconds:g} s") from None
        finally:
            self._answers.pop(number, None)
            self._session.give_up(number)

    async def _run(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                await self._serve(reader)
            finally:
                self._writer.close()
                self._writer = None
                self._greeted.clear()
                for lost in self._session.disconnected("the connection ended"):
                    self._deliver(lost)
            await asyncio.sleep(RETRY_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        greeting = asyncio.get_running_loop().create_task(self._greet())
        try:
            while data := await reader.read(READ_BYTES):
                for item in self._session.feed(data):
                    self._deliver(item)
                self._news.set()
        except OSError as error:
            log.info("%s: %s", self._path, error)
        finally:
            greeting.cancel()

    async def _greet(self) -> None:
        """Until somebody answers: what is written before the guest opens its port may be lost."""
        while self._session.hello is None and self._writer is not None:
            number, data = self._session.request(guest.Greet(0))
            self._writer.write(data)
            await asyncio.sleep(1.0)
            self._session.give_up(number)

    def _deliver(self, item: guest.Answer | Lost | Late | guest.Malformed) -> None:
        if isinstance(item, guest.Hello):
            self._greeted.set()
            self.said(item)
        if isinstance(item, Late) and isinstance(item.answer, guest.Hello):
            return  # The guest was still booting when it was greeted first.
        if isinstance(item, Late | guest.Malformed):
            log.info("guest at %s: %s", self._path, item)
            return
        queue = self._answers.get(item.id)
        if queue is not None:
            queue.put_nowait(item)
        elif item.id == 0 and not isinstance(item, Lost):
            self.told = [*self.told[-TOLD_MAX + 1 :], item]
            if not isinstance(item, guest.Hello | guest.Malformed):
                self.said(item)
