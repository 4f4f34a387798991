"""The machine against a small fake world that answers late, in any order, or not at all.

The fake keeps its own truth: what the device holds, offers and sanitises, and which hosts'
processes map what. The invariants look at both after each step: whatever the orchestrator does, no
byte is lent while somebody may still touch it, and after quiet all is as the books say.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tagmem.base.ids import NIL_TAG, ApplianceId, HostId, Tag
from tagmem.base.units import GIB, MIB, SECOND, Dpa
from tagmem.domain import effects as ev
from tagmem.domain import invariants
from tagmem.domain.invariants import DeviceExtent
from tagmem.domain.machine import OrchestratorMachine
from tagmem.domain.outcome import Outcome
from tagmem.domain.records import (
    ApplianceState,
    AttachmentState,
    LdRecord,
    Reference,
    RegionRecord,
    Sharing,
)
from tagmem.ports import Effect, Event, Loaded, Step, Tick

A0 = ApplianceId("a0")
HOSTS = tuple(HostId(f"h{n}") for n in range(3))
TAGS = tuple(Tag(f"{n}0000000-0000-0000-0000-000000000000") for n in range(1, 5))
BLOCK = 2 * MIB
REGIONS = (
    RegionRecord(0, 0, 32 * BLOCK, BLOCK),
    RegionRecord(1, 1, 16 * BLOCK, BLOCK, sharable=True, hardware_coherent=True),
    RegionRecord(2, 2, 16 * BLOCK, BLOCK, sharable=True),
    RegionRecord(3, 2, 16 * BLOCK, BLOCK, sharable=True, read_only=True),
)
BASES = tuple(Dpa(n * 4 * GIB) for n in range(4))
LDS = tuple(LdRecord(n, BASES, mirrored=n == 2) for n in range(3))


class Device:
    """What an appliance does, without bytes: adds, answers, returns, sanitising. Knows no
    machine."""

    def __init__(self) -> None:
        self.pending: dict[tuple[str, int], ev.InitiateAdd] = {}
        self.held: dict[tuple[str, int], ev.InitiateAdd] = {}
        self.dirty: dict[str, tuple[int, ev.InitiateAdd]] = {}
        """Being sanitised: the last holder's LD and what it held."""
        self.referenced: set[str] = set()
        self.had: dict[str, ev.InitiateAdd] = {}
        """Of each tag that some host has ever taken and that is not clean since: its last add."""
        self.log: list[Event] = []

    @staticmethod
    def name(effect: ev.InitiateAdd | ev.InitiateRelease | ev.FenceHost) -> Tag:
        return effect.tag if effect.tagged else NIL_TAG

    def add(self, effect: ev.InitiateAdd) -> int:
        """A return code of CXL."""
        key = (effect.tag, effect.ld)
        if key in self.pending or key in self.held:
            return 0x1E
        if effect.shared:
            if not self.live(effect.tag):
                return 0x02
        else:
            kept = {(tag, -1): self.had[tag] for tag in self.referenced}
            for other in {**self.pending, **self.held, **kept}.values():
                if self.overlap(other, effect):
                    return 0x1E
            for _, gone in self.dirty.values():
                if self.overlap(gone, effect):
                    return 0x05
        self.pending[key] = effect
        return 0

    @staticmethod
    def overlap(one: ev.InitiateAdd, other: ev.InitiateAdd) -> bool:
        same = REGIONS[one.region].pool == REGIONS[other.region].pool
        return same and bool(set(one.extents) & set(other.extents))

    def used(self, tag: str) -> bool:
        return any(other == tag for other, _ in {**self.held, **self.pending})

    def live(self, tag: str) -> bool:
        return tag in self.referenced or self.used(tag)

    def refer(self, effect: ev.SetReference) -> int:
        """A return code of CXL."""
        tag = effect.tag
        if effect.wanted:
            sharable = self.live(tag) and tag in self.had and REGIONS[self.had[tag].region].sharable
            if not sharable:
                return 0x02
            self.referenced.add(tag)
        elif tag not in self.referenced:
            return 0x02
        else:
            self.referenced.discard(tag)
            self._wipe_if_last(tag, self.had[tag])
        return 0

    def _wipe_if_last(self, tag: str, effect: ev.InitiateAdd) -> bool:
        if self.live(tag) or self.had.pop(tag, None) is None:
            return False
        self.dirty[tag] = (effect.ld, effect)
        return True

    def answer(self, key: tuple[str, int], accept: bool) -> None:
        effect = self.pending.pop(key)
        if accept:
            self.held[key] = self.had[key[0]] = effect
        else:
            self._wipe_if_last(key[0], effect)
        extents = effect.extents if accept else ()
        self.log.append(
            ev.HostAnswered(
                A0, effect.ld, self.name(effect), effect.extents[0], extents, effect.region
            )
        )

    def give_back(self, key: tuple[str, int]) -> None:
        effect = self.held.pop(key)
        if not self._wipe_if_last(key[0], effect):
            self._returned(effect)

    def reset_head(self, ld: int) -> None:
        """Shared capacity of one head is lost to all who share it; no host is told."""
        for tag, one in sorted(self.held):
            if one == ld and REGIONS[self.held[tag, one].region].sharable:
                for other in sorted(self.held):
                    if other[0] == tag:
                        self.give_back(other)

    def sanitised(self, tag: str) -> None:
        self._returned(self.dirty.pop(tag)[1])

    def _returned(self, effect: ev.InitiateAdd) -> None:
        self.log.append(
            ev.CapacityReturned(A0, effect.ld, self.name(effect), effect.extents, effect.region)
        )

    def force(self, effect: ev.InitiateRelease) -> None:
        key = (effect.tag, effect.ld)
        offered = self.pending.pop(key, None)
        if offered is not None:
            self._wipe_if_last(effect.tag, offered)
        if key in self.held:
            self.give_back(key)

    def snapshot(self) -> ev.ApplianceSnapshot:
        held = tuple(
            ev.HeldExtent(e.ld, e.region, self.name(e), extent)
            for e in self.held.values()
            for extent in e.extents
        )
        tags: dict[Tag, tuple[list[int], list[int]]] = {}
        for place, table in ((0, self.held), (1, self.pending)):
            for effect in table.values():
                tags.setdefault(self.name(effect), ([], []))[place].append(effect.ld)
        for _, gone in self.dirty.values():
            tags.setdefault(self.name(gone), ([], []))
        for kept in self.referenced:
            tags.setdefault(Tag(kept), ([], []))
        listed = tuple(
            ev.ListedTag(tag, tuple(a), tuple(p), tag in self.referenced)
            for tag, (a, p) in sorted(tags.items())
        )
        return ev.ApplianceSnapshot(A0, held, listed)


