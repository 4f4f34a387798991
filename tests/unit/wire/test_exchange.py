"""Requests and responses over one stream: tags, deadlines, late answers, peers that misbehave."""

from __future__ import annotations

import pytest

from tagmem.base.errors import Retry
from tagmem.base.limits import CCI_OUTSTANDING_MAX
from tagmem.wire.cci import Category, CciMessage, MessageType, Opcode, ReturnCode
from tagmem.wire.commands import Unsupported
from tagmem.wire.exchange import (
    Fault,
    Malformed,
    Notification,
    Request,
    Requester,
    Responder,
    Response,
    SessionFull,
)
from tagmem.wire.fmapi import (
    DcAddReferenceRequest,
    GetDcdInfoRequest,
    GetDcdInfoResponse,
    InitiateDcAddRequest,
    SelectionPolicy,
)
from tagmem.wire.generic import GetEventRecordsRequest, IdentifyRequest
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpMessage, MctpStream
from tagmem.wire.memdev import GetDcExtentListRequest

INFO = GetDcdInfoResponse(1, 1, 7, 3, 1 << 28, (1 << 21,) * 8)


def pair() -> tuple[Requester, Responder]:
    return Requester(MctpStream(FM_EID, DEVICE_EID)), Responder(MctpStream(DEVICE_EID, FM_EID))


def requests(responder: Responder, data: bytes) -> list[Request]:
    return [item for item in responder.feed(data) if isinstance(item, Request)]


def cci(message: CciMessage, *, kind: int = MessageType.CCI, sender: int = DEVICE_EID) -> bytes:
    peer = FM_EID if sender == DEVICE_EID else DEVICE_EID
    return MctpStream(sender, peer).frame(MctpMessage(kind, message.encode()))


def test_a_request_gets_its_response() -> None:
    requester, responder = pair()
    key = requester.request(Opcode.GET_DCD_INFO, GetDcdInfoRequest(), now=0, deadline=10)
    (request,) = requests(responder, requester.outgoing())
    assert request.body == GetDcdInfoRequest()
    assert request.message_type == MessageType.FM_API
    responder.respond(request, ReturnCode.SUCCESS, INFO, vendor_status=7)
    assert responder.pending_bytes > 0
    (response,) = requester.feed(responder.outgoing(), 1)
    assert response == Response(key, 0x5600, 0, INFO, INFO.encode(), 7)
    assert requester.outstanding == 0
    assert requester.outgoing() == b""
    assert responder.outgoing() == b""


def test_answers_may_come_in_any_order() -> None:
    requester, responder = pair()
    keys = [requester.request(0x5600, GetDcdInfoRequest(), 0, 10) for _ in range(20)]
    received = requests(responder, requester.outgoing())
    assert len({request.tag for request in received}) == 20
    for request in reversed(received):
        responder.respond(request, ReturnCode.SUCCESS, INFO)
    answers = requester.feed(responder.outgoing(), 1)
    assert [answer.key for answer in answers if isinstance(answer, Response)] == keys[::-1]


def test_errors_carry_no_body() -> None:
    requester, responder = pair()
    requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
    (request,) = requests(responder, requester.outgoing())
    responder.respond(request, ReturnCode.RETRY_REQUIRED)
    (response,) = requester.feed(responder.outgoing(), 1)
    assert isinstance(response, Response)
    assert response.return_code == ReturnCode.RETRY_REQUIRED
    assert response.body is None
    assert response.malformed is None


def test_a_malformed_response_says_why_and_keeps_its_key() -> None:
    requester, responder = pair()
    key = requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
    (request,) = requests(responder, requester.outgoing())
    responder.respond(request, ReturnCode.SUCCESS)
    (response,) = requester.feed(responder.outgoing(), 1)
    assert isinstance(response, Response)
    assert response.key == key
    assert response.body is None
    assert response.malformed is not None
    assert "GetDcdInfoResponse" in response.malformed


