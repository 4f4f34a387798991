"""The back-end's session against what QEMU sends, what it must not send, and what nobody should."""

from __future__ import annotations

from itertools import product

import pytest

from tagmem.base.limits import VHOST_MEMORY_SLOTS_MAX
from tagmem.wire.vhost_backend import (
    PROTOCOL_FEATURES,
    TRANSITIONS,
    Action,
    AddMemory,
    BackendChannel,
    Channel,
    Discard,
    Fault,
    Line,
    Phase,
    RemoveMemory,
    RingSetup,
    RingStart,
    RingStop,
    Send,
    SetLine,
    Started,
    Stopped,
    Trigger,
    Verdict,
    VhostUserBackend,
)
from tagmem.wire.vhost_user import (
    DESCRIPTORS_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    SHMEM_REGIONS,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    VRING_NO_DESCRIPTOR,
    BackRequest,
    ConfigSpace,
    Framer,
    MemoryRegion,
    MemoryTable,
    Message,
    MessageHeader,
    Number,
    ProtocolFeature,
    SharedMemoryConfig,
    SharedMemoryMap,
    SingleRegion,
    Unframed,
    VringAddress,
    VringState,
    message,
)
from tagmem.wire.vhost_user import FrontRequest as Ask

OFFERED = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | 1
SLOTS = 1 << ProtocolFeature.CONFIGURE_MEM_SLOTS
WINDOW = 64 << 20
RAM = MemoryRegion(0, 1 << 20, 0x7F0000000000, 0)


def backend(*, slots: bool = True) -> VhostUserBackend:
    return VhostUserBackend((WINDOW,), bytes(8) + b"\0\0\0\4\0\0\0\0", 1, memory_slots=slots)


def ready() -> VhostUserBackend:
    made = backend()
    made.feed(message(Ask.SET_PROTOCOL_FEATURES, Number(PROTOCOL_FEATURES | SLOTS).encode()), [])
    return made


def tell(
    session: VhostUserBackend, request: int, payload: bytes = b"", fds: list[int] | None = None
) -> tuple[int, list[Action]]:
    """The verdict (0 is success), and the other actions."""
    *actions, answer = session.feed(message(request, payload, need_reply=True), fds or [])
    assert isinstance(answer, Send)
    return Number.decode(reply(answer, request)).value, actions


def reply(action: Action, request: int) -> bytes:
    assert isinstance(action, Send)
    header = MessageHeader.decode(action.data[:HEADER_BYTES])
    assert (header.request, header.version, header.reply) == (request, 1, True)
    assert len(action.data) == HEADER_BYTES + header.size_bytes
    return action.data[HEADER_BYTES:]


def ask(session: VhostUserBackend, request: int, payload: bytes = b"") -> bytes:
    (action,) = session.feed(message(request, payload), [])
    return reply(action, request)


def start(session: VhostUserBackend) -> list[Action]:
    verdict, actions = tell(session, Ask.SET_FEATURES, Number(OFFERED).encode())
    assert verdict == 0
    return actions


def ring(session: VhostUserBackend) -> list[Action]:
    """Everything that a queue needs; what the last message led to."""
    tell(session, Ask.SET_VRING_NUM, VringState(0, 64).encode())
    tell(session, Ask.SET_VRING_BASE, VringState(0, 7).encode())
    tell(session, Ask.SET_VRING_ADDR, VringAddress(0, 0, 0x100, 0x300, 0x200).encode())
    tell(session, Ask.SET_VRING_KICK, Number(0).encode(), [9])
    return tell(session, Ask.SET_VRING_ENABLE, VringState(0, 1).encode())[1]


def test_negotiation() -> None:
    session = backend()
    assert Number.decode(ask(session, Ask.GET_FEATURES)).value == OFFERED
    offered = Number.decode(ask(session, Ask.GET_PROTOCOL_FEATURES)).value
    assert offered == PROTOCOL_FEATURES | SLOTS
    assert [bit for bit in range(64) if offered >> bit & 1] == [0, 3, 5, 9, 10, 15, 16, 22]
    assert session.feed(message(Ask.SET_PROTOCOL_FEATURES, Number(offered).encode()), []) == []
    assert Number.decode(ask(session, Ask.GET_QUEUE_NUM)).value == 1
    assert Number.decode(ask(session, Ask.GET_MAX_MEM_SLOTS)).value == VHOST_MEMORY_SLOTS_MAX
    config = SharedMemoryConfig.decode(ask(session, Ask.GET_SHMEM_CONFIG))
    assert config == SharedMemoryConfig(1, (WINDOW, *[0] * (SHMEM_REGIONS - 1)))
    assert session.phase is Phase.IDLE


