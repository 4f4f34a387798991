"""What people ask of capacities: create, attach, release; each answered with one Outcome, lowest
number first.

A request that is refused changes nothing. A request repeated with the same parameters is answered
ALREADY_SO, so that a client that lost an answer may simply ask again.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from tagmem.base.ids import NIL_TAG, HostId, Tag
from tagmem.base.limits import HOSTS_PER_APPLIANCE_MAX, REGIONS_MAX
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.domain import attachment as attachments
from tagmem.domain import ladder, moves, placement
from tagmem.domain.attachment import Happening
from tagmem.domain.effects import AttachCapacity, CreateCapacity, InitiateAdd, ReleaseCapacity
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.placement import Choice, Explanation, Request
from tagmem.domain.records import (
    RUNGS,
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    CapacityState,
    IdempotencyRecord,
    ReleasePlan,
    Sharing,
)
from tagmem.domain.state import State
from tagmem.domain.turn import Turn

SIZE_BYTES_MAX = 1 << 60
OWNER_LENGTH_MAX = 256
KEY_LENGTH_MAX = 255
IDEMPOTENCY_KEPT_MAX = 10_000
IDEMPOTENCY_AGE_NS = 86_400 * SECOND

_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def problem(outcome: Outcome, field: str, limit: str, value: object, subject: str = "") -> Reply:
    """A refusal that names the field, its limit and the value."""
    detail = f"{field} must be {limit}, got {value}"
    return Reply(outcome, subject, detail, field, limit, str(value))


def refusal(outcome: Outcome, subject: str, detail: str) -> Reply:
    """A refusal for what is the case rather than for a field."""
    return Reply(outcome, subject, detail)


# ---- create


def digest_of(event: CreateCapacity) -> str:
    """The parameters of a creating request, where the border has not given a digest of them."""
    return "|".join(
        (
            str(event.size_bytes),
            ",".join(event.hosts),
            "tagged" if event.tagged else "untagged",
            event.sharing.value,
            event.owner,
            event.appliance,
            str(event.region),
            "contiguous" if event.contiguous else "scattered",
            *(("retained",) if event.retain else ()),
        )
    )


def create(turn: Turn, event: CreateCapacity) -> Reply:
    """Set extents aside under a tag, and have them offered to the hosts."""
    state = turn.state
    digest = event.digest or digest_of(event)
    known = answer_again(state, event.idempotency_key, digest)
    if known is not None:
        return known
    existing = state.capacities.get(event.tag)
    if existing is not None and existing.request_digest == digest and not existing.leaving:
        return Reply(Outcome.ALREADY_SO, event.tag)
    wrong = _wrong_fields(event) or _wrong_names(state, event.hosts, event.appliance)
    if wrong is not None:
        return wrong
    if existing is not None:
        return _existing(existing, digest)
    if event.tag in state.quarantined_tags:
        detail = "an appliance lists this tag, and not from here; see the quarantine"
        return refusal(Outcome.TAG_IS_QUARANTINED, event.tag, detail)
    request = request_of(event)
    choice = placement.place(
        state.tiers(request), event.size_bytes, contiguous=event.contiguous, index=state.lengths
    )
    if choice is None:
        return replace(explain(state, request).reply, subject=event.tag)
    _create(turn, event, digest, choice)
    reply = Reply(Outcome.CREATED, event.tag)
    remember(turn, event.idempotency_key, digest, reply)
    return reply


def request_of(event: CreateCapacity) -> Request:
    """What a creating request asks of placement."""
    return Request(
        event.size_bytes,
        event.hosts,
        event.tagged,
        event.sharing,
        event.appliance,
        event.region,
        event.contiguous,
    )


def explain(state: State, request: Request) -> Explanation:
    """Where a request would go now, and why; changes nothing."""
    wrong = _wrong_size(request.size_bytes) or _wrong_names(state, request.hosts, request.appliance)
    if wrong is not None:
        return Explanation(wrong, None, ())
    choice = placement.place(
        state.tiers(request), request.size_bytes, contiguous=request.contiguous, index=state.lengths
    )
    reach = state.reachable(request.hosts)
    candidates = placement.examine(state.windows(), request, reach, choice)
    if choice is not None:
        return Explanation(Reply(Outcome.OK), choice, candidates)
    return Explanation(placement.failure(candidates, request, reach), None, candidates)


def _create(turn: Turn, event: CreateCapacity, digest: str, choice: Choice) -> None:
    window, extents = choice
    tag = Tag(event.tag)
    hosts = tuple(HostId(host) for host in event.hosts)
    turn.put(
        "capacity",
        tag,
        CapacityRecord(
            tag,
            event.size_bytes,
            event.tagged,
            event.sharing,
            hosts,
            window.appliance,
            window.region.index,
            extents,
            CapacityState.RESERVED,
            turn.revision(),
            owner=event.owner,
            created_ns=turn.now,
            contiguous=event.contiguous,
            request_digest=digest,
            retain=event.retain,
        ),
    )
    for host in hosts:
        moves.plan(turn, turn.state.capacities[tag], host)
    turn.note(
        "capacity.created",
        tag,
        size_bytes=event.size_bytes,
        appliance=window.appliance,
        region=window.region.index,
        hosts=list(hosts),
    )


def answer_again(state: State, key: str, digest: str) -> Reply | None:
    """The answer given under an `Idempotency-Key` before; None for a new key or none."""
    known = state.idempotency.get(key)
    if known is None:
        return None
    if known.digest != digest:
        detail = "this Idempotency-Key came with other parameters before"
        return Reply(Outcome.IDEMPOTENCY_KEY_REUSED, known.subject, detail, "idempotency_key")
    return Reply(Outcome(known.outcome), known.subject)


def remember(turn: Turn, key: str, digest: str, reply: Reply) -> None:
    """Keep the answer to a request that came with an `Idempotency-Key`; the oldest go first."""
    if not key:
        return
    kept = turn.state.idempotency
    while kept:
        oldest = next(iter(kept.values()))
        too_old = oldest.at_ns + IDEMPOTENCY_AGE_NS <= turn.now
        if not too_old and len(kept) < IDEMPOTENCY_KEPT_MAX:
            break
        turn.put("idempotency", oldest.key, None)
    record = IdempotencyRecord(key, digest, int(reply.outcome), reply.subject, turn.now)
    turn.put("idempotency", key, record)


def _existing(existing: CapacityRecord, digest: str) -> Reply:
    if existing.request_digest != digest:
        detail = "this tag exists with other parameters"
        return refusal(Outcome.TAG_EXISTS_WITH_OTHER_PARAMETERS, existing.tag, detail)
    detail = "this tag is on its way back to the pool"
    return refusal(Outcome.TAG_IS_BEING_RELEASED, existing.tag, detail)


def _wrong_size(size_bytes: int) -> Reply | None:
    if size_bytes < 0 or size_bytes > SIZE_BYTES_MAX:
        limit = f"between 1 and {SIZE_BYTES_MAX}"
        return problem(Outcome.FIELD_OUT_OF_RANGE, "size_bytes", limit, size_bytes)
    if size_bytes == 0:
        return problem(Outcome.SIZE_IS_ZERO, "size_bytes", "at least 1", size_bytes)
    return None


def _wrong_fields(event: CreateCapacity) -> Reply | None:
    """What is wrong with the request by itself, in the order of the outcomes' numbers."""
    out = Outcome.FIELD_OUT_OF_RANGE
    size = _wrong_size(event.size_bytes)
    if size is not None and size.outcome is out:
        return size
    if len(event.hosts) > HOSTS_PER_APPLIANCE_MAX:
        return problem(out, "hosts", f"at most {HOSTS_PER_APPLIANCE_MAX}", len(event.hosts))
    if len(set(event.hosts)) != len(event.hosts):
        return problem(out, "hosts", "named once each", ",".join(event.hosts))
    if len(event.hosts) > 1 and event.sharing in (Sharing.NONE, Sharing.READ_ONLY):
        return problem(
            out, "hosts", f"one host with sharing {event.sharing.value}", len(event.hosts)
        )
    if len(event.owner) > OWNER_LENGTH_MAX:
        return problem(out, "owner", f"at most {OWNER_LENGTH_MAX} characters", len(event.owner))
    key = wrong_key(event.idempotency_key)
    if key is not None:
        return key
    if event.region is not None and not 0 <= event.region < REGIONS_MAX:
        return problem(out, "region", f"between 0 and {REGIONS_MAX - 1}", event.region)
    if event.tag == NIL_TAG:
        return problem(Outcome.TAG_IS_NIL, "tag", "a non-nil UUID", event.tag)
    if not _CANONICAL.fullmatch(event.tag):
        limit = "a UUID in canonical form"
        return problem(Outcome.NAME_IS_MALFORMED, "tag", limit, event.tag[:80])
    if size is not None:
        return size
    if event.sharing is not Sharing.NONE and not event.tagged:
        return problem(
            Outcome.SHARING_NEEDS_A_TAG, "sharing", "none without a tag", event.sharing.value
        )
    if event.retain and event.sharing is Sharing.NONE:
        limit = "false without sharing, for only shared media can outlive their host"
        return problem(Outcome.TAG_IS_NOT_SHARABLE, "retain", limit, "true")
    return None