class TestTags:
    def test_the_session_is_full_at_its_bound(self) -> None:
        requester, responder = pair()
        for _ in range(CCI_OUTSTANDING_MAX):
            requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
        with pytest.raises(SessionFull) as caught:
            requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
        assert caught.value.retry is Retry.LATER
        received = requests(responder, requester.outgoing())
        assert len(received) == CCI_OUTSTANDING_MAX
        responder.respond(received[5], ReturnCode.SUCCESS, INFO)
        requester.feed(responder.outgoing(), 1)
        requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
        (request,) = requests(responder, requester.outgoing())
        assert request.tag not in {r.tag for r in received if r is not received[5]}

    def test_a_thousand_requests_are_answered_by_their_own_answers(self) -> None:
        requester, responder = pair()
        waiting: list[tuple[int, Request]] = []
        for number in range(1000):
            request = GetDcExtentListRequest(number)
            key = requester.request(0x4801, request, 0, 10)
            (received,) = requests(responder, requester.outgoing())
            assert received.body == request
            waiting.append((key, received))
            if len(waiting) > 3:
                # The oldest stays unanswered for long; its tag must not be given to another.
                key, old = waiting.pop(-2)
                responder.respond(old, ReturnCode.BUSY, vendor_status=number)
                (answer,) = requester.feed(responder.outgoing(), 1)
                assert isinstance(answer, Response)
                assert (answer.key, answer.vendor_status) == (key, number)
        assert len({r.tag for _, r in waiting}) == len(waiting)
        assert requester.ignored == 0

    def test_a_late_response_answers_nobody(self) -> None:
        requester, responder = pair()
        key = requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
        (late,) = requests(responder, requester.outgoing())
        assert requester.next_deadline() == 10
        assert requester.expire(9) == []
        assert requester.expire(10) == [key]
        assert requester.next_deadline() is None
        for _ in range(300):
            requester.request(0x5600, GetDcdInfoRequest(), 10, 20)
            (young,) = requests(responder, requester.outgoing())
            assert young.tag != late.tag
            responder.respond(young, ReturnCode.SUCCESS, INFO)
            assert len(requester.feed(responder.outgoing(), 11)) == 1
        responder.respond(late, ReturnCode.SUCCESS, INFO)
        assert requester.feed(responder.outgoing(), 12) == []
        assert requester.ignored == 1

    def test_tags_that_never_come_back_end_the_session(self) -> None:
        requester, _ = pair()
        for number in range(256):
            requester.request(0x5600, GetDcdInfoRequest(), number, number + 1)
            requester.expire(number + 1)
        with pytest.raises(SessionFull, match="renewed"):
            requester.request(0x5600, GetDcdInfoRequest(), 300, 301)

    def test_duplicate_and_made_up_responses_are_counted_and_ignored(self) -> None:
        requester, responder = pair()
        requester.request(0x5600, GetDcdInfoRequest(), 0, 10)
        (request,) = requests(responder, requester.outgoing())
        wrong = CciMessage(Category.RESPONSE, request.tag, 0x5601)
        assert requester.feed(cci(wrong), 1) == []
        responder.respond(request, ReturnCode.SUCCESS, INFO)
        responder.respond(request, ReturnCode.SUCCESS, INFO)
        assert len(requester.feed(responder.outgoing(), 1)) == 1
        assert requester.feed(cci(CciMessage(Category.RESPONSE, 200, 0x5600)), 1) == []
        assert requester.ignored == 3

    def test_abandon_names_every_request(self) -> None:
        requester, _ = pair()
        keys = [requester.request(0x5600, GetDcdInfoRequest(), 0, 10) for _ in range(3)]
        assert requester.abandon() == keys
        assert requester.outstanding == 0


class TestBadCallers:
    def test_a_deadline_in_the_past(self) -> None:
        requester, _ = pair()
        with pytest.raises(ValueError, match="deadline"):
            requester.request(0x5600, GetDcdInfoRequest(), 10, 10)

    def test_a_payload_of_another_opcode(self) -> None:
        requester, _ = pair()
        with pytest.raises(ValueError, match="payload"):
            requester.request(0x5601, GetDcdInfoRequest(), 0, 10)

    def test_a_bound_that_the_tag_cannot_hold(self) -> None:
        with pytest.raises(ValueError, match="outstanding_max"):
            Requester(MctpStream(8, 9), outstanding_max=257)


