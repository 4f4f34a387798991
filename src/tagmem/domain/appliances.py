"""What appliances say: the outcomes of commands, what hosts took and gave back, connections.

An appliance's word is the truth about who holds what. A missing answer is no word at all: it makes
the attachment UNKNOWN and the appliance doubtful, until `reconcile` has read the appliance's own
lists.
"""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import NIL_TAG, ApplianceId, parse_name
from tagmem.domain import attachment as attachments
from tagmem.domain import ladder, moves
from tagmem.domain.attachment import Happening
from tagmem.domain.device_records import Code
from tagmem.domain.effects import (
    AddFailed,
    AddStarted,
    ApplianceConnected,
    ApplianceDisconnected,
    CapacityReturned,
    ConnectAppliance,
    EffectUnknown,
    FenceEnded,
    FenceHost,
    HostAnswered,
    InitiateAdd,
    InitiateRelease,
    ReferenceSet,
    RefreshAppliance,
    RegisterAppliance,
    ReleaseFailed,
    ReleaseStarted,
    SetReference,
)
from tagmem.domain.extent import covers, normal, subtract
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import (
    ApplianceRecord,
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    Extent,
    Reference,
    ReleasePlan,
    Sharing,
)
from tagmem.domain.requests import problem
from tagmem.domain.turn import Turn
from tagmem.ports import Effect

APPLIANCES_MAX = 1024
ADDRESS_LENGTH_MAX = 1024

DOUBTFUL_CODES = frozenset({0x0F, 0x1D, 0x1E})
"""Answers to an add (invalid physical address, resources exhausted, invalid extent list) that mean:
the appliance's picture of what is free differs from ours."""

PARTIAL = "the host accepted only a part, which nobody can use"
UNASKED = "the appliance no longer lists the host as holder, and nobody had asked for that"


# ---- registration and connection


def register(turn: Turn, event: RegisterAppliance) -> Reply:
    """Name an appliance; its regions are learnt when it is connected."""
    state = turn.state
    try:
        name = ApplianceId(parse_name(event.id, "id"))
    except InvalidInput as error:
        return problem(Outcome.NAME_IS_MALFORMED, "id", error.limit, event.id[:80])
    if not 0 < len(event.address) <= ADDRESS_LENGTH_MAX:
        limit = f"1 to {ADDRESS_LENGTH_MAX} characters"
        return problem(Outcome.FIELD_OUT_OF_RANGE, "address", limit, len(event.address))
    present = state.appliances.get(name)
    if present is not None:
        if present.address == event.address:
            return Reply(Outcome.ALREADY_SO, name)
        limit = f"{present.address}, as registered"
        outcome = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
        return problem(outcome, "address", limit, event.address[:80], name)
    for other in state.appliances.values():
        if other.address == event.address:
            # Two names for one device would lend its memory twice.
            outcome = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
            return problem(outcome, "address", f"not {other.id}'s", event.address[:80], name)
    if len(state.appliances) >= APPLIANCES_MAX:
        limit = f"at most {APPLIANCES_MAX} appliances"
        return problem(Outcome.FIELD_OUT_OF_RANGE, "id", limit, name)
    turn.put_appliance(
        ApplianceRecord(name, event.address, ApplianceState.LOST, registered_ns=turn.now)
    )
    turn.post(ConnectAppliance(0, name, event.address))
    turn.note("appliance.registered", name, address=event.address)
    return Reply(Outcome.CREATED, name)


def refresh(turn: Turn, event: RefreshAppliance) -> Reply:
    """Have an appliance's lists read now."""
    record = turn.state.appliances.get(event.id)
    if record is None:
        limit = "a registered appliance"
        return problem(Outcome.APPLIANCE_IS_UNKNOWN, "id", limit, event.id[:80])
    turn.read_appliance(record.id)
    return Reply(Outcome.ACCEPTED, record.id)


def connected(turn: Turn, event: ApplianceConnected) -> None:
    """The link is up: take over the regions, and wait for the lists."""
    record = turn.state.appliances.get(event.appliance)
    if record is None:
        return
    if not _still_fits(turn, record, event):
        fault = "its regions are no longer those that capacities were placed in"
        turn.put_appliance(replace(record, state=ApplianceState.LOST, fault=fault))
        turn.note("appliance.fault", record.id, reason=fault)
        return
    turn.put_appliance(
        replace(
            record,
            state=ApplianceState.DOUBT,
            regions=event.regions,
            lds=event.lds,
            fault="",
        )
    )
    turn.note("appliance.connected", record.id, regions=len(event.regions), lds=len(event.lds))


