"""What happens when a deadline comes: the next rung of a release, a fence tried again, sanitising
overdue.

None of it frees anything. The last rung that is allowed leaves the release as it is, with its
holders to be seen.
"""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.domain import attachment as attachments
from tagmem.domain import ladder
from tagmem.domain.appliances import force
from tagmem.domain.effects import FenceHost
from tagmem.domain.records import AttachmentRecord, CapacityRecord, ReleasePlan
from tagmem.domain.turn import Turn

HELD = "not given back by the last rung that was allowed"


def tick(turn: Turn) -> None:
    """Deal with every deadline that has come."""
    for _, tag, host in turn.state.due(turn.now):
        capacity = turn.state.capacities.get(tag)
        if capacity is None:
            continue
        if not host:
            turn.settle_now(tag)
            left = turn.state.capacities.get(tag)
            if left is not None and left.sanitise_deadline_ns:
                turn.put_capacity(replace(left, sanitise_deadline_ns=0))
            continue
        record = turn.state.attachment(tag, host)
        if record is not None:
            _climb(turn, record, capacity)


def _climb(turn: Turn, record: AttachmentRecord, capacity: CapacityRecord) -> None:
    plan = record.release or ReleasePlan()
    over = record.state not in attachments.LEAVING or record.proved
    if over or (record.fenced and record.gone):
        turn.put_attachment(replace(record, rung_deadline_ns=0))
        return
    if record.rung == "fence" and not record.fenced:
        _fence(turn, record, capacity)
        return
    if record.fenced and plan.up_to == "force":
        force(turn, record, capacity)
        return
    rung = ladder.next_rung(plan, record.rung or "ask")
    if rung == "restart":
        deadline = turn.now + ladder.deadline_ns(plan, rung)
        turn.put_attachment(
            replace(record, rung=rung, rung_deadline_ns=deadline, revision=turn.revision())
        )
        turn.tell(record.host, record.tag)
        turn.note("capacity.rung", record.tag, host=record.host, rung=rung)
    elif rung == "fence":
        _fence(turn, record, capacity)
    else:
        reason = record.reason or HELD
        turn.put_attachment(replace(record, rung_deadline_ns=0, reason=reason))
        holders = [f"{h.name} (pid {h.pid}, {h.how})" for h in record.holders]
        turn.note("capacity.held", record.tag, host=record.host, reason=reason, holders=holders)


def _fence(turn: Turn, record: AttachmentRecord, capacity: CapacityRecord) -> None:
    """Ask for the fence, once at a time; it is asked for again at its deadline until it holds."""
    deadline = turn.now + ladder.deadline_ns(record.release or ReleasePlan(), "fence")
    turn.put_attachment(replace(record, rung="fence", rung_deadline_ns=deadline))
    if turn.state.effect_for(FenceHost, record.tag, record.host) is not None:
        return
    if record.rung != "fence":
        turn.note("capacity.rung", record.tag, host=record.host, rung="fence")
    turn.add_effect(
        FenceHost(
            turn.state.new_effect_id(),
            record.appliance,
            record.host,
            record.ld,
            record.region,
            record.tag,
            capacity.tagged,
            capacity.extents,
        )
    )
