"""The device's rules one by one: answers, records and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import MIB, SECOND, Dpa
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_check import check_device
from tagmem.domain.device_records import (
    DC_LOG,
    FM_PORT,
    KINDS,
    Add,
    AddReference,
    Adopt,
    Answer,
    AskedExtent,
    ClearEvents,
    Code,
    DcEvent,
    DeviceSpec,
    DurableEffect,
    EventType,
    Expose,
    Fence,
    HeadReset,
    HostRelease,
    LdSpec,
    MediaLost,
    Policy,
    Query,
    Range,
    RegionSpec,
    Release,
    Removal,
    RemoveReference,
    Respond,
    Sanitise,
    SanitiseDone,
    SanitiseFailed,
    SanitiseMethod,
    SetRegionConfig,
)
from tagmem.ports import Batch, Event, Step, Tick
from tagmem.store.memory import MemoryStore

B = 2 * MIB
SHARED = 256 * MIB
"""Base of region 1."""
T1 = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")
T2 = Tag("00000000-0000-4000-8000-000000000002")
T3 = Tag("00000000-0000-4000-8000-000000000003")

SPEC = DeviceSpec(
    regions=(
        RegionSpec(0, 16 * B, B),
        RegionSpec(1, 16 * B, B, sharable=True),
        RegionSpec(1, 16 * B, B, sharable=True, read_only=True),
    ),
    lds=(LdSpec("w1", log_records=8), LdSpec("w2", mirrored=True, log_records=8), LdSpec("w3")),
)


class Device:
    """A machine, the store it commits to, and short words for its commands."""

    def __init__(self, spec: DeviceSpec = SPEC) -> None:
        self.store = MemoryStore(KINDS, DurableEffect)
        self.machine = DeviceMachine(spec)
        self.machine.restore(self.store.load())
        self.now = 1_000
        self.effects: list[Any] = []
        self.do(Adopt("media-1"))

    def do(self, event: Event) -> Code:
        return self.ask(event).code

    def ask(self, event: Event) -> Answer:
        step: Step = self.machine.step(event, self.now)
        self.store.commit(Batch([step], self.now))
        self.effects = list(step.effects)
        check_device(self.machine.state)
        assert isinstance(step.reply, Answer)
        return step.reply

    def restart(self) -> None:
        before = self.picture()
        self.machine = DeviceMachine(self.machine.spec)
        self.machine.restore(self.store.load())
        check_device(self.machine.state)
        assert self.picture() == before

    def picture(self) -> Any:
        """Everything the outside can see, but the device-wide tag generation."""
        lds = range(len(self.machine.spec.lds))
        return (
            [sorted(self.extents(ld)) for ld in lds],
            [self.machine.state.ld_rows[ld].generation for ld in lds],
            [self.log(port) for port in (*lds, FM_PORT)],
            sorted(self.value("tags", 0, 99).entries, key=lambda e: e.tag),
            self.machine.counts(),
            self.machine.state.groups,
            self.machine.region_infos(),
        )

    def value(self, name: str, *args: int | str) -> Any:
        answer = self.machine.query(Query(name, args))
        assert answer.code == Code.SUCCESS
        return answer.value

    def extents(self, ld: int) -> list[tuple[int, int, Tag, int]]:
        page = self.value("extents", ld, 0, 999, 0)
        return [(e.start, e.length, e.tag, e.sequence) for e in page.extents]

    def log(self, port: int) -> list[tuple[Any, ...]]:
        page = self.value("events", port, DC_LOG, 99)
        return [(e.type, e.start, e.length, e.tag, e.more) for e in page.records]

    def drain(self, port: int) -> list[DcEvent]:
        records: list[DcEvent] = list(self.value("events", port, DC_LOG, 99).records)
        handles = tuple(record.handle for record in records)
        assert self.do(ClearEvents(port, DC_LOG, handles)) == Code.SUCCESS
        return records

    def add(self, ld: int, tag: Tag, blocks: int, region: int = 0) -> Code:
        return self.do(Add(ld, Policy.CONTIGUOUS, region, blocks * B, tag))

    def accept(self, ld: int) -> Code:
        """Take the oldest offer whole."""
        group = self.machine.state.groups[ld][0]
        ranges = [
            Range(self.machine.state.to_dpa(ld, item.region, p.start, p.length), p.length)
            for item in group.items
            for p in item.pieces
        ]
        return self.do(Respond(ld, tuple(ranges)))

    def give_back(self, ld: int, tag: Tag) -> Code:
        held = [Range(Dpa(e[0]), e[1]) for e in self.extents(ld) if e[2] == tag]
        return self.do(HostRelease(ld, tuple(held)))

    def sanitised(self) -> None:
        for effect in self.store.load().outbox:
            assert isinstance(effect, Sanitise)
            done = SanitiseDone(effect.id, effect.allocation, SanitiseMethod.PUNCH, B, B)
            assert self.do(done) == Code.SUCCESS


@pytest.fixture
def device() -> Device:
    return Device()


def test_a_whole_life(device: Device) -> None:
    assert device.add(0, T1, 4) == Code.SUCCESS
    assert device.log(0) == [(EventType.ADD, 0, 4 * B, T1, False)]
    assert device.extents(0) == []
    device.drain(0)
    assert device.accept(0) == Code.SUCCESS
    assert [type(effect) for effect in device.effects if effect.durable is False][-1] is not None
    assert any(isinstance(effect, Expose) for effect in device.effects)
    assert device.extents(0) == [(0, 4 * B, T1, 0)]
    assert device.log(FM_PORT) == [(EventType.ADD_RESPONSE, 0, 4 * B, T1, False)]
    device.drain(FM_PORT)
    device.restart()
    assert device.do(Release(0, Removal.TAG_BASED, tag=T1, length=4 * B)) == Code.SUCCESS
    assert device.log(0) == [(EventType.RELEASE, 0, 4 * B, T1, False)]
    assert device.extents(0) != []
    assert device.give_back(0, T1) == Code.SUCCESS
    assert device.extents(0) == []
    assert device.log(FM_PORT) == []
    assert device.value("sanitised", T1).state == 1
    assert [entry.tag for entry in device.value("tags", 0, 9).entries] == [T1]
    device.restart()
    assert device.add(1, T1, 1) == Code.RETRY_REQUIRED
    device.sanitised()
    assert device.log(FM_PORT) == [(EventType.RELEASED, 0, 4 * B, T1, False)]
    assert device.value("sanitised", T1).state == 2
    assert device.value("tags", 0, 9).total == 0
    assert device.store.load().outbox == []
    device.restart()
    assert device.value("sanitised", T1).state == 2


def test_generation_changes_with_the_list_alone(device: Device) -> None:
    def generation() -> int:
        value: int = device.value("extents", 0, 0, 0, 0).generation
        return value

    before = generation()
    device.add(0, T1, 1)
    assert generation() == before
    device.accept(0)
    after = generation()
    assert after != before
    device.do(Release(0, Removal.TAG_BASED, tag=T1, length=B))
    assert generation() == after
    device.give_back(0, T1)
    assert generation() not in (before, after)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Add(9, Policy.FREE, 0, B, T1), Code.INVALID_INPUT),
        (Add(0, 7, 0, B, T1), Code.INVALID_INPUT),
        (Add(0, Policy.FREE, 5, B, T1), Code.INVALID_INPUT),
        (Add(0, Policy.FREE, 0, B + 1, T1), Code.INVALID_INPUT),
        (Add(0, Policy.FREE, 0, 0, T1), Code.INVALID_INPUT),
        (Add(0, Policy.FREE, 1, B, NIL_TAG), Code.INVALID_INPUT),
        (Add(0, Policy.FREE, 0, 17 * B, T1), Code.RESOURCES_EXHAUSTED),
        (Add(0, Policy.CONTIGUOUS, 0, 17 * B, T1), Code.RESOURCES_EXHAUSTED),
        (Add(0, Policy.PRESCRIPTIVE), Code.INVALID_EXTENT_LIST),
        (Add(0, Policy.PRESCRIPTIVE, extents=(AskedExtent(Dpa(1 << 50), B, T1),)), Code(2)),
        (Add(0, Policy.PRESCRIPTIVE, extents=(AskedExtent(Dpa(B // 2), B, T1),)), Code(0x1E)),
        (
            Add(0, Policy.PRESCRIPTIVE, extents=(AskedExtent(Dpa(0), B, T1),) * 2),
            Code.INVALID_EXTENT_LIST,
        ),
        (Add(0, Policy.PRESCRIPTIVE, extents=(AskedExtent(Dpa(0), B, T1, 1),)), Code(0x1E)),
        (
            Add(
                0,
                Policy.PRESCRIPTIVE,
                extents=tuple(AskedExtent(Dpa(2 * i * B), B, T1) for i in range(8)),
            ),
            Code.SUCCESS,
        ),
        (Add(0, Policy.ENABLE_SHARED, 1, 0, T1), Code.INVALID_INPUT),
        (Release(0, Removal.TAG_BASED, tag=T1, length=B), Code.INVALID_INPUT),
        (Release(9, Removal.TAG_BASED, tag=T1, length=B), Code.INVALID_INPUT),
        (Release(0, 5), Code.INVALID_INPUT),
        (Release(0, Removal.PRESCRIPTIVE), Code.INVALID_EXTENT_LIST),
        (Release(0, Removal.PRESCRIPTIVE, extents=(AskedExtent(Dpa(0), B),)), Code(0x1E)),
        (Release(0, Removal.PRESCRIPTIVE, extents=(AskedExtent(Dpa(1 << 50), B),)), Code(0x0F)),
        (AddReference(T1), Code.INVALID_INPUT),
        (RemoveReference(T1), Code.INVALID_INPUT),
        (Respond(0, ()), Code.INVALID_INPUT),
        (HostRelease(0, ()), Code.INVALID_INPUT),
        (HostRelease(0, (Range(Dpa(0), B),)), Code.INVALID_PHYSICAL_ADDRESS),
        (ClearEvents(0, DC_LOG, (1,)), Code.INVALID_HANDLE),
        (ClearEvents(0, DC_LOG, (), True), Code.INVALID_INPUT),
        (ClearEvents(0, 7, ()), Code.INVALID_INPUT),
        (SetRegionConfig(0, 3 * MIB, True), Code.INVALID_INPUT),
        (SetRegionConfig(9, B, True), Code.INVALID_INPUT),
        (SetRegionConfig(0, 4 * MIB, False), Code.SUCCESS),
        (Fence(9, T1), Code.INVALID_INPUT),
        (Fence(0, T1), Code.SUCCESS),
    ],
)
def test_answers_of_an_empty_device(device: Device, event: Event, code: Code) -> None:
    before = device.picture()
    assert device.do(event) == code
    if code != Code.SUCCESS:
        assert device.picture() == before
    device.restart()


def test_retry_required_counts_records_that_nobody_has_read(device: Device) -> None:
    for index in range(8):
        tag = Tag(f"00000000-0000-4000-8000-0000000001{index:02}")
        assert device.add(0, tag, 1) == Code.SUCCESS
    assert device.add(0, T1, 1) == Code.RETRY_REQUIRED
    device.drain(0)
    assert device.add(0, T1, 1) == Code.SUCCESS


def test_an_add_that_no_log_could_hold_is_not_retried(device: Device) -> None:
    extents = tuple(AskedExtent(Dpa(i * B), B, T1) for i in range(9))
    assert device.do(Add(0, Policy.PRESCRIPTIVE, extents=extents)) == Code.RESOURCES_EXHAUSTED


def test_groups_are_answered_in_order(device: Device) -> None:
    device.add(0, T1, 1)
    device.add(0, T2, 1)
    assert device.do(Respond(0, (Range(Dpa(B), B),))) == Code.INVALID_INPUT
    assert device.do(Respond(0, (Range(Dpa(4 * B), B),))) == Code.INVALID_PHYSICAL_ADDRESS
    assert device.do(Respond(0, (Range(Dpa(0), B), Range(Dpa(0), B)))) == Code.INVALID_EXTENT_LIST
    assert device.do(Respond(0, (Range(Dpa(5), B),))) == Code.INVALID_EXTENT_LIST
    assert device.do(Respond(0, (Range(Dpa(0), B),))) == Code.SUCCESS
    assert device.do(Respond(0, ())) == Code.SUCCESS
    assert device.do(Respond(0, ())) == Code.INVALID_INPUT
    assert [e[2] for e in device.extents(0)] == [T1]
    assert device.log(FM_PORT)[1] == (EventType.ADD_RESPONSE, B, 0, T2, False)


def test_part_of_an_offer_may_be_taken_where_it_is_not_sharable(device: Device) -> None:
    device.add(0, T1, 4)
    assert device.do(Respond(0, (Range(Dpa(B), B), Range(Dpa(3 * B), B)))) == Code.SUCCESS
    assert device.extents(0) == [(B, B, T1, 0), (3 * B, B, T1, 0)]
    assert [p.at for p in device.value("media", 0, T1).pieces] == [0, B]
    assert device.add(1, T2, 14) == Code.RESOURCES_EXHAUSTED
    assert device.do(Add(2, Policy.FREE, 0, 14 * B, T2)) == Code.SUCCESS
    device.restart()


def test_sharable_offers_are_all_or_nothing(device: Device) -> None:
    device.add(0, T1, 2, region=1)
    assert device.do(Respond(0, (Range(Dpa(SHARED), B),))) == Code.INVALID_EXTENT_LIST
    assert device.accept(0) == Code.SUCCESS
    assert device.do(HostRelease(0, (Range(Dpa(SHARED), B),))) == Code.INVALID_EXTENT_LIST


def shared_by_three(device: Device) -> None:
    extents = (AskedExtent(Dpa(SHARED + 4 * B), 2 * B, T1, 1), AskedExtent(Dpa(SHARED), B, T1, 0))
    assert device.do(Add(0, Policy.PRESCRIPTIVE, extents=extents)) == Code.SUCCESS
    assert device.accept(0) == Code.SUCCESS
    assert device.do(Add(1, Policy.ENABLE_SHARED, 1, 0, T1)) == Code.SUCCESS
    assert device.do(Add(2, Policy.ENABLE_SHARED, 2, 0, T1)) == Code.SUCCESS
    assert device.accept(1) == Code.SUCCESS
    assert device.accept(2) == Code.SUCCESS


def test_sharers_see_other_addresses_and_the_same_sequence(device: Device) -> None:
    shared_by_three(device)
    read_only = 2 * SHARED
    assert device.extents(0) == [(SHARED, B, T1, 0), (SHARED + 4 * B, 2 * B, T1, 1)]
    assert device.extents(1) == [(SHARED + 15 * B, B, T1, 0), (SHARED + 10 * B, 2 * B, T1, 1)]
    assert device.extents(2) == [(read_only, B, T1, 0), (read_only + 4 * B, 2 * B, T1, 1)]
    (entry,) = device.value("tags", 0, 9).entries
    assert (entry.added, entry.pending) == ((0, 1, 2), ())
    assert device.value("media", 2, T1).read_only
    assert device.do(Add(1, Policy.ENABLE_SHARED, 1, 0, T1)) == Code.INVALID_INPUT
    device.restart()


def test_shared_capacity_is_wiped_after_the_last_holder(device: Device) -> None:
    shared_by_three(device)
    device.drain(FM_PORT)
    assert device.do(AddReference(T1)) == Code.SUCCESS
    for ld in (2, 0, 1):
        assert device.give_back(ld, T1) == Code.SUCCESS
    assert [record.ld for record in device.drain(FM_PORT)] == [2, 2, 0, 0, 1, 1]
    assert device.store.load().outbox == []
    device.restart()
    assert device.do(RemoveReference(T1)) == Code.SUCCESS
    assert len(device.store.load().outbox) == 1
    device.sanitised()
    assert [record.type for record in device.drain(FM_PORT)] == [EventType.RELEASED] * 2


def test_forced_release_of_an_unanswered_offer_leaves_a_dead_group(device: Device) -> None:
    device.add(0, T1, 1)
    events = device.log(0)
    assert device.do(Release(0, Removal.TAG_BASED, tag=T1, length=B)) == Code(0x0F)
    assert device.do(Release(0, Removal.TAG_BASED, True, tag=T1, length=B)) == Code.SUCCESS
    assert device.log(0) == events
    assert device.value("tags", 0, 9).total == 0
    device.add(0, T2, 1)
    device.restart()
    assert device.do(Respond(0, (Range(Dpa(0), B),))) == Code.SUCCESS
    assert device.extents(0) == []
    assert device.accept(0) == Code.SUCCESS
    assert [e[2] for e in device.extents(0)] == [T2]
    kinds = [record.type for record in device.drain(FM_PORT)]
    assert kinds == [EventType.RELEASED, EventType.ADD_RESPONSE]


def test_forced_release_happens_even_if_the_log_is_full(device: Device) -> None:
    device.add(0, T1, 1)
    device.accept(0)
    for _ in range(7):
        assert device.do(Release(0, Removal.TAG_BASED, tag=T1, length=B)) == Code.SUCCESS
    release = Release(0, Removal.TAG_BASED, tag=T1, length=B)
    assert device.do(release) == Code.RETRY_REQUIRED
    forced = Release(0, Removal.TAG_BASED, forced=True, tag=T1, length=B)
    assert device.do(forced) == Code.SUCCESS
    assert device.extents(0) == []
    page = device.value("events", 0, DC_LOG, 99)
    assert (page.overflow_count, page.overflow_first_ns) == (1, 1_000)
    device.restart()
    assert device.do(ClearEvents(0, DC_LOG, clear_all=True)) == Code.SUCCESS
    assert device.value("events", 0, DC_LOG, 99).overflow_count == 0


def test_an_overflow_that_nobody_saw_is_not_forgotten(device: Device) -> None:
    device.add(0, T1, 1)
    device.accept(0)
    for _ in range(7):
        device.do(Release(0, Removal.TAG_BASED, tag=T1, length=B))
    handles = tuple(r.handle for r in device.value("events", 0, DC_LOG, 99).records)
    device.do(Release(0, Removal.TAG_BASED, forced=True, tag=T1, length=B))
    assert device.do(ClearEvents(0, DC_LOG, handles)) == Code.SUCCESS
    assert device.value("events", 0, DC_LOG, 99).overflow_count == 1


def test_clearing_takes_the_oldest_first(device: Device) -> None:
    device.add(0, T1, 1)
    device.add(0, T2, 1)
    first, second = (r.handle for r in device.value("events", 0, DC_LOG, 99).records)
    assert device.do(ClearEvents(0, DC_LOG, (second,))) == Code.INVALID_HANDLE
    assert device.do(ClearEvents(0, DC_LOG, (0,))) == Code.INVALID_HANDLE
    assert device.do(ClearEvents(0, DC_LOG, (first, second))) == Code.SUCCESS
    device.restart()
    device.add(0, T3, 1)
    (third,) = (r.handle for r in device.value("events", 0, DC_LOG, 99).records)
    assert third == second + 1


def test_a_list_in_several_commands_is_one_answer(device: Device) -> None:
    device.add(0, T1, 2, region=1)
    low, high = Range(Dpa(SHARED), B), Range(Dpa(SHARED + B), B)
    assert device.do(Respond(0, (low,), more=True)) == Code.SUCCESS
    assert device.extents(0) == []
    assert device.do(Respond(0, (high,))) == Code.SUCCESS
    assert len(device.extents(0)) == 1


def test_an_interrupted_list_is_void_to_its_end(device: Device) -> None:
    device.add(0, T1, 2)
    assert device.do(Respond(0, (Range(Dpa(0), B),), more=True)) == Code.SUCCESS
    assert device.ask(Query("extents", (0, 0, 9, 1))).code == Code.INVALID_INPUT
    assert device.do(Respond(0, (Range(Dpa(B), B),))) == Code.INVALID_INPUT
    assert device.extents(0) == []
    assert device.accept(0) == Code.SUCCESS


def test_part_of_a_tag_comes_back_and_its_file_stays(device: Device) -> None:
    device.add(0, T1, 4)
    device.accept(0)
    assert device.do(HostRelease(0, (Range(Dpa(B), B),))) == Code.SUCCESS
    assert device.extents(0) == [(0, B, T1, 0), (2 * B, 2 * B, T1, 0)]
    (effect,) = device.store.load().outbox
    assert isinstance(effect, Sanitise)
    assert (effect.part, effect.file, effect.pieces[0].at) == (True, T1, B)
    device.restart()
    device.sanitised()
    assert device.give_back(0, T1) == Code.SUCCESS
    device.sanitised()
    assert device.machine.state.pools[0].empty


def test_untagged_capacity_is_matched_by_address(device: Device) -> None:
    extents = (AskedExtent(Dpa(0), B), AskedExtent(Dpa(4 * B), B))
    assert device.do(Add(0, Policy.PRESCRIPTIVE, extents=extents)) == Code.SUCCESS
    assert [e[4] for e in device.log(0)] == [True, False]
    assert device.accept(0) == Code.SUCCESS
    assert device.do(Release(0, Removal.TAG_BASED, length=B)) == Code.INVALID_INPUT
    release = Release(0, Removal.PRESCRIPTIVE, extents=(AskedExtent(Dpa(4 * B), B),))
    assert device.do(release) == Code.SUCCESS
    assert device.do(HostRelease(0, (Range(Dpa(4 * B), B),))) == Code.SUCCESS
    assert device.extents(0) == [(0, B, NIL_TAG, 0)]
    assert device.value("tags", 0, 9).total == 0


def test_mirrored_lds_release_whole_extents(device: Device) -> None:
    device.add(1, T1, 2)
    device.accept(1)
    ((start, _, _, _),) = device.extents(1)
    assert start == 14 * B
    assert device.do(HostRelease(1, (Range(Dpa(start), B),))) == Code.INVALID_EXTENT_LIST
    assert device.give_back(1, T1) == Code.SUCCESS


def test_sanitising_is_tried_again_and_in_the_end_parked(device: Device) -> None:
    device.add(0, T1, 1)
    device.accept(0)
    device.give_back(0, T1)
    for attempt in range(6):
        (effect,) = device.store.load().outbox
        assert isinstance(effect, Sanitise)
        assert device.do(SanitiseFailed(effect.id, effect.allocation, "no")) == Code.SUCCESS
        assert device.store.load().outbox == []
        device.restart()
        deadline = device.machine.next_deadline()
        if attempt < 5:
            assert deadline == device.now + (SECOND << attempt)
            device.now = deadline
            device.do(Tick())
    assert device.machine.next_deadline() is None
    assert device.value("sanitised", T1).state == 3
    assert device.add(0, T1, 1) == Code.INVALID_INPUT
    extents = (AskedExtent(Dpa(0), B, T2),)
    assert device.do(Add(0, Policy.PRESCRIPTIVE, extents=extents)) == Code.RESOURCES_EXHAUSTED


def test_a_head_reset_drops_shared_capacity_everywhere_without_events(device: Device) -> None:
    shared_by_three(device)
    device.add(0, T2, 1)
    device.accept(0)
    device.add(0, T3, 1)
    for port in (0, 1, 2):
        device.drain(port)
    assert device.do(HeadReset(0)) == Code.SUCCESS
    assert [e[2] for e in device.extents(0)] == [T2]
    assert device.extents(1) == device.extents(2) == []
    assert device.log(0) == device.log(1) == device.log(2) == []
    assert device.do(Respond(0, ())) == Code.INVALID_INPUT
    device.restart()


def test_lost_media_leave_an_empty_device_with_new_generations(device: Device) -> None:
    shared_by_three(device)
    device.add(0, T2, 1)
    device.accept(0)
    device.give_back(0, T2)
    device.add(0, T3, 1)
    generations = [row.generation for row in device.machine.state.ld_rows]
    assert device.do(MediaLost("media-2")) == Code.SUCCESS
    assert all(space.empty for space in device.machine.state.pools.values())
    assert all(
        row.generation != old
        for row, old in zip(device.machine.state.ld_rows, generations, strict=True)
    )
    assert device.store.load().outbox == []
    device.restart()


def test_another_configuration_is_refused_while_anything_is_allocated(device: Device) -> None:
    device.add(0, T1, 1)
    other = DeviceMachine(DeviceSpec((RegionSpec(0, 32 * B, B),), SPEC.lds))
    other.restore(device.store.load())
    assert other.step(Adopt("media-1"), 0).reply.code == Code.UNSUPPORTED
    device.do(Respond(0, ()))
    other.restore(device.store.load())
    step = other.step(Adopt("media-1"), 0)
    assert step.reply.code == Code.SUCCESS
    device.store.commit(Batch([step], 0))
    assert [kind for kind, _, _ in device.store.load().records] == ["spec"]


def test_a_fenced_host_gets_no_way_to_what_it_accepts(device: Device) -> None:
    device.add(0, T1, 1)
    answer = device.ask(Fence(0, T1))
    assert answer.code == Code.SUCCESS
    device.accept(0)
    assert not any(isinstance(effect, Expose) for effect in device.effects)
    assert device.machine.query(Query("media", (0, T1))).code == Code.INVALID_INPUT
    assert device.machine.exposures() == []
    assert device.ask(Fence(0, NIL_TAG, Dpa(0), B)).value


def test_region_settings_change_only_while_nothing_is_allocated(device: Device) -> None:
    device.add(0, T1, 1)
    assert device.do(SetRegionConfig(0, B, False)) == Code.UNSUPPORTED
    device.do(Respond(0, ()))
    device.drain(0)
    assert device.do(SetRegionConfig(0, 4 * MIB, False)) == Code.SUCCESS
    assert device.log(2)[-1][0] == EventType.REGION_UPDATED
    assert device.add(0, T1, 1) == Code.INVALID_INPUT
    assert device.add(0, T1, 2) == Code.SUCCESS
    device.accept(0)
    device.give_back(0, T1)
    assert device.store.load().outbox == []
    assert device.machine.state.pools[0].empty
    device.restart()


def test_tracking_is_bounded() -> None:
    spec = DeviceSpec((RegionSpec(0, 16 * B, B),), (LdSpec("w1"),), extents_max=3, tags_max=2)
    device = Device(spec)
    assert device.add(0, T1, 3) == Code.SUCCESS
    assert device.do(Respond(0, (Range(Dpa(0), B), Range(Dpa(2 * B), B)))) == Code.SUCCESS
    assert device.add(0, T2, 1) == Code.SUCCESS
    assert device.add(0, T3, 1) == Code.RESOURCES_EXHAUSTED
    assert device.machine.counts().extents_available == 0