def _still_fits(turn: Turn, record: ApplianceRecord, event: ApplianceConnected) -> bool:
    if record.regions == event.regions:
        return True
    regions = {region.index: region for region in event.regions}
    for tag in turn.state.by_appliance.get(record.id, ()):
        capacity = turn.state.capacities[tag]
        before = turn.state.region(record.id, capacity.region)
        after = regions.get(capacity.region)
        if after is None or after.pool != before.pool or after.size_bytes < before.size_bytes:
            return False
    return True


def disconnected(turn: Turn, event: ApplianceDisconnected) -> None:
    """The link is down."""
    record = turn.state.appliances.get(event.appliance)
    if record is not None and record.state is not ApplianceState.LOST:
        turn.put_appliance(replace(record, state=ApplianceState.LOST))
        turn.note("appliance.lost", record.id, reason=event.reason[:200])


# ---- outcomes of commands


def _concluded(
    turn: Turn, effect_id: int, kind: type[Effect]
) -> tuple[AttachmentRecord | None, CapacityRecord | None]:
    """Whose effect has ended; nothing for one that is no longer awaited, or is of another kind."""
    effect = turn.state.outbox.get(effect_id)
    if not isinstance(effect, kind):
        return None, None
    turn.end_effect(effect_id)
    assert isinstance(effect, InitiateAdd | InitiateRelease | FenceHost)
    return turn.state.attachment(effect.tag, effect.host), turn.state.capacities.get(effect.tag)


def add_started(turn: Turn, event: AddStarted) -> None:
    """The host is being offered the extents."""
    record, _ = _concluded(turn, event.effect_id, InitiateAdd)
    if record is not None and turn.move(record, Happening.STARTED) is not None:
        turn.note("capacity.offered", record.tag, host=record.host)


def add_failed(turn: Turn, event: AddFailed) -> None:
    """Nothing was offered."""
    record, _ = _concluded(turn, event.effect_id, InitiateAdd)
    if record is None:
        return
    reason = f"the appliance refused to offer it ({code_name(event.code)})"
    if record.state in attachments.LEAVING:
        nothing = not record.held
        turn.move(
            record,
            Happening.ADD_FAILED,
            gone=record.gone or nothing,
            proved=record.proved or nothing,
        )
    elif turn.move(record, Happening.ADD_FAILED, reason=reason) is not None:
        turn.note("capacity.refused", record.tag, host=record.host, reason=reason)
    if event.code in DOUBTFUL_CODES:
        turn.doubt(record.appliance, reason)


def code_name(code: int) -> str:
    """A CXL return code as people read it, its number beside it."""
    try:
        return f"{Code(code).name.lower().replace('_', ' ')}, code {code:#04x}"
    except ValueError:
        return f"code {code:#04x}"


def release_started(turn: Turn, event: ReleaseStarted) -> None:
    """Forced: the host no longer has the extents. They are clean only when type 5 says so."""
    record, _ = _concluded(turn, event.effect_id, InitiateRelease)
    if record is not None and event.forced:
        turn.move(record, Happening.RETURNED, gone=True, rung_deadline_ns=0)


def release_failed(turn: Turn, event: ReleaseFailed) -> None:
    """A forced release was refused; it is tried again at the rung's deadline."""
    record, _ = _concluded(turn, event.effect_id, InitiateRelease)
    if record is None:
        return
    reason = f"the appliance refused the forced release ({code_name(event.code)})"
    _try_again(turn, record, reason, "force")
    turn.doubt(record.appliance, reason)


def fence_ended(turn: Turn, event: FenceEnded) -> None:
    """The host can no longer touch the extents, or some process there still does."""
    record, capacity = _concluded(turn, event.effect_id, FenceHost)
    if record is None or capacity is None or record.state not in attachments.LEAVING:
        return
    if event.code:
        reason = f"not fenced ({code_name(event.code)}): something on the host still has it"
        _try_again(turn, record, reason, "fence")
        return
    turn.note("capacity.fenced", record.tag, host=record.host)
    plan = record.release or ReleasePlan()
    fenced = replace(record, fenced=True, reason="")
    if fenced.gone:
        turn.put_attachment(replace(fenced, rung_deadline_ns=0))
    elif plan.up_to == "force":
        force(turn, fenced, capacity)
    else:
        reason = "fenced; it stays in the host's list, because force was not allowed"
        turn.put_attachment(replace(fenced, rung_deadline_ns=0, reason=reason))


