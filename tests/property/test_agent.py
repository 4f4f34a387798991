"""The agent's loop against a small model of a device and a host, in any order of events, with
crashes.

Whatever happens: a group is answered once and in order, nothing is returned while a process holds
it or could still find it by name, and what is said to be released and proved is so. When people
stop meddling, everything that is not wanted comes back.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tagmem.agent import records as r
from tagmem.agent.loop import AgentMachine
from tagmem.agent.vms import DetachGuests, GuestsAsked
from tagmem.base.units import MIB, SECOND, Dpa
from tagmem.ports import Batch, Effect, Event, Holding, Tick
from tagmem.store.memory import MemoryStore
from tagmem.wire.agentapi import Desired, Workload, WorkloadReport

TAGS = tuple(f"00000000-0000-4000-8000-00000000000{n}" for n in range(1, 3))
SIZE = 2 * MIB
REGIONS = (r.Region(Dpa(0), 1024 * MIB, 2 * MIB),)
HOST = (r.Surface, r.Withdraw)
WORK = (r.Launch, r.Signal)
PROOF = (r.CheckHolders, r.KillHolders)


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000 * SECOND
        self.store = MemoryStore(r.KINDS)
        self.machine = AgentMachine()
        self.machine.restore(self.store.load())
        self.channels: dict[str, list[Effect]] = {"device": [], "host": [], "work": [], "proof": []}
        # the device
        self.accepted: dict[str, tuple[r.Span, ...]] = {}
        self.pending: list[tuple[int, str, tuple[r.Span, ...]]] = []
        self.numbers: dict[int, int] = {}
        self.session_up = False
        self.next_offer = 0
        self.next_group = 0
        # the host
        self.named: set[str] = set()
        self.holders: dict[str, set[int]] = {tag: set() for tag in TAGS}
        self.running: dict[str, str] = {}
        self.ended: dict[str, WorkloadReport] = {}
        self.launched: set[str] = set()
        self.revision = 0
        self.wanted: dict[str, Desired] = {}
        self.start()

    # ---- the engine

    def give(self, *events: Event) -> None:
        for event in events:
            step = self.machine.step(event, self.now)
            self.store.commit(Batch((step,), self.now))
            for effect in step.effects:
                self.order(effect)

    def order(self, effect: Effect) -> None:
        if isinstance(effect, HOST):
            self.channels["host"].append(effect)
        elif isinstance(effect, WORK):
            self.channels["work"].append(effect)
        elif isinstance(effect, PROOF):
            self.channels["proof"].append(effect)
        elif isinstance(effect, r.Report):
            self.reported(effect)
        else:
            self.channels["device"].append(effect)

    def reported(self, effect: r.Report) -> None:
        seen = effect.observed
        if seen.phase == "released" and seen.proved:
            assert not self.holders[seen.tag], "said to be released while held"
            assert seen.tag not in self.running

    def start(self) -> None:
        reports = {tag: WorkloadReport(w, "running", 1) for tag, w in self.running.items()}
        for tag, report in self.ended.items():
            reports.setdefault(tag, report)
        self.give(r.Started({tag: f"/{tag}" for tag in self.named}, reports))
        self.connect()

    def connect(self) -> None:
        self.session_up = True
        self.channels["device"].clear()
        self.numbers.clear()
        self.give(self.read(fresh=True))
        for offer, tag, spans in list(self.pending):
            self.offer_group(offer, tag, spans)

    def read(self, *, fresh: bool) -> r.DeviceRead:
        held = tuple(
            r.Extent(Dpa(dpa), length, tag)
            for tag, spans in self.accepted.items()
            for dpa, length in spans
        )
        return r.DeviceRead("a0", REGIONS, held, fresh)

    def offer_group(self, offer: int, tag: str, spans: tuple[r.Span, ...]) -> None:
        self.next_group += 1
        self.numbers[self.next_group] = offer
        extents = tuple(r.Extent(Dpa(dpa), length, tag) for dpa, length in spans)
        self.give(r.Offered("a0", self.next_group, extents))

    # ---- what others do

    @rule(
        tag=st.sampled_from(TAGS),
        goal=st.sampled_from(["attached", "released"]),
        kill=st.booleans(),
        work=st.booleans(),
        up_to=st.sampled_from(["ask", "detach"]),
    )
    def want(self, tag: str, goal: Any, kill: bool, work: bool, up_to: str) -> None:
        self.revision += 1
        workload = Workload(f"w{self.revision}", ("true",)) if work else None
        desired = Desired(
            tag, self.revision, goal, "a0", SIZE, workload=workload, kill_holders=kill, up_to=up_to
        )
        self.wanted[tag] = desired
        self.give(r.DesiredReceived(desired))

    @rule(tag=st.sampled_from(TAGS))
    def repeat(self, tag: str) -> None:
        if tag in self.wanted:
            self.give(r.DesiredReceived(self.wanted[tag]))

    @rule(epoch=st.integers(0, 2))
    def sync(self, epoch: int) -> None:
        self.give(
            r.SessionOpened(), *map(r.DesiredReceived, self.wanted.values()), r.SyncEnded(epoch)
        )

    @rule(tag=st.sampled_from(TAGS), size=st.sampled_from([SIZE, SIZE, SIZE, 2 * SIZE]))
    def offer(self, tag: str, size: int) -> None:
        if tag in self.accepted or any(t == tag for _, t, _ in self.pending):
            return
        self.next_offer += 1
        spans = ((TAGS.index(tag) * 16 * MIB, size),)
        self.pending.append((self.next_offer, tag, spans))
        if self.session_up:
            self.offer_group(self.next_offer, tag, spans)

    @rule(tag=st.sampled_from(TAGS))
    def ask_back(self, tag: str) -> None:
        if tag in self.accepted and self.session_up:
            spans = self.accepted[tag]
            self.next_group += 1
            extents = tuple(r.Extent(Dpa(dpa), length, tag) for dpa, length in spans)
            self.give(r.ReleaseAsked("a0", self.next_group, extents))

    @rule(tag=st.sampled_from(TAGS))
    def take_by_force(self, tag: str) -> None:
        if tag in self.accepted and self.session_up:
            spans = self.accepted.pop(tag)
            self.next_group += 1
            extents = tuple(r.Extent(Dpa(dpa), length, tag) for dpa, length in spans)
            self.give(r.TakenByForce("a0", self.next_group, extents))

    @rule(tag=st.sampled_from(TAGS), pid=st.integers(100, 102))
    def somebody_opens(self, tag: str, pid: int) -> None:
        if tag in self.named:
            self.holders[tag].add(pid)

    @rule(tag=st.sampled_from(TAGS))
    def somebody_closes(self, tag: str) -> None:
        self.holders[tag].clear()

    @rule(tag=st.sampled_from(TAGS))
    def workload_ends(self, tag: str) -> None:
        if tag in self.running:
            self.end_workload(tag, 0)

    def end_workload(self, tag: str, code: int) -> None:
        report = WorkloadReport(self.running.pop(tag), "exited", 1, code)
        self.ended[tag] = report
        self.give(r.WorkloadChanged(tag, report))

    @rule(seconds=st.sampled_from([0.1, 1, 3, 20]))
    def time_passes(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        self.tick()

    def tick(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.give(Tick())
            deadline = self.machine.next_deadline()
            assert deadline is None or deadline > self.now

    # ---- what the shell does, in any order between channels

    @rule(channel=st.sampled_from(["device", "host", "work", "proof"]), count=st.integers(1, 4))
    def perform(self, channel: str, count: int) -> None:
        for _ in range(count):
            if self.channels[channel]:
                effect = self.channels[channel].pop(0)
                getattr(self, "do_" + type(effect).__name__.lower())(effect)

    def do_answer(self, effect: r.Answer) -> None:
        offer, tag, spans = self.pending.pop(0)
        assert self.numbers.pop(effect.group) == offer, "answered out of order"
        assert effect.accepted in ((), spans)
        if effect.accepted:
            assert tag not in self.accepted
            self.accepted[tag] = spans
        self.give(r.Answered("a0", effect.group, 0))

    def do_acknowledge(self, effect: r.Acknowledge) -> None:
        pass

    def do_readdevice(self, effect: r.ReadDevice) -> None:
        self.give(self.read(fresh=False))

    def do_detachguests(self, effect: DetachGuests) -> None:
        """There is no VM here; what is told of them changes nothing but a reason."""
        assert effect.tag not in self.named, "asked of guests while it can be found by name"
        self.give(GuestsAsked(effect.tag, "VM db1: it is in use"))

    def do_endsession(self, effect: r.EndSession) -> None:
        pass

    def do_returnextents(self, effect: r.ReturnExtents) -> None:
        assert not self.holders[effect.tag], "returned while held"
        assert effect.tag not in self.named, "returned while it can be found by name"
        assert effect.tag not in self.running
        if self.accepted.get(effect.tag) != effect.extents:
            self.give(r.Returned("a0", effect.tag, 0x0F))
            return
        del self.accepted[effect.tag]
        self.give(r.Returned("a0", effect.tag, 0))

    def do_surface(self, effect: r.Surface) -> None:
        if effect.tag in self.accepted:
            self.named.add(effect.tag)
            self.give(r.Surfaced(effect.tag, effect.ticket, f"/{effect.tag}"))
        else:
            self.give(r.SurfaceFailed(effect.tag, effect.ticket, "the appliance does not list it"))

    def do_withdraw(self, effect: r.Withdraw) -> None:
        self.named.discard(effect.tag)
        self.give(r.Withdrawn(effect.tag, effect.ticket))

    def do_checkholders(self, effect: r.CheckHolders) -> None:
        held = [Holding(pid, "x", "maps") for pid in sorted(self.holders[effect.tag])]
        if effect.tag in self.running:
            held.append(Holding(1, "w", "maps"))
        self.give(r.HoldersChecked(effect.tag, effect.ticket, tuple(held), complete=True))

    def do_killholders(self, effect: r.KillHolders) -> None:
        self.holders[effect.tag].clear()

    def do_giveup(self, effect: r.GiveUp) -> None:
        assert effect.tag not in self.named

    def do_launch(self, effect: r.Launch) -> None:
        if effect.workload.id in self.launched:
            return
        assert effect.tag not in self.running, "two workloads at once"
        self.launched.add(effect.workload.id)
        self.running[effect.tag] = effect.workload.id
        self.ended.pop(effect.tag, None)
        self.give(r.WorkloadChanged(effect.tag, WorkloadReport(effect.workload.id, "running", 1)))

    def do_signal(self, effect: r.Signal) -> None:
        if self.running.get(effect.tag) == effect.workload_id:
            if effect.how == "kill":
                self.end_workload(effect.tag, 137)
        elif effect.workload_id not in self.launched:
            report = WorkloadReport(effect.workload_id, "failed", reason="never started")
            self.launched.add(effect.workload_id)
            self.give(r.WorkloadChanged(effect.tag, report))

    def drain(self) -> None:
        for _ in range(50):
            for channel in self.channels:
                self.perform(channel, 4)

    @rule(tag=st.sampled_from(TAGS), work=st.booleans(), pids=st.integers(0, 2))
    def lives(self, tag: str, work: bool, pids: int) -> None:
        """What usually happens, so that faults meet tags that are in use."""
        self.link_comes_back()
        self.want(tag, "attached", kill=False, work=work, up_to="detach")
        self.drain()
        self.offer(tag, SIZE)
        self.drain()
        for pid in range(pids):
            self.somebody_opens(tag, 100 + pid)

    @rule(tag=st.sampled_from(TAGS), kill=st.booleans())
    def leaves(self, tag: str, kill: bool) -> None:
        """The beginning of a release; the rest in any order."""
        self.want(tag, "released", kill=kill, work=False, up_to="detach")

    # ---- faults

    @rule()
    def crash(self) -> None:
        for orders in self.channels.values():
            orders.clear()
        self.machine = AgentMachine()
        self.machine.restore(self.store.load())
        self.start()

    @rule(lost=st.booleans())
    def link_breaks(self, lost: bool) -> None:
        """`lost`: what was sent last has taken effect, and its answer is lost."""
        if lost and self.channels["device"]:
            effect = self.channels["device"][0]
            if isinstance(effect, r.Answer):
                _, tag, spans = self.pending.pop(0)
                if effect.accepted:
                    self.accepted[tag] = spans
            elif isinstance(effect, r.ReturnExtents):
                assert not self.holders[effect.tag]
                if self.accepted.get(effect.tag) == effect.extents:
                    del self.accepted[effect.tag]
        self.channels["device"].clear()
        self.session_up = False
        self.give(r.LinkLost("a0", "test"))

    @rule()
    def link_comes_back(self) -> None:
        if not self.session_up:
            self.connect()

    def teardown(self) -> None:
        """Nobody meddles any more and nothing is wanted: everything comes back."""
        if not self.session_up:
            self.connect()
        for tag in TAGS:
            self.want(tag, "released", kill=False, work=False, up_to="detach")
            self.somebody_closes(tag)
        for _ in range(200):
            if not any(self.channels.values()):
                self.time_passes(1)
                if not any(self.channels.values()) and not self.accepted and not self.pending:
                    break
            for channel in self.channels:
                self.perform(channel, 4)
        assert not self.accepted
        assert not self.pending
        assert not self.named
        phases = {state.tag: state.observed().phase for state in self.machine.tags()}
        assert phases == dict.fromkeys(TAGS, "released"), phases


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
