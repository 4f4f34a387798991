"""One appliance's session against a scripted peer: snapshot, effects, and what goes wrong."""

from __future__ import annotations

import pytest
from tests.unit.orchestrator.peer import (
    BASE,
    MIB,
    SIZE,
    TAG,
    TAG2,
    Pair,
    Peer,
    add,
    extent,
    fence,
    info,
    release,
    wire,
)

from tagmem.base.ids import NIL_TAG, tag_to_bytes
from tagmem.domain.effects import (
    AddFailed,
    AddStarted,
    ApplianceConnected,
    ApplianceDisconnected,
    ApplianceSnapshot,
    CapacityReturned,
    EffectUnknown,
    FenceEnded,
    HeldExtent,
    HostAnswered,
    ListedTag,
    ReadAppliance,
    ReleaseFailed,
    ReleaseStarted,
)
from tagmem.orchestrator.links import EFFECTS_OUTSTANDING_MAX, IDLE_POLL_NS, Phase
from tagmem.wire.cci import ReturnCode
from tagmem.wire.extent import WireExtent
from tagmem.wire.fmapi import (
    DcListTagsRequest,
    GetDcRegionExtentListsRequest,
    InitiateDcAddRequest,
    InitiateDcReleaseRequest,
    RegionAttribute,
    RemovalPolicy,
    SelectionPolicy,
)
from tagmem.wire.generic import ClearEventRecordsRequest, GetEventRecordsRequest
from tagmem.wire.layout import WireStruct
from tagmem.wire.vendor import FenceRequest

ADD_RESPONSE, RELEASED = 4, 5
Z0 = Pair().link.appliance


def snapshots(pair: Pair) -> list[ApplianceSnapshot]:
    return [event for event in pair.log if isinstance(event, ApplianceSnapshot)]


# ---- beginning


def test_a_session_learns_then_tells_a_snapshot_and_waits() -> None:
    pair = Pair()
    pair.peer.hold(1, wire(1, 4 * MIB))
    pair.peer.tags = [info(TAG, accepted=(1,)), info(TAG2, pending=(0,))]
    pair.connect()
    known, snapshot = pair.log
    assert isinstance(known, ApplianceConnected)
    assert [(r.size_bytes, r.block_bytes, r.sanitise) for r in known.regions] == [
        (SIZE, 2 * MIB, True)
    ]
    assert [ld.bases for ld in known.lds] == [(BASE,), (2 * BASE,)]
    assert snapshot == ApplianceSnapshot(
        Z0,
        (HeldExtent(1, 0, TAG, extent(4 * MIB)),),
        (ListedTag(TAG, (1,), (), False), ListedTag(TAG2, (), (0,), False)),
    )
    assert pair.link.phase is Phase.TOLD


def test_nothing_is_carried_out_before_the_snapshot_is_committed() -> None:
    pair = Pair()
    pair.perform(add(1))
    pair.connect()
    pair.perform(add(2, ld=1))
    assert pair.peer.count(InitiateDcAddRequest) == 0
    pair.link.resume(pair.now)
    pair.settle()
    assert pair.of(AddStarted) == [
        AddStarted(1, TAG, add(1).host),
        AddStarted(2, TAG, add(2, 1).host),
    ]


def test_what_the_snapshots_step_declares_done_is_not_carried_out() -> None:
    pair = Pair()
    pair.perform(add(1), add(2, ld=1))
    pair.connect()
    pair.link.forget([1], pair.now)
    pair.link.resume(pair.now)
    pair.settle()
    assert [event.effect_id for event in pair.log if isinstance(event, AddStarted)] == [2]
    assert pair.link.unfinished == 1


def test_mirrored_lds_are_translated_both_ways() -> None:
    peer = Peer()
    peer.mirrored = {1}
    peer.hold(1, wire(1, SIZE - 6 * MIB))
    pair = Pair(peer).connect()
    assert snapshots(pair)[0].held == (HeldExtent(1, 0, TAG, extent(4 * MIB)),)
    pair.link.resume(pair.now)
    pair.perform(add(1, ld=1))
    sent = peer.seen[-1]
    assert isinstance(sent, InitiateDcAddRequest)
    starts = [piece.start_dpa - 2 * BASE for piece in sent.extents]
    assert starts == [SIZE - 2 * MIB, SIZE - 10 * MIB]


