"""What every way of presenting a tag to a guest has in common, so that a host, a table and a test
suite can treat them alike.

A presenter *judges* (`can`) and *plans* (`plan`, `unplan`) with pure functions: facts in, data out.
Carrying a plan out (`presenter/driver.py`) is the same for all of them: each step names how it is
undone, so that an attach that fails half-way leaves the VM as it was. What a presenter promises is
said once, in its Description, which the comparison prints and the tests hold it to.

Words. A *tagged* thing is what the host has: bytes in files, in the order of the tag. A *request*
is the wish to see it in one VM. A *presentation* is a tag in a VM. A *slot* is a root port.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from tagmem.base.units import Bytes, Nanoseconds
from tagmem.wire import guest

Version = tuple[int, int, int]


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of the values below; all of them may be kept in a store and sent as JSON."""


class Piece(Value, frozen=True):
    """`length` bytes of the file at `path` from `offset`."""

    path: str
    offset: Bytes
    length: Bytes


class Tagged(Value, frozen=True):
    """What the host has under a tag."""

    tag: str
    size_bytes: Bytes
    pieces: tuple[Piece, ...]
    """In the order of the tag's bytes; together `size_bytes` long."""
    read_only: bool = False
    shared: bool = False
    """Other hosts have it too: nothing here may wipe it."""
    loaded: bool = True
    """It may have content that somebody wants to find again."""
    dead_end: bool = False
    """After its release the backing is cut off and never another tag's: one file per tag, which the
    appliance truncates. A mapping that outlives its detach can then show nobody else's bytes."""
    head_room_bytes: Bytes = 0
    """Bytes of the file in front of the first piece that are not capacity: room for a header."""


class Slot(Value, frozen=True):
    """A place where a PCI device can be plugged into a running VM."""

    bus: str
    prefetch_bytes: Bytes = 0
    """64-bit prefetchable address space that the firmware reserved behind it; 0: none beyond the
    smallest."""
    taken_by: str = ""
    """The id of the device in it; empty: free."""


class Lent(Value, frozen=True):
    """An extent of a CXL window that was offered to the guest: which tag lies where, because QEMU
    forgets tags.
    """

    tag: str
    window: str
    """QEMU's id of the device."""
    dpa: Bytes
    length: Bytes
    state: Literal["offered", "held"] = "offered"
    """`offered`: whether the guest took it is not known; nothing else is put there meanwhile."""


class CxlWindow(Value, frozen=True):
    """An emulated CXL device with dynamic capacity, directly on a root port: bytes of one file, at
    the device's addresses.
    """

    device: str
    serial: str
    """As sysfs writes it: 0xabc."""
    path: str
    offset: Bytes
    """Of the device's address 0 in the file."""
    size_bytes: Bytes
    regions: int = 1
    """DC regions of the same size."""
    lent: tuple[Lent, ...] = ()


class GuestFacts(Value, frozen=True):
    """What the guest's agent said of the guest. Untrusted: it decides what is tried, never what is
    proved.
    """

    kernel: str = ""
    features: tuple[str, ...] = ()
    """What the agent can do, in its own words."""


class VmFacts(Value, frozen=True):
    """What is known of a VM when a request is judged."""

    name: str
    qemu: Version
    state: str = "running"
    """QEMU's run state: `running`, `paused`, `guest-panicked`, …; `gone` when QEMU has ended."""
    accel: str = ""
    machine: str = ""
    nvdimm: bool = False
    """The machine was started with `nvdimm=on`."""
    ram_shared: bool = False
    """All of the guest's RAM is in a shared mapping, so that another process can serve queues."""
    slots: tuple[Slot, ...] = ()
    memory_slots_free: int = 0
    """What is left of `-m slots=`."""
    memory_free_bytes: Bytes = 0
    """What is left of `-m maxmem=`."""
    regions_taken: int = 1
    """Stretches of memory that QEMU tells its vhost back-ends of: RAM, plugged memory, windows."""
    window_regions: int = 0
    """Those of them that are windows' (header and pieces); 0: no window is attached."""
    drivers: tuple[str, ...] = ()
    """Device types of ours that this QEMU can create."""
    cxl_ports: tuple[str, ...] = ()
    """Free CXL root ports, directly on a host bridge with a fixed memory window."""
    cxl_windows: tuple[CxlWindow, ...] = ()
    """Emulated devices with dynamic capacity: host windows that extents can be put in."""
    broker: bool = False
    """A vhost-user back-end of ours runs on this host."""
    devices: tuple[str, ...] = ()
    """Ids of the devices that somebody has added; the tags that are presented already are there."""
    guest: GuestFacts | None = None
    """None: no guest agent has answered."""


