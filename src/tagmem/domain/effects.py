"""Events in, effects out: the two closed unions of the orchestrator's machine.

Events come from people (through the API), from appliances (through `links`), from hosts' agents and
from the clock. Effects go to appliances and agents. The machine is total: each event is answered in
each state.
"""

from __future__ import annotations

import msgspec

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import Bytes
from tagmem.domain.records import Extent, Holder, LdRecord, RegionRecord, Sharing, WorkloadStatus
from tagmem.ports import Effect, Event

# ---- from people


class RegisterAppliance(Event, frozen=True):
    """An operator names an appliance and where its fabric-manager port is."""

    id: str
    address: str


class RegisterHost(Event, frozen=True):
    """An operator (or a host's agent) names a host and its LD on each appliance it reaches."""

    id: str
    links: dict[str, int]


class CreateCapacity(Event, frozen=True):
    """Set capacity aside and offer it to the named hosts (none: only reserve)."""

    tag: str
    size_bytes: Bytes
    hosts: tuple[str, ...] = ()
    tagged: bool = True
    sharing: Sharing = Sharing.NONE
    owner: str = ""
    appliance: str = ""
    """Only from this appliance; empty: any that the hosts reach."""
    region: int | None = None
    contiguous: bool = True
    """False: several extents will do when nothing contiguous is left."""
    digest: str = ""
    idempotency_key: str = ""
    retain: bool = False
    """Shared capacity only: it outlives its last host."""


class AttachCapacity(Event, frozen=True):
    """Offer a reserved (or sharable) capacity to a host."""

    tag: str
    host: str


class ReleaseCapacity(Event, frozen=True):
    """Give the capacity back: from `host` only, or from all and then to the pool. A repeat may
    raise `up_to`.
    """

    tag: str
    host: str = ""
    up_to: str = "detach"
    deadlines_ns: dict[str, int] = {}
    if_match: int | None = None


class HandOver(Event, frozen=True):
    """Have `target` take a shared capacity with its contents, and then `source` let go of it."""

    tag: str
    source: str
    target: str
    up_to: str = "detach"
    """How far the release of the source may climb, with the deadlines of its rungs."""
    deadlines_ns: dict[str, int] = {}
    if_match: int | None = None
    idempotency_key: str = ""


class PublishCapacity(Event, frozen=True):
    """End the writing of read-only capacity, and let `hosts` and the one that wrote it read."""

    tag: str
    hosts: tuple[str, ...]
    up_to: str = "detach"
    deadlines_ns: dict[str, int] = {}
    if_match: int | None = None
    idempotency_key: str = ""


class RetainCapacity(Event, frozen=True):
    """Have a shared capacity outlive its last host (or no longer)."""

    tag: str
    retain: bool
    if_match: int | None = None


class LaunchWorkload(Event, frozen=True):
    """Run a command on an attached capacity."""

    tag: str
    host: str
    workload: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}


class StopWorkload(Event, frozen=True):
    """Stop the command; the capacity stays attached."""

    tag: str
    host: str


class RefreshAppliance(Event, frozen=True):
    """An operator asks for a comparison with the appliance's own lists now."""

    id: str


# ---- from appliances (`effect_id` names the effect that this is the outcome of)


class ApplianceConnected(Event, frozen=True):
    """The link is up; what the appliance says it is (5600h, 5601h). A snapshot follows."""

    appliance: ApplianceId
    regions: tuple[RegionRecord, ...]
    lds: tuple[LdRecord, ...]


class ApplianceDisconnected(Event, frozen=True):
    """The link is down: nothing about the appliance is certain."""

    appliance: ApplianceId
    reason: str


class HeldExtent(msgspec.Struct, frozen=True, gc=False):
    """An extent in an LD's accepted list (5603h), translated to media offsets."""

    ld: int
    region: int
    tag: Tag
    extent: Extent


class ListedTag(msgspec.Struct, frozen=True):
    """A tag in 5608h. Neither accepted nor pending anywhere: it is being sanitised."""

    tag: Tag
    accepted: tuple[int, ...]
    pending: tuple[int, ...]
    referenced: bool


class ApplianceSnapshot(Event, frozen=True):
    """The appliance's own lists, consistent among themselves and with all events before."""

    appliance: ApplianceId
    held: tuple[HeldExtent, ...]
    tags: tuple[ListedTag, ...]


class AddStarted(Event, frozen=True):
    """5604h succeeded: the host is being offered the extents."""

    effect_id: int
    tag: Tag
    host: HostId


