"""How a capacity goes from one host to others with its contents: hand-over, publication, and the
reference that keeps the bytes meanwhile.

A move is one durable intent in the capacity's record. It is advanced after each event that touches
the capacity, by what is then so; so it needs no memory of its own, and a restart goes on with it.

    hand-over    securing, offering, ending, surfacing     the next host accepts before the last
                                                           lets go
    publish      securing, ending, offering                nobody reads before the writer's access
                                                           has ended and was proved ended

*Securing* is the fabric manager's reference (5606h). From there on no host that dies, refuses or
lets go takes the bytes with it. A move that fails before *ending* leaves everything as it was. One
that fails later leaves the bytes: on whoever has them, or retained, when nobody does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.domain import attachment as attachments
from tagmem.domain.attachment import Happening
from tagmem.domain.effects import SetReference
from tagmem.domain.records import (
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    Move,
    MoveKind,
    MoveStep,
    Reference,
    Sharing,
)
from tagmem.domain.state import State

if TYPE_CHECKING:
    from tagmem.domain.turn import Turn

GIVEN_UP = "the capacity is on its way back to the pool"


def exclusive(capacity: CapacityRecord) -> bool:
    """Whether a writer must have let go before the next one may write.

    Only the hardware keeps two writers' caches apart; what is published has no writer.
    """
    if capacity.sharing is Sharing.READ_ONLY:
        return not capacity.published
    return capacity.sharing is Sharing.SOFTWARE_COHERENT


def held_back(capacity: CapacityRecord, host: str) -> bool:
    """Whether a host accepts the capacity and must not surface it yet, as another still writes."""
    move = capacity.moving
    return (
        move is not None
        and move.kind is MoveKind.HAND_OVER
        and host in move.targets
        and move.step is not MoveStep.SURFACING
        and exclusive(capacity)
    )


def read_only_region(state: State, capacity: CapacityRecord) -> int | None:
    """The region that shows the capacity's media to readers; None when there is none."""
    ours = state.region(capacity.appliance, capacity.region)
    end = max(extent.end for extent in capacity.extents)
    for region in state.appliances[capacity.appliance].regions:
        shows = region.pool == ours.pool and region.size_bytes >= end
        if shows and region.read_only and region.sharable:
            return region.index
    return None


def plan(turn: Turn, capacity: CapacityRecord, host: str) -> None:
    """Plan an attachment in the way that the capacity is shared now: published is read."""
    tag, appliance = capacity.tag, capacity.appliance
    present = turn.state.attachment(tag, host)
    if present is not None:
        turn.move(present, Happening.PLAN)
    region = read_only_region(turn.state, capacity) if capacity.published else capacity.region
    assert region is not None, "publishing has looked for the region"
    name = HostId(host)
    turn.put_attachment(
        AttachmentRecord(
            tag,
            name,
            appliance,
            turn.state.hosts[host].links[ApplianceId(appliance)],
            region,
            AttachmentState.PLANNED,
            turn.revision(),
            read_only=capacity.published,
        )
    )
    turn.tell(name, tag)


# ---- the reference


def keep_reference(turn: Turn, tag: str) -> None:
    """Ask for the reference, or give it up, as the capacity now calls for."""
    capacity = turn.state.capacities[tag]
    if turn.state.effect_for(SetReference, tag, "") is not None:
        return
    wanted = (capacity.retain or capacity.moving is not None) and not capacity.leaving
    if wanted and capacity.reference is Reference.NONE:
        records = turn.state.attachments.get(tag, {}).values()
        # Before a host has it the device does not know the tag.
        if any(record.state is AttachmentState.ATTACHED for record in records):
            _set_reference(turn, capacity, wanted=True)
    elif not wanted and capacity.reference is Reference.HELD:
        _set_reference(turn, capacity, wanted=False)


def _set_reference(turn: Turn, capacity: CapacityRecord, *, wanted: bool) -> None:
    asked = Reference.SECURING if wanted else Reference.DROPPING
    turn.put_capacity(replace(capacity, reference=asked))
    effect_id = turn.state.new_effect_id()
    turn.add_effect(SetReference(effect_id, capacity.appliance, capacity.tag, wanted))


def not_secured(turn: Turn, tag: str, reason: str) -> None:
    """There will be no reference: what needed it ends, and is said to have."""
    capacity = turn.state.capacities[tag]
    if capacity.retain:
        capacity = replace(capacity, retain=False)
        turn.note("capacity.not_retained", tag, reason=reason)
    turn.put_capacity(capacity)
    move = capacity.moving
    if move is not None:
        _fail(turn, tag, move, reason)


# ---- the steps


def advance(turn: Turn, tag: str) -> None:
    """Take the move under way as far as it goes now."""
    while True:
        capacity = turn.state.capacities[tag]
        move = capacity.moving
        if move is None:
            return
        if capacity.leaving:
            _fail(turn, tag, move, GIVEN_UP)
        elif move.step is MoveStep.SECURING:
            _secured(turn, capacity, move)
        elif move.kind is MoveKind.HAND_OVER:
            _hand_over(turn, capacity, move)
        else:
            _publish(turn, capacity, move)
        after = turn.state.capacities[tag].move
        if after is None or after.step is move.step:
            return


