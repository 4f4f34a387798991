"""Calls from host to host: who waits for whose answer, and until when. No I/O.

Hosts share no network but the orchestrator's, so it passes their calls on and reads nothing of
them. Nothing here is kept: a call is under way or its outcome is unknown, and who called asks the
other host again what became of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    TagmemError,
    Unsupported,
    kind_of,
)
from tagmem.base.limits import PEER_BYTES_MAX, PEER_CALL_NS, PEER_CALLS_MAX
from tagmem.base.units import Nanoseconds
from tagmem.wire.agentapi import Message, PeerAnswer, PeerCall, PeerRequest

TEXT_MAX = 4_096


class PeerSession(Protocol):
    """A connected agent."""

    @property
    def host(self) -> str: ...

    @property
    def peer_calls(self) -> bool:
        """It said that it understands calls."""

    def say(self, message: Message) -> None:
        """Send it, after what was said before."""


class _Call(msgspec.Struct, frozen=True):
    caller: PeerSession
    callers_id: int
    target: PeerSession
    due_ns: Nanoseconds


class Relay:
    """Every call under way. `find` is the session of a host that is connected now."""

    def __init__(
        self, find: Callable[[str], PeerSession | None], *, deadline_ns: Nanoseconds = PEER_CALL_NS
    ) -> None:
        self._find = find
        self._deadline_ns = deadline_ns
        self._calls: dict[int, _Call] = {}
        """By our own id, oldest first, and so by their deadlines."""
        self._made: Counter[PeerSession] = Counter()
        self._asked: Counter[PeerSession] = Counter()
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, caller: PeerSession, message: PeerCall, now: Nanoseconds) -> None:
        """Pass a call on, or answer it at once with the reason why not."""
        try:
            target = self._target(caller, message)
        except TagmemError as error:
            caller.say(_failed(message.id, error))
            return
        self._last_id += 1
        self._calls[self._last_id] = _Call(caller, message.id, target, now + self._deadline_ns)
        self._made[caller] += 1
        self._asked[target] += 1
        target.say(PeerRequest(self._last_id, caller.host, message.request))

    def _target(self, caller: PeerSession, message: PeerCall) -> PeerSession:
        size = len(bytes(message.request))
        if size > PEER_BYTES_MAX:
            raise InvalidInput("request", f"at most {PEER_BYTES_MAX} bytes", size)
        if message.host == caller.host:
            raise InvalidInput("host", "another than the caller", message.host)
        if self._made[caller] >= PEER_CALLS_MAX:
            raise Conflict(f"host {caller.host} has {PEER_CALLS_MAX} calls under way already")
        target = self._find(message.host)
        if target is None:
            raise NotFound(f"no agent of a host {message.host[:63]} is connected")
        if not target.peer_calls:
            raise Unsupported(f"the agent of host {target.host} is too old to be called")
        if self._asked[target] >= PEER_CALLS_MAX:
            raise Conflict(f"host {target.host} has {PEER_CALLS_MAX} calls to answer already")
        return target

    def answer(self, target: PeerSession, message: PeerAnswer) -> None:
        """Pass an answer back. One that nobody waits for any more, or that is another's to give,
        is dropped.
        """
        call = self._calls.get(message.id)
        if call is None or call.target is not target:
            return
        size = len(bytes(message.answer))
        if size > PEER_BYTES_MAX:
            told = f"host {target.host} answered with {size} bytes; {PEER_BYTES_MAX} may pass"
            self._end(message.id, _failed(call.callers_id, OutcomeUnknown(told)))
            return
        error, kind = message.error[:TEXT_MAX], message.kind[:32]
        self._end(message.id, PeerAnswer(call.callers_id, message.answer, error, kind))

    def left(self, session: PeerSession) -> None:
        """A session has ended: what it was to answer has an unknown outcome; what it asked is
        nobody's question any more.
        """
        for id_, call in list(self._calls.items()):
            if call.target is session:
                told = f"the agent of host {session.host} went away before it answered"
                self._end(id_, _failed(call.callers_id, OutcomeUnknown(told)))
            elif call.caller is session:
                self._end(id_, None)

    def tick(self, now: Nanoseconds) -> None:
        """Give up what is overdue."""
        for id_, call in list(self._calls.items()):
            if call.due_ns > now:
                return
            told = f"the agent of host {call.target.host} has not answered in time"
            self._end(id_, _failed(call.callers_id, OutcomeUnknown(told)))

    def next_deadline(self) -> Nanoseconds | None:
        """When `tick` has something to do."""
        oldest = next(iter(self._calls.values()), None)
        return None if oldest is None else oldest.due_ns

    def _end(self, id_: int, answer: PeerAnswer | None) -> None:
        call = self._calls.pop(id_)
        for count, session in ((self._made, call.caller), (self._asked, call.target)):
            count[session] -= 1
            if not count[session]:
                del count[session]
        if answer is not None:
            call.caller.say(answer)


def _failed(id_: int, error: TagmemError) -> PeerAnswer:
    return PeerAnswer(id_, error=str(error)[:TEXT_MAX], kind=kind_of(error))
