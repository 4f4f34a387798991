"""One step under way: what it has changed so far, and what follows from that for each capacity it
touched.

A handler puts records through a Turn, which applies each at once, so that later lines of the same
step see it. `settle` then draws the conclusions that are the same whatever happened: which
attachments are over, which are to be offered next, what state the capacity is in, and whether its
extents are free.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import Nanoseconds
from tagmem.domain import attachment as attachments
from tagmem.domain import capacity as capacities
from tagmem.domain import ladder, moves
from tagmem.domain.attachment import Happening
from tagmem.domain.capacity import Condition
from tagmem.domain.effects import FenceHost, InitiateAdd, InitiateRelease, ReadAppliance, TellHost
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.invariants import check_tag
from tagmem.domain.records import (
    ApplianceRecord,
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    CapacityState,
    Record,
    Reference,
    ReleasePlan,
)
from tagmem.domain.state import State
from tagmem.ports import Change, Effect, Note, Step


class Turn:
    """The step of one event."""

    __slots__ = (
        "_changes",
        "_done",
        "_effects",
        "_notes",
        "_read",
        "_revision",
        "_told",
        "_touched",
        "now",
        "state",
    )

    def __init__(self, state: State, now: Nanoseconds) -> None:
        self.state = state
        self.now = now
        self._changes: dict[tuple[str, str], Change] = {}
        self._effects: list[Effect] = []
        self._done: list[int] = []
        self._notes: list[Note] = []
        self._touched: dict[str, bool] = {}
        """The capacities to settle, and whether an attachment of each was changed."""
        self._told: dict[tuple[HostId, Tag], None] = {}
        self._read: dict[ApplianceId, None] = {}
        self._revision = 0

    # ---- records

    def put(self, kind: str, key: str, record: Record | None) -> None:
        """Put or delete (None) a record, now and in the commit."""
        self.state.apply(kind, key, record)
        self._changes[kind, key] = Change(kind, key, record)

    def put_capacity(self, record: CapacityRecord) -> None:
        """Put a capacity; its revision grows once per step."""
        self.put("capacity", record.tag, replace(record, revision=self.revision()))

    def put_attachment(self, record: AttachmentRecord) -> None:
        """Put an attachment; its capacity is settled at the end of the step."""
        self.put("attachment", record.key, record)
        self._touched[record.tag] = True

    def put_appliance(self, record: ApplianceRecord) -> None:
        """Put an appliance."""
        self.put("appliance", record.id, record)

    def touch(self, tag: str) -> None:
        """Settle this capacity at the end of the step."""
        self._touched.setdefault(tag, False)

    def has_changed(self, tag: str) -> bool:
        """Whether an attachment of this capacity was changed and the capacity is not settled
        since.
        """
        return self._touched.get(tag, False)

    def settle_now(self, tag: str) -> None:
        """Settle this capacity at once, for a reply that depends on it."""
        settle(self, tag)
        self._touched[tag] = False

    def revision(self) -> int:
        """The revision of this step: one, however much it changes."""
        if not self._revision:
            self._revision = self.state.new_revision(self.now)
        return self._revision

    # ---- effects and words

    def add_effect(self, effect: Effect) -> None:
        """A durable effect, made with `state.new_effect_id()`."""
        self.state.add_effect(effect)
        self._effects.append(effect)

    def end_effect(self, effect_id: int | None) -> Effect | None:
        """Take an effect out of the outbox; None when it is not there (any more)."""
        if effect_id is None:
            return None
        effect = self.state.end_effect(effect_id)
        if effect is not None:
            self._done.append(effect_id)
        return effect

    def post(self, effect: Effect) -> None:
        """A volatile effect."""
        self._effects.append(effect)

    def tell(self, host: HostId, tag: Tag) -> None:
        """Send a connected host what is wanted for a tag; the others get it when they connect."""
        if host in self.state.connected:
            self._told[host, tag] = None

    def read_appliance(self, appliance: ApplianceId) -> None:
        """Have an appliance's lists read."""
        self._read[appliance] = None

    def note(self, type_: str, subject: str, **data: Any) -> None:
        """Tell people."""
        self._notes.append(Note(type_, subject, data))

    def doubt(self, appliance: str, reason: str) -> None:
        """Nothing about an appliance is certain until its lists have been read."""
        record = self.state.appliances[appliance]
        if record.state is ApplianceState.READY:
            self.put_appliance(replace(record, state=ApplianceState.DOUBT))
            self.note("appliance.in_doubt", appliance, reason=reason)
        self.read_appliance(record.id)

    # ---- attachments

    def move(
        self, record: AttachmentRecord, happening: Happening, **changes: Any
    ) -> AttachmentRecord | None:
        """Take an attachment to its next state; None, with a note, where that cannot happen."""
        following = attachments.TABLE[record.state, happening]
        if isinstance(following, attachments.Verdict):
            self.note(
                "attachment.unexpected",
                record.tag,
                host=record.host,
                state=record.state.value,
                happening=happening.value,
            )
            return None
        moved = replace(record, state=following, **changes)
        if moved != record:
            self.put_attachment(moved)
        return moved

    def begin_release(
        self, record: AttachmentRecord, happening: Happening, plan: ReleasePlan, **changes: Any
    ) -> AttachmentRecord | None:
        """Have the host give an attachment back, from the lowest rung."""
        away = record.host not in self.state.connected
        settings: dict[str, Any] = {
            "release": plan,
            "revision": self.revision(),
            "rung": "ask",
            "rung_deadline_ns": self.now + ladder.agent_time_ns(plan),
            "reason": "host not connected" if away else "",
            "ready": False,
            "holders": (),
            **changes,
        }
        moved = self.move(record, happening, **settings)
        if moved is not None:
            self.tell(record.host, record.tag)
            self.note("capacity.rung", record.tag, host=record.host, rung="ask")
        return moved

    # ---- the end

    def finish(self, reply: Any = None) -> Step:
        """Settle what was touched, and hand over the step."""
        for tag in tuple(self._touched):
            settle(self, tag)
        for tag in self._touched:
            if tag in self.state.capacities:
                check_tag(self.state, tag)
        self.state.fill_pools()
        self._effects.extend(TellHost(0, host, tag) for host, tag in self._told)
        self._effects.extend(ReadAppliance(0, appliance) for appliance in self._read)
        return Step(
            tuple(self._changes.values()),
            tuple(self._effects),
            tuple(self._done),
            tuple(self._notes),
            reply,
        )


