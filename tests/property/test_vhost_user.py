"""Whatever a front-end sends, in whatever order and however cut: no crash, no leak, no broken
rule.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tagmem.base.units import MIB
from tagmem.io import stream
from tagmem.presenter.broker import Broker, State
from tagmem.presenter.contract import Piece, Tagged
from tagmem.wire.vhost_backend import (
    PROTOCOL_FEATURES,
    AddMemory,
    BackendChannel,
    Channel,
    Discard,
    Fault,
    Phase,
    RemoveMemory,
    RingStart,
    RingStop,
    Send,
    SetLine,
    Started,
    Stopped,
    VhostUserBackend,
)
from tagmem.wire.vhost_user import (
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    BackRequest,
    ConfigSpace,
    FrontRequest,
    MemoryRegion,
    MemoryTable,
    MessageHeader,
    Number,
    SingleRegion,
    VringAddress,
    VringState,
    message,
)

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
SMALL = st.integers(0, 3)
WORDS = st.one_of(SMALL, st.sampled_from([64, 1 << 20, 1 << 32, (1 << 64) - 1, 0x140000001]))
REGIONS = st.builds(MemoryRegion, WORDS, WORDS, WORDS, WORDS)
PAYLOADS = st.one_of(
    st.just(b""),
    st.builds(lambda n: Number(n).encode(), WORDS),
    st.just(Number(0x140000001).encode()),
    st.just(Number(PROTOCOL_FEATURES).encode()),
    st.builds(lambda i, n: VringState(i, n).encode(), SMALL, st.sampled_from([0, 1, 64, 1 << 31])),
    st.builds(lambda i, a: VringAddress(i, 0, a, a, a).encode(), SMALL, WORDS),
    st.builds(lambda r: SingleRegion(r).encode(), REGIONS),
    st.builds(lambda r: MemoryTable(tuple(r)).encode(), st.lists(REGIONS, max_size=3)),
    st.builds(lambda o, c: ConfigSpace(o, 0, c).encode(), SMALL, st.binary(max_size=20)),
    st.binary(max_size=80),
)
REQUESTS = st.one_of(st.sampled_from(list(FrontRequest)), st.integers(0, 60))
MESSAGES = st.tuples(REQUESTS, PAYLOADS, st.booleans(), st.integers(0, 3))
OPENING = message(FrontRequest.SET_PROTOCOL_FEATURES, Number(PROTOCOL_FEATURES).encode())


class Watch:
    """Looks at every action: descriptors out once each, starts and stops by turns."""

    def __init__(self, *, slots: bool) -> None:
        self.session = VhostUserBackend((64 * MIB,), bytes(16), 1, memory_slots=slots)
        self.next = 0
        self.given: list[int] = []
        self.out: list[int] = []
        self.started = False
        self.running = False
        self.regions = 0

    def feed(self, data: bytes, number: int) -> None:
        fds = list(range(self.next, self.next + number))
        self.next += number
        self.given += fds
        self.look(self.session.feed(data, list(fds)))

    def look(self, actions: Sequence[object]) -> None:
        for action in actions:
            match action:
                case Discard() | Channel() | AddMemory():
                    self.out.append(action.descriptor)
                    self.regions += isinstance(action, AddMemory)
                case SetLine():
                    if action.descriptor >= 0:
                        self.out.append(action.descriptor)
                case RemoveMemory():
                    self.regions -= 1
                case Started():
                    assert not self.started
                    self.started = True
                case Stopped():
                    assert self.started
                    self.started = False
                case RingStart():
                    assert not self.running
                    self.running = True
                case RingStop():
                    assert self.running
                    self.running = False
                case Send():
                    header = MessageHeader.decode(action.data[:HEADER_BYTES])
                    assert header.reply
                    assert header.size_bytes == len(action.data) - HEADER_BYTES
                case Fault():
                    assert self.session.phase is Phase.FAULTED
                case _:
                    raise AssertionError(action)
        assert self.session.may_map == self.started
        assert len(self.session.memory) == self.regions

    def end(self) -> None:
        self.look(self.session.end())
        assert sorted(self.out) == self.given
        assert not self.started
        assert not self.running


@given(st.lists(MESSAGES, max_size=30), st.booleans(), st.booleans())
def test_any_messages_in_any_order(
    messages: list[tuple[int, bytes, bool, int]], opened: bool, slots: bool
) -> None:
    watch = Watch(slots=slots)
    if opened:
        watch.feed(OPENING, 0)
    for request, payload, ack, fds in messages:
        watch.feed(message(request, payload, need_reply=ack), fds)
    watch.end()


@given(st.lists(MESSAGES, max_size=10), st.lists(st.integers(1, 60), min_size=1), st.data())
def test_however_cut(
    messages: list[tuple[int, bytes, bool, int]], cuts: list[int], data: st.DataObject
) -> None:
    whole = OPENING + b"".join(message(r, p, need_reply=a) for r, p, a, _ in messages)
    watch, at, turn = Watch(slots=True), 0, 0
    while at < len(whole):
        size = cuts[turn % len(cuts)]
        watch.feed(whole[at : at + size], data.draw(SMALL))
        at, turn = at + size, turn + 1
    watch.end()


@given(st.lists(st.tuples(st.binary(max_size=200), SMALL), max_size=20))
def test_any_bytes(pieces: list[tuple[bytes, int]]) -> None:
    watch = Watch(slots=False)
    for piece, fds in pieces:
        watch.feed(piece, fds)
    watch.end()


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_what_is_kept_is_bounded(pieces: list[bytes]) -> None:
    session = VhostUserBackend((64 * MIB,), bytes(16), 1)
    header = MessageHeader(1, size_bytes=PAYLOAD_BYTES_MAX).encode()
    session.feed(header, [])
    for piece in pieces * 10:
        session.feed(piece, [])
        # Not more than one message is ever kept.
        assert len(session._framer._data) < HEADER_BYTES + PAYLOAD_BYTES_MAX


@given(st.lists(st.tuples(st.binary(max_size=60), SMALL), max_size=10), st.booleans())
def test_any_answer_on_the_channel(pieces: list[tuple[bytes, int]], proper: bool) -> None:
    channel = BackendChannel()
    given_: list[int] = []
    out: list[int] = []
    channel.map(0, 1, 0, writable=True)
    if proper:
        channel.feed(message(BackRequest.SHMEM_MAP, bytes(8), reply=True), [])
    for piece, number in pieces:
        fds = list(range(len(given_), len(given_) + number))
        given_ += fds
        for item in channel.feed(piece, fds):
            if isinstance(item, Discard):
                out.append(item.descriptor)
    out += [item.descriptor for item in channel.end()]
    assert sorted(out) == given_


# -- the broker itself, with real descriptors ------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(MESSAGES, max_size=15))
def test_a_broker_survives_any_front_end(messages: list[tuple[int, bytes, bool, int]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(prefix="tm", dir="/dev/shm") as folder:
        asyncio.run(_attack(Path(folder), messages))
    assert len(os.listdir("/proc/self/fd")) == before


async def _attack(folder: Path, messages: list[tuple[int, bytes, bool, int]]) -> None:
    media = folder / "media"
    media.touch()
    os.truncate(media, 2 * MIB)
    broker = Broker(stream, folder)
    tagged = Tagged(TAG, 2 * MIB, (Piece(str(media), 0, 2 * MIB),))
    path = broker.open("vm", "device", tagged)
    near, far = socket.socketpair()
    event = os.eventfd(0)
    memory = os.memfd_create("ram")
    os.ftruncate(memory, MIB)
    choices = [event, memory, far.fileno(), os.open(media, os.O_RDONLY)]
    with socket.socket(socket.AF_UNIX) as sock, near, far:
        sock.connect(path)
        sock.setblocking(False)
        with suppress(OSError):
            sock.sendall(OPENING)
            for turn, (request, payload, ack, number) in enumerate(messages):
                fds = [choices[(turn + n) % len(choices)] for n in range(number)]
                socket.send_fds(sock, [message(request, payload, need_reply=ack)], fds)
                await asyncio.sleep(0)
            os.eventfd_write(event, 1)
        for _ in range(5):
            await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while broker.reports()[0].state is not State.LOST:  # noqa: ASYNC110 - takes no time
            await asyncio.sleep(0)
    broker.close()
    for fd in (event, memory, choices[3]):
        os.close(fd)
    assert media.read_bytes() == bytes(2 * MIB)
