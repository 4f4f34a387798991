"""The fabric manager's session with one appliance: effects in, CXL commands out, events back.

A session begins by asking the appliance what it is, and then takes a *snapshot*:

    a  hold commands back until those under way are answered
    b  drain the event log, telling each record
    c  read the extent list of every LD (5603h) and the tags (5608h), until no generation moves
    d  drain again; when that brings dynamic capacity records, go back to c for what moved
    e  tell the ApplianceSnapshot, and wait for `resume`: its step must be committed first

After that effects are carried out, several at a time, those of one tag on one host in order. Every
LD's list is read, because untagged capacity stands in no 5608h bitmap; an LD that holds nothing
costs one small request, and later rounds read only what moved.

Because a new session displaces the old one at the appliance, nothing of an older session can take
effect once this one is answered. So what the snapshot shows is the truth, and an effect whose
answer got lost is judged by it: `EffectUnknown` is told when the session ends, and whatever the
snapshot's step does not declare done is carried out again.

What is not promised: that an effect is carried out once only (it is idempotent), or ever (a device
may ask for retries without end; a later effect on the same tag and host then takes over).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from tagmem.base.ids import ApplianceId
from tagmem.base.limits import CCI_OUTSTANDING_MAX, FM_REQUEST_DEADLINE_NS, HOSTS_PER_APPLIANCE_MAX
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.domain.effects import (
    AddFailed,
    AddStarted,
    ApplianceConnected,
    ApplianceDisconnected,
    ApplianceSnapshot,
    CapacityReturned,
    DurableEffect,
    EffectUnknown,
    FenceEnded,
    FenceHost,
    HostAnswered,
    InitiateAdd,
    ReadAppliance,
    ReferenceSet,
    ReleaseFailed,
    ReleaseStarted,
    SetReference,
)
from tagmem.domain.records import Extent
from tagmem.orchestrator.pending import Job, Pending, State
from tagmem.orchestrator.reading import Lists
from tagmem.orchestrator.translate import ApplianceMap, Untranslatable
from tagmem.ports import Effect, Event
from tagmem.wire.cci import ReturnCode, return_code_name
from tagmem.wire.commands import command_of
from tagmem.wire.exchange import Fault, Notification, Requester, Response
from tagmem.wire.extent import WireExtent
from tagmem.wire.fmapi import (
    GetDcdInfoRequest,
    GetDcdInfoResponse,
    GetHostDcRegionConfigurationRequest,
    GetHostDcRegionConfigurationResponse,
    InitiateDcAddRequest,
)
from tagmem.wire.generic import (
    ClearEventRecordsRequest,
    DcEventType,
    DynamicCapacityRecord,
    EventLog,
    EventRecord,
    GetEventRecordsRequest,
    GetEventRecordsResponse,
    IdentifyRequest,
)
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream
from tagmem.wire.vendor import GetPoolMapRequest, GetPoolMapResponse

EFFECTS_OUTSTANDING_MAX = 32
"""Commands under way; the rest of CCI_OUTSTANDING_MAX is for reading lists and events."""
READS_OUTSTANDING_MAX = 24
HANDLES_PER_CLEAR_MAX = 255
"""The handle count of 0101h is one byte."""
GROUP_RECORDS_MAX = 4_096
ROUND_PAUSE_NS: Nanoseconds = 10 * MILLISECOND
"""After this many futile rounds of a snapshot, wait a moment between them."""
ROUNDS_AT_ONCE = 8
IDLE_POLL_NS: Nanoseconds = 10 * SECOND
"""How often a silent appliance is asked for events: a dead connection must not look like a quiet
one.
"""

if EFFECTS_OUTSTANDING_MAX + READS_OUTSTANDING_MAX + 4 > CCI_OUTSTANDING_MAX:
    raise ValueError("effects and reads together must fit in one session's outstanding requests")


class Phase(Enum):
    """Where a session is."""

    DOWN = "down"
    LEARNING = "learning what the appliance is"
    HOLDING = "waiting for commands under way"
    DRAINING = "draining the event log"
    READING = "reading the lists"
    DRAINING_AGAIN = "draining the event log again"
    PAUSING = "waiting, because the lists keep moving"
    TOLD = "waiting until the snapshot is committed"
    READY = "ready"


_Handler = Callable[[Response, Nanoseconds], None]


class FmLink:
    """One appliance's session. Feed it, tick it, send what is `outgoing`, take its `events`.

    Order of calls after each commit: `forget`, then `perform`, then `resume` if the commit had this
    link's snapshot in it.
    """

    def __init__(
        self,
        appliance: ApplianceId,
        *,
        deadline_ns: Nanoseconds = FM_REQUEST_DEADLINE_NS,
        idle_poll_ns: Nanoseconds = IDLE_POLL_NS,
    ) -> None:
        self.appliance = appliance
        self.phase = Phase.DOWN
        self.wants_close = ""
        """Why the connection should be closed; empty while it should not."""
        self.faults = 0
        """Things that the appliance should not have sent, since the link was made."""
        self.snapshots = 0
        self._deadline_ns = deadline_ns
        self._idle_poll_ns = idle_poll_ns
        self._events: list[Event] = []
        self._pending = Pending()
        self._uncommitted = 0
        """Snapshots told whose steps are not committed."""
        self._reset()

    def _reset(self) -> None:
        """Everything that belongs to one session."""
        stream = MctpStream(FM_EID, DEVICE_EID)
        self._requester = Requester(stream)
        self._handlers: dict[int, _Handler] = {}
        self._map: ApplianceMap | None = None
        self._info: GetDcdInfoResponse | None = None
        self._configurations: dict[int, GetHostDcRegionConfigurationResponse] = {}
        self._pool_maps: dict[int, GetPoolMapResponse | None] = {}
        self._reads: deque[tuple[WireStruct, _Handler]] = deque()
        self._reading = 0
        self._lists = Lists()
        self._rounds = 0
        self._round_at: Nanoseconds | None = None
        self._again = False
        self._getting = False
        self._get_again = False
        self._got_at: Nanoseconds = 0
        self._urgent: deque[tuple[WireStruct, _Handler]] = deque()
        self._cleared: set[int] = set()
        self._overflowed = False
        self._offered: dict[tuple[int, int], Extent] = {}
        self._group: list[DynamicCapacityRecord] = []

    # ---- the shell's side

    def connected(self, now: Nanoseconds) -> None:
        """A connection to the appliance is there: begin a session on it."""
        self._reset()
        self.wants_close = ""
        self.phase = Phase.LEARNING
        self._got_at = now
        self._read(IdentifyRequest(), self._on_identify)
        self._read(GetDcdInfoRequest(), self._on_dcd_info)
        self._pump(now)

    def disconnected(self, reason: str, now: Nanoseconds) -> None:
        """The connection ended, or never came about. What was under way is unknown from here."""
        if self.phase is Phase.DOWN:
            return
        self.phase = Phase.DOWN
        self._events.extend(EffectUnknown(effect_id) for effect_id in self._pending.suspend())
        self._reset()
        self._events.append(ApplianceDisconnected(self.appliance, reason))

    def perform(self, effect: Effect, now: Nanoseconds) -> None:
        """Carry out a committed effect, as soon as the session allows. Repeats are ignored."""
        if isinstance(effect, ReadAppliance):
            self._want_snapshot(now)
        elif isinstance(effect, DurableEffect):
            given_up = self._pending.add(effect)
            if given_up is not None:
                self._finish(given_up, ReturnCode.RETRY_REQUIRED)
        self._pump(now)

    def forget(self, effect_ids: Iterable[int], now: Nanoseconds) -> None:
        """These effects are done, by a committed step: they need not be carried out (again)."""
        self._pending.forget(effect_ids)
        self._pump(now)

    def resume(self, now: Nanoseconds) -> None:
        """A snapshot's step is committed: carry out what is left to do, if it was the last one.

        Called once for each ApplianceSnapshot that was told, also for one of an earlier session,
        or one whose commit failed (then after `disconnected`): they do not count for this one.
        """
        self._uncommitted -= 1
        if self.phase is not Phase.TOLD or self._uncommitted > 0:
            return
        self.phase = Phase.READY
        self._pending.resume()
        if self._again:
            self._want_snapshot(now)
        self._pump(now)

    def feed(self, data: bytes, now: Nanoseconds) -> None:
        """Take bytes from the appliance."""
        if self.phase is Phase.DOWN:
            return
        for item in self._requester.feed(data, now):
            if isinstance(item, Response):
                handler = self._handlers.pop(item.key, None)
                if handler is not None:
                    handler(item, now)
            elif isinstance(item, Notification):
                if item.events >> EventLog.DYNAMIC_CAPACITY & 1:
                    self._get_events(now)
            else:
                self._on_fault(item)
            if self.wants_close:
                break
        if self.wants_close:
            self.disconnected(self.wants_close, now)
        else:
            self._pump(now)

    def tick(self, now: Nanoseconds) -> None:
        """Time has passed: notice what is overdue."""
        if self.phase is Phase.DOWN:
            return
        if self._requester.expire(now):
            self._close("an answer did not come in time")
            self.disconnected(self.wants_close, now)
            return
        self._pending.tick(now)
        if self._round_at is not None and self._round_at <= now:
            self._round_at = None
            self._read_lists(now)
        if self.phase is Phase.READY and self._got_at + self._idle_poll_ns <= now:
            self._get_events(now)
        self._pump(now)

    def next_deadline(self) -> Nanoseconds | None:
        """When `tick` should be called at the latest."""
        if self.phase is Phase.DOWN:
            return None
        times = [self._requester.next_deadline(), self._round_at, self._pending.retry_at]
        if self.phase is Phase.READY and not self._getting:
            times.append(self._got_at + self._idle_poll_ns)
        return min((time for time in times if time is not None), default=None)

    def outgoing(self) -> bytes:
        """The bytes to send now; they are handed over once."""
        return self._requester.outgoing()

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    @property
    def unfinished(self) -> int:
        """Durable effects that are not known to be done."""
        return len(self._pending)

    # ---- requests

    def _close(self, reason: str) -> None:
        self.wants_close = self.wants_close or reason

    def _ask(self, request: WireStruct, handler: _Handler, now: Nanoseconds) -> None:
        opcode = command_of(request).opcode
        key = self._requester.request(opcode, request, now, now + self._deadline_ns)
        self._handlers[key] = handler

    def _read(self, request: WireStruct, handler: _Handler) -> None:
        self._reads.append((request, handler))

    def _pump(self, now: Nanoseconds) -> None:
        """Send as much as may be under way."""
        if self.phase is Phase.DOWN:
            return
        while self._urgent and self._requester.outstanding < CCI_OUTSTANDING_MAX:
            request, handler = self._urgent.popleft()
            self._ask(request, handler, now)
        while self._reads and self._reading < READS_OUTSTANDING_MAX:
            request, handler = self._reads.popleft()
            self._reading += 1
            self._ask(request, self._counted(handler), now)
        if self.phase is not Phase.READY:
            return
        while self._pending.sent < EFFECTS_OUTSTANDING_MAX:
            job = self._pending.take()
            if job is None:
                break
            self._start(job, now)

    def _counted(self, handler: _Handler) -> _Handler:
        def handle(response: Response, now: Nanoseconds) -> None:
            self._reading -= 1
            handler(response, now)

        return handle

    def _body(self, response: Response) -> WireStruct | None:
        """The body of a success; None and the session's end for anything else."""
        if response.body is None:
            what = response.malformed or return_code_name(response.return_code)
            self._close(f"{response.opcode:04x}h was answered with: {what}")
        return response.body

    def _on_fault(self, fault: Fault) -> None:
        self.faults += 1
        if fault.fatal:
            self._close(fault.reason)

    # ---- learning what the appliance is

    def _on_identify(self, response: Response, now: Nanoseconds) -> None:
        """Nothing of it is needed; that it is answered shows a component that speaks CCI."""

    def _on_dcd_info(self, response: Response, now: Nanoseconds) -> None:
        info = self._body(response)
        if not isinstance(info, GetDcdInfoResponse):
            return
        if not 1 <= info.host_count <= HOSTS_PER_APPLIANCE_MAX:
            self._close(f"5600h: hosts must be 1 to {HOSTS_PER_APPLIANCE_MAX}, {info.host_count}")
            return
        self._info = info
        for ld in range(info.host_count):
            self._read(GetHostDcRegionConfigurationRequest(ld), self._on_configuration)
            self._read(GetPoolMapRequest(ld), self._pool_map_handler(ld))

    def _on_configuration(self, response: Response, now: Nanoseconds) -> None:
        configuration = self._body(response)
        if isinstance(configuration, GetHostDcRegionConfigurationResponse):
            self._configurations[configuration.host_id] = configuration
            self._learned(now)

    def _pool_map_handler(self, ld: int) -> _Handler:
        def handle(response: Response, now: Nanoseconds) -> None:
            if response.return_code == ReturnCode.UNSUPPORTED:
                self._pool_maps[ld] = None
            else:
                pools = self._body(response)
                if not isinstance(pools, GetPoolMapResponse):
                    return
                self._pool_maps[ld] = pools
            self._learned(now)

        return handle

    def _learned(self, now: Nanoseconds) -> None:
        info = self._info
        if info is None or self._map is not None:
            return
        lds = range(info.host_count)
        if len(self._pool_maps) < len(lds) or len(self._configurations) < len(lds):
            return
        try:
            self._map = ApplianceMap(
                info,
                [self._configurations[ld] for ld in lds],
                [self._pool_maps[ld] for ld in lds],
            )
        except (Untranslatable, KeyError) as error:
            self._close(f"5601h: {error}")
            return
        known = ApplianceConnected(self.appliance, self._map.regions, self._map.lds)
        self._events.append(known)
        self._lists = Lists(info.host_count)
        self._begin_snapshot(now)

    # ---- snapshot

    def _want_snapshot(self, now: Nanoseconds) -> None:
        if self.phase is Phase.READY:
            self._begin_snapshot(now)
        elif self.phase is Phase.TOLD:
            self._again = True

    def _begin_snapshot(self, now: Nanoseconds) -> None:
        self._again = False
        self._rounds = 0
        self._lists.stale()
        self.phase = Phase.HOLDING
        self._held_back(now)

    def _held_back(self, now: Nanoseconds) -> None:
        """(a) done when nothing is under way; then (b)."""
        if self.phase is Phase.HOLDING and self._pending.sent == 0:
            self.phase = Phase.DRAINING
            self._get_events(now)

    def _drained(self, now: Nanoseconds) -> None:
        """The log was found empty."""
        if self.phase is Phase.DRAINING:
            self._read_lists(now)
        elif self.phase is Phase.DRAINING_AGAIN:
            if self._lists.complete:
                self._tell_snapshot()
            else:
                self._read_lists(now)

    def _read_lists(self, now: Nanoseconds) -> None:
        """(c) for what the lists still want, then their generations; (d) when nothing moved."""
        self.phase = Phase.READING
        for request in self._lists.requests():
            self._read(request, self._on_list)
        if self._lists.waiting:
            return
        if self._lists.complete:
            self.phase = Phase.DRAINING_AGAIN
            self._get_events(now)
        elif self._rounds >= ROUNDS_AT_ONCE:
            self._rounds = 0
            self.phase = Phase.PAUSING
            self._round_at = now + ROUND_PAUSE_NS
        else:
            self._rounds += 1
            for request in self._lists.checks():
                self._read(request, self._on_list)

    def _on_list(self, response: Response, now: Nanoseconds) -> None:
        body = self._body(response)
        if body is None:
            return
        fault = self._lists.take(body)
        if fault:
            self._close(fault)
        else:
            self._read_lists(now)

    def _tell_snapshot(self) -> None:
        """(e)"""
        known = self._known()
        try:
            held = [
                item for ld, extents in self._lists.extents() for item in known.held(ld, extents)
            ]
        except Untranslatable as error:
            self._close(f"5603h: {error}")
            return
        tags = tuple(known.listed(info) for info in self._lists.tags())
        self._events.append(ApplianceSnapshot(self.appliance, tuple(held), tags))
        self._lists.stale()
        self.phase = Phase.TOLD
        self.snapshots += 1
        self._uncommitted += 1

    def _known(self) -> ApplianceMap:
        if self._map is None:
            raise Untranslatable("the appliance has not described itself yet")
        return self._map

    # ---- the event log

    def _get_events(self, now: Nanoseconds) -> None:
        """Read the log until it is empty; a call while that is going on makes it look once more."""
        if self._getting:
            self._get_again = True
            return
        self._getting = True
        self._get_again = False
        self._got_at = now
        log = GetEventRecordsRequest(EventLog.DYNAMIC_CAPACITY)
        self._urgent.append((log, self._on_events))

    def _on_events(self, response: Response, now: Nanoseconds) -> None:
        self._getting = False
        found = self._body(response)
        if not isinstance(found, GetEventRecordsResponse):
            return
        # A record whose clearing is on its way may be told again by a device that answers in
        # another order than it was asked.
        records = [r for r in found.records if r.header.handle not in self._cleared]
        whole = _whole_groups(records)
        if found.overflow and (records or not self._overflowed):
            self._take_records(records[:whole])
            self._on_overflow(now)
        elif records:
            # A group that has no end yet is left in the log, unless nothing stands before it.
            taken = records[: whole or len(records)]
            self._take_records(taken)
            self._clear(tuple(record.header.handle for record in taken))
            self._get_events(now)
        elif self._get_again or (found.more_records and found.records):
            self._get_events(now)
        else:
            self._overflowed = False
            self._drained(now)

    def _on_overflow(self, now: Nanoseconds) -> None:
        """Records were lost: start the log afresh, and read the lists instead."""
        self._overflowed = True
        self._group.clear()
        clear = ClearEventRecordsRequest(EventLog.DYNAMIC_CAPACITY, (), clear_all=True)
        self._urgent.append((clear, self._on_cleared(())))
        self._lists.stale()
        self._want_snapshot(now)
        self._get_events(now)

    def _clear(self, handles: tuple[int, ...]) -> None:
        """Clear the oldest records; the next look at the log goes out in the same breath."""
        self._cleared.update(handles)
        for at in range(0, len(handles), HANDLES_PER_CLEAR_MAX):
            some = handles[at : at + HANDLES_PER_CLEAR_MAX]
            clear = ClearEventRecordsRequest(EventLog.DYNAMIC_CAPACITY, some)
            self._urgent.append((clear, self._on_cleared(some)))

    def _on_cleared(self, handles: tuple[int, ...]) -> _Handler:
        def handle(response: Response, _now: Nanoseconds) -> None:
            self._cleared.difference_update(handles)
            self._body(response)

        return handle

    def _take_records(self, records: Iterable[EventRecord]) -> None:
        for record in records:
            if not isinstance(record, DynamicCapacityRecord):
                continue
            self._group.append(record)
            if not record.more:
                group, self._group = self._group, []
                self._take_group(group)
            elif len(self._group) >= GROUP_RECORDS_MAX:
                self._close(f"a group of events has more than {GROUP_RECORDS_MAX} records")

    def _take_group(self, group: list[DynamicCapacityRecord]) -> None:
        """Records up to one without More belong together: one host's answer, or one return."""
        kind, ld = group[0].type, group[0].host_id
        if kind not in (DcEventType.ADD_CAPACITY_RESPONSE, DcEventType.CAPACITY_RELEASED):
            return
        self._lists.touch(ld)
        by_tag: dict[bytes, list[WireExtent]] = {}
        for record in group:
            by_tag.setdefault(record.extent.tag, []).append(record.extent)
        try:
            for raw, wires in by_tag.items():
                self._take_extents(kind, ld, raw, wires)
        except Untranslatable as error:
            self._close(f"event record: {error}")

    def _take_extents(
        self, kind: DcEventType, ld: int, raw: bytes, wires: list[WireExtent]
    ) -> None:
        known = self._known()
        tag = known.tag(raw)
        wires.sort(key=lambda wire: wire.sequence)
        region = known.media(ld, wires[0])[0]
        extents = [known.media(ld, wire)[1] for wire in wires]
        taken = tuple(extent for extent in extents if extent.length)
        if kind is DcEventType.CAPACITY_RELEASED:
            self._events.append(CapacityReturned(self.appliance, ld, tag, taken, region))
            return
        offered = self._offered.pop((ld, wires[0].start_dpa), None)
        first = offered or extents[0]
        self._events.append(HostAnswered(self.appliance, ld, tag, first, taken, region))

    # ---- effects

    def _start(self, job: Job, now: Nanoseconds) -> None:
        """Send the next command of an effect."""
        known = self._known()
        if not job.requests:
            try:
                job.requests.extend(known.requests(job.effect))
            except Untranslatable:
                self._finish(job, ReturnCode.INVALID_INPUT)
                return
        request = job.requests[0]
        effect = job.effect
        if isinstance(effect, InitiateAdd) and isinstance(request, InitiateDcAddRequest):
            # A refusal tells the place alone; for untagged capacity that has to be found again.
            for extent in request.extents[:1]:
                self._offered[effect.ld, extent.start_dpa] = effect.extents[0]
        job.state = State.SENT
        self._pending.sent += 1
        self._ask(request, self._on_effect(job), now)

    def _on_effect(self, job: Job) -> _Handler:
        def handle(response: Response, now: Nanoseconds) -> None:
            self._pending.sent -= 1
            code = response.return_code
            if code == ReturnCode.SUCCESS and len(job.requests) > 1:
                self._pending.go_on(job)
            elif code != ReturnCode.RETRY_REQUIRED or not self._pending.retry(job, now):
                self._finish(job, code)
            self._held_back(now)

        return handle

    def _finish(self, job: Job, code: int) -> None:
        """Tell what became of an effect."""
        self._pending.answered(job)
        self._events.append(_outcome(job.effect, code))


def _whole_groups(records: Sequence[EventRecord]) -> int:
    """How many records there are up to the last end of a group."""
    for at in range(len(records), 0, -1):
        record = records[at - 1]
        if not isinstance(record, DynamicCapacityRecord) or not record.more:
            return at
    return 0


def _outcome(effect: DurableEffect, code: int) -> Event:
    """The event that says what a command was answered with."""
    if isinstance(effect, SetReference):
        return ReferenceSet(effect.id, effect.tag, effect.wanted, code)
    id_, tag, host = effect.id, effect.tag, effect.host
    ok = code == ReturnCode.SUCCESS
    if isinstance(effect, InitiateAdd):
        return AddStarted(id_, tag, host) if ok else AddFailed(id_, tag, host, code)
    if isinstance(effect, FenceHost):
        return FenceEnded(id_, tag, host, code)
    if ok:
        return ReleaseStarted(id_, tag, host, effect.forced)
    return ReleaseFailed(id_, tag, host, effect.forced, code)
