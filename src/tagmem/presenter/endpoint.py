"""One window of one VM: the socket that its QEMU connects to, and the connection.

Carries out what the session (`wire/vhost_backend`) and the window (`presenter/window`) decide, and
decides nothing itself. Three objects: an Endpoint lives as long as the window is served, a Link as
long as QEMU is connected, a ChannelPeer as long as QEMU lets itself be asked.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from tagmem.base.errors import InvalidInput
from tagmem.base.units import Bytes
from tagmem.presenter import procfs
from tagmem.presenter.contract import Piece, Tagged
from tagmem.presenter.guestmemory import GuestMemory
from tagmem.presenter.header import HEADER_AT, dax_header, place
from tagmem.presenter.pmemqueue import PmemQueue
from tagmem.presenter.window import (
    HEAD_BYTES,
    Goal,
    Map,
    Operation,
    Part,
    Source,
    Window,
    bar_bytes,
    lay_out,
)
from tagmem.wire.vhost_backend import (
    Action,
    AddMemory,
    BackendChannel,
    Channel,
    Discard,
    Fault,
    Line,
    RemoveMemory,
    RingStart,
    RingStop,
    Send,
    SetLine,
    Started,
    Stopped,
    Verdict,
    VhostUserBackend,
)
from tagmem.wire.virtio_pmem import PMEM_F_SHMEM_REGION, PmemConfig

log = logging.getLogger(__name__)

UNSENT_BYTES_MAX = 64 * 1024
"""Answers that a front-end has not read; no honest one leaves more than a few."""


class Connection(Protocol):
    """One connected socket (`io.stream.Connection`)."""

    pending_bytes: int
    open: bool

    @property
    def peer_pid(self) -> int: ...
    def attach(self, peer: Any) -> None: ...
    def send(self, data: bytes, descriptor: int = -1) -> None: ...
    def close(self, reason: str = "closed") -> None: ...


class Listener(Protocol):
    """A listening socket."""

    def close(self) -> None: ...


class Sockets(Protocol):
    """What makes sockets: the module `io.stream`."""

    def listen(self, path: Path | str, accept: Callable[[Any], None]) -> Listener: ...
    def adopt(self, descriptor: int) -> Connection: ...


class State(Enum):
    """Of one window, as its owner is told."""

    WAITING = "waiting"
    """Nobody has connected yet."""
    CONNECTED = "connected"
    """QEMU is there; the guest's driver has not started the device."""
    STARTED = "started"
    """The device runs; memory comes and goes as is asked."""
    STOPPED = "stopped"
    """Driver unbound, or VM paused: what is mapped stays, and nothing can be asked."""
    LOST = "lost"
    """The connection ended; while QEMU lives it has what it had."""
    CLOSED = "closed"


class Report(msgspec.Struct, frozen=True):
    """What is known of one window."""

    vm: str
    device: str
    tag: str
    state: State
    goal: Goal
    reason: str
    """Why it is in this state; or what went wrong."""
    qemu_pid: int
    mapped_bytes: Bytes
    """Of the tag, as far as is known."""
    must_stop_vm: bool
    """Nothing can be asked of this QEMU any more; only its end gives the bytes back."""
    regions: int = 0
    """Stretches of memory that it is made of."""


Watcher = Callable[[Report], None]
"""Told after each change of a window. Must not block."""