def wrong_key(key: str) -> Reply | None:
    """What is wrong with an `Idempotency-Key`."""
    if len(key) <= KEY_LENGTH_MAX:
        return None
    limit = f"at most {KEY_LENGTH_MAX} characters"
    return problem(Outcome.FIELD_OUT_OF_RANGE, "idempotency_key", limit, len(key))


def _wrong_names(state: State, hosts: tuple[str, ...], appliance: str) -> Reply | None:
    for host in hosts:
        if host not in state.hosts:
            return unknown_host(host)
    if appliance and appliance not in state.appliances:
        limit = "a registered appliance"
        return problem(Outcome.APPLIANCE_IS_UNKNOWN, "appliance", limit, appliance)
    return None


def unknown_host(host: str) -> Reply:
    return problem(Outcome.HOST_IS_UNKNOWN, "host", "a registered host", host)


def unknown_tag(tag: str) -> Reply:
    """There is no such capacity."""
    return problem(Outcome.TAG_IS_UNKNOWN, "tag", "the tag of a capacity", tag[:80], tag[:80])


# ---- attach


def attach(turn: Turn, event: AttachCapacity) -> Reply:
    """Offer a reserved or sharable capacity to one more host."""
    state = turn.state
    if event.host not in state.hosts:
        return unknown_host(event.host)
    capacity = state.capacities.get(event.tag)
    if capacity is None:
        return unknown_tag(event.tag)
    present = state.attachment(event.tag, event.host)
    if present is not None and present.state in attachments.WANTED:
        return Reply(Outcome.ALREADY_SO, event.tag)
    if capacity.appliance not in state.reachable((event.host,)):
        limit = f"a host that reaches {capacity.appliance}"
        return problem(Outcome.HOST_CANNOT_REACH_APPLIANCE, "host", limit, event.host, event.tag)
    wrong = _cannot_attach(state, capacity, present, event.host)
    if wrong is not None:
        return wrong
    moves.plan(turn, capacity, event.host)
    turn.note("capacity.attaching", capacity.tag, host=event.host)
    return Reply(Outcome.ACCEPTED, capacity.tag)


