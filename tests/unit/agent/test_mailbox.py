"""The mailbox session against a small device at the other end of the wire, byte for byte."""

from __future__ import annotations

from collections import Counter

from tagmem.agent import records as r
from tagmem.agent.mailbox import HostLink, MediaAnswer
from tagmem.base.ids import Tag, tag_to_bytes
from tagmem.base.limits import MAILBOX_REQUEST_DEADLINE_NS
from tagmem.base.units import GIB, MIB, SECOND, Dpa
from tagmem.ports import Effect, Event
from tagmem.wire import generic, memdev, vendor
from tagmem.wire.cci import NoPayload, Opcode, ReturnCode
from tagmem.wire.exchange import Fault, Request, Responder
from tagmem.wire.extent import UpdatedExtent, WireExtent
from tagmem.wire.generic import DcEventType, DynamicCapacityRecord, EventHeader
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
OK = ReturnCode.SUCCESS


def wire(start: int, tag: str = TAG) -> WireExtent:
    return WireExtent(start, 2 * MIB, tag_to_bytes(Tag(tag)))


class Device:
    """Answers as an appliance does; `codes` overrides the next answers to an opcode."""

    def __init__(self) -> None:
        self.log: list[DynamicCapacityRecord] = []
        self.held: list[WireExtent] = []
        self.generation = 0
        self.page_max = 1000
        self.handle = 0
        self.codes: dict[int, list[ReturnCode]] = {}
        self.asked: Counter[int] = Counter()
        self.answers: list[tuple[UpdatedExtent, ...]] = []
        self.silent = False
        self.moves = 0
        """How often the list still changes just after it was read."""

    def group(self, kind: DcEventType, *extents: WireExtent) -> None:
        for index, extent in enumerate(extents):
            self.handle += 1
            more = index < len(extents) - 1
            self.log.append(DynamicCapacityRecord(EventHeader(self.handle), kind, extent, more))

    def answer(self, request: Request) -> tuple[ReturnCode, WireStruct | None]:
        body = request.body
        self.asked[request.opcode] += 1
        if self.codes.get(request.opcode):
            return self.codes[request.opcode].pop(0), None
        if isinstance(body, memdev.GetDcConfigurationRequest):
            return OK, memdev.GetDcConfigurationResponse(
                1, (memdev.DcRegion(0, GIB, GIB, 2 * MIB),)
            )
        if isinstance(body, generic.GetEventRecordsRequest):
            return OK, generic.GetEventRecordsResponse(tuple(self.log[:100]))
        if isinstance(body, generic.ClearEventRecordsRequest):
            handles = tuple(record.header.handle for record in self.log[: len(body.handles)])
            if handles != body.handles:
                return ReturnCode.INVALID_HANDLE, None
            del self.log[: len(handles)]
        if isinstance(body, memdev.GetDcExtentListRequest):
            page = tuple(self.held[body.first_extent :][: self.page_max])
            total, generation = len(self.held), self.generation
            if self.moves:
                self.moves -= 1
                self.generation += 1
                self.held.append(wire(100 * MIB))
            return OK, memdev.GetDcExtentListResponse(page, total, generation)
        if isinstance(body, memdev.AddDcResponseRequest):
            self.answers.append(body.extents)
        if isinstance(body, vendor.GetExtentMediaRequest):
            piece = vendor.MediaPiece(0, 2 * MIB)
            layout = vendor.MediaLayout.BY_TAG
            return OK, vendor.GetExtentMediaResponse(layout, False, (piece,))
        return OK, NoPayload()


class Wire:
    def __init__(self, device: Device | None = None) -> None:
        self.device = device or Device()
        self.link = HostLink("a0")
        self.now = 1000 * SECOND
        self.events: list[Event | MediaAnswer] = []
        self.connect()

    def connect(self) -> None:
        self.responder = Responder(MctpStream(DEVICE_EID, FM_EID))
        self.link.connected(self.now)

    def run(self) -> list[Event | MediaAnswer]:
        """Until nothing moves; what the loop hears."""
        while data := self.link.outgoing():
            for request in self.responder.feed(data):
                assert not isinstance(request, Fault)
                code, body = self.device.answer(request)
                if not self.device.silent:
                    self.responder.respond(request, code, body)
            self.events += self.link.feed(self.responder.outgoing(), self.now)
        heard, self.events = self.events, []
        return heard

    def notify(self) -> list[Event | MediaAnswer]:
        self.responder.notify(1 << 4)
        self.events += self.link.feed(self.responder.outgoing(), self.now)
        return self.run()

    def perform(self, effect: Effect) -> list[Event | MediaAnswer]:
        self.link.perform(effect, self.now)
        return self.run()

    def later(self, nanoseconds: int) -> list[Event | MediaAnswer]:
        self.now += nanoseconds
        self.events += self.link.tick(self.now)
        return self.run()


