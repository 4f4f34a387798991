"""What people ask of shared capacity beyond attach and release: hand over, publish, retain.

As in `requests`: each is answered with one Outcome, lowest number first; a refusal changes nothing,
and a repeat is answered ALREADY_SO. The steps that follow are those of `moves`.
"""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.base.ids import HostId
from tagmem.base.limits import HOSTS_PER_APPLIANCE_MAX
from tagmem.domain import attachment as attachments
from tagmem.domain import ladder, moves
from tagmem.domain.effects import HandOver, PublishCapacity, RetainCapacity
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import (
    AttachmentState,
    CapacityRecord,
    CapacityState,
    Move,
    MoveKind,
    MoveStep,
    Reference,
    ReleasePlan,
    Sharing,
)
from tagmem.domain.requests import (
    answer_again,
    climb,
    problem,
    refusal,
    remember,
    unknown_host,
    unknown_tag,
    unmatched,
    wrong_key,
    wrong_plan,
)
from tagmem.domain.state import State
from tagmem.domain.turn import Turn


def hand_over(turn: Turn, event: HandOver) -> Reply:
    """Begin to hand a capacity over; it goes on through `moves.advance`."""
    state = turn.state
    wrong = wrong_plan(event.up_to, event.deadlines_ns) or wrong_key(event.idempotency_key)
    if wrong is not None:
        return wrong
    if event.source == event.target:
        limit = f"another host than {event.source}"
        return problem(Outcome.FIELD_OUT_OF_RANGE, "to", limit, event.target, event.tag)
    digest = f"hand-over|{event.tag}|{event.source}|{event.target}"
    known = answer_again(state, event.idempotency_key, digest)
    if known is not None:
        return known
    found = _capacity(state, event.tag, (event.source, event.target))
    if isinstance(found, Reply):
        return found
    plan = ReleasePlan(event.up_to, dict(event.deadlines_ns))
    if _same(found, MoveKind.HAND_OVER, event.source, (event.target,)):
        return _again(turn, found, plan, event.if_match)
    if _handed_over(state, found, event):
        return Reply(Outcome.ALREADY_SO, found.tag)
    refused = (
        _cannot_reach(state, found, event.target)
        or _cannot_hand_over(state, found, event)
        or unmatched(found, event.if_match)
    )
    if refused is not None:
        return refused
    _begin(turn, found, MoveKind.HAND_OVER, event.source, (HostId(event.target),), plan)
    reply = Reply(Outcome.ACCEPTED, found.tag)
    remember(turn, event.idempotency_key, digest, reply)
    return reply


def _capacity(state: State, tag: str, hosts: tuple[str, ...]) -> CapacityRecord | Reply:
    for host in hosts:
        if host not in state.hosts:
            return unknown_host(host[:80])
    return state.capacities.get(tag) or unknown_tag(tag)


def _cannot_reach(state: State, capacity: CapacityRecord, host: str) -> Reply | None:
    if capacity.appliance in state.reachable((host,)):
        return None
    limit = f"a host that reaches {capacity.appliance}"
    return problem(Outcome.HOST_CANNOT_REACH_APPLIANCE, "to", limit, host, capacity.tag)


def _same(
    capacity: CapacityRecord, kind: MoveKind, source: str | None, targets: tuple[str, ...]
) -> bool:
    """Whether just this move is under way (`source` None: whoever its source is)."""
    move = capacity.moving
    return (
        move is not None
        and move.kind is kind
        and source in (None, move.source)
        and set(targets) <= set(move.targets)
    )


def _again(turn: Turn, capacity: CapacityRecord, plan: ReleasePlan, if_match: int | None) -> Reply:
    """The move that is under way was asked for again: its release may climb higher now."""
    move = capacity.moving
    if move is None or ladder.rank(plan.up_to) <= ladder.rank(move.plan.up_to):
        return Reply(Outcome.ALREADY_SO, capacity.tag)
    refused = unmatched(capacity, if_match)
    if refused is not None:
        return refused
    higher = replace(plan, deadlines_ns={**move.plan.deadlines_ns, **plan.deadlines_ns})
    turn.put_capacity(replace(capacity, move=replace(move, plan=higher)))
    source = turn.state.attachment(capacity.tag, move.source)
    if source is not None and source.state in attachments.LEAVING:
        climb(turn, source, higher)
    turn.settle_now(capacity.tag)
    return Reply(Outcome.ACCEPTED, capacity.tag)


