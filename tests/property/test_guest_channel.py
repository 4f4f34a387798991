"""The wire between host and guest agent: whatever comes, whole messages are found and nothing
raises; whatever is cut, split or mixed with garbage, only what was cut is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import InvalidInput
from tagmem.wire import guest as w
from tagmem.wire.guest_session import HostSession, Late, Lost

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
MEMORY = w.Memory(TAG, "pmem", "dax0.0", "/dev/dax0.0", 1 << 30, 2 << 20, slot="0-2")
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
IDS = st.integers(1, (1 << 53) - 1)
HOLDERS = st.lists(
    st.builds(w.Holder, st.integers(1, 1 << 22), TEXT, st.sampled_from(["maps", "open"])),
    max_size=3,
).map(tuple)
TOLD = st.builds(
    lambda serial, index: w.Told(TAG, serial=serial, acpi_index=index),
    st.sampled_from(["", "0xabc"]),
    st.integers(0, 16383),
)
MS = st.integers(0, w.MILLISECONDS_MAX)

REQUESTS: st.SearchStrategy[Any] = st.one_of(
    st.builds(w.Greet, IDS, st.integers(0, 9)),
    st.builds(w.Find, IDS, st.lists(TOLD, max_size=3).map(tuple)),
    st.builds(w.Attach, IDS, st.just(TAG), MS, st.none() | TOLD),
    st.builds(w.Detach, IDS, st.just(TAG), MS, MS, st.booleans(), st.booleans(), st.booleans()),
    st.builds(
        w.Exec,
        IDS,
        st.lists(TEXT, min_size=1, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from(["A", "PATH"]), TEXT),
        st.sampled_from(["", TAG]),
        st.binary(max_size=64),
        st.integers(0, 1 << 30),
    ),
    st.builds(w.Signal, IDS, IDS, st.integers(1, 64)),
    st.builds(w.Eject, IDS, st.sampled_from(["", "0-2", "7"]), st.sampled_from(["", TAG])),
    st.builds(w.Reset, IDS, MS, MS, st.booleans()),
    st.builds(w.Shutdown, IDS, st.sampled_from(w.HOWS), MS, MS),
)
ANSWERS: st.SearchStrategy[Any] = st.one_of(
    st.builds(w.Hello, IDS, st.just(1), TEXT, TEXT, TEXT, st.just(("exec",)), st.just((TAG,))),
    st.builds(w.Found, IDS, st.just((MEMORY,))),
    st.builds(w.Attached, IDS, st.just(MEMORY)),
    st.builds(w.Released, IDS, st.just(TAG), st.booleans(), HOLDERS, HOLDERS),
    st.builds(w.Held, IDS, st.just(TAG), HOLDERS, st.booleans(), TEXT),
    st.builds(w.Started, IDS, st.integers(1, 1 << 22)),
    st.builds(w.Output, IDS, st.sampled_from([1, 2]), st.binary(max_size=200)),
    st.builds(w.Exited, IDS, st.integers(0, 255), st.integers(0, 1 << 40)),
    st.builds(w.Done, IDS),
    st.builds(w.Failed, IDS, st.sampled_from(w.CODES), TEXT),
    st.builds(w.Vanished, IDS, st.just(TAG)),
    st.builds(w.Leaving, IDS, TEXT, st.just((TAG,))),
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


CUTS = st.lists(st.integers(0, 1 << 16), max_size=8)


@given(st.lists(REQUESTS, max_size=4), CUTS)
def test_requests_arrive_as_they_were_sent(messages: list[Any], cuts: list[int]) -> None:
    frames = w.Frames()
    stream = b"".join(w.encode(message) for message in messages)
    payloads = [payload for part in split(stream, cuts) for payload in frames.feed(part)]
    assert [w.decode(payload, w.REQUESTS) for payload in payloads] == messages
    assert frames.dropped_bytes == 0


@given(ANSWERS)
def test_answers_arrive_as_they_were_sent(message: Any) -> None:
    [payload] = w.Frames().feed(w.encode(message))
    decoded = w.decode(payload, w.ANSWERS)
    assert (type(decoded), decoded) == (type(message), message)


@given(ANSWERS, ANSWERS, st.integers(0, 1 << 16), st.binary(max_size=64), CUTS)
def test_halves_and_garbage_cost_only_themselves(
    cut: Any, whole: Any, at: int, garbage: bytes, cuts: list[int]
) -> None:
    """A peer dies within a message; another writes anything; then comes a whole message."""
    half = w.encode(cut)
    half = half[: at % len(half)]
    frames = w.Frames()
    stream = half + garbage + w.encode(whole)
    payloads = [payload for part in split(stream, cuts) for payload in frames.feed(part)]
    assert w.decode(payloads[-1], w.ANSWERS) == whole
    assert frames.dropped_bytes == len(half) + len(garbage)


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_nothing_that_comes_raises_or_piles_up(parts: list[bytes]) -> None:
    frames, session = w.Frames(), HostSession()
    for part in parts:
        assert frames.feed(part) == []
        assert list(session.feed(part)) == []
    assert len(frames._data) <= w.HEAD_BYTES + w.PAYLOAD_BYTES_MAX


@given(st.sampled_from([*w.REQUESTS.values()]), st.data())
def test_a_field_that_does_not_fit_is_named(kind: type[Any], data: st.DataObject) -> None:
    values: dict[str, Any] = {"kind": kind.__name__.lower(), "id": 1}
    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )
    for field in kind._fields:
        values[field] = data.draw(json_values)
    message: Any = w.decode(json.dumps(values).encode(), w.REQUESTS)
    if isinstance(message, w.Malformed):
        assert any(message.reason.startswith(field) for field in kind._fields)
        return
    whole: Any = message
    assert w.decode(w.encode(whole)[w.HEAD_BYTES :], w.REQUESTS) == whole


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"[" * 60_000, w.Malformed),
        (b"1" * 60_000, w.Malformed),
        (b"{}", w.Unknown),
        (b"[]", w.Malformed),
        (b'{"kind":"find"}', w.Malformed),
        (b'{"kind":"find","id":true}', w.Malformed),
        (b'{"kind":"find","id":1e3}', w.Malformed),
        (b'{"kind":["find"],"id":7}', w.Unknown),
        (b'{"kind":"hello","id":7}', w.Unknown),
        (b'{"kind":"exec","id":7,"argv":[]}', w.Malformed),
        (b'{"kind":"exec","id":7,"argv":["a\\u0000b"]}', w.Malformed),
        (b'{"kind":"exec","id":7,"argv":["a"],"env":{"A=B":"c"}}', w.Malformed),
        (b'{"kind":"exec","id":7,"argv":["a"],"input":"not base64!"}', w.Malformed),
        (b'{"kind":"eject","id":7,"slot":"../../etc"}', w.Malformed),
        (b'{"kind":"attach","id":7,"tag":"00000000-0000-0000-0000-000000000000"}', w.Malformed),
        (b'{"kind":"attach","id":7,"tag":"5BE13BCE-AE34-4A77-B6C3-16DF975FCF1A"}', w.Malformed),
    ],
)
def test_what_is_no_request_becomes_a_value(payload: bytes, kind: type[Any]) -> None:
    [cut] = w.Frames().feed(w.frame(payload))
    message = w.decode(cut, w.REQUESTS)
    assert isinstance(message, kind)
    assert message.id == (7 if b'"id":7' in payload else 0)


def test_fields_of_a_later_version_are_left_aside() -> None:
    assert w.decode(b'{"kind":"find","id":1,"colour":"red"}', w.REQUESTS) == w.Find(1)


@pytest.mark.parametrize(
    ("payload", "limit"), [(b"x" * (w.PAYLOAD_BYTES_MAX + 1), "at most"), (b"\xf5", "ASCII")]
)
def test_what_the_peer_would_not_take_is_not_sent(payload: bytes, limit: str) -> None:
    with pytest.raises(InvalidInput, match=limit):
        w.frame(payload)


def test_a_message_that_grows_too_long_is_refused_here() -> None:
    with pytest.raises(InvalidInput, match="payload"):
        w.encode(w.Exec(1, ("\x01" * 20_000,)))


# ---- the host's session


def hello(boot: str = "b", instance: str = "i", number: int = 0) -> bytes:
    return w.encode(w.Hello(number, 1, boot, instance, "Linux"))


def test_answers_come_late_and_in_any_order() -> None:
    session = HostSession(10)
    first, _ = session.request(w.Find(0))
    second, _ = session.request(w.Attach(0, TAG))
    third, _ = session.request(w.Exec(0, ("true",)))
    answers: list[Any] = [w.Attached(second, MEMORY), w.Started(third, 5), w.Found(first, ())]
    heard = list(session.feed(b"".join(map(w.encode, answers))))
    assert heard == answers
    assert list(session.outstanding) == [third]
    assert list(session.feed(w.encode(w.Exited(third, 0)))) == [w.Exited(third, 0)]
    [late] = session.feed(w.encode(w.Exited(third, 0)))
    assert isinstance(late, Late)
    assert not session.outstanding


def test_who_gave_up_hears_that_the_answer_was_late() -> None:
    session = HostSession()
    number, _ = session.request(w.Find(0))
    session.give_up(number)
    assert list(session.feed(w.encode(w.Found(number, ())))) == [Late(number, w.Found(number, ()))]


@pytest.mark.parametrize(
    ("boot", "instance", "reason"),
    [("b2", "i2", "the guest rebooted"), ("b", "i2", "the guest restarted its agent")],
)
def test_a_guest_that_begins_anew_answers_nothing_old(
    boot: str, instance: str, reason: str
) -> None:
    session = HostSession()
    list(session.feed(hello()))
    number, _ = session.request(w.Detach(0, TAG))
    lost, greeting = session.feed(hello(boot, instance))
    assert isinstance(lost, Lost)
    assert (lost.id, lost.reason) == (number, reason)
    assert isinstance(greeting, w.Hello)
    assert not session.outstanding


def test_the_same_agent_that_greets_again_has_forgotten_nothing() -> None:
    session = HostSession()
    list(session.feed(hello()))
    number, _ = session.request(w.Detach(0, TAG))
    assert [type(answer) for answer in session.feed(hello())] == [w.Hello]
    assert number in session.outstanding


def test_what_does_not_answer_the_request_is_no_answer() -> None:
    session = HostSession()
    number, _ = session.request(w.Find(0))
    [bad] = session.feed(w.encode(w.Done(number)))
    assert isinstance(bad, w.Malformed)
    assert number in session.outstanding
    [bad] = session.feed(w.frame(b'{"kind":"found","id":1,"memory":[{"tag":"x"}]}'))
    assert isinstance(bad, w.Malformed)
    assert session.violations == 2


def test_a_stream_that_ends_leaves_outcomes_unknown() -> None:
    session = HostSession()
    number, data = session.request(w.Find(0))
    list(session.feed(data[:10]))
    assert [lost.id for lost in session.disconnected("gone")] == [number]
    assert list(session.feed(hello())) == [w.Hello(0, 1, "b", "i", "Linux")]
