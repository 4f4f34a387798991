"""Compares the books with an appliance's own lists: what it shows is so, and what it shows and we
do not know is foreign.

This is the only way out of doubt. A snapshot is consistent with every event delivered before it,
and no command of ours is under way while it is taken (`orchestrator/links.py`), so a tag that is
absent from it is neither held nor offered, and an add that it does not show was never carried out.
"""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import MediaOffset
from tagmem.domain import attachment as attachments
from tagmem.domain.appliances import UNASKED, accepted, took_part
from tagmem.domain.attachment import Happening
from tagmem.domain.effects import (
    ApplianceSnapshot,
    InitiateAdd,
    InitiateRelease,
    SetReference,
)
from tagmem.domain.extent import ExtentSet, intersect, normal, subtract
from tagmem.domain.records import (
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    Extent,
    QuarantineRecord,
    Reference,
    ReleasePlan,
    Sharing,
)
from tagmem.domain.turn import Turn


class _Lists:
    """A snapshot, indexed; what is explained by our books is taken out, the rest is foreign."""

    def __init__(self, event: ApplianceSnapshot) -> None:
        self.tagged: dict[tuple[str, int], list[Extent]] = {}
        self.regions: dict[tuple[str, int], int] = {}
        self.untagged: dict[tuple[int, int], ExtentSet] = {}
        """By LD and region."""
        for held in event.held:
            if held.tag == NIL_TAG:
                key = (held.ld, held.region)
                self.untagged[key] = (*self.untagged.get(key, ()), held.extent)
            else:
                self.tagged.setdefault((held.tag, held.ld), []).append(held.extent)
                self.regions[held.tag, held.ld] = held.region
        self.untagged = {key: normal(extents) for key, extents in self.untagged.items()}
        self.listed = {tag.tag: tag for tag in event.tags}

    def take(self, capacity: CapacityRecord, record: AttachmentRecord) -> tuple[Extent, ...]:
        """What the appliance shows of a capacity on a host."""
        if capacity.tagged:
            return tuple(self.tagged.pop((record.tag, record.ld), ()))
        key = (record.ld, record.region)
        mine = normal(capacity.extents)
        found = intersect(self.untagged.get(key, ()), mine)
        if found:
            self.untagged[key] = subtract(self.untagged[key], mine)
        return found

    def pending(self, capacity: CapacityRecord, record: AttachmentRecord) -> bool:
        """Whether the appliance is offering it; for untagged capacity: whether it may be."""
        listed = self.listed.get(record.tag if capacity.tagged else NIL_TAG)
        return listed is not None and record.ld in listed.pending

    def sanitising(self, capacity: CapacityRecord) -> bool:
        """Whether its media may still be unclean. Untagged media are not listed by name, so they
        always may.
        """
        if capacity.tagged:
            listed = self.listed.get(capacity.tag)
            return listed is not None and not (
                listed.accepted or listed.pending or listed.referenced
            )
        return NIL_TAG in self.listed

    def referenced(self, capacity: CapacityRecord) -> bool:
        """Whether the fabric manager has a reference on it."""
        listed = self.listed.get(capacity.tag)
        return capacity.tagged and listed is not None and listed.referenced


def snapshot(turn: Turn, event: ApplianceSnapshot) -> None:
    """Take an appliance's lists for the truth, and end its doubt."""
    record = turn.state.appliances.get(event.appliance)
    if record is None or record.state is ApplianceState.LOST:
        return
    lists = _Lists(event)
    for tag in tuple(turn.state.by_appliance.get(record.id, ())):
        capacity = turn.state.capacities[tag]
        for attachment in tuple(turn.state.attachments.get(tag, {}).values()):
            _compare(turn, lists, capacity, attachment)
        _compare_media(turn, lists, capacity)
        _compare_reference(turn, lists, tag)
        turn.touch(tag)
    foreign = _foreign(turn, event, lists)
    _quarantine(turn, event.appliance, foreign)
    if record.state is not ApplianceState.READY:
        turn.put_appliance(replace(record, state=ApplianceState.READY, fault=""))
        turn.note("appliance.ready", record.id, tags=len(event.tags), quarantined=len(foreign))


def _compare(turn: Turn, lists: _Lists, capacity: CapacityRecord, record: AttachmentRecord) -> None:
    held = lists.take(capacity, record)
    if held:
        _end_add(turn, record)
        if normal(held) == normal(capacity.extents):
            if record.state is not AttachmentState.ATTACHED or record.held != capacity.extents:
                accepted(turn, record, capacity, Happening.SEEN_HELD)
        elif normal(held) != normal(record.held) or record.state is AttachmentState.ATTACHED:
            took_part(turn, record, held)
    elif lists.pending(capacity, record):
        _end_add(turn, record)
        if record.state in attachments.OVER:
            plan = record.release or ReleasePlan()
            turn.begin_release(
                record, Happening.SEEN_PENDING, plan, gone=False, proved=False, fenced=False
            )
        elif record.state is AttachmentState.ATTACHED:
            _vanished(turn, record)
        else:
            turn.move(record, Happening.SEEN_PENDING)
    else:
        _absent(turn, record)