def _handed_over(state: State, capacity: CapacityRecord, event: HandOver) -> bool:
    """Whether just this was the last move, and still is so."""
    move = capacity.move
    if move is None or move.kind is not MoveKind.HAND_OVER or move.step is not MoveStep.DONE:
        return False
    source = state.attachment(capacity.tag, event.source)
    target = state.attachment(capacity.tag, event.target)
    over = source is None or source.state in attachments.OVER
    there = target is not None and target.state in attachments.WANTED
    return (move.source, *move.targets) == (event.source, event.target) and over and there


def _unsettled(capacity: CapacityRecord) -> Reply | None:
    """Why nothing can begin on a capacity as it is."""
    tag = capacity.tag
    if capacity.leaving:
        return refusal(Outcome.TAG_IS_BEING_RELEASED, tag, moves.GIVEN_UP)
    if capacity.sharing is Sharing.NONE:
        detail = "it is not shared: only media that two hosts may have at once can change hands"
        return refusal(Outcome.TAG_IS_NOT_SHARABLE, tag, detail)
    if capacity.state is CapacityState.QUARANTINED:
        return refusal(Outcome.TAG_IS_QUARANTINED, tag, capacity.fault)
    move = capacity.moving
    if move is not None:
        detail = f"a {move.kind.value} to {', '.join(move.targets)} is {move.step.value}"
        return refusal(Outcome.TAG_IS_MOVING, tag, detail)
    return None


def _cannot_hand_over(state: State, capacity: CapacityRecord, event: HandOver) -> Reply | None:
    tag = capacity.tag
    source = state.attachment(tag, event.source)
    if source is None or source.state in attachments.OVER:
        limit = "a host that holds the tag"
        return problem(Outcome.HOST_DOES_NOT_HOLD_TAG, "from", limit, event.source, tag)
    unsettled = _unsettled(capacity)
    if unsettled is not None and unsettled.outcome is not Outcome.TAG_IS_MOVING:
        return unsettled
    if source.state is not AttachmentState.ATTACHED:
        detail = f"on {source.host} it is {source.state.value}"
        return refusal(Outcome.TAG_IS_NOT_ATTACHED, tag, detail)
    target = state.attachment(tag, event.target)
    if target is not None and (target.state not in attachments.OVER or target.held):
        detail = f"{target.host} is still giving it back"
        if target.state is AttachmentState.ATTACHED:
            detail = f"{target.host} has it already: release it on {source.host}"
        elif target.state in attachments.WANTED:
            detail = f"on {target.host} it is {target.state.value} already"
        return refusal(Outcome.TAG_IS_STILL_HELD, tag, detail)
    return unsettled


def _begin(
    turn: Turn,
    capacity: CapacityRecord,
    kind: MoveKind,
    source: str,
    targets: tuple[HostId, ...],
    plan: ReleasePlan,
) -> None:
    move = Move(kind, source, targets, MoveStep.SECURING, plan, turn.now)
    turn.put_capacity(replace(capacity, move=move))
    turn.note(
        "capacity.moving",
        capacity.tag,
        move=kind.value,
        source=source,
        targets=list(targets),
        step=move.step.value,
    )
    turn.settle_now(capacity.tag)


# ---- publish


def publish(turn: Turn, event: PublishCapacity) -> Reply:
    """Begin to publish; of what is published already, let more hosts read."""
    state = turn.state
    wrong = (
        wrong_plan(event.up_to, event.deadlines_ns)
        or wrong_key(event.idempotency_key)
        or _wrong_hosts(event)
    )
    if wrong is not None:
        return wrong
    digest = f"publish|{event.tag}|{','.join(event.hosts)}"
    known = answer_again(state, event.idempotency_key, digest)
    if known is not None:
        return known
    found = _capacity(state, event.tag, event.hosts)
    if isinstance(found, Reply):
        return found
    plan = ReleasePlan(event.up_to, dict(event.deadlines_ns))
    if _same(found, MoveKind.PUBLISH, None, event.hosts):
        return _again(turn, found, plan, event.if_match)
    if _all_read(state, found, event.hosts):
        return Reply(Outcome.ALREADY_SO, found.tag)
    for host in event.hosts:
        refused = _cannot_reach(state, found, host)
        if refused is not None:
            return refused
    refused = _cannot_publish(state, found, event.hosts) or unmatched(found, event.if_match)
    if refused is not None:
        return refused
    source = "" if found.published else _writer(state, found)
    hosts = dict.fromkeys((source, *event.hosts) if source else event.hosts)
    targets = tuple(HostId(host) for host in hosts)
    _begin(turn, found, MoveKind.PUBLISH, source, targets, plan)
    reply = Reply(Outcome.ACCEPTED, found.tag)
    remember(turn, event.idempotency_key, digest, reply)
    return reply