class AddFailed(Event, frozen=True):
    """5604h was answered with an error (`code`, CXL return code): nothing was offered."""

    effect_id: int
    tag: Tag
    host: HostId
    code: int


class ReleaseStarted(Event, frozen=True):
    """5605h succeeded: an event was queued, or (forced) the capacity is gone from the host."""

    effect_id: int
    tag: Tag
    host: HostId
    forced: bool


class ReleaseFailed(Event, frozen=True):
    """5605h was answered with an error."""

    effect_id: int
    tag: Tag
    host: HostId
    forced: bool
    code: int


class FenceEnded(Event, frozen=True):
    """A fence was confirmed (`code` 0: nothing on that host can touch the extents) or refused."""

    effect_id: int
    tag: Tag
    host: HostId
    code: int


class EffectUnknown(Event, frozen=True):
    """No answer came for an effect; it stays in the outbox until the next snapshot tells."""

    effect_id: int


class ReferenceSet(Event, frozen=True):
    """5606h (or, not `wanted`, 5607h) was answered with `code`."""

    effect_id: int
    tag: Tag
    wanted: bool
    code: int


class HostAnswered(Event, frozen=True):
    """A type 4 record: what the host accepted (empty: it refused), in media offsets."""

    appliance: ApplianceId
    ld: int
    tag: Tag
    first: Extent
    """The first offered or accepted extent; for untagged capacity this tells which it is."""
    accepted: tuple[Extent, ...]
    region: int | None = None
    """Where `first` lies; None: to be found by its offset alone."""


class CapacityReturned(Event, frozen=True):
    """Type 5 records: extents that a host has given back; the last holder's come only after
    sanitising.
    """

    appliance: ApplianceId
    ld: int
    tag: Tag
    extents: tuple[Extent, ...]
    region: int | None = None


# ---- from hosts' agents


class HostConnected(Event, frozen=True):
    """An agent has said Hello; it is to be sent all that concerns it."""

    host: HostId
    boot_id: str
    links: dict[ApplianceId, int]


class HostDisconnected(Event, frozen=True):
    """The agent's session ended. The host may well go on using what it has."""

    host: HostId


class HostObserved(Event, frozen=True):
    """What an agent has for one tag (`wire/agentapi.py: Observed`, checked and translated)."""

    host: HostId
    tag: Tag
    revision: int
    phase: str
    dax_path: str = ""
    reason: str = ""
    rung: str = ""
    holders: tuple[Holder, ...] = ()
    workload: WorkloadStatus | None = None
    proved: bool = False


# ---- effects


class InitiateAdd(Effect, frozen=True):
    """5604h prescriptive (or, with `shared`, enable shared access) for one attachment."""

    appliance: ApplianceId
    host: HostId
    ld: int
    region: int
    tag: Tag
    tagged: bool
    extents: tuple[Extent, ...]
    shared: bool = False


class InitiateRelease(Effect, frozen=True):
    """5605h for one attachment; `forced` only after every milder rung and a fence."""

    appliance: ApplianceId
    host: HostId
    ld: int
    region: int
    tag: Tag
    tagged: bool
    extents: tuple[Extent, ...]
    forced: bool


class FenceHost(Effect, frozen=True):
    """Have the appliance make sure that one host can no longer touch one tag (vendor command
    C003h).
    """

    appliance: ApplianceId
    host: HostId
    ld: int
    region: int
    tag: Tag
    tagged: bool
    extents: tuple[Extent, ...]


class SetReference(Effect, frozen=True):
    """5606h, or not `wanted` 5607h: the fabric manager's reference on a tag. It is the capacity's
    own, so it names no host and no LD.
    """

    appliance: ApplianceId
    tag: Tag
    wanted: bool
    host: HostId = HostId("")
    ld: int = -1


class ReadAppliance(Effect, frozen=True):
    """Bring a fresh ApplianceSnapshot. Volatile: doubt is in the appliance's record."""

    durable = False

    appliance: ApplianceId


class ConnectAppliance(Effect, frozen=True):
    """Start (or restart) the link to a newly registered appliance. Volatile: links start from the
    records.
    """

    durable = False

    appliance: ApplianceId
    address: str


class TellHost(Effect, frozen=True):
    """Send the host what is wanted for one tag. Volatile: it is derived from the records at each
    connection.
    """

    durable = False

    host: HostId
    tag: Tag


DurableEffect = InitiateAdd | InitiateRelease | FenceHost | SetReference
"""What the outbox can hold, for its decoder."""
