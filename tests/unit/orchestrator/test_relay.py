"""Calls from host to host in the orchestrator: each gets one answer, its own, and in time."""

from __future__ import annotations

import msgspec
import pytest

from tagmem.base.limits import PEER_BYTES_MAX, PEER_CALLS_MAX
from tagmem.orchestrator.relay import Relay
from tagmem.wire.agentapi import Message, PeerAnswer, PeerCall, PeerRequest

ASK = msgspec.Raw(b'{"vm": "migrate"}')
YES = msgspec.Raw(b'{"ok": true}')


class Session:
    """A connected agent."""

    def __init__(self, host: str, *, peer_calls: bool = True) -> None:
        self.host = host
        self.peer_calls = peer_calls
        self.heard: list[Message] = []

    def say(self, message: Message) -> None:
        self.heard.append(message)

    def last(self) -> Message:
        return self.heard.pop()


@pytest.fixture
def hosts() -> dict[str, Session]:
    found = {name: Session(name) for name in ("w1", "w2", "w3")}
    found["old"] = Session("old", peer_calls=False)
    return found


@pytest.fixture
def relay(hosts: dict[str, Session]) -> Relay:
    return Relay(hosts.get, deadline_ns=100)


def failed(session: Session, number: int) -> str:
    """The kind of the one answer that was heard."""
    (answer,) = session.heard
    session.heard.clear()
    assert isinstance(answer, PeerAnswer)
    assert answer.id == number
    assert answer.error
    return answer.kind


def test_a_call_goes_there_and_its_answer_back(relay: Relay, hosts: dict[str, Session]) -> None:
    w1, w2 = hosts["w1"], hosts["w2"]
    relay.call(w1, PeerCall(7, "w2", ASK), 0)
    asked = w2.last()
    assert isinstance(asked, PeerRequest)
    assert (asked.from_host, bytes(asked.request)) == ("w1", bytes(ASK))
    relay.answer(w2, PeerAnswer(asked.id, YES))
    answer = w1.last()
    assert isinstance(answer, PeerAnswer)
    assert (answer.id, bytes(answer.answer), answer.error) == (7, bytes(YES), "")
    relay.answer(w2, PeerAnswer(asked.id, YES))
    assert not w1.heard
    assert len(relay) == 0


def test_answers_are_told_apart(relay: Relay, hosts: dict[str, Session]) -> None:
    for caller in ("w1", "w3"):
        relay.call(hosts[caller], PeerCall(1, "w2", ASK), 0)
    first, second = hosts["w2"].heard
    assert isinstance(first, PeerRequest)
    assert isinstance(second, PeerRequest)
    relay.answer(hosts["w3"], PeerAnswer(first.id, YES))  # not its to give
    assert not hosts["w1"].heard
    relay.answer(hosts["w2"], PeerAnswer(second.id, error="no", kind="conflict"))
    assert failed(hosts["w3"], 1) == "conflict"
    assert not hosts["w1"].heard


@pytest.mark.parametrize(
    ("host", "kind"),
    [("w9", "not-found"), ("old", "unsupported"), ("w1", "invalid"), ("x" * 999, "not-found")],
)
def test_what_cannot_be_passed_on_is_answered_at_once(
    relay: Relay, hosts: dict[str, Session], host: str, kind: str
) -> None:
    relay.call(hosts["w1"], PeerCall(1, host, ASK), 0)
    assert failed(hosts["w1"], 1) == kind
    assert relay.next_deadline() is None


def test_sizes_are_bounded_both_ways(relay: Relay, hosts: dict[str, Session]) -> None:
    large = msgspec.Raw(b'"' + b"x" * PEER_BYTES_MAX + b'"')
    relay.call(hosts["w1"], PeerCall(1, "w2", large), 0)
    assert failed(hosts["w1"], 1) == "invalid"
    relay.call(hosts["w1"], PeerCall(2, "w2", ASK), 0)
    asked = hosts["w2"].last()
    assert isinstance(asked, PeerRequest)
    relay.answer(hosts["w2"], PeerAnswer(asked.id, large))
    assert failed(hosts["w1"], 2) == "unknown"


def test_calls_under_way_are_bounded_per_caller_and_per_target(
    relay: Relay, hosts: dict[str, Session]
) -> None:
    for number in range(PEER_CALLS_MAX):
        relay.call(hosts["w1"], PeerCall(number, "w2", ASK), 0)
    assert len(hosts["w2"].heard) == PEER_CALLS_MAX
    relay.call(hosts["w1"], PeerCall(99, "w3", ASK), 0)
    assert failed(hosts["w1"], 99) == "conflict"
    relay.call(hosts["w3"], PeerCall(1, "w2", ASK), 0)
    assert failed(hosts["w3"], 1) == "conflict"
    asked = hosts["w2"].last()
    assert isinstance(asked, PeerRequest)
    relay.answer(hosts["w2"], PeerAnswer(asked.id, YES))
    relay.call(hosts["w3"], PeerCall(2, "w2", ASK), 0)
    assert not hosts["w3"].heard


def test_a_session_that_ends_leaves_an_unknown_outcome(
    relay: Relay, hosts: dict[str, Session]
) -> None:
    relay.call(hosts["w1"], PeerCall(1, "w2", ASK), 0)
    relay.call(hosts["w2"], PeerCall(5, "w3", ASK), 0)
    relay.left(hosts["w2"])
    assert failed(hosts["w1"], 1) == "unknown"
    asked = hosts["w3"].last()
    assert isinstance(asked, PeerRequest)
    relay.answer(hosts["w3"], PeerAnswer(asked.id, YES))
    assert len(hosts["w2"].heard) == 1  # the request; nobody is told who has gone
    assert len(relay) == 0


def test_an_overdue_call_has_an_unknown_outcome_and_a_late_answer_none(
    relay: Relay, hosts: dict[str, Session]
) -> None:
    relay.call(hosts["w1"], PeerCall(1, "w2", ASK), 0)
    relay.call(hosts["w1"], PeerCall(2, "w2", ASK), 50)
    assert relay.next_deadline() == 100
    relay.tick(99)
    assert not hosts["w1"].heard
    relay.tick(100)
    assert failed(hosts["w1"], 1) == "unknown"
    assert relay.next_deadline() == 150
    first = hosts["w2"].heard[0]
    assert isinstance(first, PeerRequest)
    relay.answer(hosts["w2"], PeerAnswer(first.id, YES))
    assert not hosts["w1"].heard
