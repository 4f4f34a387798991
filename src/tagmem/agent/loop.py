"""The deciding half of the host agent: what is wanted, offered, held and observed, tag by tag.

Level-triggered on both sides. What the orchestrator wants is a whole state per tag, stamped with a
revision; what the device has is its own list, read again after each new session. The loop moves
each tag through `phases.TABLE` and orders effects when a phase is entered; a phase that is passed
at once orders nothing. After a restart the phases are entered again from the records, the device's
list, the run directory and the process table, so nothing needs an outbox (see `records`).

Offers are answered strictly in their order. One whose tag is not announced yet is held, and holds
up those behind it, for `expect_grace_ns`; then it is refused.

What is held and not wanted is reported as it is and otherwise left alone: the orchestrator decides.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from tagmem.agent import records as r
from tagmem.agent import vms
from tagmem.agent.offers import GROUPS_MAX, Group, Link, Part
from tagmem.agent.phases import Input, Phase, next_phase
from tagmem.agent.policy import Limits, in_sequence, judge, region_of
from tagmem.agent.tagstate import HOLDERS_SHOWN_MAX, TagState
from tagmem.base.ids import NIL_TAG
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.ports import Change, Effect, Event, Loaded, Step, Tick
from tagmem.wire.agentapi import Observed, WorkloadReport

RECHECK_NS = 1 * SECOND
"""How often holders of a tag that is to be given back are looked for again."""
RETRY_NS = 500 * MILLISECOND
"""How long after a failure of the host or the device a step is tried again."""
RELEASED_KEPT_MAX = 4096
"""Released tags that are remembered, so that a lost report can be repeated; oldest go first."""


class AgentMachine:
    """`ports.Machine` of one host."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self.vms = vms.VmTable()
        self._clear()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            Tick: self._on_tick,
            r.Started: self._on_started,
            r.SessionOpened: self._on_session_opened,
            r.DesiredReceived: self._on_desired,
            r.SyncEnded: self._on_sync_ended,
            r.DeviceRead: self._on_device_read,
            r.Offered: self._on_offered,
            r.Answered: self._on_answered,
            r.ReleaseAsked: self._on_release_asked,
            r.TakenByForce: self._on_taken,
            r.Returned: self._on_returned,
            r.LinkLost: self._on_link_lost,
            r.Surfaced: self._on_surfaced,
            r.SurfaceFailed: self._on_surface_failed,
            r.Withdrawn: self._on_withdrawn,
            r.WithdrawFailed: self._on_withdraw_failed,
            r.HoldersChecked: self._on_holders_checked,
            r.WorkloadChanged: self._on_workload_changed,
            vms.KeepVm: lambda event: self._changes.append(self.vms.keep(event)),
            vms.GuestsAsked: self._on_guests_asked,
        }

    def _clear(self) -> None:
        self._now: Nanoseconds = 0
        self._tags: dict[str, TagState] = {}
        self._links: dict[str, Link] = {}
        self._untagged: dict[tuple[str, int], str] = {}
        """(appliance, DPA) announced without a tag, to the handle of that capacity."""
        self._released: dict[str, None] = {}
        self._in_use = 0
        self._epoch = 0
        self._named: set[str] | None = None
        """Tags that the sync under way has named; None when none is."""
        self._tickets = 0
        self._timers: list[tuple[Nanoseconds, str, str]] = []
        self._touched: dict[str, TagState] = {}
        self._entered: set[str] = set()
        self._force_report: set[str] = set()
        self._effects: list[Effect] = []
        self._changes: list[Change] = []

    # ---- ports.Machine

    def restore(self, loaded: Loaded) -> None:
        """Forget everything and start from what the store has."""
        self._clear()
        self.vms.clear()
        for kind, key, record in loaded.records:
            if kind == "epoch":
                self._epoch = record.epoch
                continue
            if kind == vms.KIND:
                self.vms.restore(key, record)
                continue
            state = TagState.restore(record)
            self._tags[state.tag] = state
            self._in_use += state.in_use
            self._index_untagged(state)
            if state.phase is Phase.RELEASED:
                self._released[state.tag] = None

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """Decide. Never raises for anything that came from outside."""
        self._now = now
        self._touched, self._entered, self._force_report = {}, set(), set()
        self._effects, self._changes = [], []
        self._handlers[type(event)](event)
        self._finish()
        return Step(changes=tuple(self._changes), effects=tuple(self._effects))

    def next_deadline(self) -> Nanoseconds | None:
        """When a Tick is wanted at the latest."""
        return self._timers[0][0] if self._timers else None

    def tag(self, tag: str) -> TagState | None:
        """One tag, if it is known here."""
        return self._tags.get(tag)

    def tags(self) -> Iterable[TagState]:
        """All that is known, for the local status."""
        return self._tags.values()

    # ---- the orchestrator

    def _on_started(self, event: r.Started) -> None:
        for tag, path in event.devices.items():
            (self._tags.get(tag) or self._new(tag)).dax_path = path
        for tag, report in event.workloads.items():
            state = self._tags.get(tag) or self._new(tag)
            state.workload = report
        for tag, state in self._tags.items():
            if state.active and tag not in event.workloads:
                self._not_adopted(state)
            self._touched[tag] = state
            self._entered.add(tag)

    def _not_adopted(self, state: TagState) -> None:
        assert state.workload is not None
        if state.workload.state == "pending":
            state.workload = None  # It was never started; it may be now.
            return
        state.workload = msgspec.structs.replace(
            state.workload, state="failed", reason="it is gone and left no exit status"
        )

    def _on_session_opened(self, event: r.SessionOpened) -> None:
        self._named = set()
        for state in self._tags.values():
            state.told = None

    def _on_desired(self, event: r.DesiredReceived) -> None:
        desired = event.desired
        if self._named is not None:
            self._named.add(desired.tag)
        state = self._tags.get(desired.tag) or self._new(desired.tag)
        self._force_report.add(desired.tag)
        self._touched[desired.tag] = state
        idle = state.phase in (Phase.REFUSED, Phase.RELEASED)
        if desired.revision < state.revision and not idle:
            return
        news = desired.revision != state.revision
        if state.want(desired):
            self._entered.add(desired.tag)
        if not state.in_use:
            state.appliance = desired.appliance
        self._index_untagged(state)
        if news:
            if desired.revision > state.flag_revision or idle:
                state.asked_back = False
                state.lost = state.lost and not idle
            if state.phase is Phase.REFUSED and desired.goal == "attached":
                self._fire(state, Input.WANTED)
        self._rejudge(desired.appliance)

    def _on_sync_ended(self, event: r.SyncEnded) -> None:
        if event.epoch < self._epoch:
            reason = f"epoch must be at least {self._epoch}, got {event.epoch}"
            self._effects.append(r.EndSession(0, reason))
            self._named = None
            return
        if event.epoch > self._epoch:
            self._epoch = event.epoch
            self._changes.append(Change("epoch", "epoch", r.EpochRecord(event.epoch)))
        named, self._named = self._named or set(), None
        for tag, state in list(self._tags.items()):
            if tag not in named:
                if not state.in_use and not state.active:
                    self._forget(state)
                    continue
                state.told = None
                self._touched[tag] = state

    # ---- appliances

    def _link(self, appliance: str) -> Link:
        return self._links.setdefault(appliance, Link())

    def _on_device_read(self, event: r.DeviceRead) -> None:
        link = self._link(event.appliance)
        link.read = True
        link.regions = event.regions
        link.session = event.session
        if event.fresh:
            link.renew()
        held: dict[str, list[r.Extent]] = {}
        for extent in event.held:
            tag = self._handle(event.appliance, extent)
            if tag != NIL_TAG:
                held.setdefault(tag, []).append(extent)
        for tag, extents in held.items():
            state = self._tags.get(tag) or self._new(tag)
            if state.extents and state.appliance != event.appliance:
                continue  # The same tag through two appliances: the first one has it.
            self._present(state, event, extents)
        for tag, state in self._tags.items():
            if state.appliance == event.appliance and tag not in held:
                self._missing(state, event)
        self._rejudge(event.appliance)

    def _present(self, state: TagState, event: r.DeviceRead, extents: list[r.Extent]) -> None:
        if not event.fresh and state.phase in (Phase.ACCEPTING, Phase.RETURNING):
            return  # An answer to our own command is on its way, and is newer than this list.
        announced = state.desired.extents if state.desired is not None else ()
        self._hold(state, event.appliance, in_sequence(extents, announced), event.regions)
        self._fire(state, Input.PRESENT)

    def _missing(self, state: TagState, event: r.DeviceRead) -> None:
        self._touched[state.tag] = state
        if not event.fresh and state.phase is Phase.ACCEPTING:
            return
        had = state.extents != () or state.active or state.dax_path != ""
        state.extents = ()
        if had and state.phase in (Phase.EXPECTED, Phase.SURFACING, Phase.ATTACHED):
            self._lose(state, f"appliance {event.appliance} no longer lists it as held here")
            return
        self._fire(state, Input.MISSING)

    def _lose(self, state: TagState, reason: str) -> None:
        state.lost = True
        state.flag_revision = state.revision
        state.reason = reason
        state.extents = ()
        if state.phase in (Phase.SURFACING, Phase.ATTACHED, Phase.RETURNING):
            self._fire(state, Input.MISSING)
        self._touched[state.tag] = state

    def _hold(
        self,
        state: TagState,
        appliance: str,
        extents: tuple[r.Extent, ...],
        regions: tuple[r.Region, ...],
    ) -> None:
        state.appliance = appliance
        state.extents = tuple((extent.dpa, extent.length) for extent in extents)
        state.region = region_of(extents[0], regions) or 0

    def _on_offered(self, event: r.Offered) -> None:
        link = self._link(event.appliance)
        if not event.extents or len(link.waiting) >= GROUPS_MAX:
            # An empty group cannot come from our own link; one too many is refused out of hand.
            link.answering[event.group] = ()
            self._effects.append(r.Answer(0, event.appliance, event.group, ()))
            return
        link.waiting.append(Group(event.group, event.extents, self._now))
        self._rejudge(event.appliance)

    def _rejudge(self, appliance: str) -> None:
        """Answer the offers at the head of the queue that can be decided now."""
        link = self._links.get(appliance)
        if link is None or not link.read:
            return
        while link.waiting:
            group = link.waiting[0]
            parts = self._by_tag(appliance, group.extents)
            until = group.since_ns + self._limits.expect_grace_ns
            if self._now < until and any(self._unannounced(tag) for tag in parts):
                self._timer(until, "hold", appliance)
                return
            link.waiting.popleft()
            decided = [self._decide(appliance, tag, part) for tag, part in parts.items()]
            accepted = tuple(part for part in decided if part is not None)
            link.answering[group.number] = accepted
            spans = tuple(span for part in accepted for span in part.spans)
            self._effects.append(r.Answer(0, appliance, group.number, spans))

    def _by_tag(
        self, appliance: str, extents: tuple[r.Extent, ...]
    ) -> dict[str, tuple[r.Extent, ...]]:
        parts: dict[str, list[r.Extent]] = {}
        for extent in extents:
            parts.setdefault(self._handle(appliance, extent), []).append(extent)
        return {tag: tuple(part) for tag, part in parts.items()}

    def _handle(self, appliance: str, extent: r.Extent) -> str:
        """The key under which an extent is known here: its tag, or the handle announced for its
        DPA.
        """
        if extent.tag != NIL_TAG:
            return extent.tag
        return self._untagged.get((appliance, extent.dpa), NIL_TAG)

    def _unannounced(self, tag: str) -> bool:
        state = self._tags.get(tag)
        if state is None or state.desired is None:
            return True
        if state.phase is Phase.RELEASED:
            return state.goal == "released"
        return state.phase is Phase.RETURNING and state.goal == "attached"

    def _decide(self, appliance: str, tag: str, extents: tuple[r.Extent, ...]) -> Part | None:
        """Accept (a part) or refuse (None) what a group offers of one tag."""
        link = self._link(appliance)
        state = self._tags.get(tag)
        if state is None or state.desired is None:
            grace = self._limits.expect_grace_ns / SECOND
            reason = f"tag {tag} was offered by {appliance}, and not announced within {grace:g} s"
            if tag != NIL_TAG:
                self._effects.append(r.Report(0, Observed(tag, 0, "refused", reason=reason)))
            return None
        ordered = in_sequence(extents, state.desired.extents)
        devices = self._in_use
        reason = judge(ordered, state.desired, appliance, link.regions, self._limits, devices)
        if not reason and state.phase not in (Phase.EXPECTED, Phase.REFUSED):
            reason = f"tag {tag} is {state.phase.value} on this host already"
        if reason:
            if state.phase in (Phase.EXPECTED, Phase.REFUSED):
                state.reason = reason
            self._fire(state, Input.JUDGED_BAD)
            return None
        state.reason = ""
        self._fire(state, Input.JUDGED_GOOD)
        spans = tuple((extent.dpa, extent.length) for extent in ordered)
        return Part(tag, spans, region_of(ordered[0], link.regions) or 0)

    def _on_answered(self, event: r.Answered) -> None:
        link = self._link(event.appliance)
        for part in link.answering.pop(event.group, ()):
            state = self._tags[part.tag]
            if event.code == 0 and part.tag not in link.dead:
                state.appliance, state.region = event.appliance, part.region
                state.extents = part.spans
                self._fire(state, Input.ANSWERED)
                continue
            state.reason = (
                f"appliance {event.appliance} refused our acceptance (code {event.code:#04x})"
                if event.code
                else f"appliance {event.appliance} took the offer back by force"
            )
            self._fire(state, Input.ANSWER_FAILED)
            self._effects.append(r.ReadDevice(0, event.appliance))
            link.dead.discard(part.tag)

    def _on_release_asked(self, event: r.ReleaseAsked) -> None:
        self._effects.append(r.Acknowledge(0, event.appliance, event.group))
        for tag in self._by_tag(event.appliance, event.extents):
            state = self._tags.get(tag)
            if state is not None and state.appliance == event.appliance and state.in_use:
                state.asked_back = True
                state.flag_revision = state.revision
                self._touched[tag] = state

    def _on_taken(self, event: r.TakenByForce) -> None:
        link = self._link(event.appliance)
        self._effects.append(r.Acknowledge(0, event.appliance, event.group))
        for tag in self._by_tag(event.appliance, event.extents):
            state = self._tags.get(tag)
            if state is None or state.appliance != event.appliance:
                continue
            if link.pending(tag) and state.phase is Phase.ACCEPTING:
                link.dead.add(tag)
            elif state.in_use:
                self._lose(state, f"appliance {event.appliance} took it back by force")

    def _on_returned(self, event: r.Returned) -> None:
        state = self._tags.get(event.tag)
        if state is None or state.phase is not Phase.RETURNING:
            return
        if event.code == 0:
            state.extents = ()
            self._fire(state, Input.RETURNED)
            return
        state.reason = f"appliance {event.appliance} refused the release (code {event.code:#04x})"
        self._fire(state, Input.RETURN_FAILED)
        self._retry(state, RETRY_NS)
        self._effects.append(r.ReadDevice(0, event.appliance))

    def _on_link_lost(self, event: r.LinkLost) -> None:
        link = self._link(event.appliance)
        link.read = False
        link.waiting.clear()
        for state in self._tags.values():
            if state.appliance == event.appliance and state.phase is Phase.RETURNING:
                state.reason = f"appliance {event.appliance} is not connected: {event.reason}"
                self._touched[state.tag] = state

    # ---- this host

    def _answered(self, tag: str, ticket: int) -> TagState | None:
        """The tag that a result is for, unless something newer has been ordered since."""
        state = self._tags.get(tag)
        return state if state is not None and state.ticket == ticket else None

    def _on_surfaced(self, event: r.Surfaced) -> None:
        state = self._answered(event.tag, event.ticket)
        if state is not None:
            state.dax_path = event.path
            if state.phase is Phase.SURFACING:
                state.reason = ""
            self._fire(state, Input.SURFACED)

    def _on_surface_failed(self, event: r.SurfaceFailed) -> None:
        state = self._answered(event.tag, event.ticket)
        if state is None or state.phase is not Phase.SURFACING:
            return
        state.reason = f"no DAX device: {event.reason}"
        self._fire(state, Input.SURFACE_FAILED)
        self._retry(state, RETRY_NS)
        self._effects.append(r.ReadDevice(0, state.appliance))

    def _on_withdrawn(self, event: r.Withdrawn) -> None:
        state = self._answered(event.tag, event.ticket)
        if state is not None:
            state.dax_path = ""
            if state.phase is Phase.WITHDRAWING and event.leftovers:
                state.reason = "removed what was left beside the bytes: " + ", ".join(
                    event.leftovers[:HOLDERS_SHOWN_MAX]
                )
            self._fire(state, Input.WITHDRAWN)

    def _on_withdraw_failed(self, event: r.WithdrawFailed) -> None:
        state = self._answered(event.tag, event.ticket)
        if state is not None and state.phase is Phase.WITHDRAWING:
            state.reason = f"the DAX device could not be taken away: {event.reason}"
            self._fire(state, Input.WITHDRAW_FAILED)
            self._retry(state, RETRY_NS)

    def _on_holders_checked(self, event: r.HoldersChecked) -> None:
        state = self._answered(event.tag, event.ticket)
        if state is None or state.phase is not Phase.PROVING:
            return
        state.holders = event.holders
        if event.complete and not event.holders:
            state.proved = True
            self._fire(state, Input.FREE)
            return
        if event.holders:
            first = event.holders[0]
            more = f" and {len(event.holders) - 1} more" if len(event.holders) > 1 else ""
            verb = "maps it" if first.how == "maps" else "has it open"
            state.reason = f"process {first.pid} ({first.name}){more} {verb}"
        else:
            state.reason = f"nothing is proved: {event.reason}"
        if why := self.vms.reasons.get(event.tag):
            state.reason += f"; {why}"
        self._fire(state, Input.HELD)

    def _on_guests_asked(self, event: vms.GuestsAsked) -> None:
        self.vms.reasons.pop(event.tag, None)
        if event.reason and event.tag in self._tags:
            self.vms.reasons[event.tag] = event.reason

    def _on_workload_changed(self, event: r.WorkloadChanged) -> None:
        state = self._tags.get(event.tag)
        if state is None or state.workload is None or state.workload.id != event.report.id:
            return
        if not state.active and event.report.state in ("pending", "running"):
            return  # Its end is known already; this is a late word of its start.
        state.workload = event.report
        if not state.active:
            state.rung, state.rung_due_ns = "", 0
        self._touched[event.tag] = state

    def _on_tick(self, event: Tick) -> None:
        while self._timers and self._timers[0][0] <= self._now:
            _, kind, key = heapq.heappop(self._timers)
            if kind == "hold":
                self._rejudge(key)
                continue
            state = self._tags.get(key)
            if state is None:
                continue
            self._touched[key] = state
            if kind == "retry" and state.due_ns is not None and state.due_ns <= self._now:
                state.due_ns = None
                self._fire(state, Input.DUE)

    # ---- moving one tag

    def _new(self, tag: str) -> TagState:
        state = self._tags[tag] = TagState(tag)
        self._touched[tag] = state
        return state

    def _forget(self, state: TagState) -> None:
        del self._tags[state.tag]
        self._touched.pop(state.tag, None)
        self._released.pop(state.tag, None)
        self._untagged = {k: tag for k, tag in self._untagged.items() if tag != state.tag}
        if state.saved is not None:
            self._changes.append(Change("tag", state.tag, None))

    def _index_untagged(self, state: TagState) -> None:
        if state.desired is not None and not state.desired.tagged:
            for dpa, _ in state.desired.extents:
                self._untagged[state.desired.appliance, dpa] = state.tag

    def _timer(self, at: Nanoseconds, kind: str, key: str) -> None:
        heapq.heappush(self._timers, (at, kind, key))

    def _retry(self, state: TagState, after_ns: Nanoseconds) -> None:
        state.due_ns = self._now + after_ns
        self._timer(state.due_ns, "retry", state.tag)

    def _fire(self, state: TagState, given: Input) -> None:
        """Move a tag through the table; effects follow in `_finish`, for where it ends up."""
        self._touched[state.tag] = state
        entered = next_phase(state.phase, given)
        if entered is None:
            return
        before = state.in_use
        state.phase = entered
        self._in_use += state.in_use - before
        self._entered.add(state.tag)
        state.due_ns = None

    def _settle(self, state: TagState) -> None:
        """Pass the phases that need no wait."""
        if state.phase is Phase.RELEASED and state.revision > state.flag_revision:
            state.lost = state.asked_back = False
        while (given := self._at_once(state)) is not None:
            self._fire(state, given)

    def _at_once(self, state: TagState) -> Input | None:
        phase, goal = state.phase, state.goal
        if phase is Phase.RELEASED:
            return Input.WANTED if goal == "attached" else None
        if goal == "released" and phase in (
            Phase.EXPECTED,
            Phase.REFUSED,
            Phase.SURFACING,
            Phase.ATTACHED,
        ):
            return Input.UNWANTED
        going = (Phase.ENDING, Phase.WITHDRAWING, Phase.PROVING, Phase.BLOCKED)
        if goal == "attached" and phase in going and state.extents:
            return Input.WANTED
        if phase is Phase.ENDING and not state.active:
            return Input.QUIET
        if phase is Phase.RETURNING and not state.extents and self._device_known(state):
            return Input.RETURNED
        if phase is Phase.SURFACING and not state.tagged:
            return Input.SURFACED
        return None

    def _device_known(self, state: TagState) -> bool:
        link = self._links.get(state.appliance)
        return link is not None and link.read

    def _finish(self) -> None:
        """Settle what was touched, order the effects of the phases entered, keep and report."""
        for tag in list(self._touched):
            state = self._tags.get(tag)
            if state is None:
                continue
            self._settle(state)
            if tag in self._entered:
                self._enter(state)
            self._drive_workload(state)
            record = state.record()
            if record != state.saved:
                state.saved = record
                self._changes.append(Change("tag", tag, record))
            observed = state.observed()
            if observed != state.told or tag in self._force_report:
                state.told = observed
                self._effects.append(r.Report(0, observed))
        while len(self._released) > RELEASED_KEPT_MAX:
            self._forget(self._tags[next(iter(self._released))])

    def _enter(self, state: TagState) -> None:
        """Order what the phase calls for; entering again orders it again."""
        phase, tag = state.phase, state.tag
        if phase is not Phase.RELEASED:
            self._released.pop(tag, None)
        if phase in (Phase.EXPECTED, Phase.SURFACING):
            state.proved, state.holders = False, ()
        if phase in (Phase.SURFACING, Phase.WITHDRAWING, Phase.PROVING):
            self._tickets += 1
            state.ticket = self._tickets
        if phase is Phase.SURFACING and not state.held_back:
            self._effects.append(state.surface())
        elif phase is Phase.WITHDRAWING:
            state.reason = state.reason if state.lost else ""
            self._effects.append(r.Withdraw(0, tag, state.ticket))
        elif phase is Phase.PROVING:
            state.proved = False
            check = r.CheckHolders(0, state.appliance, tag, state.ticket, self._shared(state))
            self._effects.append(check)
        elif phase is Phase.BLOCKED:
            self._retry(state, RECHECK_NS)
            if state.holders:
                due, force = state.deadline_ns(state.up_to), state.may_kill
                self._effects.append(vms.DetachGuests(0, tag, due, force, state.up_to))
                if force:
                    kill = r.KillHolders(0, state.appliance, tag, self._shared(state))
                    self._effects.append(kill)
        elif phase is Phase.RETURNING:
            state.reason, state.holders = "", ()
            if not self._device_known(state):
                state.reason = f"appliance {state.appliance} is not connected"
            elif state.extents:
                session = self._link(state.appliance).session
                give = r.ReturnExtents(0, state.appliance, tag, state.extents, session)
                self._effects.append(give)
        elif phase is Phase.RELEASED:
            state.dax_path, state.holders = "", ()
            state.reason = state.reason if state.lost else ""
            self._released[tag] = None
            if state.lost:
                self._effects.append(r.GiveUp(0, tag))

    def _shared(self, state: TagState) -> bool:
        return state.desired is not None and state.desired.shared

    # ---- the workload of one tag

    def _drive_workload(self, state: TagState) -> None:
        """Start the workload that is wanted; climb the ladder under one that is not."""
        wanted = state.desired.workload if state.desired is not None else None
        if (
            state.phase is Phase.ATTACHED
            and wanted is not None
            and not state.active
            and not wanted.stop
            and (state.workload is None or state.workload.id != wanted.id)
        ):
            state.workload = WorkloadReport(wanted.id, "pending")
            state.rung, state.rung_due_ns = "", 0
            size = sum(length for _, length in state.extents)
            self._effects.append(r.Launch(0, state.tag, wanted, state.dax_path, size))
            return
        if not state.active or state.workload is None:
            return
        stopped = wanted is not None and wanted.id == state.workload.id and wanted.stop
        if state.phase is Phase.ENDING or stopped:
            self._climb(state, state.workload.id)
        else:
            state.rung, state.rung_due_ns = "", 0

    def _climb(self, state: TagState, workload_id: str) -> None:
        """One rung at a time; after a restart the rung that was reached is taken again."""
        if state.lost and state.rung != "stop":
            self._rung(state, workload_id, "stop")
        elif not state.rung:
            self._rung(state, workload_id, "ask")
        elif self._now >= state.rung_due_ns:
            if state.rung == "ask" and not state.may_stop():
                state.reason = "the workload did not end when asked, and may not be stopped"
            else:
                if state.rung == "stop":
                    state.reason = "the workload has not ended although it was killed"
                self._rung(state, workload_id, "stop")
        elif state.tag in self._entered:
            self._signal(state, workload_id)
            self._timer(state.rung_due_ns, "rung", state.tag)

    def _rung(self, state: TagState, workload_id: str, rung: str) -> None:
        state.rung = rung
        state.rung_due_ns = self._now + state.deadline_ns(rung)
        self._timer(state.rung_due_ns, "rung", state.tag)
        self._signal(state, workload_id)

    def _signal(self, state: TagState, workload_id: str) -> None:
        how = r.Signal(0, state.tag, workload_id, "term" if state.rung == "ask" else "kill")
        self._effects.append(how)