def _absent(turn: Turn, record: AttachmentRecord) -> None:
    """The appliance neither shows nor offers it to the host."""
    adding = turn.state.effect_for(InitiateAdd, record.tag, record.host)
    if record.state in attachments.LEAVING:
        turn.end_effect(turn.state.effect_for(InitiateRelease, record.tag, record.host))
        # An add that is still to be done, and is not needed any more, never reached the host.
        never = turn.end_effect(adding) is not None and not record.held
        turn.move(record, Happening.SEEN_ABSENT, gone=True, proved=record.proved or never)
    elif record.state is AttachmentState.ATTACHED:
        _vanished(turn, record)
    elif record.state is AttachmentState.UNKNOWN and adding is None:
        turn.move(record, Happening.DECLINED, reason="the appliance does not list the offer")
    elif record.state is AttachmentState.OFFERED:
        reason = record.reason or "the appliance no longer lists the offer"
        turn.move(record, Happening.SEEN_ABSENT, reason=reason)
        turn.note("capacity.refused", record.tag, host=record.host, reason=reason)
    else:
        if record.state in attachments.OVER:
            _end_add(turn, record)
        turn.move(record, Happening.SEEN_ABSENT)


def _vanished(turn: Turn, record: AttachmentRecord) -> None:
    moved = turn.begin_release(
        record, Happening.SEEN_ABSENT, ReleasePlan(), gone=True, reason=UNASKED
    )
    if moved is not None:
        turn.note("capacity.lost", record.tag, host=record.host, reason=UNASKED)


def _end_add(turn: Turn, record: AttachmentRecord) -> None:
    turn.end_effect(turn.state.effect_for(InitiateAdd, record.tag, record.host))


def _compare_media(turn: Turn, lists: _Lists, capacity: CapacityRecord) -> None:
    """Media that the appliance no longer lists, and that no host holds, are clean."""
    records = tuple(turn.state.attachments.get(capacity.tag, {}).values())
    if lists.sanitising(capacity):
        return
    for record in records:
        if record.held and (record.gone or record.state in attachments.OVER):
            turn.put_attachment(replace(record, held=()))


def _compare_reference(turn: Turn, lists: _Lists, tag: str) -> None:
    """Take over whether there is a reference; what is still to be asked for is asked again."""
    capacity = turn.state.capacities[tag]
    there = lists.referenced(capacity)
    records = turn.state.attachments.get(tag, {}).values()
    shared = capacity.sharing is not Sharing.NONE and not any(record.held for record in records)
    unclean = lists.sanitising(capacity) and (shared or capacity.reference is not Reference.NONE)
    found = Reference.HELD if there else Reference.DROPPING if unclean else Reference.NONE
    # Whatever was on its way has not been carried out, or is seen here; settling asks anew.
    turn.end_effect(turn.state.effect_for(SetReference, tag, ""))
    if found is not capacity.reference:
        turn.put_capacity(replace(capacity, reference=found))


def _foreign(turn: Turn, event: ApplianceSnapshot, lists: _Lists) -> dict[str, QuarantineRecord]:
    """What the appliance shows and our books do not explain, by record id."""
    found: dict[str, QuarantineRecord] = {}
    state, name = turn.state, event.appliance
    ours = state.by_appliance.get(name, {})

    def add(ld: int | None, region: int, tag: Tag, extents: ExtentSet, reason: str) -> None:
        key = f"{name}/{'-' if ld is None else ld}/{region}/{tag}"
        found[key] = QuarantineRecord(key, name, ld, region, tag, extents, reason, turn.now)

    held_tags = set()
    for (tag, ld), extents in lists.tagged.items():
        held_tags.add(tag)
        host = state.ld_hosts.get((name, ld), f"LD {ld}")
        known = tag in ours and state.capacities[tag].tagged
        reason = f"{host} holds a tag that it was not given" if known else "a tag unknown here"
        add(ld, lists.regions[tag, ld], Tag(tag), normal(extents), reason)
    for (ld, region), rest in lists.untagged.items():
        if rest:
            add(ld, region, NIL_TAG, rest, "untagged memory unknown here")
    for tag in lists.listed:
        known = tag == NIL_TAG or tag in held_tags or (tag in ours and state.capacities[tag].tagged)
        if not known:
            add(None, 0, Tag(tag), (), "a tag unknown here, offered or being sanitised")
    return found


def _quarantine(turn: Turn, appliance: str, found: dict[str, QuarantineRecord]) -> None:
    state = turn.state
    before = {k: q for k, q in state.quarantines.items() if q.appliance == appliance}
    for key in before.keys() - found.keys():
        turn.put("quarantine", key, None)
        turn.note("appliance.quarantine_lifted", appliance, id=key, tag=before[key].tag)
    for key, record in found.items():
        old = before.get(key)
        record = _inside(turn, record)
        if old is not None and replace(record, found_ns=old.found_ns) == old:
            continue
        turn.put("quarantine", key, record)
        turn.note(
            "appliance.quarantined",
            appliance,
            id=key,
            tag=record.tag,
            reason=record.reason,
            size_bytes=sum(extent.length for extent in record.extents),
        )


def _inside(turn: Turn, record: QuarantineRecord) -> QuarantineRecord:
    """Without what lies outside every pool, which nobody could be lent anyway."""
    if not turn.state.has_region(record.appliance, record.region):
        return replace(record, extents=())
    pool = turn.state.pool(record.appliance, record.region)
    whole = (Extent(MediaOffset(0), pool.free.size_bytes),)
    return replace(record, extents=intersect(record.extents, whole))
