"""What holds for every structure and every stream of bytes, whatever the values and however cut."""

from __future__ import annotations

import types
from enum import IntEnum
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.wire import cci, commands, extent, fmapi, generic, memdev, vendor
from tagmem.wire.exchange import Fault, Request, Requester, Responder, Response
from tagmem.wire.fields import DecodeError
from tagmem.wire.layout import STRUCTURES, BadValue, WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, FramingFault, MctpMessage, MctpStream

MODULES = (cci, extent, fmapi, generic, memdev, vendor)
KINDS = [kind for kind in STRUCTURES if kind.__module__ in {m.__name__ for m in MODULES}]
INTEGERS = st.one_of(
    st.integers(0, 255),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 32).map(lambda n: n << 28),
    st.sampled_from([0x7D, 0x7E, 0xFFFF, 0xFFFFFFFF]),
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type; some are out of its range, which `structures` mends."""
    if isinstance(kind, types.UnionType):
        return st.one_of([values(option) for option in get_args(kind)])
    if get_origin(kind) is tuple:
        item = values(get_args(kind)[0])
        return st.one_of(
            st.lists(item, max_size=4).map(tuple),
            st.lists(item, min_size=8, max_size=8).map(tuple),
        )
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return INTEGERS
    if kind is bytes:
        return st.one_of(
            *[st.binary(min_size=size, max_size=size) for size in (16, 32, 80)],
            st.binary(max_size=40),
        )
    if issubclass(kind, IntEnum):
        return st.sampled_from(list(kind))
    assert issubclass(kind, WireStruct)
    return structures(kind)


@st.composite
def structures(draw: st.DrawFn, kind: type[WireStruct]) -> WireStruct:
    """A value of a structure: a refused field is moved into the range that the error names."""
    hints = get_type_hints(kind)
    drawn = {name: draw(values(hints[name]), label=name) for name in kind.__struct_fields__}
    if kind is generic.DynamicCapacityRecord:
        own = generic.DYNAMIC_CAPACITY_UUID
        drawn["header"] = msgspec.structs.replace(drawn["header"], identifier=own)
    for _ in range(4 * len(drawn) + 1):
        try:
            return kind(**drawn)
        except BadValue as error:
            name = error.field.split()[0]
            drawn[name] = smaller(drawn[name], error.limit)
    raise AssertionError(f"{kind.__name__}: {drawn}")


def smaller(value: Any, limit: str) -> Any:
    """A value near `value` that a field takes, found from the field's own words."""
    words = limit.split()
    if isinstance(value, bytes):
        size = int(words[0])
        return value[:size].ljust(size, b"\x7e")
    if isinstance(value, tuple):
        if words[0] == "a":
            return (value * 8)[:8] if value else (0,) * 8
        return tuple(item & int(words[-1]) for item in value) if words[0] == "0" else ()
    if "multiple" in words:
        return value << 28 & 0xFFFF_FFFF_F000_0000
    return max(int(words[0]), value & int(words[-1]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_value_comes_back(kind: type[WireStruct], data: st.DataObject) -> None:
    value = data.draw(structures(kind))
    encoded = value.encode()
    assert kind.decode(encoded) == value
    assert kind.decode(encoded).encode() == encoded
    assert kind.LAYOUT.reserved_nonzero(encoded) == ()
    assert len(encoded) >= kind.LAYOUT.size


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(noise=st.binary(max_size=200))
def test_noise_decodes_or_is_refused(kind: type[WireStruct], noise: bytes) -> None:
    try:
        value, consumed = kind.decode_prefix(noise)
    except DecodeError:
        return
    assert consumed <= len(noise)
    # What was read can be written, and reads the same again.
    assert kind.decode(value.encode()) == value


@given(opcode=st.integers(0, 0xFFFF), payload=st.binary(max_size=100))
def test_unknown_opcodes_never_raise(opcode: int, payload: bytes) -> None:
    if opcode in commands.COMMANDS:
        return
    assert commands.decode_request(opcode, payload) == commands.Unsupported(opcode)


SPECIAL = st.sampled_from([b"\x7e", b"\x7d", b"\x7d\x5e", b"\x7d\x5d", b"\x7e\x01", b"\x5e"])
BODIES = st.lists(st.one_of(SPECIAL, st.binary(max_size=300)), max_size=6).map(b"".join)
MESSAGES = st.builds(MctpMessage, st.integers(0, 127), BODIES, st.integers(0, 7), st.booleans())


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


@given(messages=st.lists(MESSAGES, max_size=5), cuts=st.lists(st.integers(0), max_size=20))
def test_framing_does_not_depend_on_how_bytes_arrive(
    messages: list[MctpMessage], cuts: list[int]
) -> None:
    sender, receiver = MctpStream(FM_EID, DEVICE_EID), MctpStream(DEVICE_EID, FM_EID)
    data = b"".join(sender.frame(message) for message in messages)
    found = [item for chunk in chunks(data, cuts) for item in receiver.feed(chunk)]
    assert found == messages
    assert receiver.faults == 0


NOISE = st.lists(
    st.one_of(SPECIAL, st.binary(max_size=40), st.just(b"\x7e\x01\xff"), st.just(b"\x7e" * 9)),
    max_size=8,
).map(b"".join)


@given(noise=NOISE, messages=st.lists(MESSAGES, min_size=1, max_size=3))
def test_a_stream_finds_its_way_back_after_noise(noise: bytes, messages: list[MctpMessage]) -> None:
    sender = MctpStream(FM_EID, DEVICE_EID)
    receiver = MctpStream(DEVICE_EID, FM_EID, faults_max=1_000)
    receiver.feed(noise)
    data = b"".join(sender.frame(message) for message in messages)
    found = [item for item in receiver.feed(data) if isinstance(item, MctpMessage)]
    assert found == messages


@given(noise=st.lists(st.one_of(NOISE, st.binary(max_size=3000)), max_size=10))
def test_noise_never_raises_and_memory_stays_bounded(noise: list[bytes]) -> None:
    receiver = MctpStream(DEVICE_EID, FM_EID)
    faults = 0
    for piece in noise:
        found = receiver.feed(piece)
        faults += sum(isinstance(item, FramingFault) for item in found)
        assert len(receiver._buffer) <= 3 + 2 * 255 + 3
    assert faults == receiver.faults <= 1 + 16 * (1 + len(noise))


@given(
    payloads=st.lists(st.tuples(st.sampled_from([7, 8, 1]), st.binary(max_size=60)), max_size=20)
)
def test_no_message_ends_a_session(payloads: list[tuple[int, bytes]]) -> None:
    sender = MctpStream(FM_EID, DEVICE_EID)
    responder = Responder(MctpStream(DEVICE_EID, FM_EID))
    for kind, payload in payloads:
        for item in responder.feed(sender.frame(MctpMessage(kind, payload))):
            assert isinstance(item, Fault | Request)
            if isinstance(item, Request):
                responder.respond(item, cci.ReturnCode.UNSUPPORTED)
    requester = Requester(MctpStream(FM_EID, DEVICE_EID))
    requester.feed(responder.outgoing(), 0)
    requester.request(0x0001, generic.IdentifyRequest(), 0, 1)
    (request,) = responder.feed(requester.outgoing())
    assert isinstance(request, Request)
    assert request.body == generic.IdentifyRequest()


@given(
    script=st.lists(
        st.tuples(st.sampled_from(["ask", "answer", "repeat", "expire"]), st.integers(0)),
        max_size=60,
    )
)
def test_every_answer_reaches_the_request_that_it_answers(script: list[tuple[str, int]]) -> None:
    requester = Requester(MctpStream(FM_EID, DEVICE_EID), outstanding_max=8)
    responder = Responder(MctpStream(DEVICE_EID, FM_EID))
    open_keys: set[int] = set()
    unanswered: dict[int, Request] = {}
    answered: list[Request] = []
    for now, (verb, choice) in enumerate(script):
        if verb == "ask" and len(open_keys) < 8:
            key = requester.request(0x0401, generic.GetLogRequest(bytes(16), now, 0), now, now + 9)
            (request,) = responder.feed(requester.outgoing())
            assert isinstance(request, Request)
            unanswered[key] = request
            open_keys.add(key)
        elif verb == "answer" and unanswered:
            key = sorted(unanswered)[choice % len(unanswered)]
            request = unanswered.pop(key)
            answered.append(request)
            body = generic.GetLogResponse(key.to_bytes(4, "little"))
            responder.respond(request, cci.ReturnCode.SUCCESS, body)
            got = requester.feed(responder.outgoing(), now)
            if key in open_keys:
                (answer,) = got
                assert isinstance(answer, Response)
                assert (answer.key, answer.body) == (key, body)
                open_keys.remove(key)
            else:
                assert got == []
        elif verb == "expire":
            late = requester.expire(now)
            assert open_keys.issuperset(late)
            open_keys.difference_update(late)
        assert requester.outstanding == len(open_keys)