def test_slots_are_offered_only_when_asked_for() -> None:
    session = backend(slots=False)
    assert Number.decode(ask(session, Ask.GET_PROTOCOL_FEATURES)).value == PROTOCOL_FEATURES
    both = Number(PROTOCOL_FEATURES | SLOTS).encode()
    session.feed(message(Ask.SET_PROTOCOL_FEATURES, both), [])
    assert session.protocol_features == 0


def test_nothing_starts_the_device_but_its_feature() -> None:
    session = ready()
    without = Number(OFFERED & ~1).encode()
    assert tell(session, Ask.SET_FEATURES, without) == (0, [])
    before = session.may_map
    assert start(session) == [Started()]
    assert (before, session.may_map) == (False, True)
    assert start(session) == []


@pytest.mark.parametrize(
    ("request_", "payload", "replies"),
    [
        (Ask.GET_VRING_BASE, VringState(0, 0).encode(), True),
        (Ask.RESET_OWNER, b"", False),
        (Ask.RESET_DEVICE, b"", False),
        (Ask.SET_STATUS, Number(0).encode(), False),
        (Ask.SET_FEATURES, Number(OFFERED & ~1).encode(), False),
    ],
)
def test_what_stops_the_device(request_: Ask, payload: bytes, replies: bool) -> None:
    session = ready()
    start(session)
    actions = session.feed(message(request_, payload), [])
    assert isinstance(actions[0], Stopped)
    assert [type(a) for a in actions[1:]] == ([Send] if replies else [])
    assert not session.may_map
    assert start(session) == [Started()]


def test_the_phases_are_total() -> None:
    assert set(TRANSITIONS) == set(product(Phase, Trigger))
    for (phase, trigger), after in TRANSITIONS.items():
        assert (after is Phase.FAULTED) == (phase is Phase.FAULTED or trigger is Trigger.FAULT)
        assert after is not Phase.STARTED or trigger is Trigger.START


def test_features_that_were_not_offered_are_refused() -> None:
    session = ready()
    assert tell(session, Ask.SET_FEATURES, Number(OFFERED | 1 << 28).encode()) == (1, [])
    assert tell(session, Ask.SET_PROTOCOL_FEATURES, Number(1 << 1).encode()) == (1, [])
    assert session.features == 0


@pytest.mark.parametrize("request_", [0, 6, 19, 31, 41, 45, 1 << 31])
def test_unknown_requests_are_refused_and_nothing_else(request_: int) -> None:
    session = ready()
    assert tell(session, request_, b"whatever", [5]) == (1, [Discard(5)])
    assert session.feed(message(request_, b"whatever"), [6]) == [Discard(6)]
    assert session.phase is Phase.IDLE


def test_without_reply_ack_nothing_is_answered() -> None:
    session = backend()
    assert session.feed(message(99, need_reply=True), []) == []


def test_the_configuration_is_read_and_not_written() -> None:
    session = ready()
    asked = ConfigSpace(8, 0, bytes(8))
    assert ConfigSpace.decode(ask(session, Ask.GET_CONFIG, asked.encode())).content == (
        b"\0\0\0\4\0\0\0\0"
    )
    # No payload at all: the protocol's way to say that there is no such configuration.
    assert ask(session, Ask.GET_CONFIG, ConfigSpace(9, 0, bytes(8)).encode()) == b""
    assert ask(session, Ask.GET_CONFIG, ConfigSpace(0xFFFFFFFF, 0, bytes(256)).encode()) == b""
    assert tell(session, Ask.SET_CONFIG, asked.encode()) == (1, [])


def test_status_is_kept() -> None:
    session = ready()
    tell(session, Ask.SET_STATUS, Number(15).encode())
    assert Number.decode(ask(session, Ask.GET_STATUS)).value == 15


def test_the_channel_is_handed_over() -> None:
    session = ready()
    assert tell(session, Ask.SET_BACKEND_REQ_FD, fds=[7]) == (0, [Channel(7)])
    assert tell(session, Ask.SET_BACKEND_REQ_FD) == (1, [])
    assert tell(session, Ask.SET_BACKEND_REQ_FD, fds=[7, 8]) == (1, [Discard(7), Discard(8)])


