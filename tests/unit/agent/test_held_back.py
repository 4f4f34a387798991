"""A tag that another host still writes is accepted and not surfaced, until a later word says so."""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.agent import records as r
from tagmem.agent.loop import AgentMachine
from tagmem.agent.phases import Phase
from tagmem.base.units import MIB, Bytes, Dpa
from tagmem.ports import Effect, Event
from tagmem.wire.agentapi import Desired

TAG = "1" * 8 + "-0000-0000-0000-000000000000"
WANTED = Desired(
    TAG, 1, "attached", "a0", 4 * MIB, extents=((0, 4 * MIB),), shared=True, held_back=True
)
EXTENT = r.Extent(Dpa(0), Bytes(4 * MIB), TAG, 0)


def told(machine: AgentMachine, *events: Event) -> list[Effect]:
    return [effect for event in events for effect in machine.step(event, 1).effects]


def accepted() -> AgentMachine:
    machine = AgentMachine()
    region = r.Region(Dpa(0), Bytes(64 * MIB), Bytes(2 * MIB))
    told(machine, r.DeviceRead("a0", (region,), (), True, 1), r.DesiredReceived(WANTED))
    told(machine, r.Offered("a0", 1, (EXTENT,)), r.Answered("a0", 1, 0))
    return machine


def surfacing(effects: list[Effect]) -> list[r.Surface]:
    return [effect for effect in effects if isinstance(effect, r.Surface)]


def test_it_surfaces_when_it_is_held_back_no_longer() -> None:
    machine = accepted()
    state = machine.tag(TAG)
    assert state is not None
    assert state.phase is Phase.SURFACING
    assert not surfacing(told(machine, r.DesiredReceived(replace(WANTED, workload=None))))
    later = replace(WANTED, revision=2, held_back=False)
    assert len(surfacing(told(machine, r.DesiredReceived(later)))) == 1
    assert not surfacing(told(machine, r.DesiredReceived(later))), "once is enough"


def test_it_is_given_back_without_ever_having_surfaced() -> None:
    machine = accepted()
    released = replace(WANTED, revision=2, goal="released", held_back=False)
    effects = told(machine, r.DesiredReceived(released))
    assert not surfacing(effects)
    assert any(isinstance(effect, r.Withdraw) for effect in effects)