@pytest.mark.parametrize("page_max", [1, 3, 7, 50])
def test_lists_are_read_in_pages(page_max: int) -> None:
    peer = Peer()
    peer.page_max = page_max
    for at in range(20):
        peer.hold(0, wire(0, at * 2 * MIB, tag=TAG))
    peer.tags = [info(TAG, accepted=(0,))] * 9
    (snapshot,) = snapshots(Pair(peer).connect())
    assert [item.extent.start for item in snapshot.held] == [at * 2 * MIB for at in range(20)]
    assert len(snapshot.tags) == 9


def test_extents_of_a_shared_tag_come_in_sequence_order() -> None:
    peer = Peer(attributes=(RegionAttribute.SHARABLE,))
    peer.hold(0, wire(0, 0, sequence=1), wire(0, 8 * MIB, sequence=0))
    (snapshot,) = snapshots(Pair(peer).connect())
    assert [item.extent.start for item in snapshot.held] == [8 * MIB, 0]


# ---- snapshots while the world moves


def test_events_are_told_before_the_snapshot() -> None:
    """A type 5 record of before the session is stale; what the snapshot says comes after it."""
    peer = Peer()
    peer.record(RELEASED, 0, wire(0, 0))
    peer.hold(0, wire(0, 0))
    pair = Pair(peer).connect()
    kinds = [type(event) for event in pair.log]
    assert kinds == [ApplianceConnected, CapacityReturned, ApplianceSnapshot]
    assert peer.log == []
    assert snapshots(pair)[0].held == (HeldExtent(0, 0, TAG, extent(0)),)