class Endpoint:
    """One window of one VM: its socket, its connection, its files."""

    def __init__(self, vm: str, device: str, tagged: Tagged, watcher: Watcher) -> None:
        self._loop = asyncio.get_running_loop()
        self._watcher = watcher
        self.vm = vm
        self.device = device
        self.tagged = tagged
        device_bytes = HEAD_BYTES + tagged.size_bytes
        self.memory_bytes = bar_bytes(device_bytes)
        """What the guest sees of memory; the header says where in it the bytes are."""
        at = place(device_bytes, self.memory_bytes).data_at
        header = dax_header(tagged.tag, device_bytes, self.memory_bytes)
        pieces = [(piece.path, piece.offset, piece.length) for piece in tagged.pieces]
        self.window = Window(lay_out(pieces, read_only=tagged.read_only, data_at=at))
        if self.window.data_bytes != tagged.size_bytes:
            limit = f"what its pieces have ({self.window.data_bytes})"
            raise InvalidInput("size_bytes", limit, tagged.size_bytes)
        self.state = State.WAITING
        self.reason = ""
        self.pid = 0
        self.link: Link | None = None
        self._changed: list[asyncio.Future[None]] = []
        self._listener: Listener | None = None
        self._scrap = -1
        self._known: dict[str, procfs.Identity] = {}
        self.ranges: dict[procfs.Identity, list[procfs.Range]] = {}
        self._header = -1
        self._header_bytes = header
        try:
            self._make_header()
            self.find_files()
        except (OSError, InvalidInput):
            self.close("cannot be opened")
            raise

    def _make_header(self) -> None:
        self._header = _memory("tagmem-header", HEAD_BYTES)
        os.pwrite(self._header, self._header_bytes, HEADER_AT)
        self._header_at_rest = procfs.identity_of(self._header)
        # In a huge page what the guest reads of it cannot be told apart.
        self._whole = os.lseek(self._header, 0, os.SEEK_DATA) == 0

    def find_files(self) -> None:
        """Learn where the tag's bytes are; nothing of them stays open here.

        Raises InvalidInput for files that have not so many bytes, OSError.
        """
        self._known.clear()
        self.ranges.clear()
        for piece in self.tagged.pieces:
            descriptor = self._open(piece.path)
            try:
                _check_piece(descriptor, piece)
                identity = procfs.identity_of(descriptor)
            finally:
                os.close(descriptor)
            self._known[piece.path] = identity
            self.ranges.setdefault(identity, []).append((piece.offset, piece.length))

    def _open(self, path: str) -> int:
        """The file, for the moment in which it is needed: who has it open holds the tag. It is the
        one that was found first. Raises OSError.
        """
        mode = os.O_RDONLY if self.tagged.read_only else os.O_RDWR
        # Not to wait for anybody, should it be a pipe.
        careful = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(path, mode | careful)
        known = self._known.get(path)
        if known is not None and procfs.identity_of(descriptor) != known:
            os.close(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return descriptor

    def sync(self) -> bool:
        """Put what the guest wrote on the medium; whether it is there. Blocks: for a thread."""
        if self.window.goal is not Goal.PRESENTED:
            return False
        good = True
        for path in tuple(self._known):
            try:
                descriptor = self._open(path)
            except OSError as error:
                log.warning("flush: %s", error.strerror)
                good = False
                continue
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                # A DAX device has no write-back cache of the kernel's: there is nothing to flush.
                if error.errno != errno.EINVAL:
                    log.warning("flush: %s", error.strerror)
                    good = False
            finally:
                os.close(descriptor)
        return good

    # -- connections -------------------------------------------------------------------------------

    def listen(self, sockets: Sockets, path: str) -> None:
        """Serve at `path`. Raises Conflict, InvalidInput."""
        self._listener = sockets.listen(path, lambda sock: self._accept(sockets, sock))

    def _accept(self, sockets: Sockets, connection: Connection) -> None:
        pid = connection.peer_pid
        if self.link is not None and pid != self.pid:
            # The kernel closes a dead QEMU's end, so this is somebody else.
            connection.close("the window has its front-end")
            return
        if self.link is not None:
            # A character device that reconnects may begin twice, and means the second one.
            self.link.connection.close("the front-end connected again")
        if pid != self.pid and self.pid:
            # Another process: it cannot have what was mapped for the last one.
            self.window.dropped()
        else:
            self.window.failed = ""
            self.window.doubt()
        self.pid = pid
        self.link = Link(self, sockets, connection)
        self.tell(State.CONNECTED)
        connection.attach(self.link)

    def lost(self, reason: str) -> None:
        """The connection ended."""
        self.link = None
        self.window.doubt()
        if self.state is not State.CLOSED:
            self.tell(State.LOST, reason)

    # -- mapping -----------------------------------------------------------------------------------

    def started(self) -> None:
        """The device runs: what was in doubt is settled first, then the goal."""
        self.window.doubt()
        if not self.window.certain and not self._maybe_mapped():
            self.window.dropped()
            # A new one, on which no guest has looked or written yet.
            os.close(self._header)
            self._make_header()
        self.tell(State.STARTED)
        self.advance()

    def stopped(self, reason: str) -> None:
        """The device stands still."""
        self.window.doubt()
        self.tell(State.STOPPED, reason)

    def advance(self) -> None:
        """Ask for the next thing, when it may be asked."""
        if self.link is not None and self.link.ready:
            operation = self.window.next()
            if operation is not None:
                self.link.ask(operation)

    def answered(self, operation: Operation, succeeded: bool) -> None:
        """The hypervisor's verdict."""
        if not succeeded:
            log.info("%s: %s was refused", self.device, operation)
        self.window.done(operation, succeeded)
        if self.window.failed:
            log.warning("%s: %s", self.device, self.window.failed)
        self.tell(self.state, self.window.failed)
        self.advance()

    def source(self, part: Part) -> int:
        """A new descriptor of a part's memory. Raises OSError."""
        if part.source is Source.DATA:
            return self._open(part.path)
        if part.source is Source.SCRAP:
            if self._scrap < 0:
                self._scrap = _memory("tagmem-scrap", part.length)
            return os.dup(self._scrap)
        # QEMU 11.1 maps everything writable, so a guest may have written on its header.
        os.pwrite(self._header, self._header_bytes, HEADER_AT)
        return os.dup(self._header)

    def own_identities(self) -> frozenset[procfs.Identity]:
        """Files that are not guest memory, whatever a front-end says."""
        own = {*self.ranges, self._header_at_rest}
        if self._scrap >= 0:
            own.add(procfs.identity_of(self._scrap))
        return frozenset(own)

    def header_read(self) -> bool | None:
        """Whether the guest has found the header: its page came into QEMU's page table. None when
        it looked before there was one, and made a raw device: that reads the first page as well.
        """
        try:
            if not self._whole and os.lseek(self._header, 0, os.SEEK_DATA) == 0:
                return None
        except OSError:
            return False
        return procfs.touched(self.pid, self._header_at_rest, HEADER_AT)

    def _maybe_mapped(self) -> bool:
        ranges = {self._header_at_rest: [(0, HEAD_BYTES)], **self.ranges}
        if self._scrap >= 0:
            # All that is left of a window that was revoked while its device stood still.
            ranges[procfs.identity_of(self._scrap)] = [(0, self.window.data_bytes)]
        return bool(procfs.holds(self.pid, ranges, ()))

    # -- telling -----------------------------------------------------------------------------------

    def report(self) -> Report:
        """What is known now."""
        mapped = sum(part.length for part in self.window.mapped if part.source is Source.DATA)
        stuck = bool(mapped) and (bool(self.window.failed) or self._deaf)
        return Report(
            self.vm,
            self.device,
            self.tagged.tag,
            self.state,
            self.window.goal,
            self.reason or self.window.failed,
            self.pid,
            mapped,
            stuck,
            len(self.window.parts),
        )

    @property
    def _deaf(self) -> bool:
        """The device runs, and has no channel to ask on."""
        return self.state is State.STARTED and (self.link is None or not self.link.has_channel)

    def tell(self, state: State, reason: str = "") -> None:
        """Something changed."""
        self.state = state
        self.reason = reason
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)
        self._changed.clear()
        self._watcher(self.report())

    async def change(self, seconds: float) -> None:
        """Return at the next change, or after so many seconds."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._changed.append(waiter)
        await asyncio.wait((waiter,), timeout=seconds)
        with suppress(ValueError):
            self._changed.remove(waiter)

    def close(self, reason: str = "closed") -> None:
        """Let go of everything of ours; QEMU keeps what it has. Idempotent."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._listener is not None:
            self._listener.close()
        if self.link is not None:
            self.link.connection.close(reason)
        for descriptor in (self._header, self._scrap):
            if descriptor >= 0:
                os.close(descriptor)
        self._header = self._scrap = -1
        self.tell(State.CLOSED, reason)