def test_memory_comes_and_goes() -> None:
    session = ready()
    one = SingleRegion(RAM).encode()
    assert tell(session, Ask.ADD_MEM_REG, one, [5]) == (0, [AddMemory(RAM, 5)])
    assert tell(session, Ask.ADD_MEM_REG, one, [6]) == (1, [Discard(6)])
    assert tell(session, Ask.REM_MEM_REG, one, [7]) == (0, [RemoveMemory(RAM), Discard(7)])
    assert tell(session, Ask.REM_MEM_REG, one) == (1, [])


def test_a_table_takes_the_place_of_what_was_there() -> None:
    session = ready()
    tell(session, Ask.ADD_MEM_REG, SingleRegion(RAM).encode(), [5])
    other = MemoryRegion(1 << 32, 1 << 20, 1 << 40, 0)
    table = MemoryTable((RAM, other)).encode()
    assert tell(session, Ask.SET_MEM_TABLE, table, [6, 7]) == (
        0,
        [RemoveMemory(RAM), AddMemory(RAM, 6), AddMemory(other, 7)],
    )
    assert tell(session, Ask.SET_MEM_TABLE, table, [6]) == (1, [Discard(6)])
    overlapping = MemoryTable((RAM, RAM)).encode()
    assert tell(session, Ask.SET_MEM_TABLE, overlapping, [6, 7]) == (1, [Discard(6), Discard(7)])
    assert list(session.memory.values()) == [RAM, other]


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion(0, 0, 0, 0),
        MemoryRegion((1 << 64) - 1, 2, 0, 0),
        MemoryRegion(0, 2, (1 << 64) - 1, 0),
        MemoryRegion(0, 2, 0, (1 << 64) - 1),
    ],
)
def test_regions_that_cannot_be_are_refused(region: MemoryRegion) -> None:
    assert tell(ready(), Ask.ADD_MEM_REG, SingleRegion(region).encode(), [5])[0] == 1


def test_slots_are_bounded() -> None:
    session = ready()
    for n in range(VHOST_MEMORY_SLOTS_MAX + 1):
        region = MemoryRegion(n << 20, 1 << 20, n << 20, 0)
        verdict, _ = tell(session, Ask.ADD_MEM_REG, SingleRegion(region).encode(), [5])
        assert verdict == int(n == VHOST_MEMORY_SLOTS_MAX)


def test_a_queue_runs_when_everything_about_it_is_known() -> None:
    session = ready()
    start(session)
    assert ring(session) == [RingStart(0, RingSetup(64, 0x100, 0x200, 0x300, 7))]
    session.completed(0, 12)
    stop = session.feed(message(Ask.GET_VRING_BASE, VringState(0, 0).encode()), [])
    assert stop[:2] == [RingStop(0), SetLine(Line.KICK, 0, -1)]
    assert VringState.decode(reply(stop[-1], Ask.GET_VRING_BASE)) == VringState(0, 12)


def test_a_running_queue_that_is_changed_starts_anew() -> None:
    session = ready()
    ring(session)
    moved = VringAddress(0, 0, 0x1000, 0x3000, 0x2000).encode()
    _, actions = tell(session, Ask.SET_VRING_ADDR, moved)
    assert [type(a) for a in actions] == [RingStop, RingStart]


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (Line.KICK, Ask.SET_VRING_KICK),
        (Line.CALL, Ask.SET_VRING_CALL),
        (Line.ERROR, Ask.SET_VRING_ERR),
    ],
)
def test_eventfds_come_with_or_without_a_descriptor(line: Line, request_: Ask) -> None:
    session = ready()
    assert tell(session, request_, Number(0).encode(), [5]) == (0, [SetLine(line, 0, 5)])
    none = Number(VRING_NO_DESCRIPTOR).encode()
    assert tell(session, request_, none) == (0, [SetLine(line, 0, -1)])
    assert tell(session, request_, none, [5]) == (1, [Discard(5)])
    assert tell(session, request_, Number(0).encode()) == (1, [])
    assert tell(session, request_, Number(1).encode(), [5]) == (1, [Discard(5)])