def _try_again(turn: Turn, record: AttachmentRecord, reason: str, rung: str) -> None:
    if record.state in attachments.LEAVING:
        deadline = turn.now + ladder.deadline_ns(record.release or ReleasePlan(), rung)
        turn.put_attachment(replace(record, reason=reason, rung_deadline_ns=deadline))


def force(turn: Turn, record: AttachmentRecord, capacity: CapacityRecord) -> None:
    """The last rung: have the appliance take the extents from a fenced host."""
    deadline = turn.now + ladder.deadline_ns(record.release or ReleasePlan(), "force")
    moved = turn.move(record, Happening.FORCE, rung="force", rung_deadline_ns=deadline)
    if moved is None or turn.state.effect_for(InitiateRelease, record.tag, record.host):
        return
    turn.add_effect(
        InitiateRelease(
            turn.state.new_effect_id(),
            record.appliance,
            record.host,
            record.ld,
            record.region,
            record.tag,
            capacity.tagged,
            capacity.extents,
            forced=True,
        )
    )
    turn.note("capacity.rung", record.tag, host=record.host, rung="force")


def reference_set(turn: Turn, event: ReferenceSet) -> None:
    """The fabric manager holds a reference, or there is none; without one the lists have to tell
    what became of the media.
    """
    if turn.end_effect(event.effect_id) is None:
        return
    capacity = turn.state.capacities.get(event.tag)
    if capacity is None:
        return
    turn.touch(event.tag)
    if not event.wanted:
        turn.read_appliance(capacity.appliance)
    elif event.code == 0:
        turn.put_capacity(replace(capacity, reference=Reference.HELD))
    else:
        turn.put_capacity(replace(capacity, reference=Reference.NONE))
        reason = f"the appliance holds no reference for us ({code_name(event.code)})"
        moves.not_secured(turn, event.tag, reason)
        turn.read_appliance(capacity.appliance)


def effect_unknown(turn: Turn, event: EffectUnknown) -> None:
    """No answer: nothing may be concluded. The effect stays in the outbox."""
    effect = turn.state.outbox.get(event.effect_id)
    if not isinstance(effect, InitiateAdd | InitiateRelease | FenceHost | SetReference):
        return
    record = turn.state.attachment(effect.tag, effect.host)
    if record is not None and isinstance(effect, InitiateAdd):
        turn.move(record, Happening.NO_ANSWER)
    turn.doubt(effect.appliance, "no answer came to a command")


# ---- what hosts took and gave back


def _find(
    turn: Turn, appliance: str, ld: int, tag: str, first: Extent | None, region: int | None
) -> tuple[AttachmentRecord | None, CapacityRecord | None]:
    """The attachment that a record of the device's log is about."""
    state = turn.state
    host = state.ld_hosts.get((appliance, ld))
    if host is None:
        return None, None
    if tag != NIL_TAG:
        capacity = state.capacities.get(tag)
        if capacity is None or capacity.appliance != appliance or not capacity.tagged:
            return None, None
        return state.attachment(tag, host), capacity
    for capacity in state.owner_of(appliance, first, region) if first else ():
        record = state.attachment(capacity.tag, host)
        if not capacity.tagged and record is not None:
            return record, capacity
    return None, None


def host_answered(turn: Turn, event: HostAnswered) -> None:
    """What a host accepted of an offer: all, nothing, or an unusable part."""
    if event.appliance not in turn.state.appliances:
        return
    record, capacity = _find(turn, event.appliance, event.ld, event.tag, event.first, event.region)
    if record is None or capacity is None:
        _strange(turn, event.appliance, event.ld, event.tag, "an answer to an offer not made here")
        return
    # The answer shows that the add took effect, whether or not its own answer has come.
    turn.end_effect(turn.state.effect_for(InitiateAdd, record.tag, record.host))
    if not event.accepted:
        _declined(turn, record)
    elif normal(event.accepted) == normal(capacity.extents):
        accepted(turn, record, capacity, Happening.ACCEPTED)
    else:
        took_part(turn, record, event.accepted)


def _declined(turn: Turn, record: AttachmentRecord) -> None:
    _read_if_last(turn, record)
    if record.state in attachments.LEAVING:
        turn.move(record, Happening.DECLINED, gone=True, proved=True)
        return
    reason = record.reason or "the host refused the offer"
    if turn.move(record, Happening.DECLINED, reason=reason, ready=False) is not None:
        turn.note("capacity.refused", record.tag, host=record.host, reason=reason)


