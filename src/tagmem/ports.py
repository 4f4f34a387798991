"""What a daemon needs from the world, as Protocols: each has a real and a fake implementation and
one contract suite.

Also the vocabulary of `step`: every daemon's machine takes an event and returns a Step, and the
engine commits its changes before any of its effects is carried out (persist, then act).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from tagmem.base.units import Nanoseconds


class Event(msgspec.Struct, frozen=True):
    """Something that happened; the only way into a machine."""


class Effect(msgspec.Struct, frozen=True, tag=True):
    """Something to be done after the commit. Idempotent by `id` (0 for volatile ones)."""

    durable: ClassVar[bool] = True
    """False: derived again from the state after a restart, so it is not kept in the outbox."""

    id: int


class Change(msgspec.Struct, frozen=True, gc=False):
    """Put (`record`) or delete (None) one row: `kind` is the table, `key` the row."""

    kind: str
    key: str
    record: msgspec.Struct | None


class Note(msgspec.Struct, frozen=True):
    """A public event for people and watchers; kept in the history with a growing number."""

    type: str
    """Dotted, past tense: `capacity.created`, `attachment.refused`."""
    subject: str
    """What it is about: a tag, host or appliance."""
    data: dict[str, Any] = {}


class Step(msgspec.Struct, frozen=True):
    """What one event leads to. The machine has applied `changes` to its own state already."""

    changes: tuple[Change, ...] = ()
    effects: tuple[Effect, ...] = ()
    done: tuple[int, ...] = ()
    """Outbox ids of effects whose result this event was."""
    notes: tuple[Note, ...] = ()
    reply: Any = None


class Batch(msgspec.Struct, frozen=True):
    """The steps that one commit makes durable together."""

    steps: Sequence[Step]
    at_ns: Nanoseconds


class Loaded(msgspec.Struct, frozen=True):
    """Everything that a store has: what a machine is restored from."""

    records: Iterable[tuple[str, str, Any]]
    """(kind, key, record)"""
    outbox: Sequence[Effect]
    """Durable effects not yet done, in the order of their ids."""
    last_effect_id: int
    """The highest effect id ever given out."""


class Machine(Protocol):
    """The deciding half of a daemon: synchronous, deterministic, no I/O."""

    def restore(self, loaded: Loaded) -> None:
        """Forget everything and start from what the store has."""

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """Decide. Never raises for anything that came from outside."""

    def next_deadline(self) -> Nanoseconds | None:
        """When the machine wants a Tick at the latest."""


class Tick(Event, frozen=True):
    """Time has passed; the engine posts it when a machine's deadline is due."""


class Clock(Protocol):
    """Nanoseconds since 1970, read once at start and advanced monotonically from there."""

    def now(self) -> Nanoseconds: ...


class HistoryEntry(msgspec.Struct, frozen=True):
    """One Note as kept: `seq` grows by one."""

    seq: int
    at_ns: Nanoseconds
    type: str
    subject: str
    data: dict[str, Any]


Finish = Callable[[], int]
"""The end of a commit: waits until it is on stable storage; the last history number. Raises
StorageFailed with nothing of it kept."""


class Store(Protocol):
    """Durable rows, outbox and history. `commit` is atomic, and on stable storage on return."""

    def load(self) -> Loaded: ...

    def commit(self, batch: Batch) -> int:
        """Make a batch durable; returns the last history number. Raises StorageFailed with nothing
        of it kept.
        """
        ...

    def begin(self, batch: Batch) -> Finish:
        """The same in two parts: all work now, and the waiting for the disk in what is returned,
        which may be called in another thread, before anything else is begun. Raises StorageFailed.
        """
        ...

    def history(self, after: int, limit: int) -> Sequence[HistoryEntry]: ...

    def last_history(self) -> int: ...

    def close(self) -> None: ...


