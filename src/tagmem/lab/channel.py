"""The lab's end of a guest agent's channel: run a command in a guest, and see what it wrote.

The rules of the conversation are `wire/guest.py`'s; here is the socket, and who waits for which
answer. A host agent's way to its guests is another matter (it has deadlines, ladders, releases);
this one serves tests and the comparison, which want one call and one result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tagmem.lab.errors import GuestDied, LabFailed
from tagmem.wire import guest as wire
from tagmem.wire.guest_session import HostSession, Late, Lost

READ_BYTES = 64 * 1024
REQUEST_SECONDS = 60.0
"""Long, because a guest under emulation on a loaded machine is slow; nothing waits for it when all
is well."""


@dataclass(frozen=True)
class Ran:
    """What a command in the guest came to."""

    code: int
    output: bytes
    errors: bytes

    @property
    def text(self) -> str:
        """Its standard output, as text without the last newline."""
        return self.output.decode(errors="replace").rstrip("\n")


class Channel:
    """A conversation with one guest agent, over the socket that QEMU listens on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._session = HostSession()
        self._answers: dict[int, asyncio.Queue[wire.Answer | Lost]] = {}
        self.told: list[wire.Answer] = []
        """What the guest said unasked."""
        self._ended = ""
        """Why nothing can be asked any more; empty while something can."""
        self._task = asyncio.ensure_future(self._read())

    @classmethod
    async def connect(cls, path: Path) -> Channel:
        """Connect. Raises LabFailed when nobody listens there."""
        try:
            return cls(*await asyncio.open_unix_connection(str(path)))
        except OSError as error:
            raise LabFailed(f"no agent channel at {path}: {error.strerror}") from error

    async def close(self) -> None:
        """Let somebody else have the channel."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def greet(self, seconds: float = REQUEST_SECONDS) -> wire.Hello:
        """Who answers. Raises GuestDied when nobody does."""
        answer = await self.ask(wire.Greet(0), seconds)
        if isinstance(answer, Lost) and self._session.hello is not None:
            return self._session.hello  # a guest that came up meanwhile has said who it is
        if not isinstance(answer, wire.Hello):
            raise GuestDied(f"the guest agent answered a greeting with {answer!r:.200}")
        return answer

    async def ask(
        self, request: wire.Request, seconds: float = REQUEST_SECONDS
    ) -> wire.Answer | Lost:
        """The one answer that ends a request. Raises GuestDied when none comes in time."""
        number, queue = await self._send(request)
        try:
            while True:
                answer = await self._next(queue, request, seconds)
                if not isinstance(answer, wire.Started | wire.Output):
                    return answer
        finally:
            self._forget(number)

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        tag: str = "",
        seconds: float = REQUEST_SECONDS,
    ) -> Ran:
        """Run a command in the guest to its end. Raises LabFailed when it cannot be started.

        `seconds` may pass without a word from it.
        """
        request = wire.Exec(0, tuple(argv), environment or {}, tag, stdin)
        number, queue = await self._send(request)
        written: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        try:
            while True:
                answer = await self._next(queue, request, seconds)
                if isinstance(answer, wire.Output):
                    written[2 if answer.stream == 2 else 1] += answer.data
                elif isinstance(answer, wire.Exited):
                    return Ran(answer.code, bytes(written[1]), bytes(written[2]))
                elif not isinstance(answer, wire.Started):
                    raise LabFailed(f"the guest did not run {argv[0]}: {answer!r:.300}")
        finally:
            self._forget(number)

    async def python(self, code: str, *, seconds: float = REQUEST_SECONDS) -> str:
        """What a piece of Python printed in the guest. Raises LabFailed when it failed."""
        ran = await self.run(["python3", "-c", code], seconds=seconds)
        if ran.code:
            raise LabFailed(f"python in the guest ended with {ran.code}: {ran.errors!r:.2000}")
        return ran.text

    async def _send(self, request: wire.Request) -> tuple[int, asyncio.Queue[wire.Answer | Lost]]:
        if self._ended:
            raise GuestDied(f"the agent channel ended: {self._ended}")
        number, data = self._session.request(request)
        queue: asyncio.Queue[wire.Answer | Lost] = asyncio.Queue()
        self._answers[number] = queue
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            self._forget(number)
            raise GuestDied(f"the agent channel broke: {error}") from error
        return number, queue

    async def _next(
        self,
        queue: asyncio.Queue[wire.Answer | Lost],
        request: wire.Request,
        seconds: float,
    ) -> wire.Answer | Lost:
        try:
            return await asyncio.wait_for(queue.get(), seconds)
        except TimeoutError:
            kind = type(request).__name__
            raise GuestDied(f"the guest agent left {kind} unanswered for {seconds:g} s") from None

    def _forget(self, number: int) -> None:
        self._answers.pop(number, None)
        self._session.give_up(number)

    async def _read(self) -> None:
        reason = "QEMU closed the channel"
        try:
            while data := await self._reader.read(READ_BYTES):
                for message in self._session.feed(data):
                    self._deliver(message)
        except OSError as error:
            reason = str(error)
        self._ended = reason
        for lost in self._session.disconnected(reason):
            self._deliver(lost)

    def _deliver(self, message: wire.Answer | Lost | Late | wire.Malformed) -> None:
        if isinstance(message, Late | wire.Malformed):
            return
        queue = self._answers.get(message.id)
        if queue is not None:
            queue.put_nowait(message)
        elif not isinstance(message, Lost):
            self.told.append(message)
