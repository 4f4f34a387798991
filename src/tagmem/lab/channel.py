"""The lab's end of a guest agent's channel: run a command in a guest, and see what it wrote.

The conversation is the host's own (`presenter/channel`); this is for tests and the comparison,
which want one call and one result, and to be told that the guest died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tagmem.base.errors import OutcomeUnknown
from tagmem.base.units import SECOND
from tagmem.lab.errors import GuestDied, LabFailed
from tagmem.presenter import channel
from tagmem.wire import guest as wire

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

    def __init__(self, path: Path) -> None:
        self._link = channel.Channel(str(path))
        self._link.start()

    async def close(self) -> None:
        """Let somebody else have the channel."""
        await self._link.close()

    async def greet(self, seconds: float = REQUEST_SECONDS) -> wire.Hello:
        """Who answers. Raises GuestDied when nobody does."""
        try:
            answer = await self.ask(wire.Greet(0), seconds)
            if isinstance(answer, wire.Hello):
                return answer
        except GuestDied:
            pass  # A guest that came up meanwhile has said who it is instead of answering.
        try:
            return await self._link.greeted(int(seconds * SECOND))
        except OutcomeUnknown as error:
            raise GuestDied(str(error)) from None

    async def ask(self, request: wire.Request, seconds: float = REQUEST_SECONDS) -> wire.Answer:
        """The one answer that ends a request. Raises GuestDied when none comes in time."""
        return await self._stream(request, {}, seconds)

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        tag: str = "",
        seconds: float = REQUEST_SECONDS,
    ) -> Ran:
        """Run a command in the guest to its end. Raises LabFailed when it cannot be started."""
        request = wire.Exec(0, tuple(argv), environment or {}, tag, stdin)
        written = {1: bytearray(), 2: bytearray()}
        ended = await self._stream(request, written, seconds)
        if not isinstance(ended, wire.Exited):
            raise LabFailed(f"the guest did not run {argv[0]}: {ended!r:.300}")
        return Ran(ended.code, bytes(written[1]), bytes(written[2]))

    async def python(self, code: str, *, seconds: float = REQUEST_SECONDS) -> str:
        """What a piece of Python printed in the guest. Raises LabFailed when it failed."""
        ran = await self.run(["python3", "-c", code], seconds=seconds)
        if ran.code:
            raise LabFailed(f"python in the guest ended with {ran.code}: {ran.errors!r:.2000}")
        return ran.text

    async def _stream(
        self, request: wire.Request, written: dict[int, bytearray], seconds: float
    ) -> wire.Answer:
        def keep(answer: wire.Answer) -> None:
            if isinstance(answer, wire.Output) and answer.stream in written:
                written[answer.stream] += answer.data

        try:
            return await self._link.stream(request, keep, int(seconds * SECOND))
        except OutcomeUnknown as error:
            raise GuestDied(f"the guest agent: {error}") from None
