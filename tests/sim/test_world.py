"""Simulated worlds: many seeds, the same run twice, and bugs on purpose that have to be found.

`make sim SEED=123` runs one world and prints what happened in it.
"""

from __future__ import annotations

import sys

import pytest

from tagmem.domain.extent import InvariantViolated
from tagmem.testing.planted import PLANTED
from tagmem.testing.pod import NOTHING_PLANTED, Planted
from tagmem.testing.sharedworld import SharedWorld
from tagmem.testing.world import World

SEEDS = 600
SEEDS_PER_TEST = 25
SEEDS_TO_FIND_A_BUG = 300


def run_worlds(numbers: range, planted: Planted = NOTHING_PLANTED) -> None:
    """One world after the other, until one breaks."""
    for number in numbers:
        World(number, planted).run()


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_worlds_come_to_rest_with_every_invariant_held(first: int, seed: int | None) -> None:
    """After each event no byte has two owners; at the end nothing is left and nothing is dirty."""
    if seed is not None:
        if first == 0:
            world = World(seed)
            world.run()
            sys.stdout.write("\n".join(world.sim.transcript) + "\n")
        return
    run_worlds(range(first, first + SEEDS_PER_TEST))


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_shared_worlds_come_to_rest_with_every_byte_where_it_was_promised(first: int) -> None:
    """Hand-overs, publications, references and head resets, in any order and among all faults."""
    for number in range(first, first + SEEDS_PER_TEST):
        SharedWorld(number).run()


@pytest.mark.parametrize("number", [1, 5, 92, 101, 139, 153])
def test_a_seed_is_one_run(number: int) -> None:
    """Two runs of a seed say the same, line for line."""
    one, two = World(number), World(number)
    one.run()
    two.run()
    assert one.sim.transcript == two.sim.transcript
    assert one.sim.events_run == two.sim.events_run


@pytest.mark.parametrize("bug", sorted(PLANTED))
def test_a_planted_bug_is_found(bug: str) -> None:
    """A simulator that cannot find these is not looking."""
    with pytest.raises(InvariantViolated) as found:
        run_worlds(range(SEEDS_TO_FIND_A_BUG), PLANTED[bug])
    assert "seed" in "".join(found.value.__notes__)


def test_the_storm_is_a_storm() -> None:
    """What the worlds go through: if this thins out, the runs above prove little."""
    crashes, transcripts = 0, ""
    for number in range(60):
        world = World(number)
        world.run()
        crashes += sum(
            process.crashes
            for process in (world.orchestrator, world.appliance, *world.hosts.values())
        )
        transcripts += "\n".join(world.sim.transcript)
    assert crashes > 60
    for happening in (
        "(lost)",
        "capacity.held",
        "capacity.sanitising",
        "rung=stop",
        "rung=restart",
        "rung=fence",
        "appliance.lost",
        "maps",
    ):
        assert happening in transcripts, happening