class World(RuleBasedStateMachine):
    """Rules are what can happen next; hypothesis chooses which."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = OrchestratorMachine()
        self.now = 1_000 * SECOND
        self.rows: dict[tuple[str, str], object] = {}
        self.outbox: dict[int, Effect] = {}
        self.last_effect_id = 0
        self.device = Device()
        self.connected = True
        self.sent: dict[int, Event | None] = {}
        """Effects carried out whose answer has not come, and the answer (None: it was lost)."""
        self.mapped: set[tuple[str, str]] = set()
        """(tag, host) that some process may touch."""
        self.do(ev.RegisterAppliance("a0", "unix:/a0"))
        self.do(ev.ApplianceConnected(A0, REGIONS, LDS))
        self.do(ev.ApplianceSnapshot(A0, (), ()))
        for ld, host in enumerate(HOSTS):
            self.do(ev.RegisterHost(host, {"a0": ld}))
            self.do(ev.HostConnected(host, "boot", {A0: ld}))

    def do(self, event: Event) -> Step:
        step = self.machine.step(event, self.now)
        for change in step.changes:
            if change.record is None:
                self.rows.pop((change.kind, change.key), None)
            else:
                self.rows[change.kind, change.key] = change.record
        for effect in step.effects:
            if effect.durable:
                self.outbox[effect.id] = effect
                self.last_effect_id = max(self.last_effect_id, effect.id)
        for effect_id in step.done:
            del self.outbox[effect_id]
        return step

    # ---- people

    @rule(
        tag=st.sampled_from(TAGS),
        blocks=st.integers(1, 12),
        hosts=st.lists(st.sampled_from(HOSTS), unique=True, max_size=3),
        kind=st.sampled_from(("tagged", "untagged", *list(Sharing)[1:])),
        contiguous=st.booleans(),
        retain=st.booleans(),
    )
    def create(
        self,
        tag: Tag,
        blocks: int,
        hosts: list[HostId],
        kind: str | Sharing,
        contiguous: bool,
        retain: bool,
    ) -> None:
        sharing = kind if isinstance(kind, Sharing) else Sharing.NONE
        shared = sharing in (Sharing.HARDWARE_COHERENT, Sharing.SOFTWARE_COHERENT)
        ready = self.machine.state.appliances["a0"].state is ApplianceState.READY
        step = self.do(
            ev.CreateCapacity(
                tag,
                blocks * BLOCK,
                tuple(hosts if shared else hosts[:1]),
                tagged=kind != "untagged",
                sharing=sharing,
                contiguous=contiguous,
                retain=retain and sharing is not Sharing.NONE,
            )
        )
        assert ready or step.reply.outcome is not Outcome.CREATED

    @rule(tag=st.sampled_from(TAGS), host=st.sampled_from(HOSTS))
    def attach(self, tag: Tag, host: HostId) -> None:
        self.do(ev.AttachCapacity(tag, host))

    @rule(
        tag=st.sampled_from(TAGS),
        host=st.sampled_from(("", *HOSTS)),
        up_to=st.sampled_from(("ask", "detach", "restart", "fence", "force")),
    )
    def release(self, tag: Tag, host: str, up_to: str) -> None:
        self.do(ev.ReleaseCapacity(tag, host, up_to))

    @rule(
        tag=st.sampled_from(TAGS),
        source=st.sampled_from(HOSTS),
        taker=st.sampled_from(HOSTS),
        up_to=st.sampled_from(("detach", "force")),
    )
    def hand_over(self, tag: Tag, source: HostId, taker: HostId, up_to: str) -> None:
        self.do(ev.HandOver(tag, source, taker, up_to))

    @rule(
        tag=st.sampled_from(TAGS),
        hosts=st.lists(st.sampled_from(HOSTS), unique=True, min_size=1, max_size=3),
    )
    def publish(self, tag: Tag, hosts: list[HostId]) -> None:
        self.do(ev.PublishCapacity(tag, tuple(hosts)))

    @rule(tag=st.sampled_from(TAGS), retain=st.booleans())
    def retain(self, tag: Tag, retain: bool) -> None:
        self.do(ev.RetainCapacity(tag, retain))

    # ---- the link to the appliance

    @precondition(lambda self: self.connected and self._unsent())
    @rule(data=st.data(), lost=st.booleans())
    def send(self, data: st.DataObject, lost: bool) -> None:
        """The command takes effect; its answer comes later, or never."""
        effect = data.draw(st.sampled_from(self._unsent()))
        answer = self._perform(effect)
        if answer is not None:
            self.sent[effect.id] = None if lost else answer

    def _unsent(self) -> list[Effect]:
        if self.machine.state.appliances["a0"].state is not ApplianceState.READY:
            return []
        return [effect for key, effect in self.outbox.items() if key not in self.sent]

    def _perform(self, effect: Effect) -> Event | None:
        if isinstance(effect, ev.InitiateAdd):
            code = self.device.add(effect)
            if code == 0x05:
                return None
            if code:
                return ev.AddFailed(effect.id, effect.tag, effect.host, code)
            return ev.AddStarted(effect.id, effect.tag, effect.host)
        if isinstance(effect, ev.FenceHost):
            self.mapped.discard((effect.tag, effect.host))
            return ev.FenceEnded(effect.id, effect.tag, effect.host, 0)
        if isinstance(effect, ev.SetReference):
            code = self.device.refer(effect)
            return ev.ReferenceSet(effect.id, effect.tag, effect.wanted, code)
        assert isinstance(effect, ev.InitiateRelease)
        assert (effect.tag, effect.host) not in self.mapped
        self.device.force(effect)
        return ev.ReleaseStarted(effect.id, effect.tag, effect.host, True)

    @precondition(lambda self: any(self.sent.values()))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        """The answer to a command arrives."""
        known = [key for key, answer in self.sent.items() if answer is not None]
        answer = self.sent.pop(data.draw(st.sampled_from(known)))
        assert answer is not None
        self.do(answer)

    @precondition(lambda self: self.device.log)
    @rule()
    def read_log(self) -> None:
        """One record of the device's log arrives; they keep their order."""
        if self.connected:
            self.do(self.device.log.pop(0))

    @rule(kind=st.sampled_from(("cut", "reread", "restart", "reconnect")))
    def trouble(self, kind: str) -> None:
        if kind == "restart":
            self.restart()
        elif kind == "reconnect":
            self.reconnect(HOSTS[0])
        elif self.connected:
            (self.cut if kind == "cut" else self.reread)()

    def cut(self) -> None:
        """The session breaks: every answer that has not come will not come."""
        for effect_id in self.sent:
            self.do(ev.EffectUnknown(effect_id))
        self.sent.clear()
        self.do(ev.ApplianceDisconnected(A0, "cut"))
        self.connected = False

    @precondition(lambda self: not self.connected)
    @rule()
    def mend(self) -> None:
        self.do(ev.ApplianceConnected(A0, REGIONS, LDS))
        self.connected = True
        self._snapshot()

    def _snapshot(self) -> None:
        while self.device.log:
            self.do(self.device.log.pop(0))
        self.do(self.device.snapshot())

    def reread(self) -> None:
        """A snapshot on a live session: the link lets outstanding answers come first."""
        for effect_id in list(self.sent):
            self.do(self.sent.pop(effect_id) or ev.EffectUnknown(effect_id))
        self._snapshot()

    @rule(willing=st.booleans())
    def flow(self, willing: bool) -> None:
        """All goes well for a while, which leads to deeper places than chance would."""
        if not self.connected:
            return
        for effect_id in list(self.sent):
            self.do(self.sent.pop(effect_id) or ev.EffectUnknown(effect_id))
        for effect in self._unsent():
            answer = self._perform(effect)
            if answer is not None:
                self.do(answer)
        for tag, ld in sorted(self.device.pending):
            self._answer((tag, ld), willing)
        while self.device.log:
            self.do(self.device.log.pop(0))

    # ---- hosts

    @precondition(lambda self: self.device.pending)
    @rule(data=st.data(), willing=st.booleans())
    def answer(self, data: st.DataObject, willing: bool) -> None:
        self._answer(data.draw(st.sampled_from(sorted(self.device.pending))), willing)

    def _answer(self, key: tuple[str, int], willing: bool) -> None:
        host = HOSTS[key[1]]
        wanted = self.machine.desired(host, key[0])
        accept = willing and wanted is not None and not wanted.released
        self.device.answer(key, accept)
        if accept and wanted is not None and not wanted.held_back:
            self.mapped.add((key[0], host))

    def _uses(self) -> list[tuple[str, int]]:
        mapped = {(tag, HOSTS.index(host)) for tag, host in self.mapped}
        return sorted(mapped | self.device.held.keys())

    @precondition(lambda self: self._uses())
    @rule(data=st.data())
    def prove(self, data: st.DataObject) -> None:
        """A host stops its processes, gives back, and says so."""
        tag, ld = data.draw(st.sampled_from(self._uses()))
        host = HOSTS[ld]
        wanted = self.machine.desired(host, tag)
        if wanted is None or not wanted.released:
            return
        self.mapped.discard((tag, host))
        if (tag, ld) in self.device.held:
            self.device.give_back((tag, ld))
        self.do(ev.HostObserved(host, Tag(tag), wanted.revision, "released", proved=True))

    @precondition(lambda self: self.device.held)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        """Somebody else took it from a host by force, and its processes know nothing of that."""
        self.device.give_back(data.draw(st.sampled_from(sorted(self.device.held))))

    @rule(ld=st.integers(0, 2))
    def reset_head(self, ld: int) -> None:
        self.device.reset_head(ld)

    @rule(tag=st.sampled_from(TAGS), host=st.sampled_from(HOSTS), stale=st.booleans())
    def report(self, tag: Tag, host: HostId, stale: bool) -> None:
        """A host says what it has: true of now, but perhaps of an older wish."""
        wanted = self.machine.desired(host, tag)
        if wanted is None:
            return
        revision = wanted.revision - 1 if stale else wanted.revision
        holds = (tag, HOSTS.index(host)) in self.device.held or (tag, host) in self.mapped
        if holds and not wanted.held_back:
            if not wanted.released and (tag, wanted.ld) in self.device.held:
                self.mapped.add((tag, host))
            event = ev.HostObserved(host, tag, revision, "attached", dax_path="/x")
        else:
            # With a wish to release there is nothing left; otherwise it is yet to come.
            proved = wanted.released and (tag, HOSTS.index(host)) not in self.device.pending
            event = ev.HostObserved(host, tag, revision, "absent", proved=proved)
        self.do(event)

    @precondition(lambda self: self.device.dirty)
    @rule(data=st.data())
    def sanitise(self, data: st.DataObject) -> None:
        self.device.sanitised(data.draw(st.sampled_from(sorted(self.device.dirty))))

    def reconnect(self, host: HostId) -> None:
        self.do(ev.HostDisconnected(host))
        self.do(ev.HostConnected(host, "boot", {A0: HOSTS.index(host)}))

    # ---- time and the process itself

    @precondition(lambda self: self.machine.next_deadline() is not None)
    @rule()
    def wait(self) -> None:
        deadline = self.machine.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        self.do(Tick())

    def restart(self) -> None:
        """kill -9 after a commit: the machine knows only what the store has."""
        before = self.machine.state
        self.machine = OrchestratorMachine()
        records = [(kind, key, record) for (kind, key), record in self.rows.items()]
        outbox = [effect for _, effect in sorted(self.outbox.items())]
        self.machine.restore(Loaded(records, outbox, self.last_effect_id))
        invariants.check_same(before, self.machine.state)
        self.sent.clear()
        self.do(ev.ApplianceConnected(A0, REGIONS, LDS))
        self.connected = True
        for ld, host in enumerate(HOSTS):
            self.do(ev.HostConnected(host, "boot", {A0: ld}))
        self._snapshot()

    # ---- what must hold

    @invariant()
    def books_are_right(self) -> None:
        invariants.check(self.machine.state)
        assert self.machine.state.outbox == self.outbox

    @invariant()
    def device_agrees(self) -> None:
        held = [
            DeviceExtent(e.ld, e.region, self.device.name(e), extent)
            for e in self.device.held.values()
            for extent in e.extents
        ]
        invariants.check_device(self.machine.state, "a0", held)

    @invariant()
    def what_may_be_touched_is_not_free(self) -> None:
        """Rule 4, seen from the processes: a mapping keeps its capacity, and its attachment."""
        for tag, host in self.mapped:
            record = self.machine.state.attachment(tag, host)
            assert record is not None, f"{tag} is mapped on {host} and forgotten"
            assert record.state is not AttachmentState.RELEASED

    @invariant()
    def what_is_dirty_is_not_free(self) -> None:
        for tag in self.device.dirty:
            assert tag in self.machine.state.capacities, f"{tag} is dirty and free"

    @invariant()
    def what_is_kept_is_not_wiped(self) -> None:
        """A reference that is known to be held keeps the bytes, whatever hosts do."""
        for tag, capacity in self.machine.state.capacities.items():
            if capacity.reference is Reference.HELD:
                assert tag not in self.device.dirty, f"{tag} is kept and wiped"

    @invariant()
    def what_has_one_writer_has_one(self) -> None:
        """Of read-only capacity nobody writes when others read, nor two before that."""
        for tag, capacity in self.machine.state.capacities.items():
            if capacity.sharing is not Sharing.READ_ONLY:
                continue
            held = [e for (name, _), e in self.device.held.items() if name == tag]
            writers = [e for e in held if not REGIONS[e.region].read_only]
            assert not writers or len(writers) == len(held), f"{tag} is read and written"
            mapped = [host for name, host in self.mapped if name == tag]
            assert capacity.published or len(mapped) <= 1, f"{mapped} write {tag}"

    def teardown(self) -> None:
        """Let everything happen that is on its way: then all that was to be given back is free."""
        if not self.connected:
            self.mend()
        for tag in TAGS:
            self.do(ev.ReleaseCapacity(tag, up_to="detach"))
        for _ in range(12):
            self.reread()
            for key in sorted(self.device.pending):
                self.device.answer(key, accept=False)
            for held, ld in sorted(self.device.held):
                self.mapped.discard((held, HOSTS[ld]))
                self.device.give_back((held, ld))
            for host in HOSTS:
                for wanted in self.machine.desired_for(host):
                    gone = (wanted.tag, wanted.ld) not in self.device.pending
                    revision, proved = wanted.revision, wanted.released and gone
                    phase = "released" if proved else "absent"
                    if proved:
                        self.mapped.discard((wanted.tag, host))
                    self.do(ev.HostObserved(host, wanted.tag, revision, phase, proved=proved))
            for dirty in sorted(self.device.dirty):
                self.device.sanitised(dirty)
            for effect in self._unsent():
                answer = self._perform(effect)
                if answer is not None:
                    self.do(answer)
        assert not self.machine.state.capacities, self.machine.state.attachments
        assert not self.outbox
        for pool in self.machine.state.pools.values():
            assert pool.free.free_bytes == pool.free.size_bytes


TestMachine = World.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
