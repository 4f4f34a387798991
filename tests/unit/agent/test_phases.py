"""The table of a tag's life: total, and without a way past the proof."""

from __future__ import annotations

import pytest

from tagmem.agent.phases import TABLE, IllegalTransition, Input, Phase, next_phase


def test_every_pair_was_thought_of() -> None:
    assert set(TABLE) == {(phase, given) for phase in Phase for given in Input}


def test_only_a_proof_leads_to_returning() -> None:
    ways = {pair for pair, entered in TABLE.items() if entered is Phase.RETURNING}
    assert ways == {(Phase.PROVING, Input.FREE)}


def test_released_comes_only_after_returning() -> None:
    ways = {phase for (phase, _), entered in TABLE.items() if entered is Phase.RELEASED}
    assert ways == {Phase.RETURNING}


def test_the_proof_begins_after_the_name_is_gone() -> None:
    ways = {phase for (phase, _), entered in TABLE.items() if entered is Phase.PROVING}
    assert ways == {Phase.WITHDRAWING, Phase.BLOCKED, Phase.RETURNING}


def test_each_phase_can_be_reached_and_left() -> None:
    entered = {after for after in TABLE.values() if isinstance(after, Phase)}
    assert entered == set(Phase)
    left = {phase for (phase, _), after in TABLE.items() if isinstance(after, Phase)}
    assert left == set(Phase)


def test_what_cannot_happen_is_said_to_be_so() -> None:
    with pytest.raises(IllegalTransition, match="answered in phase attached"):
        next_phase(Phase.ATTACHED, Input.ANSWERED)
