"""What the agent's machine hears, orders and remembers.

No effect of the agent is kept in the outbox: each follows from the records and from what the
device, the run directory and the process table say, and all of these are read again after a
restart. So the effects are volatile, and each is idempotent by the thing it names. A `ticket`
tells the result of the latest order for a tag from that of an earlier one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tagmem.agent.phases import Phase
from tagmem.base.units import Bytes, Dpa, Nanoseconds
from tagmem.ports import Effect, Event, Holding
from tagmem.wire.agentapi import Desired, Observed, Workload, WorkloadReport

Span = tuple[int, int]
"""(DPA, length)"""


class Extent(msgspec.Struct, frozen=True, gc=False):
    """An extent as this host's device shows it; `tag` is NIL_TAG for untagged capacity."""

    dpa: Dpa
    length: Bytes
    tag: str
    sequence: int = 0


class Region(msgspec.Struct, frozen=True, gc=False):
    """A DC region as 4800h gives it."""

    base: Dpa
    length: Bytes
    block_bytes: Bytes


# ---- records


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of what the agent's store keeps."""


class TagRecord(Record, frozen=True):
    """One tag on this host, as far as it cannot be found out again. Key: the tag."""

    tag: str
    desired: Desired | None
    phase: Phase
    """EXPECTED stands for all phases up to ATTACHED, ENDING for those up to BLOCKED: the rest is
    found.
    """
    reason: str = ""
    asked_back: bool = False
    """The device asked for it back (record type 1), with or without the orchestrator."""
    rung: str = ""
    rung_due_ns: Nanoseconds = 0
    proved: bool = False
    lost: bool = False
    """The device no longer had it although nobody here gave it back."""
    workload: WorkloadReport | None = None


class EpochRecord(Record, frozen=True):
    """The highest leader's epoch seen. Key: `epoch`."""

    epoch: int


class VmDocument(Record, frozen=True):
    """What the hypervisors keep of a VM, or of a tag in one. Key: the hypervisors' own."""

    document: str


KINDS: dict[str, type[Record]] = {"tag": TagRecord, "epoch": EpochRecord, "vm": VmDocument}
"""The agent's record kinds, by the name of their table."""


# ---- events: the orchestrator's session


class SessionOpened(Event, frozen=True):
    """The orchestrator listens: everything is to be told again."""


class DesiredReceived(Event, frozen=True):
    """What the orchestrator wants for one tag."""

    desired: Desired


class SyncEnded(Event, frozen=True):
    """All that is wanted on this host has been said since SessionOpened."""

    epoch: int


# ---- events: an appliance's mailbox


class DeviceRead(Event, frozen=True):
    """The device's own regions and accepted extents (4800h, 4801h)."""

    appliance: str
    regions: tuple[Region, ...]
    held: tuple[Extent, ...]
    fresh: bool
    """A new session: groups offered in an earlier one are void, and will be offered again."""
    session: int = 0


class Offered(Event, frozen=True):
    """A complete group of add records. `group` grows within a session."""

    appliance: str
    group: int
    extents: tuple[Extent, ...]


class Answered(Event, frozen=True):
    """The device has taken (`code` 0) our answer to a group, or refused it."""

    appliance: str
    group: int
    code: int


class ReleaseAsked(Event, frozen=True):
    """The device asks for extents back (record type 1)."""

    appliance: str
    group: int
    extents: tuple[Extent, ...]


class TakenByForce(Event, frozen=True):
    """The device has taken extents away (record type 2): they are gone already."""

    appliance: str
    group: int
    extents: tuple[Extent, ...]


class Returned(Event, frozen=True):
    """The device's answer to a release (4803h)."""

    appliance: str
    tag: str
    code: int


class LinkLost(Event, frozen=True):
    """The session with an appliance has ended; what was under way may have taken effect or not."""

    appliance: str
    reason: str


# ---- events: this host


class Started(Event, frozen=True):
    """First event after a start: what was found in the run directory and in the process table."""

    devices: dict[str, str]
    """Tag to DAX path."""
    workloads: dict[str, WorkloadReport]
    """Tag to the workload that was adopted, or whose end was found."""


class Surfaced(Event, frozen=True):
    """The DAX device of a tag exists."""

    tag: str
    ticket: int
    path: str


class SurfaceFailed(Event, frozen=True):
    """It could not be made."""

    tag: str
    ticket: int
    reason: str


class Withdrawn(Event, frozen=True):
    """The DAX device of a tag can no longer be found by name."""

    tag: str
    ticket: int
    leftovers: tuple[str, ...] = ()
    """Files that an application had left beside the bytes; removed."""


class WithdrawFailed(Event, frozen=True):
    """The name could not be taken away."""

    tag: str
    ticket: int
    reason: str


class HoldersChecked(Event, frozen=True):
    """Who maps or has open the bytes of a tag. Nobody and `complete` is the proof."""

    tag: str
    ticket: int
    holders: tuple[Holding, ...]
    complete: bool
    reason: str = ""


class WorkloadChanged(Event, frozen=True):
    """A workload was started, ended, or could not be started."""

    tag: str
    report: WorkloadReport


# ---- effects


class _Volatile(Effect, frozen=True):
    durable = False


class Answer(_Volatile, frozen=True):
    """4802h for one group: these extents of it, or none."""

    appliance: str
    group: int
    accepted: tuple[Span, ...]


class Acknowledge(_Volatile, frozen=True):
    """The records of a group that needs no answer may be cleared."""

    appliance: str
    group: int


class ReadDevice(_Volatile, frozen=True):
    """Read the device's lists again; brings DeviceRead."""

    appliance: str


class ReturnExtents(_Volatile, frozen=True):
    """4803h for all extents of a tag; brings Returned."""

    appliance: str
    tag: str
    extents: tuple[Span, ...]
    session: int = 0
    """Good in this session only: after a new one the device's list is read first."""


class Surface(_Volatile, frozen=True):
    """Make the DAX device of a tag; brings Surfaced or SurfaceFailed."""

    appliance: str
    tag: str
    ticket: int
    region: int
    size_bytes: Bytes
    read_only: bool
    extents: tuple[Span, ...]
    sharing: str = ""
    """As the orchestrator calls it; empty is not said."""


class Withdraw(_Volatile, frozen=True):
    """Take the DAX device of a tag away; brings Withdrawn or WithdrawFailed."""

    tag: str
    ticket: int


class GiveUp(_Volatile, frozen=True):
    """Let go of the DAX device of a tag that the appliance has taken away."""

    tag: str


class CheckHolders(_Volatile, frozen=True):
    """Find out who has the bytes of a tag; brings HoldersChecked with the same `ticket`."""

    appliance: str
    tag: str
    ticket: int
    shared: bool


class KillHolders(_Volatile, frozen=True):
    """The restart rung of an emulated host: end every process that has the bytes of a tag."""

    appliance: str
    tag: str
    shared: bool


class Launch(_Volatile, frozen=True):
    """Start a workload unless one of this id was ever started; brings WorkloadChanged."""

    tag: str
    workload: Workload
    dax_path: str
    size_bytes: Bytes


class Signal(_Volatile, frozen=True):
    """End a workload: `term` asks its process group, `kill` ends its cgroup or group."""

    tag: str
    workload_id: str
    how: Literal["term", "kill"]


class Report(_Volatile, frozen=True):
    """Tell the orchestrator."""

    observed: Observed


class EndSession(_Volatile, frozen=True):
    """Hang up on an orchestrator that may not command this host."""

    reason: str
