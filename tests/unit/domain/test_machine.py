"""The orchestrator's machine along the paths that people take, and along those they should not."""

from __future__ import annotations

import pytest

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import GIB, MIB, SECOND, Dpa, MediaOffset
from tagmem.domain import effects as ev
from tagmem.domain.effects import FenceHost, InitiateAdd, InitiateRelease, ReadAppliance, TellHost
from tagmem.domain.invariants import check
from tagmem.domain.machine import HANDLERS, OrchestratorMachine
from tagmem.domain.outcome import Outcome
from tagmem.domain.placement import Request
from tagmem.domain.records import (
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityState,
    Extent,
    Holder,
    LdRecord,
    RegionRecord,
    Sharing,
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


@pytest.mark.parametrize(
    ("settings", "outcome", "field"),
    [
        ({"size_bytes": -1}, Outcome.FIELD_OUT_OF_RANGE, "size_bytes"),
        ({"hosts": (H1, H1)}, Outcome.FIELD_OUT_OF_RANGE, "hosts"),
        ({"hosts": (H1, H2)}, Outcome.FIELD_OUT_OF_RANGE, "hosts"),
        ({"region": 8}, Outcome.FIELD_OUT_OF_RANGE, "region"),
        ({"tag": "00000000-0000-0000-0000-000000000000"}, Outcome.TAG_IS_NIL, "tag"),
        ({"tag": "bread"}, Outcome.NAME_IS_MALFORMED, "tag"),
        ({"size_bytes": 0}, Outcome.SIZE_IS_ZERO, "size_bytes"),
        ({"size_bytes": MIB}, Outcome.SIZE_IS_NOT_ALIGNED, "size_bytes"),
        ({"size_bytes": 2 * GIB}, Outcome.SIZE_EXCEEDS_EVERY_REGION, "size_bytes"),
        (
            {"tagged": False, "sharing": Sharing.HARDWARE_COHERENT},
            Outcome.SHARING_NEEDS_A_TAG,
            "sharing",
        ),
        ({"hosts": ("h9",)}, Outcome.HOST_IS_UNKNOWN, "host"),
        ({"appliance": "a9"}, Outcome.APPLIANCE_IS_UNKNOWN, "appliance"),
        ({"region": 5}, Outcome.REGION_IS_UNKNOWN, "region"),
        ({"sharing": Sharing.SOFTWARE_COHERENT}, Outcome.TAG_IS_NOT_SHARABLE, "sharing"),
        ({"sharing": Sharing.READ_ONLY}, Outcome.TAG_IS_NOT_SHARABLE, "sharing"),
        # The lowest number wins where several are wrong.
        ({"size_bytes": 0, "hosts": ("h9",)}, Outcome.SIZE_IS_ZERO, "size_bytes"),
    ],
)
def test_a_bad_request_names_its_field_and_changes_nothing(
    world: World, settings: dict[str, object], outcome: Outcome, field: str
) -> None:
    before = dict(world.rows)
    step = world.create(**settings)
    assert (step.reply.outcome, step.reply.field) == (outcome, field)
    assert step.reply.limit
    assert step.reply.value
    assert not step.changes
    assert not step.effects
    assert world.rows == before


def test_a_host_that_reaches_no_appliance_gets_nothing(world: World) -> None:
    """Neither capacity of any appliance, nor of the one that was named."""
    world.do(ev.RegisterHost("h3", {}))
    before = dict(world.rows)
    unreachable = Outcome.HOST_CANNOT_REACH_APPLIANCE
    for settings, field in (({}, "hosts"), ({"appliance": "a0"}, "hosts")):
        step = world.create(hosts=("h3",), **settings)
        assert (step.reply.outcome, step.reply.field) == (unreachable, field)
        assert world.rows == before
    world.create(hosts=())
    step = world.do(ev.AttachCapacity(T, HostId("h3")))
    assert (step.reply.outcome, step.reply.field) == (unreachable, "host")
    assert not step.changes


def test_more_than_the_pool_of_the_named_appliance(world: World) -> None:
    """Elsewhere it would fit, so it is this pool that is too small."""
    world.do(ev.RegisterAppliance("b0", "unix:/b0"))
    b0 = ApplianceId("b0")
    region = RegionRecord(0, 0, 64 * MIB, BLOCK)
    world.do(ev.ApplianceConnected(b0, (region,), (LdRecord(0, (Dpa(0),)),)))
    world.do(ev.ApplianceSnapshot(b0, (), ()))
    step = world.create(hosts=(), appliance="b0", size_bytes=128 * MIB)
    assert (step.reply.outcome, step.reply.field) == (Outcome.SIZE_EXCEEDS_POOL, "size_bytes")
    assert step.reply.limit == f"at most {64 * MIB}"
    assert not step.changes


def test_what_is_not_held_is_not_released(world: World) -> None:
    step = world.do(ev.ReleaseCapacity(T))
    assert step.reply.outcome is Outcome.TAG_IS_UNKNOWN
    world.attached()
    step = world.do(ev.ReleaseCapacity(T, H2))
    assert (step.reply.outcome, step.reply.field) == (Outcome.HOST_DOES_NOT_HOLD_TAG, "host")
    assert not step.changes


def test_a_repeat_is_already_so_and_other_parameters_conflict(world: World) -> None:
    world.create()
    step = world.create()
    assert step.reply.outcome is Outcome.ALREADY_SO
    assert not step.changes
    conflict = world.create(size_bytes=2 * MIB)
    assert conflict.reply.outcome is Outcome.TAG_EXISTS_WITH_OTHER_PARAMETERS
    world.do(ev.ReleaseCapacity(T))
    assert world.create().reply.outcome is Outcome.TAG_IS_BEING_RELEASED


def test_an_idempotency_key_gives_the_same_answer_again(world: World) -> None:
    first = world.create(idempotency_key="k", digest="d")
    again = world.create(tag=U, idempotency_key="k", digest="d")
    assert (again.reply.outcome, again.reply.subject) == (Outcome.CREATED, T)
    assert first.reply == again.reply
    other = world.create(idempotency_key="k", digest="e")
    assert other.reply.outcome is Outcome.IDEMPOTENCY_KEY_REUSED
    world.now += 90_000 * SECOND
    world.create(tag=U, idempotency_key="l", digest="d")
    assert list(world.machine.state.idempotency) == ["l"]


def test_a_reservation_is_free_at_once(world: World) -> None:
    world.create(hosts=())
    assert world.state() is CapacityState.RESERVED
    step = world.do(ev.ReleaseCapacity(T))
    assert step.reply.outcome is Outcome.OK
    assert world.free() == GIB
    assert world.do(ev.ReleaseCapacity(T)).reply.outcome is Outcome.TAG_IS_UNKNOWN


def test_a_full_pool_says_how_much_there_is(world: World) -> None:
    world.create(tag=U, size_bytes=512 * MIB, region=0)
    for place in range(8):
        tag = f"3000000{place}-0000-0000-0000-000000000000"
        world.create(tag=tag, size_bytes=64 * MIB, region=0)
        if place % 2:
            world.do(ev.ReleaseCapacity(tag))
    world.now += SECOND
    assert world.free() == 0
    step = world.create(size_bytes=128 * MIB, region=0)
    assert step.reply.outcome is Outcome.NOT_ENOUGH_FREE_CAPACITY
    assert step.reply.limit == "at most 0, what is free in one region now"


def test_scattered_capacity_only_where_it_is_allowed(world: World) -> None:
    tags = [f"3000000{place}-0000-0000-0000-000000000000" for place in range(8)]
    for tag in tags:
        world.create(tag=tag, size_bytes=128 * MIB, hosts=(), region=0)
    for tag in tags[::2]:
        world.do(ev.ReleaseCapacity(tag))
    step = world.create(size_bytes=256 * MIB, region=0)
    assert step.reply.outcome is Outcome.NO_CONTIGUOUS_CAPACITY
    step = world.create(size_bytes=256 * MIB, region=0, contiguous=False)
    assert step.reply.outcome is Outcome.CREATED
    assert len(world.machine.state.capacities[T].extents) == 2


def test_a_refusal_keeps_the_extents_and_the_reason(world: World) -> None:
    add = world.add(world.create())
    world.do(ev.AddStarted(add.id, T, H1))
    revision = world.at().revision
    world.do(ev.HostObserved(H1, T, revision, "refused", reason="no free slot"))
    world.answer(add, ())
    assert world.at().state is AttachmentState.REFUSED
    assert world.at().reason == "no free slot"
    assert world.state() is CapacityState.RESERVED
    step = world.do(ev.AttachCapacity(T, H2))
    assert step.reply.outcome is Outcome.ACCEPTED
    assert world.add(step).ld == 1


def test_a_part_is_given_back(world: World) -> None:
    add = world.add(world.create())
    world.do(ev.AddStarted(add.id, T, H1))
    part = (Extent(add.extents[0].start, BLOCK),)
    world.answer(add, part)
    assert world.at().state is AttachmentState.RELEASING
    world.prove()
    world.do(ev.CapacityReturned(A0, 0, T, part))
    assert world.at().state is AttachmentState.RELEASED
    assert world.state() is CapacityState.RESERVED


def test_a_failed_add_that_contradicts_us_makes_doubt(world: World) -> None:
    add = world.add(world.create())
    step = world.do(ev.AddFailed(add.id, T, H1, 0x1E))
    assert ReadAppliance in kinds(step)
    assert step.done == (add.id,)
    assert world.machine.state.appliances["a0"].state is ApplianceState.DOUBT
    assert world.create(tag=U).reply.outcome is Outcome.APPLIANCE_IS_IN_DOUBT


def test_no_answer_decides_nothing(world: World) -> None:
    add = world.add(world.create())
    step = world.do(ev.EffectUnknown(add.id))
    assert not step.done
    assert world.at().state is AttachmentState.UNKNOWN
    world.do(ev.ReleaseCapacity(T))
    assert world.state() is CapacityState.RELEASING
    assert world.free() == GIB - 64 * MIB
    # The appliance's own lists do not show it, so it never happened.
    step = world.do(ev.ApplianceSnapshot(A0, (), ()))
    assert step.done == (add.id,)
    assert world.state() is None
    assert world.free() == GIB


def test_a_snapshot_finds_what_was_done_meanwhile(world: World) -> None:
    add = world.add(world.create())
    world.do(ev.EffectUnknown(add.id))
    listed = (ev.ListedTag(T, (), (0,), False),)
    step = world.do(ev.ApplianceSnapshot(A0, (), listed))
    assert step.done == (add.id,)
    assert world.at().state is AttachmentState.OFFERED
    held = (ev.HeldExtent(0, 0, T, add.extents[0]),)
    world.do(ev.ApplianceSnapshot(A0, held, (ev.ListedTag(T, (0,), (), False),)))
    assert world.at().state is AttachmentState.ATTACHED


def test_an_effect_that_was_not_done_stays(world: World) -> None:
    add = world.add(world.create())
    world.do(ev.EffectUnknown(add.id))
    step = world.do(ev.ApplianceSnapshot(A0, (), ()))
    assert not step.done
    assert world.at().state is AttachmentState.PLANNED
    assert list(world.machine.state.outbox) == [add.id]


def test_what_is_unknown_is_quarantined_and_lifted(world: World) -> None:
    foreign = Extent(MediaOffset(0), 128 * MIB)
    held = (ev.HeldExtent(1, 0, U, foreign),)
    step = world.do(ev.ApplianceSnapshot(A0, held, (ev.ListedTag(U, (1,), (), False),)))
    assert "appliance.quarantined" in types(step)
    assert world.free() == GIB - 128 * MIB
    assert world.create(tag=U).reply.outcome is Outcome.TAG_IS_QUARANTINED
    add = world.add(world.create())
    assert add.extents[0].start == 128 * MIB
    world.take(add)
    held = (ev.HeldExtent(0, 0, T, add.extents[0]),)
    world.do(ev.ApplianceSnapshot(A0, held, (ev.ListedTag(T, (0,), (), False),)))
    assert not world.machine.state.quarantines
    assert world.free() == GIB - 64 * MIB


def test_a_foreign_extent_over_ours_outlives_ours(world: World) -> None:
    add = world.add(world.create(hosts=(H1,)))
    held = (ev.HeldExtent(1, 0, U, add.extents[0]),)
    world.do(ev.AddFailed(add.id, T, H1, 0x1E))
    world.do(ev.ApplianceSnapshot(A0, held, (ev.ListedTag(U, (1,), (), False),)))
    world.do(ev.ReleaseCapacity(T))
    assert world.state() is None
    assert world.free() == GIB - 64 * MIB


def test_gone_unasked_is_seen_and_not_free(world: World) -> None:
    add = world.attached()
    step = world.do(ev.ApplianceSnapshot(A0, (), ()))
    assert "capacity.lost" in types(step)
    assert world.at().state is AttachmentState.RELEASING
    assert world.at().gone
    world.do(ev.ReleaseCapacity(T))
    assert world.state() is CapacityState.RELEASING
    world.prove()
    assert world.state() is None
    assert add.extents[0].length == 64 * MIB


def test_returned_without_proof_keeps_the_extents(world: World) -> None:
    add = world.attached()
    world.do(ev.ReleaseCapacity(T))
    world.returned(add)
    assert world.state() is CapacityState.RELEASING
    assert "not proved" in world.at().reason
    assert world.free() == GIB - 64 * MIB
    world.prove()
    assert world.free() == GIB


def test_the_ladder_stops_where_it_was_told_to(world: World) -> None:
    world.attached()
    world.do(ev.ReleaseCapacity(T, up_to="stop"))
    holder = Holder(7, "memcached", "maps")
    revision = world.at().revision
    seen = ev.HostObserved(H1, T, revision, "releasing", rung="stop", holders=(holder,))
    assert types(world.do(seen)) == ["capacity.rung", "capacity.held"]
    step = world.tick()
    assert types(step) == ["capacity.held"]
    assert world.at().holders == (holder,)
    assert world.machine.next_deadline() is None
    assert world.state() is CapacityState.RELEASING
    assert world.do(ev.ReleaseCapacity(T)).reply.outcome is Outcome.ACCEPTED
    assert world.do(ev.ReleaseCapacity(T)).reply.outcome is Outcome.ALREADY_SO


def test_the_ladder_to_its_top(world: World) -> None:
    add = world.attached()
    world.do(ev.HostDisconnected(H1))
    world.do(ev.ReleaseCapacity(T, up_to="force", deadlines_ns={"ask": SECOND}))
    assert world.at().reason == "host not connected"
    world.tick()
    assert world.at().rung == "restart"
    wanted = world.machine.desired(H1, T)
    assert wanted is not None
    assert wanted.kill_holders
    step = world.tick()
    (fence,) = [e for e in step.effects if isinstance(e, FenceHost)]
    world.do(ev.FenceEnded(fence.id, T, H1, 6))
    assert not world.at().fenced
    step = world.tick()
    (fence,) = [e for e in step.effects if isinstance(e, FenceHost)]
    step = world.do(ev.FenceEnded(fence.id, T, H1, 0))
    (forced,) = [e for e in step.effects if isinstance(e, InitiateRelease)]
    assert forced.forced
    world.restart()
    world.do(ev.ReleaseStarted(forced.id, T, H1, True))
    assert world.at().state is AttachmentState.RELEASED
    assert world.state() is CapacityState.SANITISING
    world.returned(add)
    assert world.state() is None


def test_a_fence_alone_gives_nothing_back(world: World) -> None:
    """The appliance still lists the host, so it is releasing: not sanitising, later overdue."""
    world.attached()
    world.do(ev.HostDisconnected(H1))
    world.do(ev.ReleaseCapacity(T, up_to="fence"))
    world.tick()
    (fence,) = [e for e in world.tick().effects if isinstance(e, FenceHost)]
    world.do(ev.FenceEnded(fence.id, T, H1, 0))
    while world.machine.next_deadline() is not None:
        world.tick()
    assert world.at().fenced
    assert world.state() is CapacityState.RELEASING
    assert world.free() == GIB - 64 * MIB


def test_a_refusal_of_what_was_not_lent_here_is_told(world: World) -> None:
    other = Tag("99999999-0000-4000-8000-000000000000")
    step = world.do(ev.HostObserved(H1, other, 0, "refused", reason="not announced"))
    assert types(step) == ["host.refused"]
    assert step.notes[0].data == {"tag": other, "reason": "not announced"}
    assert not step.changes


def test_sanitising_too_long_is_seen_and_not_free(world: World) -> None:
    add = world.attached()
    world.do(ev.ReleaseCapacity(T))
    world.prove()
    step = world.tick()
    assert "capacity.quarantined" in types(step)
    assert ReadAppliance in kinds(step)
    assert world.state() is CapacityState.QUARANTINED
    assert world.free() == GIB - 64 * MIB
    assert world.machine.next_deadline() is None
    world.returned(add)
    assert world.free() == GIB


def test_one_host_gives_back_and_another_gets_it(world: World) -> None:
    add = world.attached()
    world.do(ev.ReleaseCapacity(T, H1))
    world.prove()
    assert world.do(ev.AttachCapacity(T, H2)).reply.outcome is Outcome.TAG_IS_STILL_HELD
    world.returned(add)
    assert world.state() is CapacityState.RESERVED
    assert world.do(ev.AttachCapacity(T, H2)).reply.outcome is Outcome.ACCEPTED


def test_sharers_follow_the_first(world: World) -> None:
    step = world.create(hosts=(H1, H2), sharing=Sharing.HARDWARE_COHERENT)
    first = world.add(step)
    assert (first.host, first.region, first.shared) == (H1, 1, False)
    second = world.add(world.take(first))
    assert (second.host, second.shared) == (H2, True)
    world.take(second)
    world.do(ev.ReleaseCapacity(T))
    world.prove(H1)
    world.returned(first)
    assert world.state() is CapacityState.RELEASING
    world.prove(H2)
    assert world.state() is CapacityState.SANITISING
    world.returned(second)
    assert world.state() is None


def test_when_the_first_sharer_refuses_the_next_is_first(world: World) -> None:
    first = world.add(world.create(hosts=(H1, H2), sharing=Sharing.HARDWARE_COHERENT))
    world.do(ev.AddStarted(first.id, T, H1))
    second = world.add(world.answer(first, ()))
    assert (second.host, second.shared) == (H2, False)


def test_untagged_memory_is_found_by_its_place(world: World) -> None:
    add = world.attached(tagged=False)
    assert world.at().state is AttachmentState.ATTACHED
    assert not world.machine.state.capacities[T].guaranteed
    world.do(ev.ReleaseCapacity(T))
    world.prove()
    world.returned(add)
    assert world.state() is None


def test_an_old_observation_is_of_the_past(world: World) -> None:
    world.attached()
    old = world.at().revision
    world.do(ev.ReleaseCapacity(T))
    step = world.do(ev.HostObserved(H1, T, old, "released", proved=True))
    assert not step.changes
    assert not world.at().proved


def test_a_workload_runs_once_at_a_time(world: World) -> None:
    launch = ev.LaunchWorkload(T, H1, "w", ("sleep", "1"))
    assert world.do(launch).reply.outcome is Outcome.TAG_IS_UNKNOWN
    world.create()
    assert world.do(launch).reply.outcome is Outcome.TAG_IS_NOT_ATTACHED
    world.do(ev.ReleaseCapacity(T))
    assert world.do(launch).reply.outcome is Outcome.TAG_IS_BEING_RELEASED


def test_workload_refusals(world: World) -> None:
    world.attached()
    launch = ev.LaunchWorkload(T, H1, "w", ("sleep", "1"))
    empty = world.do(ev.LaunchWorkload(T, H1, "w", ()))
    assert empty.reply.outcome is Outcome.COMMAND_IS_EMPTY
    long = world.do(ev.LaunchWorkload(T, H1, "w", ("x" * 40_000,)))
    assert long.reply.outcome is Outcome.FIELD_OUT_OF_RANGE
    stop = ev.StopWorkload(T, H1)
    assert world.do(stop).reply.outcome is Outcome.WORKLOAD_IS_UNKNOWN
    assert world.do(launch).reply.outcome is Outcome.ACCEPTED
    assert world.do(launch).reply.outcome is Outcome.ALREADY_SO
    other = ev.LaunchWorkload(T, H1, "v", ("sleep", "1"))
    assert world.do(other).reply.outcome is Outcome.WORKLOAD_IS_RUNNING
    assert world.do(stop).reply.outcome is Outcome.ACCEPTED
    assert world.do(stop).reply.outcome is Outcome.ALREADY_SO
    status = WorkloadStatus("w", "exited", exit_code=0)
    revision = world.at().revision
    world.do(ev.HostObserved(H1, T, revision, "attached", workload=status))
    assert world.do(other).reply.outcome is Outcome.ACCEPTED


def test_names_are_registered_once(world: World) -> None:
    do = world.do
    same = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
    assert do(ev.RegisterAppliance("a0", "unix:/a0")).reply.outcome is Outcome.ALREADY_SO
    assert do(ev.RegisterAppliance("a0", "unix:/b")).reply.outcome is same
    assert do(ev.RegisterAppliance("b", "unix:/a0")).reply.outcome is same
    assert do(ev.RegisterAppliance("B!", "x")).reply.outcome is Outcome.NAME_IS_MALFORMED
    assert do(ev.RegisterHost("h1", {"a0": 0})).reply.outcome is Outcome.ALREADY_SO
    assert do(ev.RegisterHost("h1", {"a0": 1})).reply.outcome is same
    assert do(ev.RegisterHost("h3", {"a0": 1})).reply.outcome is same
    assert do(ev.RegisterHost("h3", {"a9": 1})).reply.outcome is Outcome.APPLIANCE_IS_UNKNOWN
    assert do(ev.RegisterHost("h3", {"a0": 256})).reply.outcome is Outcome.FIELD_OUT_OF_RANGE
    assert do(ev.HostConnected(HostId("h9"), "b", {})).reply.outcome is Outcome.HOST_IS_UNKNOWN
    assert do(ev.RefreshAppliance("a9")).reply.outcome is Outcome.APPLIANCE_IS_UNKNOWN


def test_an_appliance_with_other_regions_is_not_used(world: World) -> None:
    world.attached()
    smaller = (RegionRecord(0, 0, 32 * MIB, BLOCK),)
    step = world.do(ev.ApplianceConnected(A0, smaller, LDS))
    assert types(step) == ["appliance.fault"]
    world.do(ev.ApplianceSnapshot(A0, (), ()))
    assert world.at().state is AttachmentState.ATTACHED
    assert world.machine.state.appliances["a0"].state is ApplianceState.LOST


def test_an_explanation_changes_nothing(world: World) -> None:
    found = world.machine.explain(Request(64 * MIB, (H1,)))
    assert found.choice is not None
    assert "a0 region 0" in found.sentence
    found = world.machine.explain(Request(64 * MIB, (H1,), sharing=Sharing.READ_ONLY))
    assert found.choice is None
    assert "read-only" in found.sentence


def test_a_snapshot_without_news_writes_nothing(world: World) -> None:
    add = world.attached()
    held = (ev.HeldExtent(0, 0, T, add.extents[0]),)
    step = world.do(ev.ApplianceSnapshot(A0, held, (ev.ListedTag(T, (0,), (), False),)))
    assert step == Step()


def test_nothing_is_launched_on_untagged_memory(world: World) -> None:
    world.attached(tagged=False)
    step = world.do(ev.LaunchWorkload(T, H1, "one", ("true",)))
    assert step.reply.outcome is Outcome.NOT_SUPPORTED
    assert "ordinary memory" in step.reply.detail
    assert not step.changes