def _wrong_hosts(event: PublishCapacity) -> Reply | None:
    out = Outcome.FIELD_OUT_OF_RANGE
    if not 0 < len(event.hosts) <= HOSTS_PER_APPLIANCE_MAX:
        limit = f"1 to {HOSTS_PER_APPLIANCE_MAX} hosts"
        return problem(out, "to", limit, len(event.hosts))
    if len(set(event.hosts)) != len(event.hosts):
        return problem(out, "to", "named once each", ",".join(event.hosts)[:80])
    return None


def _writer(state: State, capacity: CapacityRecord) -> str:
    """Who has it; empty for nobody."""
    for record in state.attachments.get(capacity.tag, {}).values():
        if record.state not in attachments.OVER:
            return record.host
    return ""


def _all_read(state: State, capacity: CapacityRecord, hosts: tuple[str, ...]) -> bool:
    if not capacity.published or capacity.leaving:
        return False
    records = [state.attachment(capacity.tag, host) for host in hosts]
    return all(record is not None and record.state in attachments.WANTED for record in records)


def _cannot_publish(state: State, capacity: CapacityRecord, hosts: tuple[str, ...]) -> Reply | None:
    tag = capacity.tag
    unsettled = _unsettled(capacity)
    if unsettled is not None:
        return unsettled
    if capacity.sharing is not Sharing.READ_ONLY:
        detail = f"only read-only capacity is published, and this is {capacity.sharing.value}"
        return refusal(Outcome.TAG_IS_NOT_SHARABLE, tag, detail)
    if moves.read_only_region(state, capacity) is None:
        detail = "no read-only region shows its media"
        return refusal(Outcome.TAG_IS_NOT_SHARABLE, tag, detail)
    for host in hosts:
        record = state.attachment(tag, host)
        if record is not None and record.state in attachments.LEAVING:
            return refusal(Outcome.TAG_IS_STILL_HELD, tag, f"{host} is still giving it back")
    writer = state.attachment(tag, _writer(state, capacity))
    loaded = capacity.reference is Reference.HELD or capacity.published
    if writer is None and not loaded:
        return refusal(Outcome.TAG_IS_NOT_ATTACHED, tag, "no host has loaded it")
    if capacity.published or writer is None:
        return None
    if writer.state is not AttachmentState.ATTACHED:
        detail = f"on {writer.host} it is {writer.state.value}"
        return refusal(Outcome.TAG_IS_NOT_ATTACHED, tag, detail)
    return None


# ---- retain


def retain(turn: Turn, event: RetainCapacity) -> Reply:
    """Have a shared capacity outlive its last host, or no longer.

    Taken back where no host has it, its media are wiped and it stays reserved.
    """
    capacity = turn.state.capacities.get(event.tag)
    if capacity is None:
        return unknown_tag(event.tag)
    if capacity.leaving:
        return refusal(Outcome.TAG_IS_BEING_RELEASED, capacity.tag, moves.GIVEN_UP)
    if capacity.sharing is Sharing.NONE:
        detail = "only shared capacity can outlive its host"
        return refusal(Outcome.TAG_IS_NOT_SHARABLE, capacity.tag, detail)
    refused = unmatched(capacity, event.if_match)
    if refused is not None:
        return refused
    if capacity.retain is event.retain:
        return Reply(Outcome.ALREADY_SO, capacity.tag)
    turn.put_capacity(replace(capacity, retain=event.retain))
    name = "capacity.retained" if event.retain else "capacity.not_retained"
    turn.note(name, capacity.tag, reason="asked for")
    turn.touch(capacity.tag)
    turn.settle_now(capacity.tag)
    return Reply(Outcome.ACCEPTED, capacity.tag)
