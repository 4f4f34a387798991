"""One tag in the agent's memory: what its record says, and what is found out again after a start.

Kept apart from the loop so that what a tag *is* (goal, observation, record) reads without what
happens.
"""

from __future__ import annotations

from typing import Literal

from tagmem.agent.phases import Phase
from tagmem.agent.records import Span, Surface, TagRecord
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.ports import Holding
from tagmem.wire.agentapi import Desired, HolderReport, Observed, WorkloadReport
from tagmem.wire.agentapi import Phase as ShownPhase

HOLDERS_SHOWN_MAX = 16
"""Holders that one observation names; the reason says how many there are."""
RUNG_DEADLINES_NS: dict[str, Nanoseconds] = {
    "ask": 10 * SECOND,
    "stop": 5 * SECOND,
    "detach": 30 * SECOND,
}
"""How long a rung may take where the orchestrator does not say."""

_SHOWN: dict[Phase, ShownPhase] = {
    Phase.EXPECTED: "expected",
    Phase.REFUSED: "refused",
    Phase.ACCEPTING: "expected",
    Phase.SURFACING: "expected",
    Phase.ATTACHED: "attached",
    Phase.ENDING: "releasing",
    Phase.WITHDRAWING: "releasing",
    Phase.PROVING: "releasing",
    Phase.BLOCKED: "releasing",
    Phase.RETURNING: "releasing",
    Phase.RELEASED: "released",
}
_KEPT: dict[Phase, Phase] = {
    Phase.EXPECTED: Phase.EXPECTED,
    Phase.REFUSED: Phase.REFUSED,
    Phase.ACCEPTING: Phase.EXPECTED,
    Phase.SURFACING: Phase.EXPECTED,
    Phase.ATTACHED: Phase.EXPECTED,
    Phase.ENDING: Phase.ENDING,
    Phase.WITHDRAWING: Phase.ENDING,
    Phase.PROVING: Phase.ENDING,
    Phase.BLOCKED: Phase.ENDING,
    Phase.RETURNING: Phase.RETURNING,
    Phase.RELEASED: Phase.RELEASED,
}


class TagState:
    """Everything that the loop knows of one tag."""

    __slots__ = (
        "appliance",
        "asked_back",
        "dax_path",
        "desired",
        "due_ns",
        "extents",
        "flag_revision",
        "holders",
        "lost",
        "phase",
        "proved",
        "reason",
        "region",
        "rung",
        "rung_due_ns",
        "saved",
        "tag",
        "ticket",
        "told",
        "workload",
    )

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.desired: Desired | None = None
        self.phase = Phase.EXPECTED
        self.appliance = ""
        self.region = 0
        self.extents: tuple[Span, ...] = ()
        """What the device lists as ours, in the order of the bytes; empty when it lists nothing."""
        self.dax_path = ""
        self.reason = ""
        self.asked_back = False
        self.lost = False
        self.flag_revision = 0
        """The revision at which the device asked back or took it; a later wish goes before."""
        self.proved = False
        self.holders: tuple[Holding, ...] = ()
        self.ticket = 0
        """Of the last Surface, Withdraw or CheckHolders: results of older ones are ignored."""
        self.due_ns: Nanoseconds | None = None
        self.workload: WorkloadReport | None = None
        self.rung = ""
        self.rung_due_ns: Nanoseconds = 0
        self.saved: TagRecord | None = None
        self.told: Observed | None = None

    @classmethod
    def restore(cls, record: TagRecord) -> TagState:
        """From its record; the rest is found out."""
        state = cls(record.tag)
        state.desired = record.desired
        state.phase = record.phase
        state.reason = record.reason
        state.asked_back = record.asked_back
        state.lost = record.lost
        state.flag_revision = state.revision if record.asked_back or record.lost else 0
        state.rung = record.rung
        state.rung_due_ns = record.rung_due_ns
        state.proved = record.proved
        state.workload = record.workload
        state.appliance = record.desired.appliance if record.desired is not None else ""
        state.saved = record
        return state

    @property
    def revision(self) -> int:
        """Of what is wanted; 0 when nothing was ever said about this tag."""
        return 0 if self.desired is None else self.desired.revision

    @property
    def goal(self) -> Literal["attached", "released", "none"]:
        """What to work towards. `none`: held, and nobody has said what for; it is kept as it is."""
        if self.lost or self.asked_back:
            return "released"
        return "none" if self.desired is None else self.desired.goal

    @property
    def tagged(self) -> bool:
        """Untagged capacity has no name and so no DAX device."""
        return self.desired is None or self.desired.tagged

    def want(self, desired: Desired) -> bool:
        """Take over what is wanted; whether that lifts what its surfacing waited for."""
        waited, self.desired = self.held_back, desired
        return waited and not desired.held_back

    @property
    def held_back(self) -> bool:
        """Whether it is to be accepted and not surfaced yet."""
        return self.desired is not None and self.desired.held_back

    def surface(self) -> Surface:
        """The order to make its device."""
        desired = self.desired
        return Surface(
            0,
            self.appliance,
            self.tag,
            self.ticket,
            self.region,
            sum(length for _, length in self.extents),
            desired is not None and desired.read_only,
            self.extents,
            desired.sharing if desired is not None else "",
        )

    @property
    def active(self) -> bool:
        """Whether a workload of ours runs on it, or is about to."""
        return self.workload is not None and self.workload.state in ("pending", "running")

    @property
    def in_use(self) -> bool:
        """Whether it occupies a DAX device."""
        return self.phase not in (Phase.EXPECTED, Phase.REFUSED, Phase.RELEASED)

    @property
    def up_to(self) -> str:
        """The highest rung that is allowed."""
        return "detach" if self.desired is None else self.desired.up_to

    @property
    def may_kill(self) -> bool:
        """Whether processes that are not our workload may be ended as well."""
        return self.desired is not None and self.desired.kill_holders

    def deadline_ns(self, rung: str) -> Nanoseconds:
        """How long a rung may take."""
        given = self.desired.deadlines_ns if self.desired is not None else {}
        return given.get(rung, RUNG_DEADLINES_NS[rung])

    def may_stop(self) -> bool:
        """Whether the agent may end a workload that does not end when asked."""
        return self.lost or self.desired is None or self.desired.up_to != "ask"

    def shown_rung(self) -> str:
        """The rung of the ladder that a release stands on."""
        if self.rung:
            return self.rung
        return "detach" if _SHOWN[self.phase] == "releasing" else ""

    def observed(self) -> Observed:
        """What the orchestrator is told."""
        shown = self.holders[:HOLDERS_SHOWN_MAX]
        return Observed(
            tag=self.tag,
            revision=self.revision,
            phase=_SHOWN[self.phase],
            dax_path=self.dax_path if self.phase is Phase.ATTACHED else "",
            reason=self.reason,
            rung=self.shown_rung(),
            holders=tuple(
                HolderReport(h.pid, h.name, "maps" if h.how == "maps" else "open") for h in shown
            ),
            workload=self.workload,
            proved=self.proved and self.phase is Phase.RELEASED,
        )

    def record(self) -> TagRecord:
        """What is kept of it."""
        phase = _KEPT[self.phase]
        return TagRecord(
            tag=self.tag,
            desired=self.desired,
            phase=phase,
            reason=self.reason if phase in (Phase.REFUSED, Phase.RELEASED) else "",
            asked_back=self.asked_back,
            rung=self.rung,
            rung_due_ns=self.rung_due_ns,
            proved=self.proved and phase in (Phase.RETURNING, Phase.RELEASED),
            lost=self.lost,
            workload=self.workload,
        )
