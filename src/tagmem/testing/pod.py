"""An appliance, an orchestrator and hosts on simulated wires: what worlds and scenarios both are.

Who runs it says what goes wrong; `opened` is where a connection can be broken, cut or listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tagmem.agent.policy import Limits
from tagmem.domain import invariants
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_records import FM_PORT, AllocState, DeviceSpec
from tagmem.domain.invariants import DeviceExtent
from tagmem.domain.machine import OrchestratorMachine
from tagmem.domain.records import Extent
from tagmem.domain.state import State
from tagmem.testing.control import OrchestratorProcess
from tagmem.testing.device import ApplianceProcess, SimMedia
from tagmem.testing.hosts import HostProcess
from tagmem.testing.nodes import Connection
from tagmem.testing.sim import Simulation

APPLIANCE = "a0"
ToClient = Callable[[bytes], None]


class Planted:
    """Machines that can be swapped for ones with a bug, to show that the simulator finds it."""

    def __init__(
        self,
        orchestrator: Callable[[], OrchestratorMachine] = OrchestratorMachine,
        device: Callable[[DeviceSpec], DeviceMachine] = DeviceMachine,
        *,
        forgets_outbox: bool = False,
    ) -> None:
        self.orchestrator = orchestrator
        self.device = device
        self.forgets_outbox = forgets_outbox


NOTHING_PLANTED = Planted()


class Pod:
    """One appliance, the orchestrator, and an agent on each LD that is named in `agents`."""

    def __init__(
        self,
        sim: Simulation,
        spec: DeviceSpec,
        agents: Sequence[str],
        planted: Planted = NOTHING_PLANTED,
        limits: Mapping[str, Limits] | None = None,
    ) -> None:
        self.sim = sim
        media = SimMedia(min(region.block_bytes for region in spec.regions))
        self.media = {APPLIANCE: media}
        self.appliance = ApplianceProcess(sim, APPLIANCE, spec, media, planted.device)
        self.orchestrator = OrchestratorProcess(sim, self._dial_fm, planted.orchestrator)
        self.appliance.forgets_outbox = planted.forgets_outbox
        self.orchestrator.forgets_outbox = planted.forgets_outbox
        self.hosts = {
            ld.name: HostProcess(
                sim,
                ld.name,
                {APPLIANCE: number},
                self.media,
                self._dial_mailbox,
                self._dial_orchestrator,
                (limits or {}).get(ld.name),
            )
            for number, ld in enumerate(spec.lds)
            if ld.name in agents
        }
        self._names = tuple(ld.name for ld in spec.lds)

    # ---- wires

    def opened(self, wire: Connection, client: str, server: str) -> None:
        """A connection was made."""

    def reachable(self, client: str, server: str) -> bool:
        """Whether a connection can be made now."""
        return True

    def _dial_fm(self, name: str, to_client: ToClient) -> Connection | None:
        if not self.reachable("orchestrator", name):
            return None
        wire = self.appliance.accept(FM_PORT, to_client, fifo=False)
        if wire is not None:
            self.opened(wire, "orchestrator", name)
        return wire

    def _dial_mailbox(self, name: str, ld: int, to_client: ToClient) -> Connection | None:
        if not self.reachable(self._names[ld], name):
            return None
        # A mailbox is a register interface: it neither loses nor repeats commands.
        wire = self.appliance.accept(ld, to_client, fifo=True)
        if wire is not None:
            self.opened(wire, self._names[ld], name)
        return wire

    def _dial_orchestrator(self, name: str, to_client: ToClient) -> Connection | None:
        if not self.orchestrator.alive or not self.reachable(name, "orchestrator"):
            return None
        wire = Connection(
            self.sim,
            lambda data: self.orchestrator.take_agent_message(wire, data),
            to_client,
            fifo=True,
        )
        self.orchestrator.accepted.append(wire)
        self.opened(wire, name, "orchestrator")
        return wire

    # ---- checking

    @property
    def state(self) -> State:
        """The orchestrator's."""
        return self.orchestrator.machine.state

    def device_extents(self) -> list[DeviceExtent]:
        """What the device's own books say that hosts hold, in media offsets."""
        return [
            DeviceExtent(holder.ld, holder.region, row.tag, Extent(piece.start, piece.length))
            for row in self.appliance.machine.state.allocations.values()
            if row.state is AllocState.LIVE
            for holder in row.holders
            if not holder.pending
            for piece in row.pieces
        ]

    def check(self) -> None:
        """Raise InvariantViolated if the books contradict each other or the device."""
        state = self.state
        invariants.check(state)
        both = self.appliance.alive and self.orchestrator.alive
        if both and APPLIANCE in state.appliances and state.has_region(APPLIANCE, 0):
            invariants.check_device(state, APPLIANCE, self.device_extents())