class Need(Value, frozen=True):
    """What the asker cannot do without; everything else is preference."""

    guaranteed: bool = False
    """The host must be able to take it back without the guest."""
    dax: bool = False
    """A real DAX device in the guest: page structures, O_DIRECT."""
    ram: bool = False
    """Ordinary memory, which the guest's kernel hands out."""
    live_migration: bool = False
    """The presentation itself must stay while the VM migrates."""
    discoverable: bool = False
    """The guest finds the tag by itself, without a side channel."""


class Request(Value, frozen=True):
    """A tag, wanted in a VM."""

    tagged: Tagged
    need: Need = Need()
    align_bytes: Bytes = 2 << 20


Removal = Literal["host", "guest", "sometimes", "vm-end", "never"]
"""Who can take it back: the host alone, the guest if it wants to, the guest if its kernel can, the
guest out of itself while QEMU keeps the bytes until it ends, or nobody before QEMU ends."""
Migration = Literal["stays", "refused", "broken"]
"""`stays`: migrates in place (x-ignore-shared); `refused`: blocks it; `broken`: is lost by it."""


class Description(Value, frozen=True):
    """What a presenter promises: for people, for `--as auto`, and for the tests to hold it to."""

    name: str
    summary: str
    guaranteed: bool
    """Removal needs nothing of the guest, not even a live one."""
    removal: Removal
    dax: bool
    ram: bool
    tag_in_band: bool
    """The guest sees the tag with no side channel."""
    granularity_bytes: Bytes
    minimum_bytes: Bytes
    pieces: bool
    """A tag in several extents can be presented as one."""
    read_only: bool
    """A read-only sharer cannot write through it."""
    header_bytes: Bytes
    """Room in front of the bytes that a header takes; never of the capacity."""
    migration: Migration
    stock_kernel: bool
    guest_code: str
    """What the guest runs of ours; empty: nothing."""
    qemu_min: Version
    setup: tuple[str, ...] = ()
    """Lines of QEMU's configuration that it needs at boot and at attach."""
    warning: str = ""
    """What the user is told when attaching."""


class Verdict(Value, frozen=True):
    """Whether one presenter can meet a request, and why not."""

    presenter: str
    reason: str | None
    """None: it can."""


class Choice(Value, frozen=True):
    """What `--as auto` chose, and what it thought of the others."""

    presenter: str
    """Empty: none can."""
    why: str
    verdicts: tuple[Verdict, ...] = ()


# ---- plans: data that `driver` carries out in order


class Command(Value, frozen=True):
    """A QMP command. Undone by `undo`, in the reverse order, when a later step fails."""

    execute: str
    arguments: dict[str, Any] = {}
    undo: tuple[str, dict[str, Any]] | None = None


class MakeHeader(Value, frozen=True):
    """Write the tag's header into the head room in front of `path`'s capacity: `device_bytes` are
    what the guest's device will show, header included.
    """

    tag: str
    path: str
    offset: Bytes
    device_bytes: Bytes
    read_only: bool = False
    """This host may not write: the header must be there."""


class OpenWindow(Value, frozen=True):
    """Have the broker serve a window `device`: a private header, then the pieces one after another;
    and connect QEMU's character device `chardev` to it.
    """

    device: str
    chardev: str
    tagged: Tagged
    device_bytes: Bytes


