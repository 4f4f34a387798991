"""Bugs on purpose: a simulator that cannot find these is not looking.

Each is a mistake that somebody once made in such a system: an answer that did not come taken for a
no, memory given out before it was wiped, and work that was decided, and forgotten by a restart.
"""

from __future__ import annotations

from msgspec.structs import replace

from tagmem.base.units import Nanoseconds
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_records import Sanitise, SanitiseDone, SanitiseMethod
from tagmem.domain.effects import DurableEffect, EffectUnknown
from tagmem.domain.machine import OrchestratorMachine
from tagmem.domain.turn import Turn
from tagmem.ports import Event, Step
from tagmem.testing.pod import Planted


class FreesOnTimeout(OrchestratorMachine):
    """Takes a missing answer for the end: what the command was about counts as free."""

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """As it should be, but for EffectUnknown."""
        if not isinstance(event, EffectUnknown):
            return super().step(event, now)
        turn = Turn(self.state, now)
        effect = turn.end_effect(event.effect_id)
        if isinstance(effect, DurableEffect):
            for record in tuple(self.state.attachments.get(effect.tag, {}).values()):
                turn.put("attachment", record.key, None)
            if effect.tag in self.state.capacities:
                turn.put("capacity", effect.tag, None)
        return turn.finish()


class GrantsBeforeSanitising(DeviceMachine):
    """Calls bytes wiped when it has only decided to wipe them."""

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """As it should be, but a Sanitise counts as done at once."""
        step = super().step(event, now)
        for effect in step.effects:
            if isinstance(effect, Sanitise):
                size = sum(piece.length for piece in effect.pieces)
                punch = SanitiseMethod.PUNCH
                done = SanitiseDone(effect.id, effect.allocation, punch, size, size)
                rest = super().step(done, now)
                step = replace(
                    step,
                    changes=step.changes + rest.changes,
                    effects=step.effects + rest.effects,
                    done=step.done + rest.done,
                )
        return step


PLANTED: dict[str, Planted] = {
    "frees on a timeout": Planted(orchestrator=FreesOnTimeout),
    "grants before sanitising": Planted(device=GrantsBeforeSanitising),
    "forgets the outbox": Planted(forgets_outbox=True),
}
"""By what is wrong."""