def settle(turn: Turn, tag: str) -> None:
    """Draw the conclusions for one capacity from what its attachments are now."""
    capacity = turn.state.capacities.get(tag)
    if capacity is None:
        return
    _close(turn, tag)
    moves.advance(turn, tag)
    moves.keep_reference(turn, tag)
    capacity = turn.state.capacities[tag]
    _offer(turn, capacity)
    condition = _condition(turn, capacity)
    following = capacities.TABLE[capacity.state, condition]
    if following is capacities.FREE:
        _free(turn, capacity)
    elif isinstance(following, capacities.Verdict):
        raise InvariantViolated(
            f"capacity {tag} cannot be {capacity.state.value} and {condition.value}"
        )
    else:
        _keep(turn, capacity, following)


def _close(turn: Turn, tag: str) -> None:
    for record in tuple(turn.state.attachments.get(tag, {}).values()):
        if record.state in attachments.LEAVING and record.gone and (record.proved or record.fenced):
            turn.move(record, Happening.OVER, rung="", rung_deadline_ns=0, holders=(), dax_path="")
            for kind in (FenceHost, InitiateRelease, InitiateAdd):
                turn.end_effect(turn.state.effect_for(kind, tag, record.host))
            turn.note("attachment.released", tag, host=record.host)


def _offer(turn: Turn, capacity: CapacityRecord) -> None:
    """Start the adds whose turn has come: the first by place, its sharers once the first host has
    it.
    """
    if capacity.leaving:
        return
    records = turn.state.attachments.get(capacity.tag, {}).values()
    waiting = [
        record
        for record in records
        if record.state is AttachmentState.PLANNED
        and turn.state.effect_for(InitiateAdd, record.tag, record.host) is None
    ]
    if not waiting:
        return
    kept = capacity.reference is Reference.HELD
    if kept or any(record.state is AttachmentState.ATTACHED for record in records):
        for record in waiting:
            _add(turn, capacity, record, shared=True)
    elif not any(
        record.held or (record.state not in attachments.OVER and record not in waiting)
        for record in records
    ):
        order = {host: place for place, host in enumerate(capacity.hosts)}
        first = min(waiting, key=lambda r: (order.get(r.host, len(order)), r.host))
        _add(turn, capacity, first, shared=False)