class MapWindow(Value, frozen=True):
    """Wait until the guest's driver has started the device and the broker has mapped the pieces."""

    device: str
    deadline_ns: Nanoseconds


class SeeWindow(Value, frozen=True):
    """Wait until the guest's kernel has found the tag, or the plan stops when it looked too early;
    a guest that has not looked in time is left alone.
    """

    device: str
    deadline_ns: Nanoseconds


class RevokeWindow(Value, frozen=True):
    """Take the memory out of a window, scrap memory in its place; nothing is asked of the guest."""

    device: str
    deadline_ns: Nanoseconds


class CloseWindow(Value, frozen=True):
    """The broker forgets the window; QEMU's device is gone already."""

    device: str


class OfferExtent(Value, frozen=True):
    """Offer an extent to the guest, whose agent is asked to take it afterwards. It is on record
    before QEMU is told.
    """

    lent: Lent


class RecallExtent(Value, frozen=True):
    """Have the guest's agent give a tag's extent back, or refuse it; done when QEMU, asked to
    release it, says that nothing is there.
    """

    tag: str
    deadline_ns: Nanoseconds


class AskGuest(Value, frozen=True):
    """Ask the guest's agent. `needed`: with a refusal or without an answer the plan stops here."""

    request: guest.Request
    deadline_ns: Nanoseconds
    needed: bool = True


class AwaitDeleted(Value, frozen=True):
    """Wait until QEMU says that the device has left."""

    device: str
    deadline_ns: Nanoseconds


class AwaitSize(Value, frozen=True):
    """Wait until virtio-mem's `size` is what was requested of it."""

    device: str
    size_bytes: Bytes
    deadline_ns: Nanoseconds


class ProveUnmapped(Value, frozen=True):
    """QEMU's process neither maps nor has open any of these files."""

    paths: tuple[str, ...]
    deadline_ns: Nanoseconds
    otherwise: str = ""
    """What helps when it does, or why it always will."""


class Impossible(Value, frozen=True):
    """There is no way: the plan stops here with the reason."""

    reason: str


class StopVm(Value, frozen=True):
    """The last rung: QEMU is ended, and with it every mapping that it has."""

    deadline_ns: Nanoseconds


Step = (
    Command
    | MakeHeader
    | OpenWindow
    | MapWindow
    | SeeWindow
    | RevokeWindow
    | CloseWindow
    | OfferExtent
    | RecallExtent
    | AskGuest
    | AwaitDeleted
    | AwaitSize
    | ProveUnmapped
    | Impossible
    | StopVm
)


class Plan(Value, frozen=True):
    """What will be done, in order; and what is told about it before it is."""

    presenter: str
    device: str
    """QEMU's id of the device that presents the tag."""
    steps: tuple[Step, ...]
    device_bytes: Bytes
    slot: str = ""
    warning: str = ""


class Presentation(Value, frozen=True):
    """A tag in a VM."""

    tagged: Tagged
    vm: str
    presenter: str
    device: str
    state: Literal["attaching", "attached", "detaching", "revoked"]
    """`revoked`: the bytes have been taken back; the device is still to be cleared away."""
    slot: str = ""
    device_bytes: Bytes = 0
    guest_path: str = ""
    """What the guest's agent calls it; empty when it did not say."""
    warning: str = ""
    told: guest.Told | None = None
    """How the guest's agent knows memory that cannot carry its tag; told again after a reboot."""


class Holder(Value, frozen=True):
    """A process in the guest that has the tag, as the guest says."""

    pid: int
    name: str
    how: str = ""


class Detached(Value, frozen=True):
    """How a detach ended."""

    done: bool
    """No byte of the tag can be reached through this VM any more; shown by QEMU's own maps."""
    rung: str
    """What did it, or what was tried last: `ask`, `insist`, `unplug`, `revoke`, `stop-vm`."""
    holders: tuple[Holder, ...] = ()
    reason: str = ""
    presentation: Presentation | None = None
    """What is left of it in the VM; None: nothing."""