class TestResponder:
    def test_unknown_opcodes_are_values_to_answer(self) -> None:
        requester, responder = pair()
        key = requester.request(0x7777, b"whatever", 0, 10)
        (request,) = requests(responder, requester.outgoing())
        assert request.body == Unsupported(0x7777)
        responder.respond(request, ReturnCode.UNSUPPORTED)
        (response,) = requester.feed(responder.outgoing(), 1)
        assert isinstance(response, Response)
        assert (response.key, response.return_code) == (key, ReturnCode.UNSUPPORTED)

    @pytest.mark.parametrize(
        ("opcode", "payload", "code"),
        [
            (0x5600, b"x", ReturnCode.INVALID_PAYLOAD_LENGTH),
            (0x5606, bytes(15), ReturnCode.INVALID_PAYLOAD_LENGTH),
            (0x4802, b"\xff\xff\xff\xff" + bytes(4), ReturnCode.INVALID_PAYLOAD_LENGTH),
            (0x0100, b"\x09", ReturnCode.INVALID_INPUT),
            (0x5604, b"\0\0\x0f" + bytes(25), ReturnCode.INVALID_INPUT),
        ],
    )
    def test_malformed_requests_get_the_code_they_deserve(
        self, opcode: int, payload: bytes, code: ReturnCode
    ) -> None:
        requester, responder = pair()
        requester.request(opcode, payload, 0, 10)
        requester.request(0x0001, IdentifyRequest(), 0, 10)
        bad, good = requests(responder, requester.outgoing())
        assert isinstance(bad.body, Malformed)
        assert bad.body.return_code is code
        assert bad.body.reason
        assert good.body == IdentifyRequest()

    def test_a_length_that_is_not_the_payloads_is_answered(self) -> None:
        _, responder = pair()
        message = bytearray(CciMessage(Category.REQUEST, 9, 0x0100, b"\x04").encode())
        message[5] = 2
        data = MctpStream(FM_EID, DEVICE_EID).frame(MctpMessage(8, bytes(message)))
        (request,) = requests(responder, data)
        assert isinstance(request.body, Malformed)
        assert request.body.return_code is ReturnCode.INVALID_PAYLOAD_LENGTH
        assert request.tag == 9

    def test_a_command_under_the_wrong_message_type_is_unsupported(self) -> None:
        _, responder = pair()
        message = CciMessage(Category.REQUEST, 1, 0x5600)
        (request,) = requests(responder, cci(message, kind=8, sender=FM_EID))
        assert request.body == Unsupported(0x5600)

    def test_a_port_may_take_component_commands_only(self) -> None:
        responder = Responder(
            MctpStream(DEVICE_EID, FM_EID), message_types=frozenset({MessageType.CCI})
        )
        message = CciMessage(Category.REQUEST, 1, 0x5600)
        (item,) = responder.feed(cci(message, kind=7, sender=FM_EID))
        assert item == Fault("MCTP message type 7")

    @pytest.mark.parametrize("payload", [b"", b"\0", bytes(11), b"\1" + bytes(11), b"\x0f" * 12])
    def test_what_cannot_be_answered_is_a_fault(self, payload: bytes) -> None:
        requester, responder = pair()
        data = MctpStream(FM_EID, DEVICE_EID).frame(MctpMessage(8, payload))
        (item,) = responder.feed(data)
        assert isinstance(item, Fault)
        assert not item.fatal
        requester.request(0x0100, GetEventRecordsRequest.decode(b"\4"), 0, 10)
        assert len(requests(responder, requester.outgoing())) == 1

    def test_garbage_without_end_is_fatal_once(self) -> None:
        _, responder = pair()
        faults = responder.feed(b"garbage " * 10_000) + responder.feed(b"more" * 1000)
        assert [item for item in faults if isinstance(item, Fault) and item.fatal] == [
            Fault("too many consecutive framing faults", fatal=True)
        ]
        assert len(faults) < 20


class TestRequesterAndItsPeer:
    def test_notifications(self) -> None:
        requester, responder = pair()
        responder.notify(0x10)
        assert requester.feed(responder.outgoing(), 0) == [Notification(0x10)]

    @pytest.mark.parametrize(
        "data",
        [
            cci(CciMessage(Category.REQUEST, 0, Opcode.EVENT_NOTIFICATION, b"\1")),
            cci(CciMessage(Category.REQUEST, 0, Opcode.IDENTIFY)),
            cci(CciMessage(Category.RESPONSE, 0, Opcode.IDENTIFY), kind=5),
            MctpStream(DEVICE_EID, FM_EID).frame(MctpMessage(8, b"short")),
            b"\x7e\x01\x05\x01\x08\x09\xc8\x08\x00\x00\x7e",
        ],
    )
    def test_nonsense_is_a_fault_and_the_session_lives(self, data: bytes) -> None:
        requester, responder = pair()
        (item,) = requester.feed(data, 0)
        assert isinstance(item, Fault)
        assert not item.fatal
        responder.notify(1)
        assert requester.feed(responder.outgoing(), 0) == [Notification(1)]

    def test_garbage_without_end_is_fatal(self) -> None:
        requester, _ = pair()
        assert requester.feed(b"x" * 100_000, 0)[-1] == Fault(
            "too many consecutive framing faults", fatal=True
        )


def test_large_requests_come_through_whole() -> None:
    requester, responder = pair()
    tag = bytes(range(16))
    requester.request(0x5606, DcAddReferenceRequest(tag), 0, 10)
    add = InitiateDcAddRequest(0, SelectionPolicy.FREE, 1, 1 << 30, tag)
    requester.request(0x5604, add, 0, 10)
    data = requester.outgoing()
    received = [r for byte in data for r in requests(responder, bytes((byte,)))]
    assert [r.body for r in received] == [DcAddReferenceRequest(tag), add]