class StreamPeer(Protocol):
    """What a stream tells: the session that it carries."""

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes, and file descriptors that came beside them and now belong to the callee."""

    def drained(self) -> None:
        """Everything sent so far has left this process."""

    def closed(self, reason: str) -> None:
        """The connection ended; told once, also after `close`."""


class Stream(Protocol):
    """A connected byte stream (`io/stream.py`)."""

    def attach(self, peer: StreamPeer) -> None:
        """Start telling `peer` what comes."""

    def send(self, data: bytes) -> None:
        """Send bytes, without waiting."""

    def close(self, reason: str = "closed") -> None:
        """End it now."""


Dial = Callable[[str], Awaitable[Stream]]
"""Connects to an address. Raises OSError when nobody is there, InvalidInput for no address."""


class FabricLink(Protocol):
    """One appliance's session, in whatever language it is driven: FM-API; later QMP, Redfish. No
    I/O.

    After each commit the calls come in this order: `forget`, `perform`, and `resume`, once for each
    of this link's snapshots in it. Nothing of the outbox is carried out before the first `resume`.
    """

    wants_close: str
    """Why the connection should be closed; empty while it should not."""

    def connected(self, now: Nanoseconds) -> None: ...

    def disconnected(self, reason: str, now: Nanoseconds) -> None: ...

    def perform(self, effect: Effect, now: Nanoseconds) -> None: ...

    def forget(self, effect_ids: Iterable[int], now: Nanoseconds) -> None: ...

    def resume(self, now: Nanoseconds) -> None: ...

    def feed(self, data: bytes, now: Nanoseconds) -> None: ...

    def tick(self, now: Nanoseconds) -> None: ...

    def next_deadline(self) -> Nanoseconds | None: ...

    def outgoing(self) -> bytes: ...

    def events(self) -> list[Event]: ...


class Holding(msgspec.Struct, frozen=True):
    """A process that maps or has open a file."""

    pid: int
    name: str
    how: str


class MediaPiece(msgspec.Struct, frozen=True, gc=False):
    """`length` bytes of a media file from `offset`."""

    offset: int
    length: int


class Wiped(msgspec.Struct, frozen=True):
    """What a sanitising did: `punched` or overwritten, and how many bytes of it were read back as
    zero.
    """

    punched: bool
    sanitised_bytes: int
    read_back_bytes: int


class Media(Protocol):
    """Backing memory of an appliance. `allocation` names the bytes of one tag; the device chooses
    it.
    """

    def positions(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[MediaPiece, ...]:
        """Where pieces (pool offset, length, offset in the allocation) stand in the medium's
        file.
        """
        ...

    def create(self, allocation: str, pool: int, pieces: Sequence[MediaPiece]) -> None:
        """Make the bytes of a new allocation exist, reading zero. Idempotent."""

    def expose(self, allocation: str, directory: str) -> None:
        """Let a host find the bytes in its own directory. Idempotent."""

    def mark_stale(self, allocation: str, directory: str, seed: int) -> None:
        """Have the host's view of exposed bytes be one of its own, which lies. Idempotent."""

    def conceal(self, allocation: str, directory: str) -> None:
        """Take that back. Idempotent."""

    def descriptor(self, allocation: str, pool: int, *, read_only: bool) -> int:
        """A new descriptor of the file that has the bytes. Raises OSError."""
        ...

    def revoke(
        self,
        allocation: str,
        pool: int,
        pieces: Sequence[MediaPiece],
        *,
        only: str = "",
        others: Sequence[str] = (),
    ) -> Sequence[Holding]:
        """Make sure that nobody (or, with `only`, nobody through that directory) can touch the
        bytes any more.

        With `only`, holders through the directories in `others` are left alone and the bytes stay.
        Returns who still could touch them; then nothing is proved.
        """
        ...

    def sanitise(
        self, allocation: str, pool: int, pieces: Sequence[MediaPiece], *, part: bool = False
    ) -> Generator[None, None, Wiped]:
        """Make the bytes read zero, read them back, and give them up; `part`: the rest of the tag
        lives on.

        Does a bounded chunk of work between yields. Raises OSError when it cannot be proved.
        """
        ...

    def drop(self, allocation: str, pool: int) -> None:
        """Give bytes up that need no sanitising. Idempotent."""

    def incarnation(self) -> str:
        """Names the medium as it is; empty when there is none yet or it was lost."""
        ...

    def renew(self) -> str:
        """Wipe everything that is there and begin a new incarnation; returns its name."""
        ...

    def reconcile(
        self, files: Mapping[str, bool], exposed: Mapping[str, Sequence[str]]
    ) -> tuple[list[str], set[tuple[str, str]]]:
        """Bring the medium to what the device knows after a restart.

        `files`: every allocation, and whether its bytes must be there. `exposed`: per host
        directory, the allocations that are to be found there. Returns the allocations whose bytes
        were missing, and what is exposed already as (directory, allocation).
        """
        ...


