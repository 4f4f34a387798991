"""The orchestrator's deciding half: one event in, one Step out; every event is answered in every
state.

The rules are in the modules named here; this one only says which of them answers what. The machine
applies its own changes as it decides them, so the state it shows is the one that the pending commit
makes durable. When a commit fails, `restore` puts it back to what the store has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tagmem.base.units import Nanoseconds
from tagmem.domain import appliances, climb, effects, hosts, reconcile, requests, sharing
from tagmem.domain import desired as wanted
from tagmem.domain.desired import Desired
from tagmem.domain.placement import Explanation, Request
from tagmem.domain.state import State
from tagmem.domain.turn import Turn
from tagmem.ports import Event, Loaded, Step, Tick

Handler = Callable[[Turn, Any], Any]


def _tick(turn: Turn, _: Tick) -> None:
    climb.tick(turn)


HANDLERS: dict[type[Event], Handler] = {
    effects.RegisterAppliance: appliances.register,
    effects.RegisterHost: hosts.register,
    effects.CreateCapacity: requests.create,
    effects.AttachCapacity: requests.attach,
    effects.ReleaseCapacity: requests.release,
    effects.HandOver: sharing.hand_over,
    effects.PublishCapacity: sharing.publish,
    effects.RetainCapacity: sharing.retain,
    effects.LaunchWorkload: hosts.launch,
    effects.StopWorkload: hosts.stop,
    effects.RefreshAppliance: appliances.refresh,
    effects.ApplianceConnected: appliances.connected,
    effects.ApplianceDisconnected: appliances.disconnected,
    effects.ApplianceSnapshot: reconcile.snapshot,
    effects.AddStarted: appliances.add_started,
    effects.AddFailed: appliances.add_failed,
    effects.ReleaseStarted: appliances.release_started,
    effects.ReleaseFailed: appliances.release_failed,
    effects.FenceEnded: appliances.fence_ended,
    effects.ReferenceSet: appliances.reference_set,
    effects.EffectUnknown: appliances.effect_unknown,
    effects.HostAnswered: appliances.host_answered,
    effects.CapacityReturned: appliances.capacity_returned,
    effects.HostConnected: hosts.connected,
    effects.HostDisconnected: hosts.disconnected,
    effects.HostObserved: hosts.observed,
    Tick: _tick,
}
"""Every event of `effects` and the clock's; a test holds that none is missing."""


class OrchestratorMachine:
    """Implements `ports.Machine` over `state`, which others may read between steps."""

    def __init__(self) -> None:
        self.state = State()

    def restore(self, loaded: Loaded) -> None:
        """Forget everything, connections excepted, and start from what the store has."""
        connected = self.state.connected
        self.state = State.restored(loaded)
        # A failed commit ends no session; after a restart of the process the set is empty anyway.
        self.state.connected = {host for host in connected if host in self.state.hosts}

    def step(self, event: Event, now: Nanoseconds) -> Step:
        """Decide. Raises nothing for what came from outside; InvariantViolated when the books are
        broken.
        """
        turn = Turn(self.state, now)
        return turn.finish(HANDLERS[type(event)](turn, event))

    def next_deadline(self) -> Nanoseconds | None:
        """When a Tick is wanted at the latest."""
        return self.state.next_deadline()

    def desired(self, host: str, tag: str) -> Desired | None:
        """What a host is to reach for one tag; None where nothing is wanted of it."""
        return wanted.desired(self.state, host, tag)

    def desired_for(self, host: str) -> list[Desired]:
        """All that is wanted of a host, for a full synchronisation."""
        return wanted.desired_for(self.state, host)

    def explain(self, request: Request) -> Explanation:
        """Where a request would go now, and why; changes nothing."""
        return requests.explain(self.state, request)