def test_a_list_that_moves_between_its_pages_is_read_again() -> None:
    peer = Peer()
    peer.page_max = 2
    peer.hold(0, *(wire(0, at * 2 * MIB) for at in range(5)))

    def move(request: WireStruct) -> None:
        if isinstance(request, GetDcRegionExtentListsRequest) and request.first_extent == 2:
            del peer.lists[0][0]
            peer.generations[0] += 1
            peer.before = lambda _: None

    peer.before = move
    (snapshot,) = snapshots(Pair(peer).connect())
    assert [item.extent.start // MIB for item in snapshot.held] == [2, 4, 6, 8]


def test_a_list_that_moves_after_it_was_read_is_read_again_and_others_are_not() -> None:
    peer = Peer(hosts=3)

    def move(request: WireStruct) -> None:
        if isinstance(request, GetDcRegionExtentListsRequest) and request.extents_wanted == 0:
            peer.hold(1, wire(1, 0))
            peer.before = lambda _: None

    peer.before = move
    (snapshot,) = snapshots(Pair(peer).connect())
    assert [(item.ld, item.extent.start) for item in snapshot.held] == [(1, 0)]
    pages = [
        request.host_id
        for request in peer.seen
        if isinstance(request, GetDcRegionExtentListsRequest) and request.extents_wanted
    ]
    assert pages == [0, 1, 2, 1]


def test_tags_that_move_are_read_again() -> None:
    peer = Peer()

    def move(request: WireStruct) -> None:
        if isinstance(request, DcListTagsRequest) and request.tags_max == 0:
            peer.tags = [info(TAG, pending=(1,))]
            peer.tags_generation += 1
            peer.before = lambda _: None

    peer.before = move
    (snapshot,) = snapshots(Pair(peer).connect())
    assert [item.pending for item in snapshot.tags] == [(1,)]


def test_a_record_in_the_second_drain_sends_the_reader_back() -> None:
    """Even when the device's generations do not move, as QEMU's do not."""
    peer = Peer()
    drains = 0

    def move(request: WireStruct) -> None:
        nonlocal drains
        drains += isinstance(request, GetEventRecordsRequest)
        if drains == 2:
            drains += 1
            peer.lists[1].append(wire(1, 0))
            peer.record(ADD_RESPONSE, 1, wire(1, 0))

    peer.before = move
    pair = Pair(peer).connect()
    kinds = [type(event) for event in pair.log]
    assert kinds == [ApplianceConnected, HostAnswered, ApplianceSnapshot]
    assert snapshots(pair)[0].held == (HeldExtent(1, 0, TAG, extent(0)),)


def test_a_record_during_the_reading_is_told_and_the_list_read_again() -> None:
    peer = Peer()
    pair = Pair(peer)

    def move(request: WireStruct) -> None:
        if isinstance(request, DcListTagsRequest):
            peer.before = lambda _: None
            peer.lists[0].append(wire(0, 0))
            peer.record(ADD_RESPONSE, 0, wire(0, 0))
            pair.link.feed(peer.notify(), pair.now)

    peer.before = move
    pair.connect()
    assert [type(event) for event in pair.log][1:] == [HostAnswered, ApplianceSnapshot]
    assert len(snapshots(pair)[0].held) == 1


def test_lists_that_never_rest_are_read_with_pauses_until_they_do() -> None:
    peer = Peer()

    def move(request: WireStruct) -> None:
        if isinstance(request, GetDcRegionExtentListsRequest) and request.extents_wanted == 0:
            peer.generations[0] += 1

    peer.before = move
    pair = Pair(peer).connect()
    assert pair.link.phase is Phase.PAUSING
    assert not snapshots(pair)
    deadline = pair.link.next_deadline()
    assert deadline is not None
    pair.pass_time(deadline - pair.now)
    assert not snapshots(pair)
    peer.before = lambda _: None
    pair.pass_time(10_000_000)
    assert len(snapshots(pair)) == 1


def test_a_wanted_snapshot_waits_for_commands_under_way() -> None:
    pair = Pair().ready()
    pair.link.perform(add(1), pair.now)
    held_back = pair.link.outgoing()
    pair.link.perform(ReadAppliance(0, Z0), pair.now)
    pair.link.perform(add(2, ld=1), pair.now)
    assert pair.link.outgoing() == b""
    assert pair.link.phase is Phase.HOLDING
    pair.link.feed(pair.peer.feed(held_back), pair.now)
    pair.settle()
    assert [type(event) for event in pair.log] == [AddStarted, ApplianceSnapshot]
    pair.link.forget([1], pair.now)
    pair.link.resume(pair.now)
    pair.settle()
    assert isinstance(pair.log[-1], AddStarted)


def test_a_wanted_snapshot_is_taken_at_once() -> None:
    pair = Pair().ready()
    pair.link.perform(ReadAppliance(0, Z0), pair.now)
    pair.settle()
    assert len(snapshots(pair)) == 1


def test_a_snapshot_wanted_before_the_last_is_committed_follows_it() -> None:
    pair = Pair().connect()
    pair.link.perform(ReadAppliance(0, Z0), pair.now)
    assert len(snapshots(pair)) == 1
    pair.link.resume(pair.now)
    pair.settle()
    assert len(snapshots(pair)) == 2


# ---- events


def test_many_records_cost_one_get_and_one_clear() -> None:
    pair = Pair().ready()
    for at in range(100):
        pair.peer.record(ADD_RESPONSE, 0, wire(0, at * 2 * MIB))
    pair.notify()
    assert len(pair.of(HostAnswered)) == 100
    assert pair.peer.count(ClearEventRecordsRequest) == 1
    assert pair.peer.count(GetEventRecordsRequest) == 2
    assert pair.peer.log == []


def test_more_records_than_one_clear_can_name() -> None:
    pair = Pair().ready()
    for at in range(450):
        pair.peer.record(RELEASED, 0, wire(0, at * 2 * MIB))
    pair.notify()
    assert len(pair.of(CapacityReturned)) == 450
    assert pair.peer.count(ClearEventRecordsRequest) == 2
    assert pair.peer.log == []


@pytest.mark.parametrize("records_per_get", [1, 2, 3, 4, 9])
def test_a_group_is_one_event_however_it_is_read(records_per_get: int) -> None:
    pair = Pair().ready()
    pair.peer.records_per_get = records_per_get
    for at in range(3):
        pair.peer.record(ADD_RESPONSE, 1, wire(1, at * 4 * MIB), more=at < 2)
    pair.peer.record(RELEASED, 1, wire(1, 0, tag=TAG2))
    pair.notify()
    pieces = tuple(extent(at * 4 * MIB) for at in range(3))
    assert pair.log == [
        HostAnswered(Z0, 1, TAG, pieces[0], pieces, 0),
        CapacityReturned(Z0, 1, TAG2, (extent(0),), 0),
    ]


def test_a_group_is_cleared_only_whole() -> None:
    """So that a session that ends in between leaves no half of a group behind."""
    pair = Pair().ready()
    pair.peer.records_per_get = 4
    for tag in (TAG, TAG2):
        for at in range(3):
            pair.peer.record(ADD_RESPONSE, 1, wire(1, at * 4 * MIB, tag=tag), more=at < 2)
    pair.notify()
    clears = [
        len(request.handles)
        for request in pair.peer.seen
        if isinstance(request, ClearEventRecordsRequest)
    ]
    assert clears == [3, 3]


def test_a_refusal_is_an_answer_that_takes_nothing() -> None:
    pair = Pair().ready()
    pair.peer.record(ADD_RESPONSE, 0, wire(0, 4 * MIB, 0))
    pair.notify()
    assert pair.log == [HostAnswered(Z0, 0, TAG, extent(4 * MIB, 0), (), 0)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_refusal_of_untagged_capacity_says_which(mirrored: bool) -> None:
    peer = Peer()
    peer.mirrored = {0} if mirrored else set()
    pair = Pair(peer).ready().perform(add(1, tagged=False))
    offer = peer.seen[-1]
    assert isinstance(offer, InitiateDcAddRequest)
    place = offer.extents[0].start_dpa
    peer.record(ADD_RESPONSE, 0, WireExtent(place, 0))
    pair.notify()
    assert pair.log[-1] == HostAnswered(Z0, 0, NIL_TAG, extent(0), (), 0)


def test_a_notification_during_a_drain_looks_once_more() -> None:
    pair = Pair().ready()
    pair.link.feed(pair.peer.notify(), pair.now)
    first = pair.link.outgoing()
    back = pair.peer.feed(first)
    pair.peer.record(RELEASED, 0, wire(0, 0))
    pair.link.feed(pair.peer.notify(), pair.now)
    pair.link.feed(back, pair.now)
    pair.settle()
    assert len(pair.of(CapacityReturned)) == 1


def test_an_overflow_is_cleared_and_leads_to_a_snapshot() -> None:
    pair = Pair().ready()
    pair.peer.record(RELEASED, 0, wire(0, 0))
    pair.peer.overflow = True
    pair.notify()
    assert [type(event) for event in pair.log] == [CapacityReturned, ApplianceSnapshot]
    assert not pair.peer.overflow
    assert pair.link.phase is Phase.TOLD


def test_an_overflow_before_the_snapshot_needs_no_second_one() -> None:
    peer = Peer()
    peer.record(RELEASED, 0, wire(0, 0), more=True)
    peer.overflow = True
    pair = Pair(peer).connect()
    assert [type(event) for event in pair.log] == [ApplianceConnected, ApplianceSnapshot]
    pair.link.resume(pair.now)
    assert pair.link.phase is Phase.READY


def test_a_silent_appliance_is_asked_now_and_then() -> None:
    pair = Pair().ready()
    pair.peer.record(RELEASED, 0, wire(0, 0))
    assert pair.link.next_deadline() == pair.now + IDLE_POLL_NS
    pair.pass_time(IDLE_POLL_NS)
    assert len(pair.of(CapacityReturned)) == 1


# ---- effects


def test_commands_say_what_the_effects_mean() -> None:
    pair = Pair(Peer(attributes=(RegionAttribute.SHARABLE,))).ready()
    raw = tag_to_bytes(TAG)
    pair.perform(add(1), release(2, forced=True), add(3, 1, shared=True), fence(4))
    by_type = {type(request): request for request in pair.peer.seen[:1]}
    first = by_type[InitiateDcAddRequest]
    assert first == InitiateDcAddRequest(
        0,
        SelectionPolicy.PRESCRIPTIVE,
        extents=(WireExtent(BASE, 2 * MIB, raw, 0), WireExtent(BASE + 8 * MIB, 2 * MIB, raw, 1)),
    )
    assert (
        InitiateDcAddRequest(1, SelectionPolicy.ENABLE_SHARED_ACCESS, 0, 0, raw) in pair.peer.seen
    )
    assert (
        InitiateDcReleaseRequest(0, RemovalPolicy.TAG_BASED, True, True, 4 * MIB, raw)
        in pair.peer.seen
    )
    assert FenceRequest(0, raw) in pair.peer.seen
    assert ReleaseStarted(2, TAG, add(1).host, True) in pair.log
    assert FenceEnded(4, TAG, add(1).host, 0) in pair.log


def test_untagged_capacity_is_named_by_its_extents() -> None:
    pair = Pair().ready()
    pair.perform(add(1, tagged=False), release(2, tagged=False), fence(3, tagged=False))
    places = (WireExtent(BASE, 2 * MIB), WireExtent(BASE + 8 * MIB, 2 * MIB))
    assert pair.peer.seen == [
        InitiateDcAddRequest(0, SelectionPolicy.PRESCRIPTIVE, extents=places),
        InitiateDcReleaseRequest(0, RemovalPolicy.PRESCRIPTIVE, sanitise=True, extents=places),
        FenceRequest(0, bytes(16), BASE, 2 * MIB),
        FenceRequest(0, bytes(16), BASE + 8 * MIB, 2 * MIB),
    ]
    assert [type(event) for event in pair.log] == [AddStarted, ReleaseStarted, FenceEnded]


@pytest.mark.parametrize("code", [ReturnCode.INVALID_INPUT, ReturnCode.RESOURCES_EXHAUSTED])
def test_errors_are_told_with_their_code(code: ReturnCode) -> None:
    pair = Pair().ready()
    pair.peer.codes = [code, code, code]
    pair.perform(add(1), release(2), fence(3))
    host = add(1).host
    assert pair.log == [
        AddFailed(1, TAG, host, code),
        ReleaseFailed(2, TAG, host, False, code),
        FenceEnded(3, TAG, host, code),
    ]


def test_what_cannot_be_said_fails_without_being_sent() -> None:
    pair = Pair().ready()
    pair.perform(add(1, ld=9))
    assert pair.log == [AddFailed(1, TAG, add(1, 9).host, ReturnCode.INVALID_INPUT)]
    assert pair.peer.seen == []


def test_effects_of_one_tag_and_host_go_in_order_and_others_beside_them() -> None:
    pair = Pair().ready()
    for effect in (add(1), release(2), add(3, ld=1)):
        pair.link.perform(effect, pair.now)
    first = pair.link.outgoing()
    back = pair.peer.feed(first)
    assert [type(r).__name__ for r in pair.peer.seen] == ["InitiateDcAddRequest"] * 2
    pair.link.feed(back, pair.now)
    pair.settle()
    assert isinstance(pair.peer.seen[-1], InitiateDcReleaseRequest)


def test_no_more_than_a_bound_are_under_way() -> None:
    pair = Pair(Peer(hosts=100)).ready()
    for ld in range(100):
        pair.link.perform(add(ld + 1, ld), pair.now)
    back = pair.peer.feed(pair.link.outgoing())
    assert pair.peer.count(InitiateDcAddRequest) == EFFECTS_OUTSTANDING_MAX
    pair.link.feed(back, pair.now)
    pair.settle()
    assert len(pair.of(AddStarted)) == 100


def test_a_repeated_effect_is_carried_out_once() -> None:
    pair = Pair().ready()
    pair.perform(add(1), add(1))
    assert pair.peer.count(InitiateDcAddRequest) == 1
    pair.perform(add(1))
    assert pair.peer.count(InitiateDcAddRequest) == 1


def test_retry_required_is_asked_again_later_each_time() -> None:
    pair = Pair().ready()
    pair.peer.codes = [ReturnCode.RETRY_REQUIRED] * 4
    pair.perform(add(1))
    waits = []
    while not pair.log:
        deadline = pair.link.next_deadline()
        assert deadline is not None
        waits.append(deadline - pair.now)
        pair.pass_time(waits[-1])
    assert waits == [5_000_000, 10_000_000, 20_000_000, 40_000_000]
    assert pair.log == [AddStarted(1, TAG, add(1).host)]


def test_an_add_that_is_put_off_gives_way_to_a_release() -> None:
    for early in (False, True):
        pair = Pair().ready()
        pair.peer.codes = [ReturnCode.RETRY_REQUIRED]
        if early:
            pair.perform(add(1), release(2))
        else:
            pair.perform(add(1)).perform(release(2))
        host = add(1).host
        assert pair.log == [
            AddFailed(1, TAG, host, ReturnCode.RETRY_REQUIRED),
            ReleaseStarted(2, TAG, host, False),
        ]


def test_an_effect_forgotten_while_put_off_is_never_sent_again() -> None:
    pair = Pair().ready()
    pair.peer.codes = [ReturnCode.RETRY_REQUIRED]
    pair.perform(add(1))
    pair.link.forget([1], pair.now)
    pair.pass_time(1_000_000_000)
    assert pair.peer.count(InitiateDcAddRequest) == 1
    assert pair.link.unfinished == 0


def test_answers_that_come_twice_count_once() -> None:
    peer = Peer()
    peer.twice = True
    pair = Pair(peer).ready().perform(add(1))
    peer.record(RELEASED, 0, wire(0, 0))
    pair.notify()
    assert [type(event) for event in pair.log] == [AddStarted, CapacityReturned]


# ---- ends


def test_a_lost_answer_ends_the_session_and_the_next_one_finds_out() -> None:
    pair = Pair().ready()
    pair.peer.mute = lambda request: isinstance(request, InitiateDcAddRequest)
    pair.perform(add(1), add(2, ld=1))
    deadline = pair.link.next_deadline()
    assert deadline is not None
    pair.pass_time(deadline - pair.now)
    assert pair.link.wants_close == "an answer did not come in time"
    assert [type(event) for event in pair.log] == [
        EffectUnknown,
        EffectUnknown,
        ApplianceDisconnected,
    ]
    pair.link.disconnected("closed", pair.now)
    assert pair.link.events() == []
    pair.peer.mute = lambda _: False
    pair.peer.hold(0, wire(0, 0), wire(0, 8 * MIB))
    pair.log.clear()
    pair.peer.seen.clear()
    pair.connect()
    assert len(snapshots(pair)[0].held) == 2
    # The machine saw effect 1 in the snapshot, and 2 nowhere.
    pair.link.forget([1], pair.now)
    pair.link.resume(pair.now)
    pair.settle()
    assert pair.log[-1] == AddStarted(2, TAG, add(2, 1).host)
    assert pair.peer.count(InitiateDcAddRequest) == 1


def test_a_snapshot_of_an_earlier_session_does_not_stand_for_a_later_one() -> None:
    pair = Pair()
    pair.perform(add(1))
    pair.connect()
    pair.link.disconnected("reset by peer", pair.now)
    pair.connect()
    assert len(snapshots(pair)) == 2
    pair.link.resume(pair.now)
    pair.settle()
    assert pair.peer.count(InitiateDcAddRequest) == 0
    pair.link.resume(pair.now)
    pair.settle()
    assert pair.peer.count(InitiateDcAddRequest) == 1


def test_what_was_answered_before_the_session_ended_is_not_sent_again() -> None:
    pair = Pair().ready().perform(add(1))
    pair.link.disconnected("reset by peer", pair.now)
    pair.connect()
    pair.link.resume(pair.now)
    assert pair.link.phase is Phase.READY
    pair.settle()
    assert pair.peer.count(InitiateDcAddRequest) == 1
    assert not pair.of(EffectUnknown)


def test_nothing_of_an_old_session_reaches_the_new_one() -> None:
    pair = Pair().ready()
    pair.link.perform(add(1), pair.now)
    late = pair.peer.feed(pair.link.outgoing())
    pair.link.disconnected("reset by peer", pair.now)
    pair.link.feed(late, pair.now)
    assert [type(event) for event in pair.link.events()] == [EffectUnknown, ApplianceDisconnected]


@pytest.mark.parametrize(
    "name", ["GetDcdInfoRequest", "DcListTagsRequest", "GetDcRegionExtentListsRequest"]
)
def test_an_appliance_that_cannot_answer_what_is_needed_is_left(name: str) -> None:
    peer = Peer()
    setattr(peer, f"on_{name}", lambda _: (ReturnCode.INTERNAL_ERROR, None))
    pair = Pair(peer).connect()
    assert "internal error" in pair.link.wants_close
    assert isinstance(pair.log[-1], ApplianceDisconnected)
    assert pair.link.phase is Phase.DOWN


def test_an_extent_that_lies_nowhere_ends_the_session_and_is_named() -> None:
    peer = Peer()
    peer.hold(0, wire(0, SIZE + 4 * MIB))
    pair = Pair(peer).connect()
    assert "which is in no region" in pair.link.wants_close
    assert not snapshots(pair)


def test_a_list_that_contradicts_itself_ends_the_session() -> None:
    peer = Peer()
    peer.page_max = 0
    peer.hold(0, wire(0, 0))
    pair = Pair(peer).connect()
    assert "says 1 entries and gives 0" in pair.link.wants_close


def test_garbage_ends_the_session_at_last() -> None:
    pair = Pair().ready()
    for _ in range(200):
        pair.link.feed(b"\x7e\x00garbage" * 50, pair.now)
    assert pair.link.phase is Phase.DOWN
    assert pair.link.faults > 0


def test_a_link_that_is_down_does_nothing() -> None:
    link = Pair().link
    link.feed(b"anything", 1)
    link.tick(2)
    link.disconnected("never was", 4)
    assert link.next_deadline() is None
    assert link.outgoing() == b""
    assert link.events() == []