def test_a_session_begins_by_reading() -> None:
    device = Device()
    device.held = [wire(0)]
    device.group(DcEventType.ADD_CAPACITY, wire(8 * MIB), wire(4 * MIB))
    read, offered = Wire(device).run()
    region = r.Region(Dpa(0), GIB, 2 * MIB)
    assert read == r.DeviceRead("a0", (region,), (r.Extent(Dpa(0), 2 * MIB, TAG),), True, 1)
    assert isinstance(offered, r.Offered)
    assert [extent.dpa for extent in offered.extents] == [8 * MIB, 4 * MIB]


def test_records_are_cleared_after_the_answer_and_not_before() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.group(DcEventType.ADD_CAPACITY, wire(0))
    (offered,) = wire_.notify()
    assert isinstance(offered, r.Offered)
    assert len(wire_.device.log) == 1
    heard = wire_.perform(r.Answer(0, "a0", offered.group, ((0, 2 * MIB),)))
    assert heard == [r.Answered("a0", offered.group, 0)]
    assert wire_.device.answers == [(UpdatedExtent(0, 2 * MIB),)]
    assert wire_.device.log == []


def test_a_group_that_stays_open_is_offered_when_it_is_complete() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.group(DcEventType.ADD_CAPACITY, wire(0), wire(2 * MIB))
    tail = wire_.device.log.pop()
    assert wire_.notify() == []
    wire_.device.log.append(tail)
    (offered,) = wire_.later(SECOND)
    assert isinstance(offered, r.Offered)
    assert len(offered.extents) == 2


def test_what_an_earlier_session_answered_is_not_answered_again() -> None:
    device = Device()
    device.group(DcEventType.ADD_CAPACITY, wire(0))
    device.group(DcEventType.ADD_CAPACITY, wire(2 * MIB))
    device.group(DcEventType.ADD_CAPACITY, wire(4 * MIB))
    device.held = [wire(2 * MIB)]
    heard = Wire(device).run()
    offered = [event for event in heard if isinstance(event, r.Offered)]
    assert [event.extents[0].dpa for event in offered] == [4 * MIB]
    assert len(device.log) == 1


def test_the_list_is_read_again_when_it_moves() -> None:
    device = Device()
    device.held = [wire(n * 2 * MIB) for n in range(5)]
    device.page_max = 2

    device.moves = 1
    read = Wire(device).run()[0]
    assert isinstance(read, r.DeviceRead)
    assert len(read.held) == 6
    assert len(set(read.held)) == 6


def test_retry_required_is_waited_for() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.group(DcEventType.ADD_CAPACITY, wire(0))
    (offered,) = wire_.notify()
    assert isinstance(offered, r.Offered)
    wire_.device.codes[Opcode.ADD_DC_RESPONSE] = [ReturnCode.RETRY_REQUIRED, ReturnCode.BUSY]
    assert wire_.perform(r.Answer(0, "a0", offered.group, ((0, 2 * MIB),))) == []
    assert wire_.later(SECOND) == []
    assert wire_.later(SECOND) == [r.Answered("a0", offered.group, 0)]


def three_offers(wire_: Wire) -> list[int]:
    """The numbers of three groups of one extent each."""
    wire_.run()
    for number in range(3):
        wire_.device.group(DcEventType.ADD_CAPACITY, wire(number * 2 * MIB))
    return [event.group for event in wire_.notify() if isinstance(event, r.Offered)]


def acceptance(group: int, number: int) -> r.Answer:
    return r.Answer(0, "a0", group, ((number * 2 * MIB, 2 * MIB),))


def test_acceptances_do_not_wait_for_one_another() -> None:
    wire_ = Wire()
    groups = three_offers(wire_)
    for number, group in enumerate(groups):
        wire_.link.perform(acceptance(group, number), wire_.now)
    sent = wire_.responder.feed(wire_.link.outgoing())
    assert [request.opcode for request in sent if isinstance(request, Request)] == [
        Opcode.ADD_DC_RESPONSE
    ] * 3


def test_an_acceptance_that_came_too_early_is_sent_again_behind_the_older_one() -> None:
    wire_ = Wire()
    groups = three_offers(wire_)
    wire_.device.codes[Opcode.ADD_DC_RESPONSE] = [
        ReturnCode.RETRY_REQUIRED,
        ReturnCode.INVALID_INPUT,
        ReturnCode.INVALID_INPUT,
    ]
    for number, group in enumerate(groups):
        wire_.link.perform(acceptance(group, number), wire_.now)
    assert wire_.run() == []
    heard = wire_.later(SECOND)
    assert heard == [r.Answered("a0", group, 0) for group in groups]
    assert [extents[0].start_dpa for extents in wire_.device.answers] == [0, 2 * MIB, 4 * MIB]
    assert wire_.device.log == []


def test_a_refusal_goes_alone() -> None:
    wire_ = Wire()
    first, second, third = three_offers(wire_)
    wire_.link.perform(acceptance(first, 0), wire_.now)
    wire_.link.perform(r.Answer(0, "a0", second, ()), wire_.now)
    wire_.link.perform(acceptance(third, 2), wire_.now)
    sent: list[int] = []
    while data := wire_.link.outgoing():
        answers = 0
        for request in wire_.responder.feed(data):
            assert isinstance(request, Request)
            answers += request.opcode == Opcode.ADD_DC_RESPONSE
            wire_.responder.respond(request, *wire_.device.answer(request))
        wire_.link.feed(wire_.responder.outgoing(), wire_.now)
        sent.append(answers)
    assert [count for count in sent if count] == [1, 1, 1]
    assert [len(extents) for extents in wire_.device.answers] == [1, 0, 1]


def test_an_acceptance_that_the_device_cannot_take_becomes_a_refusal() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.group(DcEventType.ADD_CAPACITY, wire(0))
    (offered,) = wire_.notify()
    assert isinstance(offered, r.Offered)
    wire_.device.codes[Opcode.ADD_DC_RESPONSE] = [ReturnCode.RESOURCES_EXHAUSTED]
    heard = wire_.perform(r.Answer(0, "a0", offered.group, ((0, 2 * MIB),)))
    assert heard == [r.Answered("a0", offered.group, ReturnCode.RESOURCES_EXHAUSTED)]
    assert wire_.device.answers == [()]


def test_forced_and_asked_releases_are_told_and_cleared_when_acknowledged() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.group(DcEventType.RELEASE_CAPACITY, wire(0))
    wire_.device.group(DcEventType.FORCED_CAPACITY_RELEASE, wire(0))
    asked, taken = wire_.notify()
    assert isinstance(asked, r.ReleaseAsked)
    assert isinstance(taken, r.TakenByForce)
    wire_.perform(r.Acknowledge(0, "a0", taken.group))
    assert len(wire_.device.log) == 2, "the older one first"
    wire_.perform(r.Acknowledge(0, "a0", asked.group))
    assert wire_.device.log == []


def test_a_missing_answer_ends_the_session_and_the_next_one_reads_again() -> None:
    wire_ = Wire()
    wire_.run()
    wire_.device.silent = True
    wire_.perform(r.ReadDevice(0, "a0"))
    wire_.later(MAILBOX_REQUEST_DEADLINE_NS)
    assert "no answer within 5000 ms" in wire_.link.broken
    assert wire_.link.disconnected(wire_.now, "x") == [r.LinkLost("a0", "x")]
    wire_.device.silent = False
    wire_.connect()
    (read,) = wire_.run()
    assert isinstance(read, r.DeviceRead)
    assert read.fresh
    assert read.session == 2


def test_a_release_of_an_earlier_session_is_void() -> None:
    wire_ = Wire()
    wire_.run()
    returned = r.ReturnExtents(0, "a0", TAG, ((0, 2 * MIB),), session=1)
    assert wire_.perform(returned) == [r.Returned("a0", TAG, 0)]
    wire_.connect()
    wire_.run()
    assert wire_.perform(returned) == []
    assert wire_.device.asked[Opcode.RELEASE_DC] == 1


def test_media_are_asked_for_by_tag() -> None:
    wire_ = Wire()
    wire_.run()
    assert wire_.link.ask_media(TAG, wire_.now)
    (answer,) = wire_.run()
    assert isinstance(answer, MediaAnswer)
    assert answer.media is not None


def test_more_requests_than_a_session_holds_wait_in_order() -> None:
    wire_ = Wire()
    wire_.run()
    for _ in range(200):
        wire_.link.perform(r.ReturnExtents(0, "a0", TAG, ((0, 2 * MIB),), session=1), wire_.now)
    assert len(wire_.run()) == 200