def test_a_question_that_cannot_be_answered_ends_the_session() -> None:
    session = ready()
    start(session)
    actions = session.feed(message(Ask.GET_VRING_BASE, VringState(3, 0).encode()), [])
    assert [type(a) for a in actions] == [Stopped, Fault]
    assert session.feed(message(Ask.GET_FEATURES), [4]) == [Discard(4)]


@pytest.mark.parametrize(
    "data",
    [
        MessageHeader(1, 2).encode(),
        MessageHeader(1, 0).encode(),
        MessageHeader(1, size_bytes=PAYLOAD_BYTES_MAX + 1).encode(),
        b"\xff" * HEADER_BYTES,
    ],
)
def test_bytes_that_are_no_message_end_the_session(data: bytes) -> None:
    session = ready()
    start(session)
    ring(session)
    actions = session.feed(message(Ask.SET_OWNER) + data, [3])
    assert [type(a) for a in actions] == [Discard, RingStop, Stopped, Fault]
    assert session.phase is Phase.FAULTED
    assert session.end() == []


def test_a_wrong_size_is_refused() -> None:
    session = ready()
    assert tell(session, Ask.SET_FEATURES, b"1234567")[0] == 1
    assert tell(session, Ask.SET_FEATURES, b"123456789")[0] == 1
    assert tell(session, Ask.SET_OWNER, b"1")[0] == 1


def test_descriptors_go_to_the_message_that_the_piece_ends_in() -> None:
    framer = Framer()
    first, second = message(1), message(12, bytes(8))
    found = framer.feed(first + second, [5])
    assert [m.descriptors for m in found] == [(), (5,)]
    assert framer.feed(second[:13], [6]) == []
    assert framer.feed(second[13:], [])[0].descriptors == (6,)
    assert framer.feed(second[:13], [6]) == []
    found = framer.feed(second[13:] + first[:4], [7])
    assert [m.descriptors for m in found] == [(6,)]
    assert framer.end() == (7,)


def test_descriptors_of_one_message_are_bounded() -> None:
    framer = Framer()
    data = message(5, bytes(264))
    assert framer.feed(data[:20], list(range(DESCRIPTORS_MAX))) == []
    (end,) = framer.feed(data[20:30], [99])
    assert isinstance(end, Unframed)
    assert end.descriptors == (*range(DESCRIPTORS_MAX), 99)


def test_the_end_of_a_connection_gives_up_what_is_half_there() -> None:
    session = ready()
    start(session)
    session.feed(message(Ask.SET_VRING_CALL, Number(0).encode())[:-1], [8])
    actions = session.end()
    assert actions[0] == Discard(8)
    assert [type(a) for a in actions[1:]] == [Stopped, Fault]


# -- the back-end's own channel --------------------------------------------------------------------


def test_requests_and_verdicts() -> None:
    channel = BackendChannel()
    (sent,) = Framer().feed(channel.map(2 << 20, 4 << 20, 8 << 20, writable=True), [])
    assert isinstance(sent, Message)
    assert sent.header == MessageHeader(BackRequest.SHMEM_MAP, 1, False, True, 40)
    assert SharedMemoryMap.decode(sent.payload) == SharedMemoryMap(
        0, 8 << 20, 2 << 20, 4 << 20, True
    )
    with pytest.raises(RuntimeError, match="SHMEM_MAP"):
        channel.unmap(0, 1)
    answer = message(BackRequest.SHMEM_MAP, Number(0).encode(), reply=True)
    assert channel.feed(answer[:5], []) == []
    assert channel.feed(answer[5:], []) == [Verdict(0)]
    channel.unmap(2 << 20, 4 << 20)
    refused = message(BackRequest.SHMEM_UNMAP, Number(1).encode(), reply=True)
    assert channel.feed(refused, []) == [Verdict(1)]


@pytest.mark.parametrize(
    "data",
    [
        message(BackRequest.SHMEM_UNMAP, bytes(8), reply=True),
        message(BackRequest.SHMEM_MAP, bytes(8)),
        message(BackRequest.SHMEM_MAP, bytes(7), reply=True),
        message(BackRequest.SHMEM_MAP, bytes(8), reply=True) * 2,
        b"\xff" * 12,
    ],
)
def test_anything_but_the_answer_breaks_the_channel(data: bytes) -> None:
    channel = BackendChannel()
    channel.map(0, 1, 0, writable=False)
    assert isinstance(channel.feed(data, [])[-1], Fault)
    assert channel.feed(data, [3]) == [Discard(3)]
    assert channel.end() == []