# ---- what a presenter is given


class GuestChannel(Protocol):
    """A way to the guest's agent that needs no network."""

    async def ask(self, request: guest.Request, deadline_ns: Nanoseconds) -> guest.Answer:
        """The agent's answer, a refusal too. Raises OutcomeUnknown without one in time.

        The deadline is a duration.
        """
        ...


class Windows(Protocol):
    """The broker: what serves windows of memory to VMs' vhost-user devices."""

    async def open(self, device: str, tagged: Tagged, device_bytes: Bytes) -> str:
        """Serve a window; the path of the socket that QEMU is to connect to."""
        ...

    async def mapped(self, device: str, deadline_ns: Nanoseconds) -> None:
        """Return when the guest can see the bytes. Raises OutcomeUnknown, RemoteError."""

    async def found(self, device: str, deadline_ns: Nanoseconds) -> bool | None:
        """Whether the guest has read the tag's header, within so long. None: it looked before the
        header was there, and will not look again. The guest is not asked.
        """
        ...

    async def revoke(self, device: str, deadline_ns: Nanoseconds) -> None:
        """Take the bytes out of the window. Raises OutcomeUnknown (then only ending QEMU helps)."""

    async def close(self, device: str) -> None:
        """Forget the window. Idempotent."""

    def regions(self) -> int:
        """Stretches of memory that the windows of this VM are made of, as far as is known."""
        ...


class Machine(Protocol):
    """One VM as presenters see it."""

    async def facts(self) -> VmFacts:
        """Asked anew each time: slots are taken and freed by others as well."""
        ...

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """A QMP command. Raises RemoteError when QEMU refuses, OutcomeUnknown when it does not
        answer or has ended.
        """
        ...

    async def deleted(self, device: str, deadline_ns: Nanoseconds) -> bool:
        """Whether the device has left within so many nanoseconds."""
        ...

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        """Which of the files QEMU's process maps or has open."""
        ...

    async def size_of(self, device: str) -> Bytes:
        """What virtio-mem has plugged of itself."""
        ...

    async def wait_gone(self, deadline_ns: Nanoseconds) -> bool:
        """Whether QEMU's process ends within so many nanoseconds."""
        ...

    async def lend(self, tag: str, lent: Lent | None) -> None:
        """Note what is lent under a tag, or that it is no more; durable when it returns."""

    async def stop(self, deadline_ns: Nanoseconds) -> None:
        """End QEMU. Returns when its process is gone; raises OutcomeUnknown while it is not."""

    @property
    def guest(self) -> GuestChannel | None:
        """None: this VM has no agent's channel."""
        ...

    @property
    def windows(self) -> Windows | None:
        """None: no broker runs here."""
        ...


class Presenter(Protocol):
    """One way of presenting."""

    def describe(self) -> Description:
        """What it promises."""
        ...

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not, as a sentence with the limit and the value; None when it can. Pure."""
        ...

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """How it will attach. Pure. Raises Unsupported with the reason of `can`."""
        ...

    def unplan(self, presentation: Presentation, rung: str) -> Sequence[Step]:
        """How `rung` (`ask`, `insist`, `unplug`, `revoke`) takes it back; empty: it has no such
        rung. Pure.
        """
        ...

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """Carry the plan out. Raises Unsupported, RemoteError, OutcomeUnknown; then nothing of it
        is left, or the error says what is.
        """
        ...

    async def detach(
        self,
        presentation: Presentation,
        vm: Machine,
        *,
        deadline_ns: Nanoseconds,
        force: bool = False,
        may_stop_vm: bool = False,
    ) -> Detached:
        """Ask, then (with `force`) take; end the VM only if `may_stop_vm`. Never raises for a guest
        that refuses or is silent: the answer says who holds it.
        """
        ...
