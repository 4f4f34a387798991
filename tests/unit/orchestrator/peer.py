"""A scripted appliance for the link's tests: lists, tags, an event log; it can misbehave."""

from __future__ import annotations

from collections.abc import Callable

from tagmem.base.ids import ApplianceId, HostId, Tag, tag_to_bytes
from tagmem.base.units import MediaOffset
from tagmem.domain.effects import FenceHost, InitiateAdd, InitiateRelease
from tagmem.domain.records import Extent
from tagmem.orchestrator.links import FmLink
from tagmem.ports import Event
from tagmem.wire import fmapi, generic, vendor
from tagmem.wire.cci import MessageType, ReturnCode
from tagmem.wire.exchange import Request, Responder
from tagmem.wire.extent import WireExtent
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream

MIB = 1 << 20
BASE = 1 << 32
SIZE = 1 << 30
TAG = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")
TAG2 = Tag("00000000-0000-4000-8000-000000000002")
Answer = tuple[ReturnCode, WireStruct | None]


class Peer:
    """An appliance with `hosts` LDs and one region per entry of `attributes`."""

    def __init__(self, hosts: int = 2, attributes: tuple[int, ...] = (0,)) -> None:
        self.hosts = hosts
        self.attributes = attributes
        self.mirrored: set[int] = set()
        self.page_max = 1_000
        self.records_per_get = 500
        self.lists: dict[int, list[WireExtent]] = {ld: [] for ld in range(hosts)}
        self.generations = dict.fromkeys(range(hosts), 1)
        self.tags: list[fmapi.DcTagInfo] = []
        self.tags_generation = 1
        self.log: list[generic.DynamicCapacityRecord] = []
        self.overflow = False
        self.handle = 0
        self.seen: list[WireStruct] = []
        """Every request, in order."""
        self.codes: list[ReturnCode] = []
        """What 5604h, 5605h and C003h are answered with; success when it is empty."""
        self.mute: Callable[[WireStruct], bool] = lambda _: False
        """Requests for which no answer is sent, though they are carried out."""
        self.before: Callable[[WireStruct], None] = lambda _: None
        """Called with each request before it is answered."""
        self.twice = False
        """Send each answer twice."""
        self.connect()

    def connect(self) -> None:
        """A new session displaces the old one."""
        self.responder = Responder(
            MctpStream(DEVICE_EID, FM_EID), message_types=frozenset(MessageType)
        )

    def feed(self, data: bytes) -> bytes:
        out = b""
        for request in self.responder.feed(data):
            assert isinstance(request, Request), request
            assert isinstance(request.body, WireStruct), request
            self.seen.append(request.body)
            self.before(request.body)
            code, body = self.answer(request.body)
            if self.mute(request.body):
                continue
            for _ in range(1 + self.twice):
                self.responder.respond(request, code, body)
            out += self.responder.outgoing()
        return out

    def notify(self) -> bytes:
        self.responder.notify(1 << generic.EventLog.DYNAMIC_CAPACITY)
        return self.responder.outgoing()

    def count(self, kind: type[WireStruct]) -> int:
        return sum(isinstance(request, kind) for request in self.seen)

    # ---- the world

    def hold(self, ld: int, *extents: WireExtent) -> None:
        self.lists[ld].extend(extents)
        self.generations[ld] += 1

    def record(self, kind: int, ld: int, extent: WireExtent, *, more: bool = False) -> None:
        self.handle = self.handle % 0xFFFF + 1
        header = generic.EventHeader(self.handle)
        self.log.append(
            generic.DynamicCapacityRecord(
                header, generic.DcEventType(kind), extent, more=more, host_id=ld
            )
        )

    # ---- answers

    def answer(self, body: WireStruct) -> Answer:
        handler = getattr(self, f"on_{type(body).__name__}", None)
        if handler is None:
            return ReturnCode.UNSUPPORTED, None
        answer: Answer = handler(body)
        return answer

    def on_IdentifyRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        return ReturnCode.SUCCESS, generic.IdentifyResponse(0x1E98, 1, 0, 0, 7, 16, 3)

    def on_GetDcdInfoRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        masks = tuple(1 << 21 for _ in range(8))
        body = fmapi.GetDcdInfoResponse(self.hosts, len(self.attributes), 5, 3, SIZE, masks)
        return ReturnCode.SUCCESS, body

    def on_GetHostDcRegionConfigurationRequest(  # noqa: N802
        self, body: fmapi.GetHostDcRegionConfigurationRequest
    ) -> Answer:
        regions = tuple(
            fmapi.HostDcRegion(
                BASE * (1 + body.host_id) + at * SIZE, SIZE, SIZE, 2 * MIB, attributes, True
            )
            for at, attributes in enumerate(self.attributes)
        )
        return ReturnCode.SUCCESS, fmapi.GetHostDcRegionConfigurationResponse(
            body.host_id, len(regions), regions
        )

    def on_GetPoolMapRequest(self, body: vendor.GetPoolMapRequest) -> Answer:  # noqa: N802
        if not self.mirrored:
            return ReturnCode.UNSUPPORTED, None
        order = vendor.PoolOrder(int(body.ld in self.mirrored))
        return ReturnCode.SUCCESS, vendor.GetPoolMapResponse(order, len(self.attributes), (0,) * 8)

    def on_GetEventRecordsRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        some = tuple(self.log[: self.records_per_get])
        return ReturnCode.SUCCESS, generic.GetEventRecordsResponse(
            some, len(some) < len(self.log), self.overflow
        )

    def on_ClearEventRecordsRequest(  # noqa: N802
        self, body: generic.ClearEventRecordsRequest
    ) -> Answer:
        if body.clear_all:
            if not self.overflow:
                return ReturnCode.INVALID_INPUT, None
            self.overflow = False
            self.log.clear()
            return ReturnCode.SUCCESS, None
        oldest = tuple(record.header.handle for record in self.log[: len(body.handles)])
        if body.handles != oldest:
            return ReturnCode.INVALID_HANDLE, None
        del self.log[: len(body.handles)]
        return ReturnCode.SUCCESS, None

    def on_GetDcRegionExtentListsRequest(  # noqa: N802
        self, body: fmapi.GetDcRegionExtentListsRequest
    ) -> Answer:
        full = self.lists[body.host_id]
        wanted = min(body.extents_wanted, self.page_max)
        page = tuple(full[body.first_extent :][:wanted])
        return ReturnCode.SUCCESS, fmapi.GetDcRegionExtentListsResponse(
            body.host_id, body.first_extent, page, len(full), self.generations[body.host_id]
        )

    def on_DcListTagsRequest(self, body: fmapi.DcListTagsRequest) -> Answer:  # noqa: N802
        page = tuple(self.tags[body.first_tag :][: min(body.tags_max, self.page_max)])
        return ReturnCode.SUCCESS, fmapi.DcListTagsResponse(
            self.tags_generation, len(self.tags), page
        )

    def _code(self) -> Answer:
        return (self.codes.pop(0) if self.codes else ReturnCode.SUCCESS), None

    def on_InitiateDcAddRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        return self._code()

    def on_InitiateDcReleaseRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        return self._code()

    def on_FenceRequest(self, _: WireStruct) -> Answer:  # noqa: N802
        return self._code()


