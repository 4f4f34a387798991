"""The release ladder: which rungs there are, who climbs them, and how long each may take (design
rule 6).

The host's agent climbs ask, stop and detach by itself, because only it sees the processes. When it
has not proved the release by the sum of their deadlines, the orchestrator goes on with restart,
fence and force, each only if the caller allowed it. At the end of what is allowed a release does
not end: it stays visible with its holder, because a timeout never frees memory (rule 3).
"""

from __future__ import annotations

from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.domain.records import RUNGS, ReleasePlan

DEADLINES_NS: dict[str, Nanoseconds] = {
    "ask": 10 * SECOND,
    "stop": 5 * SECOND,
    "detach": 30 * SECOND,
    "restart": 60 * SECOND,
    "fence": 5 * SECOND,
    "force": 5 * SECOND,
}
"""How long each rung may take unless the release says otherwise."""
DEADLINE_NS_MAX: Nanoseconds = 86_400 * SECOND
MESSAGE_GRACE_NS: Nanoseconds = 2 * SECOND
"""What the words between orchestrator and agent may take, beyond the agent's own rungs."""
SANITISE_DEADLINE_NS: Nanoseconds = 600 * SECOND
"""How long an appliance may take to sanitise before a person is told; 1 TiB at 2 GiB/s takes 512
s."""

_RANK = {rung: rank for rank, rung in enumerate(RUNGS)}
_AGENT_RUNGS = RUNGS[:3]
_LAST_AGENT_RANK = _RANK["detach"]


def rank(rung: str) -> int:
    """Height of a rung; -1 for none."""
    return _RANK.get(rung, -1)


def deadline_ns(plan: ReleasePlan, rung: str) -> Nanoseconds:
    """How long one rung may take; never nothing, so that trying again cannot become a loop in no
    time.
    """
    return max(plan.deadlines_ns.get(rung, DEADLINES_NS[rung]), MILLISECOND)


def agent_time_ns(plan: ReleasePlan) -> Nanoseconds:
    """How long the agent's own rungs may take together, with the words to and fro."""
    allowed = [rung for rung in _AGENT_RUNGS if _RANK[rung] <= _RANK[plan.up_to]]
    return sum(deadline_ns(plan, rung) for rung in allowed) + MESSAGE_GRACE_NS


def next_rung(plan: ReleasePlan, rung: str) -> str:
    """The orchestrator's rung after `rung` (after any of the agent's: restart); empty when none is
    allowed.
    """
    height = max(_RANK[rung], _LAST_AGENT_RANK) + 1
    if height >= len(RUNGS) or height > _RANK[plan.up_to]:
        return ""
    return RUNGS[height]


def higher(one: str, other: str) -> str:
    """The higher of two rungs."""
    return one if rank(one) >= rank(other) else other
