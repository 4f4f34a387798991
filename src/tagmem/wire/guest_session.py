"""The host's end of the wire to a guest agent, without I/O: requests out, answers in, told apart by
id; and what becomes of a request when the guest reboots or the stream ends before its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tagmem.base.errors import Conflict
from tagmem.wire.guest import (
    ANSWERS,
    Answer,
    Attach,
    Attached,
    Detach,
    Done,
    Eject,
    Exec,
    Exited,
    Failed,
    Find,
    Found,
    Frames,
    Give,
    Greet,
    Held,
    Hello,
    Malformed,
    Output,
    Released,
    Request,
    Reset,
    Shutdown,
    Signal,
    Started,
    Unknown,
    decode,
    encode,
)

OUTSTANDING_MAX = 256


class Lost(NamedTuple):
    """A request whose answer cannot come any more: whether it took effect is not known."""

    id: int
    request: Request
    reason: str


class Late(NamedTuple):
    """An answer to nothing that is outstanding: given up, or of another session."""

    id: int
    answer: Answer


_ENDS: dict[type[Any], tuple[type[Any], ...]] = {
    Greet: (Hello,),
    Find: (Found,),
    Attach: (Attached,),
    Detach: (Released, Held),
    Give: (Done,),
    Exec: (Exited,),
    Signal: (Done,),
    Eject: (Done,),
    Reset: (Done, Held),
    Shutdown: (Done, Held),
}
_MEANWHILE: dict[type[Any], tuple[type[Any], ...]] = {Exec: (Started, Output)}


class HostSession:
    """The host's end, without I/O: requests out, answers in, told apart by id.

    `first_id` should differ from session to session (a clock, a random number), so that an answer
    to the session before is known as late.
    """

    def __init__(self, first_id: int = 1) -> None:
        self._frames = Frames()
        self._next = first_id
        self.outstanding: dict[int, Request] = {}
        self.hello: Hello | None = None
        self.violations = 0
        """Messages that a guest agent would not send."""

    @property
    def dropped_bytes(self) -> int:
        """Of the stream, because they were no frames."""
        return self._frames.dropped_bytes

    def request(self, request: Request) -> tuple[int, bytes]:
        """The id that a request gets (in place of the one it has), and the bytes to send.

        Raises Conflict when too many are outstanding, InvalidInput for a bad field.
        """
        if len(self.outstanding) >= OUTSTANDING_MAX:
            raise Conflict(f"{OUTSTANDING_MAX} requests to this guest wait for their answers")
        number, self._next = self._next, self._next + 1
        numbered: Request = request._replace(id=number)
        data = encode(numbered)
        self.outstanding[number] = numbered
        return number, data

    def give_up(self, number: int) -> None:
        """Wait no longer for an answer; should it come it is Late."""
        self.outstanding.pop(number, None)

    def feed(self, data: bytes) -> Iterator[Answer | Lost | Late | Malformed]:
        """What came. Unsolicited messages have id 0."""
        for payload in self._frames.feed(data):
            answer = decode(payload, ANSWERS)
            if isinstance(answer, Unknown | Malformed):
                self.violations += 1
                yield Malformed(answer.id, str(answer))
            else:
                yield from self._answer(answer)

    def disconnected(self, reason: str) -> Iterator[Lost]:
        """The stream ended: what was outstanding is not known. The session may be used again."""
        self._frames.clear()
        self.hello = None
        yield from self._lose(reason)

    def _lose(self, reason: str) -> Iterator[Lost]:
        lost, self.outstanding = self.outstanding, {}
        for number, request in lost.items():
            yield Lost(number, request, reason)

    def _answer(self, answer: Answer) -> Iterator[Answer | Lost | Late | Malformed]:
        request = self.outstanding.get(answer.id)
        if isinstance(answer, Hello):
            yield from self._greeted(answer)
        elif answer.id == 0:
            yield answer
            return
        if request is None:
            yield answer if answer.id == 0 else Late(answer.id, answer)
            return
        kind = type(request)
        if isinstance(answer, (Failed, *_ENDS[kind])):
            self.outstanding.pop(answer.id, None)
        elif not isinstance(answer, _MEANWHILE.get(kind, ())):
            self.violations += 1
            yield Malformed(answer.id, f"{type(answer).__name__} does not answer {kind.__name__}")
            return
        yield answer

    def _greeted(self, hello: Hello) -> Iterator[Lost]:
        """Another boot or another agent knows nothing of what was asked before."""
        before, self.hello = self.hello, hello
        if before is None or (before.boot_id, before.instance) == (hello.boot_id, hello.instance):
            return
        answered = self.outstanding.pop(hello.id, None)
        what = "rebooted" if before.boot_id != hello.boot_id else "restarted its agent"
        yield from self._lose(f"the guest {what}")
        if answered is not None:
            self.outstanding[hello.id] = answered