class DaxSource(msgspec.Struct, frozen=True):
    """What a DAX device is made from."""

    tag: str
    region: int
    size_bytes: int
    align_bytes: int
    read_only: bool
    path: str
    """Where the bytes can be linked from; empty where the layout gives no path."""
    pieces: Sequence[MediaPiece]
    """In the order of the tag's bytes."""
    sharing: str = ""
    """How hosts share it, for the programs that map it; empty is not known."""
    pool: str = ""
    """Where there is no `path`: the file of the appliance's pool in which the pieces lie."""


class DaxDevices(Protocol):
    """The DAX devices of a host, one per tag: found by name, taken out of sight, given up."""

    def surface(self, source: DaxSource) -> str:
        """Make the device of a tag exist, whole or not at all; its path. Idempotent.

        Raises OSError, with a sentence, when it cannot be made.
        """
        ...

    def withdraw(self, tag: str) -> tuple[str, ...]:
        """Nobody finds the tag by name any more; files left beside the bytes go too, and are named.

        Idempotent. Who has the bytes open keeps them. Raises OSError.
        """
        ...

    def give_up(self, tag: str) -> None:
        """The bytes are proved unused: let go of the device. Idempotent. Raises OSError."""
        ...

    def found(self) -> Mapping[str, str]:
        """Tag to path of each device that can be found by name."""
        ...

    def descriptor(self, tag: str) -> int:
        """The withdrawn bytes, open, when they have no name anywhere any more; else -1."""
        ...

    def identities(self, tag: str) -> Sequence[tuple[int, int]]:
        """(device, inode) of what a holder of this tag would have open, as far as it is known."""
        ...

    def pool(self, tag: str) -> tuple[str, Sequence[MediaPiece]] | None:
        """The file of a pool and the tag's pieces in it, as they were given; None: not known."""
        ...

    def views(self, tag: str) -> Sequence[str]:
        """Files with copies of the bytes that are this host's own; who has one open is a holder."""
        ...


# ---- virtual machines of a host


class HostTag(msgspec.Struct, frozen=True):
    """A tag that this host has, as far as a hypervisor has to know it."""

    tag: str
    size_bytes: int
    path: str
    """The file that has its bytes: its own, or an appliance's whole pool."""
    pieces: Sequence[MediaPiece]
    """In the order of the tag's bytes."""
    read_only: bool
    shared: bool
    """Other hosts have it too."""
    dead_end: bool
    """The file is cut off at release, and never another tag's."""
    head_room_bytes: int
    """In front of the first piece, and no capacity."""


Emit = Callable[[Mapping[str, Any]], None]
"""Tells the asker something before the answer, such as a command's output."""


class Peers(Protocol):
    """The hypervisors of other hosts, reached through whoever knows all of them."""

    async def call(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `Hypervisors.serve` of that host answers.

        Raises TagmemError: the other's refusal in its own kind, NotFound for no such host,
        OutcomeUnknown without an answer (then it may have been carried out).
        """
        ...


class Hypervisors(Protocol):
    """The VMs of a host, and which tags are in them.

    It keeps what it must know after a restart by a function that it is given, which returns when
    that is durable: persist, then act.
    """

    async def restore(self, kept: Mapping[str, str]) -> None:
        """Find again what was kept, in the world as it is now."""

    async def call(self, request: Mapping[str, Any], emit: Emit) -> Mapping[str, Any]:
        """Carry out one request of a person on this host. Raises TagmemError."""
        ...

    async def serve(self, from_host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out one request of another host's hypervisors, which are not believed.

        `from_host` is who asks, as the carrier proved it. Raises TagmemError.
        """
        ...

    def holding(self, tag: str) -> str:
        """Which VMs have a tag and in which way, as a sentence; empty when none has."""
        ...

    def holders(self, tag: str) -> Sequence[Holding]:
        """The hypervisors' processes of these VMs: for a tag that has no file of its own, nothing
        else shows that they have it.
        """
        ...

    async def release(
        self, tag: str, deadline_ns: Nanoseconds, *, may_stop_vm: bool, up_to: str = "detach"
    ) -> str:
        """Take a tag out of every VM; why that did not work, or nothing.

        Guests are asked for half of the time; then it is taken from them where it can be. A VM that
        has its RAM in the tag is its application: `up_to` `ask`, it is asked to shut down, and
        `stop`, it is ended after that; only `detach` concerns the tags that VMs were given.
        """
        ...

    async def close(self) -> None:
        """Let go of them all; they run on."""