def _secured(turn: Turn, capacity: CapacityRecord, move: Move) -> None:
    if capacity.reference is not Reference.HELD:
        records = turn.state.attachments.get(capacity.tag, {}).values()
        having = [r.host for r in records if r.state in attachments.WANTED]
        if move.source not in having if move.source else not having:
            _fail(turn, capacity.tag, move, f"{move.source or 'its last host'} has lost it")
        return
    if move.kind is MoveKind.PUBLISH:
        _to(turn, capacity, move, MoveStep.ENDING)
        _end(turn, capacity.tag, move)
        return
    target = move.targets[0]
    present = turn.state.attachment(capacity.tag, target)
    if present is not None and present.state not in attachments.OVER:
        _fail(turn, capacity.tag, move, f"{target} is {present.state.value} by now")
        return
    _to(turn, capacity, move, MoveStep.OFFERING)
    plan(turn, capacity, target)


def _hand_over(turn: Turn, capacity: CapacityRecord, move: Move) -> None:
    tag = capacity.tag
    target = turn.state.attachment(tag, move.targets[0])
    source = turn.state.attachment(tag, move.source)
    if move.step is MoveStep.OFFERING:
        if target is None or target.state not in attachments.WANTED:
            _fail(turn, tag, move, _refusal(move.targets[0], target))
        elif target.state is AttachmentState.ATTACHED and (target.ready or exclusive(capacity)):
            _to(turn, capacity, move, MoveStep.ENDING)
            _end(turn, tag, move)
    elif move.step is MoveStep.ENDING:
        if source is None or source.state in attachments.OVER:
            _to(turn, capacity, move, MoveStep.SURFACING)
            _tell_targets(turn, tag, move)
    elif target is None or target.state not in attachments.WANTED:
        _fail(turn, tag, move, _refusal(move.targets[0], target))
    elif target.state is AttachmentState.ATTACHED and target.ready:
        _finish(turn, tag, replace(move, step=MoveStep.DONE))


def _publish(turn: Turn, capacity: CapacityRecord, move: Move) -> None:
    tag = capacity.tag
    if move.step is MoveStep.ENDING:
        source = turn.state.attachment(tag, move.source)
        if source is not None and source.state not in attachments.OVER:
            return
        _to(turn, replace(capacity, published=True), move, MoveStep.OFFERING)
        if not capacity.published:
            turn.note("capacity.published", tag, hosts=list(move.targets))
        for host in move.targets:
            present = turn.state.attachment(tag, host)
            if present is None or present.state in attachments.OVER:
                plan(turn, turn.state.capacities[tag], host)
        return
    records = [(host, turn.state.attachment(tag, host)) for host in move.targets]
    if any(_waits(record) for _, record in records):
        return
    refused = [
        _refusal(host, record)
        for host, record in records
        if record is None or record.state is not AttachmentState.ATTACHED
    ]
    _finish(turn, tag, replace(move, step=MoveStep.DONE, reason="; ".join(refused)))


def _waits(record: AttachmentRecord | None) -> bool:
    """Whether a reader may still come to read."""
    if record is None or record.state not in attachments.WANTED:
        return False
    return record.state is not AttachmentState.ATTACHED or not record.ready


def _refusal(host: str, record: AttachmentRecord | None) -> str:
    if record is not None and record.state is AttachmentState.REFUSED:
        return f"{host} refused it: {record.reason or 'it gave no reason'}"
    if record is not None and record.reason:
        return f"{host} does not have it: {record.reason}"
    return f"{host} was asked to give it back"


def _end(turn: Turn, tag: str, move: Move) -> None:
    """Have the source let go, from the mildest rung."""
    source = turn.state.attachment(tag, move.source)
    if source is not None and source.state in attachments.WANTED:
        turn.begin_release(source, Happening.RELEASE, move.plan)


def _tell_targets(turn: Turn, tag: str, move: Move) -> None:
    """What was held back of a target is so no longer; a new revision makes it do it."""
    for host in move.targets:
        record = turn.state.attachment(tag, host)
        if record is not None and record.state in attachments.WANTED:
            turn.put_attachment(replace(record, revision=turn.revision()))
            turn.tell(record.host, record.tag)


def _to(turn: Turn, capacity: CapacityRecord, move: Move, step: MoveStep) -> None:
    turn.put_capacity(replace(capacity, move=replace(move, step=step)))
    turn.note("capacity.moving", capacity.tag, **_shown(move), step=step.value)


def _shown(move: Move) -> dict[str, object]:
    """How events name a move."""
    return {"move": move.kind.value, "source": move.source, "targets": list(move.targets)}


def _fail(turn: Turn, tag: str, move: Move, reason: str) -> None:
    _finish(turn, tag, replace(move, step=MoveStep.FAILED, reason=reason))


def _finish(turn: Turn, tag: str, move: Move) -> None:
    """End the move; bytes that nobody has are kept rather than lost."""
    capacity = turn.state.capacities[tag]
    records = turn.state.attachments.get(tag, {}).values()
    had = any(record.state is AttachmentState.ATTACHED for record in records)
    retain = capacity.retain
    may_stay = capacity.reference in (Reference.HELD, Reference.SECURING)
    if not had and not retain and not capacity.leaving and may_stay:
        retain = True
        turn.note("capacity.retained", tag, reason="no host has it; its bytes are kept")
    ended = replace(move, ended_ns=turn.now)
    turn.put_capacity(replace(capacity, move=ended, retain=retain))
    _tell_targets(turn, tag, ended)
    failed = ended.step is MoveStep.FAILED
    verb = "capacity.move_failed" if failed else "capacity.moved"
    turn.note(verb, tag, **_shown(ended), reason=ended.reason)


def forget(turn: Turn, tag: Tag) -> None:
    """End the reference's effect with its capacity."""
    turn.end_effect(turn.state.effect_for(SetReference, tag, ""))