def _cannot_attach(
    state: State, capacity: CapacityRecord, present: AttachmentRecord | None, host: str
) -> Reply | None:
    tag = capacity.tag
    if capacity.leaving:
        return refusal(Outcome.TAG_IS_BEING_RELEASED, tag, "it is on its way back to the pool")
    others = [
        record
        for record in state.attachments.get(tag, {}).values()
        if record.state not in attachments.OVER and record is not present
    ]
    alone = capacity.sharing is Sharing.NONE
    if alone and any(record.state in attachments.WANTED for record in others):
        detail = f"it is not shared, and {others[0].host} has it"
        return refusal(Outcome.TAG_IS_NOT_SHARABLE, tag, detail)
    if capacity.state is CapacityState.QUARANTINED:
        return refusal(Outcome.TAG_IS_QUARANTINED, tag, capacity.fault)
    if present is not None and present.state not in attachments.OVER:
        return refusal(Outcome.TAG_IS_STILL_HELD, tag, "that host is still giving it back")
    if alone and others:
        detail = f"{others[0].host} is still giving it back"
        return refusal(Outcome.TAG_IS_STILL_HELD, tag, detail)
    if (present is not None and present.held) or capacity.state is CapacityState.SANITISING:
        return refusal(Outcome.TAG_IS_STILL_HELD, tag, "its media is being sanitised")
    if state.appliances[capacity.appliance].state is not ApplianceState.READY:
        detail = f"{capacity.appliance}: its own extent lists have to be read first"
        return refusal(Outcome.APPLIANCE_IS_IN_DOUBT, tag, detail)
    move = capacity.moving
    if move is not None and (moves.exclusive(capacity) or host in move.targets):
        detail = f"a {move.kind.value} to {', '.join(move.targets)} is {move.step.value}"
        return refusal(Outcome.TAG_IS_MOVING, tag, detail)
    if others and capacity.sharing is Sharing.READ_ONLY and not capacity.published:
        detail = f"{others[0].host} has it alone until it is published"
        return refusal(Outcome.TAG_IS_NOT_PUBLISHED, tag, detail)
    return None