class Link:
    """One connection of one QEMU to a window: carries the session's actions out."""

    def __init__(self, endpoint: Endpoint, sockets: Sockets, connection: Connection) -> None:
        size = endpoint.memory_bytes
        self._endpoint = endpoint
        self._sockets = sockets
        self.connection = connection
        config = PmemConfig(0, size).encode()
        # Asked for only where there is no other way: QEMU 11.1 then does not outlive a reboot.
        slots = not endpoint.window.fits_table
        self._session = VhostUserBackend((size,), config, PMEM_F_SHMEM_REGION, memory_slots=slots)
        self._memory = GuestMemory(endpoint.own_identities)
        self._queue = PmemQueue(
            self._memory, endpoint.sync, lambda base: self._session.completed(0, base)
        )
        self._channel: ChannelPeer | None = None

    @property
    def has_channel(self) -> bool:
        """Whether QEMU gave us a way to ask, and has not taken it back."""
        return self._channel is not None

    @property
    def ready(self) -> bool:
        """Whether something may be asked of QEMU now."""
        return self._session.may_map and self._channel is not None and self._channel.idle

    def ask(self, operation: Operation) -> None:
        """Send a request; `ready` is true."""
        assert self._channel is not None
        self._channel.ask(operation)

    def channel_lost(self, reason: str) -> None:
        """QEMU closed the channel: it does so when it refuses to map."""
        self._channel = None
        window = self._endpoint.window
        if self._session.may_map:
            window.failed = window.failed or f"the channel to the hypervisor ended: {reason}"
        self._endpoint.tell(self._endpoint.state, reason)

    # -- the connection's peer ---------------------------------------------------------------------

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """See `io.stream.Peer`."""
        actions = self._session.feed(data, descriptors)
        for action in actions:
            self._perform(action)
        if self.connection.pending_bytes > UNSENT_BYTES_MAX:
            self.connection.close("the front-end does not read its answers")
        self._endpoint.advance()

    def drained(self) -> None:
        """See `io.stream.Peer`."""

    def closed(self, reason: str) -> None:
        """See `io.stream.Peer`."""
        for action in self._session.end():
            if isinstance(action, Discard):
                os.close(action.descriptor)
        self._queue.close()
        self._memory.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._endpoint.lost(reason)

    def _perform(self, action: Action) -> None:
        match action:
            case Send():
                self.connection.send(action.data)
            case Discard():
                os.close(action.descriptor)
            case Channel():
                self._take_channel(action.descriptor)
            case AddMemory():
                self._memory.add(action.region, action.descriptor)
            case RemoveMemory():
                self._memory.remove(action.region)
            case SetLine():
                self._set_line(action)
            case RingStart():
                self._queue.start(action.setup)
            case RingStop():
                self._queue.stop()
            case Started():
                self._endpoint.started()
            case Stopped():
                self._endpoint.stopped(action.reason)
            case Fault():
                log.warning("%s: front-end: %s", self._endpoint.device, action.reason)
                self.connection.close(action.reason)

    def _set_line(self, action: SetLine) -> None:
        if not self.connection.open:
            if action.descriptor >= 0:
                os.close(action.descriptor)
        elif action.line is Line.KICK:
            self._queue.set_kick(action.descriptor)
        elif action.line is Line.CALL:
            self._queue.set_call(action.descriptor)
        else:
            self._queue.set_error(action.descriptor)

    def _take_channel(self, descriptor: int) -> None:
        try:
            connection = self._sockets.adopt(descriptor)
        except InvalidInput as error:
            log.warning("%s: back-end channel: %s", self._endpoint.device, error)
            return
        if self._channel is not None:
            self._channel.close()
        self._endpoint.window.failed = ""
        self._channel = ChannelPeer(self._endpoint, self, connection)
        connection.attach(self._channel)