class Pair:
    """A link and its peer, with the bytes between them and a clock set by hand."""

    def __init__(self, peer: Peer | None = None, *, deadline_ns: int = 1_000_000_000) -> None:
        self.peer = peer or Peer()
        self.link = FmLink(ApplianceId("z0"), deadline_ns=deadline_ns)
        self.now = 1_000
        self.log: list[Event] = []

    def connect(self) -> Pair:
        self.peer.connect()
        self.link.connected(self.now)
        return self.settle()

    def settle(self) -> Pair:
        """Carry bytes to and fro until none are left."""
        for _ in range(10_000):
            data = self.link.outgoing()
            self.log += self.link.events()
            if not data:
                return self
            back = self.peer.feed(data)
            if back:
                self.link.feed(back, self.now)
        raise AssertionError("the link never comes to rest")

    def ready(self) -> Pair:
        """Connected, its snapshot committed."""
        self.connect()
        self.link.resume(self.now)
        self.settle()
        self.log.clear()
        self.peer.seen.clear()
        return self

    def notify(self) -> Pair:
        self.link.feed(self.peer.notify(), self.now)
        return self.settle()

    def pass_time(self, duration_ns: int) -> Pair:
        self.now += duration_ns
        self.link.tick(self.now)
        return self.settle()

    def perform(self, *effects: InitiateAdd | InitiateRelease | FenceHost) -> Pair:
        for effect in effects:
            self.link.perform(effect, self.now)
        return self.settle()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.log if isinstance(event, kind)]


def extent(start: int, length: int = 2 * MIB) -> Extent:
    return Extent(MediaOffset(start), length)


def wire(
    ld: int, start: int, length: int = 2 * MIB, tag: Tag = TAG, sequence: int = 0
) -> WireExtent:
    return WireExtent(BASE * (1 + ld) + start, length, tag_to_bytes(tag), sequence)


def info(
    tag: Tag, accepted: tuple[int, ...] = (), pending: tuple[int, ...] = ()
) -> fmapi.DcTagInfo:
    return fmapi.DcTagInfo(
        tag_to_bytes(tag),
        reference_bitmap=fmapi.bitmap_from_lds(accepted),
        pending_bitmap=fmapi.bitmap_from_lds(pending),
    )


def add(
    id_: int, ld: int = 0, tag: Tag = TAG, *, tagged: bool = True, shared: bool = False
) -> InitiateAdd:
    host = HostId(f"h{ld}")
    pieces = (extent(0), extent(8 * MIB))
    return InitiateAdd(id_, ApplianceId("z0"), host, ld, 0, tag, tagged, pieces, shared)


def release(
    id_: int, ld: int = 0, tag: Tag = TAG, *, tagged: bool = True, forced: bool = False
) -> InitiateRelease:
    host = HostId(f"h{ld}")
    pieces = (extent(0), extent(8 * MIB))
    return InitiateRelease(id_, ApplianceId("z0"), host, ld, 0, tag, tagged, pieces, forced)


def fence(id_: int, ld: int = 0, tag: Tag = TAG, *, tagged: bool = True) -> FenceHost:
    pieces = (extent(0), extent(8 * MIB))
    return FenceHost(id_, ApplianceId("z0"), HostId(f"h{ld}"), ld, 0, tag, tagged, pieces)