def _add(turn: Turn, capacity: CapacityRecord, record: AttachmentRecord, *, shared: bool) -> None:
    turn.add_effect(
        InitiateAdd(
            turn.state.new_effect_id(),
            record.appliance,
            record.host,
            record.ld,
            record.region,
            record.tag,
            capacity.tagged,
            capacity.extents,
            shared,
        )
    )


def _condition(turn: Turn, capacity: CapacityRecord) -> Condition:
    records = turn.state.attachments.get(capacity.tag, {}).values()
    living = [record for record in records if record.state not in attachments.OVER]
    kept = capacity.reference is Reference.HELD and not capacity.leaving
    if living:
        # A fence alone gives nothing back: the appliance still lists the host as holder.
        if all(r.state in attachments.LEAVING and r.proved for r in living) and not kept:
            return _unclean(turn, capacity)
        if capacity.leaving or all(r.state in attachments.LEAVING for r in living):
            return Condition.LEAVING
        return Condition.IN_USE
    if any(record.held for record in records):
        return _unclean(turn, capacity)
    if capacity.reference is not Reference.NONE:
        return Condition.KEPT if kept else _unclean(turn, capacity)
    if not capacity.leaving:
        return Condition.IDLE
    ready = turn.state.appliances[capacity.appliance].state is ApplianceState.READY
    # What no host was ever offered is certain; all else waits until the lists have been read.
    return Condition.DONE if ready or not records else _unclean(turn, capacity)


def _unclean(turn: Turn, capacity: CapacityRecord) -> Condition:
    deadline = capacity.sanitise_deadline_ns
    return Condition.OVERDUE if deadline and deadline <= turn.now else Condition.GIVEN_BACK


def _keep(turn: Turn, capacity: CapacityRecord, following: CapacityState) -> None:
    settings: dict[str, Any] = {}
    if following is not capacity.state:
        settings = {"state": following, "sanitise_deadline_ns": 0, "fault": ""}
        if following is CapacityState.SANITISING:
            settings["sanitise_deadline_ns"] = turn.now + ladder.SANITISE_DEADLINE_NS
            turn.note("capacity.sanitising", capacity.tag)
        elif following is CapacityState.QUARANTINED:
            settings["fault"] = "the appliance has not said in time that the media is clean"
            turn.note("capacity.quarantined", capacity.tag, reason=settings["fault"])
            turn.read_appliance(capacity.appliance)
        elif following is CapacityState.RETAINED:
            turn.note("capacity.kept", capacity.tag)
        elif following is CapacityState.RESERVED:
            # The media are clean: what was published is no more, and may be loaded anew.
            settings["published"] = False
            turn.note("capacity.reserved", capacity.tag)
    if settings or turn.has_changed(capacity.tag):
        turn.put_capacity(replace(capacity, **settings))


def _free(turn: Turn, capacity: CapacityRecord) -> None:
    tag = capacity.tag
    for record in tuple(turn.state.attachments.get(tag, {}).values()):
        for kind in (FenceHost, InitiateRelease, InitiateAdd):
            turn.end_effect(turn.state.effect_for(kind, tag, record.host))
        turn.put("attachment", record.key, None)
    moves.forget(turn, tag)
    turn.put("capacity", tag, None)
    turn.note("capacity.released", tag, size_bytes=capacity.size_bytes)