def _read_if_last(turn: Turn, record: AttachmentRecord) -> None:
    """Of shared capacity the last to go may be one that refuses it: those before it were told to
    have returned it, and yet the appliance wipes the media only now. The lists tell when.
    """
    capacity = turn.state.capacities[record.tag]
    if capacity.sharing is Sharing.NONE:
        return
    others = [r for r in turn.state.attachments[record.tag].values() if r is not record]
    last = all(r.state in attachments.OVER or r.gone for r in others)
    if others and last and capacity.reference is Reference.NONE:
        turn.put_capacity(replace(capacity, reference=Reference.DROPPING))
        turn.read_appliance(capacity.appliance)


def accepted(
    turn: Turn, record: AttachmentRecord, capacity: CapacityRecord, happening: Happening
) -> None:
    """The host holds all of it; if nobody wants that any more it is to give it back."""
    held = capacity.extents
    if record.state in attachments.LEAVING:
        turn.move(record, happening, held=held, gone=False)
    elif record.state in attachments.OVER:
        turn.begin_release(
            record,
            happening,
            record.release or ReleasePlan(),
            held=held,
            gone=False,
            proved=False,
            fenced=False,
        )
    else:
        before = record.state
        if turn.move(record, happening, held=held, reason="") is None:
            return
        if before is not AttachmentState.ATTACHED:
            turn.note("capacity.attached", record.tag, host=record.host)
            if record.ready:
                turn.note("capacity.ready", record.tag, host=record.host, dax_path=record.dax_path)


def took_part(turn: Turn, record: AttachmentRecord, part: tuple[Extent, ...]) -> None:
    """The host took some extents only: they are of no use to anybody, so it is to give them
    back.
    """
    if record.state in attachments.LEAVING:
        turn.move(record, Happening.TOOK_PART, held=part, gone=False)
        return
    moved = turn.begin_release(
        record, Happening.TOOK_PART, ReleasePlan(), held=part, gone=False, reason=PARTIAL
    )
    if moved is not None:
        turn.note("capacity.refused", record.tag, host=record.host, reason=PARTIAL)


def capacity_returned(turn: Turn, event: CapacityReturned) -> None:
    """Extents came back; from the last holder only after they were sanitised."""
    if event.appliance not in turn.state.appliances:
        return
    first = event.extents[0] if event.extents else None
    record, capacity = _find(turn, event.appliance, event.ld, event.tag, first, event.region)
    if capacity is not None and capacity.reference is Reference.DROPPING:
        # Given up before or after this host let go: the lists tell whether the media are clean.
        turn.read_appliance(capacity.appliance)
        if record is None or record.state in attachments.OVER:
            return
    if record is None or capacity is None:
        _strange(turn, event.appliance, event.ld, event.tag, "a return of what was not lent here")
        return
    returned = normal(event.extents)
    if not covers(normal(capacity.extents), returned):
        _strange(turn, event.appliance, event.ld, event.tag, "a return of other extents")
        return
    rest = subtract(normal(record.held), returned)
    gone(turn, record, rest)


def gone(turn: Turn, record: AttachmentRecord, rest: tuple[Extent, ...]) -> None:
    """The host no longer has what is not in `rest`; without a wish for that, it is a fault that
    people see.
    """
    if record.state in attachments.WANTED and record.state is not AttachmentState.ATTACHED:
        # An offer that was taken back before its answer: nothing else will be heard of it.
        turn.read_appliance(record.appliance)
        return
    if rest:
        turn.move(record, Happening.RETURNED, held=rest)
        if record.state is AttachmentState.ATTACHED:
            turn.note("capacity.lost", record.tag, host=record.host, reason=UNASKED)
        return
    if record.state is AttachmentState.ATTACHED:
        moved = turn.begin_release(
            record, Happening.RETURNED, ReleasePlan(), held=(), gone=True, reason=UNASKED
        )
        if moved is not None:
            turn.note("capacity.lost", record.tag, host=record.host, reason=UNASKED)
        return
    waiting = not (record.proved or record.fenced)
    reason = "given back, but the host has not proved that nothing uses it" if waiting else ""
    turn.move(record, Happening.RETURNED, held=(), gone=True, reason=reason)


def _strange(turn: Turn, appliance: str, ld: int, tag: str, reason: str) -> None:
    turn.note("appliance.unexpected", appliance, ld=ld, tag=tag, reason=reason)
    turn.read_appliance(ApplianceId(appliance))
