"""The appliance's own rules: one machine that knows what is pending, accepted, referenced, dead and
being wiped.

Theory of operation. An *allocation* is media under one tag. An add makes it (or, for shared access,
finds it), makes the LD a pending holder and queues a *group*; the host's answer to its oldest group
turns the holder into a real one (type 4 to the fabric manager) or lets it go. Any way of losing it
(4803h, forced release, reset) goes through `device_free.let_go`. When the last holder and the
reference are gone, the media are sanitised (a durable effect) and only then free; the last type 5
record says exactly that.

    nothing --add--> pending --4802h--> added --4803h / forced--> (others hold it)
                        |                 |                            | last one
                        | refused         | (5605h: a record only)     v
                        +-> free          +                         sanitising --zero--> free
                        | forced                                       | fails six times
                        +-> free, group dead                           v
                                                                    failed: never given out again

What is volatile: half-sent lists, which overflow a reader has seen. Everything else is rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import msgspec

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.limits import REGION_GRANULARITY_BYTES
from tagmem.base.units import Nanoseconds, align_up
from tagmem.domain import device_fm, device_free, device_host
from tagmem.domain.device_records import (
    DC_LOG,
    FM_PORT,
    OK,
    Add,
    AddReference,
    Adopt,
    AllocState,
    Answer,
    ClearEvents,
    Code,
    Conceal,
    Configuration,
    Counts,
    DeviceSpec,
    Expose,
    ExtentPage,
    Fence,
    FencePlan,
    HeadReset,
    HeldExtent,
    HostRelease,
    LogPage,
    MediaLost,
    MediaView,
    PortRow,
    Query,
    RegionInfo,
    Release,
    RemoveReference,
    Respond,
    SanitiseDone,
    SanitiseFailed,
    SanitiseReport,
    SessionStarted,
    SetInterruptPolicy,
    SetRegionConfig,
    SpecRow,
    TagEntry,
    TagPage,
)
from tagmem.domain.device_state import DeviceState, Draft
from tagmem.ports import Event, Loaded, Step, Tick

Handler = Callable[[Any, Nanoseconds], Answer]


class DeviceMachine:
    """The device as a machine: commands and results in, rows, effects and an Answer out."""

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec
        self.state = DeviceState(spec)
        self._chains = device_host.Chains(len(spec.lds))
        self._handlers: dict[type[Event], Handler] = {
            Add: lambda e, now: device_fm.add(self.state, e, now),
            Release: lambda e, now: device_fm.release(self.state, e, now),
            AddReference: lambda e, _: device_fm.add_reference(self.state, e),
            RemoveReference: lambda e, now: device_fm.remove_reference(self.state, e, now),
            SetRegionConfig: lambda e, now: device_fm.set_region_config(self.state, e, now),
            Respond: self._respond,
            HostRelease: self._host_release,
            ClearEvents: lambda e, _: self._clear_events(e),
            SetInterruptPolicy: lambda e, _: self._set_policy(e),
            Fence: lambda e, _: self._fence(e),
            Query: lambda e, _: self.query(e),
            SessionStarted: lambda e, _: self._session_started(e),
            SanitiseDone: self._sanitise_done,
            SanitiseFailed: self._sanitise_failed,
            HeadReset: self._head_reset,
            MediaLost: self._media_lost,
            Adopt: lambda e, _: self._adopt(e),
            Tick: lambda _, now: self._tick(now),
        }

    # ---- Machine

    def restore(self, loaded: Loaded) -> None:
        """Start from what the store has; chains of half-sent lists are void."""
        self.state.load(loaded)
        self._chains = device_host.Chains(len(self.spec.lds))

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """Decide one event; the reply is an Answer."""
        draft = self.state.draft = Draft()
        answer = self._handlers[type(event)](event, now)
        return draft.step(answer)

    def next_deadline(self) -> Nanoseconds | None:
        """When a failed sanitising is to be tried again."""
        return min(self.state.waiting.values(), default=None)

    # ---- the host's lists

    def _respond(self, event: Respond, now: Nanoseconds) -> Answer:
        ranges = self._chains.take(event)
        if isinstance(ranges, Answer):
            return ranges
        return device_host.respond(self.state, event.ld, ranges, now)

    def _host_release(self, event: HostRelease, now: Nanoseconds) -> Answer:
        ranges = self._chains.take(event)
        if isinstance(ranges, Answer):
            return ranges
        return device_host.host_release(self.state, event.ld, ranges, now)

    def _session_started(self, event: SessionStarted) -> Answer:
        if event.port != FM_PORT:
            self._chains.reset(event.port)
        return OK

    # ---- event logs

    def _clear_events(self, event: ClearEvents) -> Answer:
        port = self.state.ports[event.port]
        if not 0 <= event.log <= DC_LOG:
            return Answer(Code.INVALID_INPUT, None, f"event log {event.log}")
        records = port.records if event.log == DC_LOG else ()
        overflowed = event.log == DC_LOG and port.row.overflow_count > 0
        if event.clear_all:
            if not overflowed:
                return Answer(Code.INVALID_INPUT, None, "clear all is for a log that overflowed")
            count = len(records)
            # Every record goes, so every overflow up to now counts as told.
            port.overflow_told = port.row.overflow_count
        else:
            count = len(event.handles)
            oldest = [record.handle for record in islice(records, count)]
            if oldest != list(event.handles):
                return Answer(Code.INVALID_HANDLE, None, "handles are not the oldest records'")
        if count or event.clear_all:
            self._forget_records(event.port, count)
        return OK

    def _forget_records(self, number: int, count: int) -> None:
        port = self.state.ports[number]
        changes = self.state.draft.changes
        for _ in range(count):
            record = port.records.popleft()
            changes["event", f"{number}/{record.seq}"] = None
        row = port.row
        if row.overflow_count and port.overflow_told == row.overflow_count:
            row = msgspec.structs.replace(
                row, overflow_count=0, overflow_first_ns=0, overflow_last_ns=0
            )
            port.overflow_told = 0
        # With no record left, only this row knows the next handle.
        if row is not port.row or not port.records:
            port.row = row
            changes["port", str(number)] = row

    def _set_policy(self, event: SetInterruptPolicy) -> Answer:
        port = self.state.ports[event.port]
        policy = event.policy
        if any(byte & 3 == 3 for byte in policy) or (len(policy) > DC_LOG and policy[4] & 3 == 2):
            return Answer(Code.INVALID_INPUT, None, f"interrupt modes {policy.hex()}")
        policy = policy[:5] + port.row.policy[len(policy) : 5]
        port.row = msgspec.structs.replace(port.row, policy=policy)
        self.state.draft.changes["port", str(event.port)] = port.row
        return OK

    # ---- fence

    def _fence(self, event: Fence) -> Answer:
        state = self.state
        if not 0 <= event.ld < len(self.spec.lds):
            return Answer(Code.INVALID_INPUT, None, f"host {event.ld}")
        if event.tag != NIL_TAG:
            row = state.live(event.tag)
            rows = [row] if row is not None and row.holder(event.ld) else []
        else:
            region = state.region_at(event.start, event.length)
            if region is None or event.length <= 0:
                return Answer(Code.INVALID_INPUT, None, f"no region at {event.start:#x}")
            media = state.to_media(event.ld, region, event.start, event.length)
            space = state.pools[self.spec.regions[region].pool]
            found = {owner for _, _, owner in space.owners(media, event.length)}
            rows = [state.allocations[number] for number in sorted(found)]
            rows = [row for row in rows if row.holder(event.ld)]
        plans: list[FencePlan] = []
        for row in rows:
            holders = tuple(
                [
                    msgspec.structs.replace(h, fenced=True) if h.ld == event.ld else h
                    for h in row.holders
                ]
            )
            shared = len(holders) > 1 or row.referenced
            plans.append(FencePlan(event.ld, row.file, row.pool, row.pieces, shared))
            if holders != row.holders:
                state.put(msgspec.structs.replace(row, holders=holders))
            state.draft.effects.append(Conceal(0, event.ld, row.file))
        return Answer(Code.SUCCESS, tuple(plans))

    # ---- media

    def _sanitise_done(self, event: SanitiseDone, now: Nanoseconds) -> Answer:
        device_free.sanitise_done(self.state, event, now)
        return OK

    def _sanitise_failed(self, event: SanitiseFailed, now: Nanoseconds) -> Answer:
        device_free.sanitise_failed(self.state, event, now)
        return OK

    def _tick(self, now: Nanoseconds) -> Answer:
        due = [number for number, at_ns in self.state.waiting.items() if at_ns <= now]
        for number in due:
            device_free.start_sanitising(self.state, self.state.allocations[number])
        return OK

    def exposures(self) -> list[Expose]:
        """Every way to bytes that should exist now: what the shell compares the world with at
        start.
        """
        return [
            self.state.expose(row, holder)
            for row in self.state.allocations.values()
            if row.state is AllocState.LIVE
            for holder in row.holders
            if not holder.pending and not holder.fenced
        ]

    def files(self) -> dict[str, bool]:
        """Every file of bytes that may exist, and whether it must."""
        return {
            row.file: row.state is AllocState.LIVE
            for row in self.state.allocations.values()
            if row.touched
        }

    # ---- resets

    def _head_reset(self, event: HeadReset, now: Nanoseconds) -> Answer:
        state = self.state
        ld = event.ld
        for group in list(state.groups[ld]):
            state.drop_group(group)
            for item in group.items:
                if not item.dead:
                    state.log(FM_PORT, now, [device_host.refusal(state, ld, item)])
                    device_free.let_go(state, state.allocations[item.allocation], ld, now)
        state.groups[ld].clear()
        for number in list(state.members[ld]):
            row = state.allocations[number]
            if not row.sharable:
                continue
            for holder in row.holders:
                current = state.allocations[number]
                if holder.pending:
                    device_fm.kill_offer(state, current, holder.ld)
                device_free.let_go(state, current, holder.ld, now, forced=True)
        self._empty_log(ld)
        self._chains.reset(ld)
        state.changed(ld)
        return OK

    def _empty_log(self, number: int) -> None:
        port = self.state.ports[number]
        for record in port.records:
            self.state.draft.changes["event", f"{number}/{record.seq}"] = None
        port.records.clear()
        port.overflow_told = 0
        port.row = PortRow(number, next_seq=port.row.next_seq)
        self.state.draft.changes["port", str(number)] = port.row

    def _media_lost(self, event: MediaLost, now: Nanoseconds) -> Answer:
        state = self.state
        for row in list(state.allocations.values()):
            if row.effect:
                state.draft.done.append(row.effect)
            state.remove(row)
        for ld, queue in enumerate(state.groups):
            for group in queue:
                state.drop_group(group)
            queue.clear()
            state.changed(ld)
        for number in state.ports:
            self._empty_log(number)
        self._keep_spec(event.media)
        return OK

    def _adopt(self, event: Adopt) -> Answer:
        state = self.state
        if state.foreign:
            reason = f"{state.foreign} allocations were made under another configuration"
            return Answer(Code.UNSUPPORTED, None, reason)
        for key in state.stale:
            state.draft.changes[key] = None
        state.stale = []
        self._keep_spec(event.media)
        return OK

    def _keep_spec(self, media: str) -> None:
        self.state.spec_row = SpecRow(self.spec, media)
        self.state.draft.changes["spec", "spec"] = self.state.spec_row

    # ---- questions

    def query(self, event: Query) -> Answer:
        """Answer about the present state; true to the outside only when that is durable."""
        method: Callable[..., Answer] | None = getattr(self, f"_ask_{event.name}", None)
        if method is None:
            return Answer(Code.UNSUPPORTED, None, event.name)
        return method(*event.args)

    def _interrupted(self, ld: int, host: int) -> bool:
        return bool(host) and self._chains.interrupted(ld)

    def _ask_configuration(self, ld: int, host: int) -> Answer:
        if not 0 <= ld < len(self.spec.lds):
            return Answer(Code.INVALID_INPUT, None, f"host {ld}")
        if self._interrupted(ld, host):
            return Answer(Code.INVALID_INPUT, None, "it interrupted a list")
        return Answer(Code.SUCCESS, Configuration(self.region_infos(), self.counts()))

    def region_infos(self) -> tuple[RegionInfo, ...]:
        """The regions as every LD sees them."""
        return tuple(
            RegionInfo(
                index=index,
                base=self.state.bases[index],
                decode_bytes=align_up(spec.size_bytes, REGION_GRANULARITY_BYTES),
                size_bytes=spec.size_bytes,
                block_bytes=self.state.regions[index].block_bytes,
                block_sizes=device_fm.block_sizes(spec),
                pool=spec.pool,
                sharable=spec.sharable,
                hardware_coherent=spec.hardware_coherent,
                read_only=spec.read_only,
                sanitise=self.state.regions[index].sanitise,
            )
            for index, spec in enumerate(self.spec.regions)
        )

    def counts(self) -> Counts:
        """What can be tracked and what of that is left."""
        spec, state = self.spec, self.state
        return Counts(
            spec.extents_max,
            max(0, spec.extents_max - state.extents_used),
            spec.tags_max,
            max(0, spec.tags_max - state.tags_used),
        )

    def _ask_regions(self) -> Answer:
        return Answer(Code.SUCCESS, self.region_infos())

    def _ask_extents(self, ld: int, first: int, count: int, host: int) -> Answer:
        if not 0 <= ld < len(self.spec.lds):
            return Answer(Code.INVALID_INPUT, None, f"host {ld}")
        if self._interrupted(ld, host):
            return Answer(Code.INVALID_INPUT, None, "it interrupted a list")
        total = self.state.extent_counts[ld]
        if first > total:
            return Answer(Code.INVALID_INPUT, None, f"extent {first} of {total}")
        held = self.state.extent_list(ld)[first : first + count] if count else []
        extents = tuple([HeldExtent(*cast("tuple[Any, Any, Any, Any]", e)) for e in held])
        generation = self.state.ld_rows[ld].generation
        return Answer(Code.SUCCESS, ExtentPage(total, generation, extents))

    def _ask_tags(self, first: int, count: int) -> Answer:
        state = self.state
        total = len(state.tags)
        if first > total:
            return Answer(Code.INVALID_INPUT, None, f"tag {first} of {total}")
        tags = islice(state.tags, first, first + count)
        entries = tuple([self._entry(tag) for tag in tags])
        return Answer(Code.SUCCESS, TagPage(state.tag_generation, total, entries))

    def _entry(self, tag: Tag) -> TagEntry:
        row = self.state.live(tag)
        if row is None:
            return TagEntry(tag, False, (), ())
        added = tuple([h.ld for h in row.holders if not h.pending])
        pending = tuple([h.ld for h in row.holders if h.pending])
        return TagEntry(tag, row.referenced, added, pending)

    def _ask_events(self, number: int, log: int, count: int) -> Answer:
        if not 0 <= log <= DC_LOG:
            return Answer(Code.INVALID_INPUT, None, f"event log {log}")
        if log != DC_LOG:
            return Answer(Code.SUCCESS, LogPage((), False))
        port = self.state.ports[number]
        row = port.row
        port.overflow_told = row.overflow_count
        records = tuple(islice(port.records, count))
        more = len(port.records) > len(records)
        page = LogPage(
            records, more, row.overflow_count, row.overflow_first_ns, row.overflow_last_ns
        )
        return Answer(Code.SUCCESS, page)

    def _ask_policy(self, number: int) -> Answer:
        policy = self.state.ports[number].row.policy
        # Never set: the dynamic capacity log interrupts, which is what a notification over a socket
        # is.
        return Answer(
            Code.SUCCESS, policy if len(policy) == 5 else (policy + bytes(4))[:4] + b"\x01"
        )

    def _ask_media(self, ld: int, tag: Tag) -> Answer:
        row = self.state.live(tag)
        holder = None if row is None else row.holder(ld)
        if row is None or holder is None or holder.pending or holder.fenced:
            return Answer(Code.INVALID_INPUT, None, f"tag {tag} is not accepted")
        read_only = self.spec.regions[holder.region].read_only
        return Answer(Code.SUCCESS, MediaView(row.file, row.pool, row.pieces, read_only))

    def _ask_sanitised(self, tag: Tag) -> Answer:
        rows = [self.state.allocations[number] for number in self.state.tags.get(tag, ())]
        if any(row.state is AllocState.FAILED for row in rows):
            return Answer(Code.SUCCESS, SanitiseReport(3))
        if any(row.state is AllocState.SANITISING for row in rows):
            return Answer(Code.SUCCESS, SanitiseReport(1))
        done = self.state.wiped.get(tag)
        if done is None:
            return Answer(Code.SUCCESS, SanitiseReport(0))
        report = SanitiseReport(
            2, done.method, done.sanitised_bytes, done.read_back_bytes, done.finished_ns
        )
        return Answer(Code.SUCCESS, report)