class ChannelPeer:
    """The channel on which the back-end asks; one request at a time."""

    def __init__(self, endpoint: Endpoint, link: Link, connection: Connection) -> None:
        self._endpoint = endpoint
        self._link: Link | None = link
        self._connection = connection
        self._channel = BackendChannel()
        self._operation: Operation | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is outstanding."""
        return self._operation is None

    def ask(self, operation: Operation) -> None:
        """Send a request."""
        part = operation.part
        if not isinstance(operation, Map):
            self._operation = operation
            self._connection.send(self._channel.unmap(part.at, part.length))
            return
        try:
            descriptor = self._endpoint.source(part)
        except OSError as error:
            self._endpoint.window.failed = f"{part.source.value}: {error.strerror}"
            self._endpoint.tell(self._endpoint.state, self._endpoint.window.failed)
            return
        self._operation = operation
        data = self._channel.map(part.at, part.length, part.file_offset, writable=part.writable)
        self._connection.send(data, descriptor)

    def close(self) -> None:
        """The link has no use for it any more."""
        self._link = None
        self._connection.close()

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """See `io.stream.Peer`."""
        for item in self._channel.feed(data, descriptors):
            match item:
                case Discard():
                    os.close(item.descriptor)
                case Fault():
                    self._connection.close(item.reason)
                case Verdict():
                    operation, self._operation = self._operation, None
                    assert operation is not None
                    self._endpoint.answered(operation, item.value == 0)

    def drained(self) -> None:
        """See `io.stream.Peer`."""

    def closed(self, reason: str) -> None:
        """See `io.stream.Peer`."""
        for item in self._channel.end():
            os.close(item.descriptor)
        if self._link is not None:
            self._link.channel_lost(reason)


def _check_piece(descriptor: int, piece: Piece) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        if status.st_size < piece.offset + piece.length:
            limit = f"within the {status.st_size} bytes of {piece.path}"
            raise InvalidInput("piece", limit, f"{piece.offset}+{piece.length}")
    elif not stat.S_ISCHR(status.st_mode) or not _is_dax(status.st_rdev):
        raise InvalidInput("piece", "of a file or a DAX device", piece.path)


def _is_dax(number: int) -> bool:
    place = f"/sys/dev/char/{os.major(number)}:{os.minor(number)}/subsystem"
    return os.path.basename(os.path.realpath(place)) == "dax"


def _memory(name: str, size_bytes: Bytes) -> int:
    """A memory file that nobody can shrink or grow. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor
