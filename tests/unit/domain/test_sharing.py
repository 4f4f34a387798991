"""Hand-over, publication, references: what each answer and each failure leads to, step by step."""

from __future__ import annotations

import pytest
from tests.unit.domain.test_machine import A0, H1, H2, LDS, REGIONS, T, World, types

from tagmem.domain import effects as ev
from tagmem.domain.effects import InitiateAdd, SetReference
from tagmem.domain.outcome import Outcome
from tagmem.domain.records import CapacityState, MoveStep, Reference, Sharing
from tagmem.ports import Step

COHERENT = Sharing.HARDWARE_COHERENT


@pytest.fixture
def shared() -> World:
    world = World()
    world.attached(sharing=COHERENT)
    return world


def reference(step: Step) -> SetReference:
    [found] = [effect for effect in step.effects if isinstance(effect, SetReference)]
    return found


def answered(world: World, step: Step, code: int = 0) -> Step:
    effect = reference(step)
    return world.do(ev.ReferenceSet(effect.id, effect.tag, effect.wanted, code))


def step_of(world: World) -> MoveStep:
    move = world.machine.state.capacities[T].move
    assert move is not None
    return move.step


def offered(world: World) -> InitiateAdd:
    """A hand-over from h1 to h2, up to the add for h2."""
    begun = world.do(ev.HandOver(T, H1, H2))
    assert begun.reply.outcome is Outcome.ACCEPTED
    assert step_of(world) is MoveStep.SECURING
    add = world.add(answered(world, begun))
    assert add.shared
    assert step_of(world) is MoveStep.OFFERING
    return add


def test_the_last_host_lets_go_only_when_the_next_can_open_it(shared: World) -> None:
    shared.take(offered(shared))
    assert not shared.at(H1).release
    shared.do(ev.HostObserved(H2, T, shared.at(H2).revision, "attached", dax_path="/x"))
    assert step_of(shared) is MoveStep.ENDING
    assert shared.at(H1).release


def test_a_repeat_is_already_so_and_another_has_to_wait(shared: World) -> None:
    offered(shared)
    assert shared.do(ev.HandOver(T, H1, H2)).reply.outcome is Outcome.ALREADY_SO
    back = shared.do(ev.HandOver(T, H2, H1)).reply
    assert back.outcome in (Outcome.TAG_IS_NOT_ATTACHED, Outcome.TAG_IS_MOVING)
    assert shared.do(ev.AttachCapacity(T, H2)).reply.outcome is Outcome.ALREADY_SO


def test_a_refusal_leaves_everything_as_it_was(shared: World) -> None:
    add = offered(shared)
    step = shared.answer(add, ())
    assert "capacity.move_failed" in types(step)
    assert step_of(shared) is MoveStep.FAILED
    assert shared.state() is CapacityState.ACTIVE
    assert not shared.at(H1).release
    assert not reference(step).wanted


def test_without_references_nothing_is_begun(shared: World) -> None:
    begun = shared.do(ev.HandOver(T, H1, H2))
    step = answered(shared, begun, code=0x15)
    assert step_of(shared) is MoveStep.FAILED
    assert not [effect for effect in step.effects if isinstance(effect, InitiateAdd)]
    assert shared.state() is CapacityState.ACTIVE


def test_bytes_that_nobody_has_any_more_are_kept(shared: World) -> None:
    """The next host loses it just when the last one has let go."""
    first = ev.CapacityReturned(A0, 0, T, shared.machine.state.capacities[T].extents)
    add = offered(shared)
    shared.take(add)
    shared.do(ev.HostObserved(H2, T, shared.at(H2).revision, "attached", dax_path="/x"))
    shared.returned(add)
    shared.prove(H2)
    shared.do(first)
    step = shared.prove(H1)
    assert "capacity.move_failed" in types(step)
    assert shared.state() is CapacityState.RETAINED
    assert shared.machine.state.capacities[T].retain


def test_a_hand_over_goes_on_after_a_restart(shared: World) -> None:
    begun = shared.do(ev.HandOver(T, H1, H2))
    effect = reference(begun)
    shared.restart()
    shared.do(ev.ApplianceConnected(A0, REGIONS, LDS))
    step = shared.do(ev.ReferenceSet(effect.id, T, True, 0))
    assert shared.add(step).host == H2


def test_a_reference_given_up_frees_nothing_before_the_lists_were_read(shared: World) -> None:
    held = answered(shared, shared.do(ev.RetainCapacity(T, True)))
    assert not held.effects
    extents = shared.machine.state.capacities[T].extents
    given_up = shared.do(ev.ReleaseCapacity(T))
    shared.do(ev.CapacityReturned(A0, 0, T, extents))
    shared.prove(H1)
    step = answered(shared, given_up)
    assert shared.state() is CapacityState.SANITISING
    assert [type(effect) for effect in step.effects] == [ev.ReadAppliance]
    shared.do(ev.ApplianceSnapshot(A0, (), (ev.ListedTag(T, (), (), False),)))
    assert shared.machine.state.capacities[T].reference is Reference.DROPPING
    shared.do(ev.ApplianceSnapshot(A0, (), ()))
    assert shared.state() is None


def test_only_what_can_be_shared_is_retained_or_moved() -> None:
    world = World()
    world.attached()
    not_sharable = Outcome.TAG_IS_NOT_SHARABLE
    assert world.do(ev.RetainCapacity(T, True)).reply.outcome is not_sharable
    assert world.do(ev.HandOver(T, H1, H2)).reply.outcome is not_sharable
    assert world.do(ev.PublishCapacity(T, (H2,))).reply.outcome is not_sharable
    refused = world.create(tag=T.replace("1", "3"), retain=True)
    assert refused.reply.field == "retain"
