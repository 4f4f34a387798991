"""The orchestrator's machine along the paths that people take, and along those they should not."""

from __future__ import annotations

import pytest

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import GIB, MIB, SECOND, Dpa
from tagmem.domain import effects as ev
from tagmem.domain.effects import InitiateAdd, TellHost
from tagmem.domain.invariants import check
from tagmem.domain.machine import HANDLERS, OrchestratorMachine
from tagmem.domain.outcome import Outcome
from tagmem.domain.records import (
    AttachmentRecord,
    AttachmentState,
    CapacityState,
    Extent,
    LdRecord,
    RegionRecord,
    WorkloadStatus,
)
from tagmem.ports import Event, Loaded, Step, Tick

A0 = ApplianceId("a0")
H1, H2 = HostId("h1"), HostId("h2")
T = Tag("11111111-1111-1111-1111-111111111111")
U = Tag("22222222-2222-2222-2222-222222222222")
BLOCK = 2 * MIB
REGIONS = (
    RegionRecord(0, 0, GIB, BLOCK),
    RegionRecord(1, 1, GIB, BLOCK, sharable=True, hardware_coherent=True),
)
LDS = (
    LdRecord(0, (Dpa(0), Dpa(4 * GIB))),
    LdRecord(1, (Dpa(16 * GIB), Dpa(32 * GIB)), mirrored=True),
)


class World:
    """A machine, what it has committed, and its clock."""

    def __init__(self) -> None:
        self.machine = OrchestratorMachine()
        self.now = 1_000 * SECOND
        self.rows: dict[tuple[str, str], object] = {}
        self.do(ev.RegisterAppliance("a0", "unix:/a0"))
        self.do(ev.ApplianceConnected(A0, REGIONS, LDS))
        self.do(ev.ApplianceSnapshot(A0, (), ()))
        for host, ld in ((H1, 0), (H2, 1)):
            assert self.do(ev.RegisterHost(host, {"a0": ld})).reply.outcome is Outcome.CREATED
            assert self.do(ev.HostConnected(host, "boot", {A0: ld})).reply.outcome is Outcome.OK

    def do(self, event: Event) -> Step:
        step = self.machine.step(event, self.now)
        for change in step.changes:
            if change.record is None:
                self.rows.pop((change.kind, change.key), None)
            else:
                self.rows[change.kind, change.key] = change.record
        check(self.machine.state)
        return step

    def restart(self) -> None:
        state = self.machine.state
        self.machine = OrchestratorMachine()
        records = [(kind, key, record) for (kind, key), record in self.rows.items()]
        outbox = [effect for _, effect in sorted(state.outbox.items())]
        self.machine.restore(Loaded(records, outbox, state.last_effect_id))

    def at(self, host: HostId = H1, tag: Tag = T) -> AttachmentRecord:
        record = self.machine.state.attachment(tag, host)
        assert record is not None
        return record

    def state(self, tag: Tag = T) -> CapacityState | None:
        record = self.machine.state.capacities.get(tag)
        return record.state if record else None

    def free(self, region: int = 0) -> int:
        return self.machine.state.pool("a0", region).free.free_bytes

    def create(self, **settings: object) -> Step:
        fields: dict[str, object] = {"tag": T, "size_bytes": 64 * MIB, "hosts": (H1,), **settings}
        return self.do(ev.CreateCapacity(**fields))  # type: ignore[arg-type]

    def add(self, step: Step) -> InitiateAdd:
        (found,) = [effect for effect in step.effects if isinstance(effect, InitiateAdd)]
        return found

    def attached(self, **settings: object) -> InitiateAdd:
        add = self.add(self.create(**settings))
        self.take(add)
        return add

    def take(self, add: InitiateAdd) -> Step:
        started = self.do(ev.AddStarted(add.id, add.tag, add.host))
        assert started.done == (add.id,)
        return self.answer(add, add.extents)

    def answer(self, add: InitiateAdd, extents: tuple[Extent, ...]) -> Step:
        tag = add.tag if add.tagged else Tag("00000000-0000-0000-0000-000000000000")
        return self.do(ev.HostAnswered(A0, add.ld, tag, add.extents[0], extents))

    def returned(self, add: InitiateAdd) -> Step:
        tag = add.tag if add.tagged else Tag("00000000-0000-0000-0000-000000000000")
        return self.do(ev.CapacityReturned(A0, add.ld, tag, add.extents))

    def prove(self, host: HostId = H1, tag: Tag = T) -> Step:
        revision = self.at(host, tag).revision
        return self.do(ev.HostObserved(host, tag, revision, "released", proved=True))

    def tick(self) -> Step:
        deadline = self.machine.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.do(Tick())


@pytest.fixture
def world() -> World:
    return World()


def kinds(step: Step) -> list[type]:
    return [type(effect) for effect in step.effects]


def types(step: Step) -> list[str]:
    return [note.type for note in step.notes]


def test_every_event_has_a_handler() -> None:
    events = {
        c
        for c in vars(ev).values()
        if isinstance(c, type) and issubclass(c, Event) and c is not Event
    }
    assert events | {Tick} == set(HANDLERS)


def test_the_seven_steps(world: World) -> None:
    step = world.create()
    assert step.reply.outcome is Outcome.CREATED
    assert kinds(step) == [InitiateAdd, TellHost]
    assert world.state() is CapacityState.ACTIVE
    add = world.add(step)
    assert "capacity.offered" in types(world.do(ev.AddStarted(add.id, T, H1)))
    assert world.at().state is AttachmentState.OFFERED
    assert "capacity.attached" in types(world.answer(add, add.extents))
    revision = world.at().revision
    step = world.do(ev.HostObserved(H1, T, revision, "attached", dax_path="/run/dax0.1"))
    assert "capacity.ready" in types(step)
    assert world.at().ready
    step = world.do(ev.LaunchWorkload(T, H1, "w", ("memcached",)))
    assert step.reply.outcome is Outcome.ACCEPTED
    assert kinds(step) == [TellHost]
    wanted = world.machine.desired(H1, T)
    assert wanted is not None
    assert wanted.workload is not None
    assert wanted.revision > revision
    status = WorkloadStatus("w", "running", pid=7)
    step = world.do(
        ev.HostObserved(H1, T, wanted.revision, "attached", dax_path="x", workload=status)
    )
    assert types(step) == ["workload.running"]
    step = world.do(ev.ReleaseCapacity(T))
    assert step.reply.outcome is Outcome.ACCEPTED
    assert world.state() is CapacityState.RELEASING
    wanted = world.machine.desired(H1, T)
    assert wanted is not None
    assert wanted.released
    world.prove()
    assert world.state() is CapacityState.SANITISING
    assert world.free() == GIB - 64 * MIB
    step = world.returned(add)
    assert "capacity.released" in types(step)
    assert world.state() is None
    assert world.free() == GIB
    assert not world.machine.state.outbox
    assert {kind for kind, _ in world.rows} == {"appliance", "host"}


def test_a_mirrored_host_sees_other_addresses(world: World) -> None:
    world.attached(hosts=(H2,))
    wanted = world.machine.desired(H2, T)
    assert wanted is not None
    assert wanted.extents == ((17 * GIB - 64 * MIB, 64 * MIB),)