# ---- release


def release(turn: Turn, event: ReleaseCapacity) -> Reply:
    """Have a host, or all, give a capacity back; from all, it then goes to the pool."""
    state = turn.state
    wrong = wrong_plan(event.up_to, event.deadlines_ns)
    if wrong is not None:
        return wrong
    if event.host and event.host not in state.hosts:
        return unknown_host(event.host)
    capacity = state.capacities.get(event.tag)
    if capacity is None:
        return unknown_tag(event.tag)
    one = state.attachment(event.tag, event.host) if event.host else None
    if event.host and (one is None or one.state is AttachmentState.REFUSED):
        limit = "a host that holds the tag"
        return problem(Outcome.HOST_DOES_NOT_HOLD_TAG, "host", limit, event.host, event.tag)
    changed_since = unmatched(capacity, event.if_match)
    if changed_since is not None:
        return changed_since
    plan = ReleasePlan(event.up_to, dict(event.deadlines_ns))
    records = [one] if one else list(state.attachments.get(event.tag, {}).values())
    changed = False
    for record in records:
        changed |= _release_one(turn, record, plan)
    if not event.host and not capacity.leaving:
        changed = True
        turn.put_capacity(replace(capacity, leaving=True))
        turn.note("capacity.releasing", capacity.tag, up_to=event.up_to)
    if not changed:
        return Reply(Outcome.ALREADY_SO, event.tag)
    turn.settle_now(capacity.tag)
    freed = event.tag not in state.capacities
    return Reply(Outcome.OK if freed else Outcome.ACCEPTED, event.tag)


def _release_one(turn: Turn, record: AttachmentRecord, plan: ReleasePlan) -> bool:
    if record.state in attachments.OVER:
        return False
    if record.state in attachments.WANTED:
        adding = turn.state.effect_for(InitiateAdd, record.tag, record.host) is not None
        never = record.state is AttachmentState.PLANNED and not adding
        return (
            turn.begin_release(record, Happening.RELEASE, plan, gone=never, proved=never)
            is not None
        )
    return climb(turn, record, plan)


def climb(turn: Turn, record: AttachmentRecord, plan: ReleasePlan) -> bool:
    """Let the release that is under way go higher; False where it may already."""
    before = record.release or ReleasePlan()
    if ladder.rank(plan.up_to) <= ladder.rank(before.up_to):
        return False
    deadline = record.rung_deadline_ns or turn.now
    turn.put_attachment(
        replace(
            record,
            release=replace(plan, deadlines_ns={**before.deadlines_ns, **plan.deadlines_ns}),
            revision=turn.revision(),
            rung_deadline_ns=0 if record.proved or (record.fenced and record.gone) else deadline,
        )
    )
    turn.tell(record.host, record.tag)
    return True


def unmatched(capacity: CapacityRecord, if_match: int | None) -> Reply | None:
    """The refusal of a request that was made for another revision."""
    if if_match in (None, capacity.revision):
        return None
    limit = f"the present revision {capacity.revision}"
    return problem(Outcome.REVISION_DOES_NOT_MATCH, "if_match", limit, if_match, capacity.tag)


def wrong_plan(up_to: str, deadlines_ns: dict[str, Nanoseconds]) -> Reply | None:
    """What is wrong with how far a release may go."""
    out = Outcome.FIELD_OUT_OF_RANGE
    if up_to not in RUNGS:
        return problem(out, "up_to", "one of " + ", ".join(RUNGS), up_to[:80])
    for rung, deadline in deadlines_ns.items():
        if rung not in RUNGS:
            return problem(out, "deadlines_ns", "keyed by " + ", ".join(RUNGS), rung[:80])
        if not 0 <= deadline <= ladder.DEADLINE_NS_MAX:
            limit = f"between 0 and {ladder.DEADLINE_NS_MAX}"
            return problem(out, f"deadlines_ns.{rung}", limit, deadline)
    return None
