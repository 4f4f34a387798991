"""Calls between agents: who may ask, what comes back, and what a lost session means."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest

from tagmem.agent.peers import PeerDesk
from tagmem.base.errors import (
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    TagmemError,
    Unsupported,
)
from tagmem.base.limits import PEER_BYTES_MAX, PEER_CALLS_MAX
from tagmem.wire.agentapi import Message, PeerAnswer, PeerCall, PeerRequest


class Wire:
    """Both ends of a session: what was said on it, in order."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[Message] = asyncio.Queue()

    def say(self, message: Message) -> None:
        self.said.put_nowait(message)

    async def answer(self) -> PeerAnswer:
        message = await self.said.get()
        assert isinstance(message, PeerAnswer)
        return message


async def echo(host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    if "refuse" in request:
        raise NotFound("no VM db1")
    return {"from": host, **request}


def play(
    test: Callable[[PeerDesk, Wire], Awaitable[None]],
    allowed: bool | tuple[str, ...] = True,
    deadline_ns: int = 5_000_000_000,
) -> None:
    async def main() -> None:
        wire = Wire()
        desk = PeerDesk(allowed, echo, deadline_ns=deadline_ns)
        desk.opened(wire.say)
        await test(desk, wire)

    asyncio.run(main())


async def called(desk: PeerDesk, wire: Wire) -> tuple[asyncio.Task[Mapping[str, Any]], PeerCall]:
    task = asyncio.create_task(desk.call("w2", {"vm": "x"}))
    message = await wire.said.get()
    assert isinstance(message, PeerCall)
    return task, message


def test_a_call_has_its_answer() -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        task, call = await called(desk, wire)
        assert (call.host, bytes(call.request)) == ("w2", b'{"vm":"x"}')
        desk.hear(PeerAnswer(call.id + 1, msgspec.Raw(b"{}")))  # nobody's
        desk.hear(PeerAnswer(call.id, msgspec.Raw(b'{"a": 1}')))
        assert await task == {"a": 1}

    play(test)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("not-found", NotFound),
        ("invalid", InvalidInput),
        ("unknown", OutcomeUnknown),
        ("new", TagmemError),
    ],
)
def test_an_error_keeps_its_kind(kind: str, error: type[TagmemError]) -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        task, call = await called(desk, wire)
        desk.hear(PeerAnswer(call.id, error="so it is", kind=kind))
        with pytest.raises(error, match="host w2: so it is"):
            await task

    play(test)


def test_a_lost_session_leaves_the_outcome_unknown_and_the_next_call_refused() -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        task, _ = await called(desk, wire)
        desk.closed()
        with pytest.raises(OutcomeUnknown, match="session"):
            await task
        with pytest.raises(Unsupported, match="no orchestrator"):
            await desk.call("w2", {})
        desk.opened(None)
        with pytest.raises(Unsupported, match="too old"):
            await desk.call("w2", {})

    play(test)


def test_what_is_too_large_or_too_late() -> None:
    async def test(desk: PeerDesk, _: Wire) -> None:
        with pytest.raises(InvalidInput, match="65536"):
            await desk.call("w2", {"x": "y" * PEER_BYTES_MAX})
        with pytest.raises(OutcomeUnknown, match="in time"):
            await desk.call("w2", {})

    play(test, deadline_ns=1_000_000)


def test_another_host_is_served_where_it_may_ask() -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        desk.hear(PeerRequest(3, "w1", msgspec.Raw(b'{"vm": "receive"}')))
        answer = await wire.answer()
        assert msgspec.json.decode(answer.answer) == {"from": "w1", "vm": "receive"}
        desk.hear(PeerRequest(4, "w1", msgspec.Raw(b'{"refuse": 1}')))
        assert (await wire.answer()).kind == "not-found"
        desk.hear(PeerRequest(5, "w1", msgspec.Raw(b"[]")))
        assert (await wire.answer()).kind == "invalid"
        desk.hear(PeerRequest(6, "w3", msgspec.Raw(b"{}")))
        refused = await wire.answer()
        assert (refused.id, refused.kind) == (6, "unsupported")
        assert "accept_migrations" in refused.error

    play(test, ("w1",))


def test_an_answer_goes_to_the_session_that_asked_or_to_nobody() -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        other = Wire()
        desk.hear(PeerRequest(3, "w1", msgspec.Raw(b"{}")))
        desk.closed()
        desk.opened(other.say)
        desk.hear(PeerRequest(1, "w1", msgspec.Raw(b"{}")))
        assert (await other.answer()).id == 1
        assert wire.said.empty()
        assert other.said.empty()

    play(test)


def test_requests_under_way_are_bounded() -> None:
    async def test(desk: PeerDesk, wire: Wire) -> None:
        for number in range(PEER_CALLS_MAX + 1):
            desk.hear(PeerRequest(number, "w1", msgspec.Raw(b"{}")))
        answers = [await wire.answer() for _ in range(PEER_CALLS_MAX + 1)]
        assert [a.id for a in answers if a.kind == "conflict"] == [PEER_CALLS_MAX]

    play(test)


def test_nobody_may_ask_unless_said() -> None:
    desk = PeerDesk(allowed=False, serve=echo)
    assert not desk.allows("w1")
