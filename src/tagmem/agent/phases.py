"""The life of one tag on one host, as a total table, so that every pair of phase and input was
thought of.

Theory of operation. An offer that passes the policy is accepted, its bytes surface as a DAX device,
and a workload may run on it. Release goes the other way and only forwards: end the workload, take
the *name* away, prove that nobody has the bytes, return the extents. The name goes before the proof
because a process that could still open the tag by name could do so just after the proof; nothing is
returned until a proof that *began* after the name was gone has succeeded. While somebody holds the
bytes the tag stays BLOCKED and is looked at again; if it is wanted once more it simply surfaces
again, and the holder has lost nothing.

What is not covered by the name: on an emulated host the appliance's own directory has a link to the
bytes until the extents are returned. That directory belongs to the agent alone (mode 0700).
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where one tag is on this host."""

    EXPECTED = "expected"
    """Wanted here; no offer of it has come (or the device has not confirmed it)."""
    REFUSED = "refused"
    ACCEPTING = "accepting"
    """Our answer (4802h) is on its way."""
    SURFACING = "surfacing"
    ATTACHED = "attached"
    ENDING = "ending"
    """To be given back: the workload is asked, then made, to end."""
    WITHDRAWING = "withdrawing"
    PROVING = "proving"
    BLOCKED = "blocked"
    """Somebody holds it, or the proof was incomplete; it is checked again."""
    RETURNING = "returning"
    """Proved unused; the extents are being returned (4803h)."""
    RELEASED = "released"


class Input(Enum):
    """What can happen to a tag."""

    WANTED = "wanted"
    UNWANTED = "unwanted"
    JUDGED_GOOD = "judged-good"
    JUDGED_BAD = "judged-bad"
    ANSWERED = "answered"
    ANSWER_FAILED = "answer-failed"
    PRESENT = "present"
    """The device's own list shows it."""
    MISSING = "missing"
    """The device's own list does not show it, or the device took it by force."""
    SURFACED = "surfaced"
    SURFACE_FAILED = "surface-failed"
    QUIET = "quiet"
    """No workload of ours runs on it."""
    WITHDRAWN = "withdrawn"
    WITHDRAW_FAILED = "withdraw-failed"
    FREE = "free"
    HELD = "held"
    RETURNED = "returned"
    RETURN_FAILED = "return-failed"
    DUE = "due"
    """The time to try again has come."""


class IllegalTransition(RuntimeError):
    """The loop fed an input that cannot occur in this phase: a defect, after which the agent starts
    anew.
    """

    def __init__(self, phase: Phase, given: Input) -> None:
        super().__init__(f"{given.value} in phase {phase.value}")


# Columns are phases, rows are inputs. A name is the next phase (its own name: entered again), `.`
# means that nothing changes, `-` that it cannot happen.
_COLUMNS = {
    "EX": Phase.EXPECTED,
    "RF": Phase.REFUSED,
    "AC": Phase.ACCEPTING,
    "SU": Phase.SURFACING,
    "AT": Phase.ATTACHED,
    "EN": Phase.ENDING,
    "WD": Phase.WITHDRAWING,
    "PR": Phase.PROVING,
    "BL": Phase.BLOCKED,
    "RT": Phase.RETURNING,
    "RL": Phase.RELEASED,
}
_ROWS = """
                  EX  RF  AC  SU  AT  EN  WD  PR  BL  RT  RL
 wanted           .   EX  .   .   .   SU  SU  SU  SU  .   EX
 unwanted         EN  EN  .   EN  EN  .   .   .   .   .   .
 judged-good      AC  AC  -   -   -   -   -   -   -   -   -
 judged-bad       RF  RF  .   .   .   .   .   .   .   .   .
 answered         -   -   SU  -   -   -   -   -   -   -   -
 answer-failed    -   -   EX  -   -   -   -   -   -   -   -
 present          SU  SU  SU  .   .   .   .   .   .   PR  EN
 missing          .   .   EX  EN  EN  .   .   .   .   RL  .
 surfaced         .   .   .   AT  .   .   .   .   .   .   .
 surface-failed   .   .   .   .   .   .   .   .   .   .   .
 quiet            -   -   -   -   -   WD  -   -   -   -   -
 withdrawn        .   .   .   .   .   .   PR  .   .   .   .
 withdraw-failed  .   .   .   .   .   .   .   .   .   .   .
 free             -   -   -   -   -   -   -   RT  -   -   -
 held             -   -   -   -   -   -   -   BL  -   -   -
 returned         .   .   .   .   .   .   .   .   .   RL  .
 return-failed    .   .   .   .   .   .   .   .   .   .   .
 due              .   .   .   SU  .   .   WD  .   PR  PR  .
"""
_STAY = "."
_NEVER = "-"


def _read(rows: str) -> dict[tuple[Phase, Input], Phase | IllegalTransition | None]:
    lines = [line.split() for line in rows.strip("\n").splitlines()]
    columns = [_COLUMNS[name] for name in lines[0]]
    table: dict[tuple[Phase, Input], Phase | IllegalTransition | None] = {}
    for name, *cells in lines[1:]:
        given = Input(name)
        for phase, cell in zip(columns, cells, strict=True):
            if cell == _NEVER:
                table[phase, given] = IllegalTransition(phase, given)
            else:
                table[phase, given] = None if cell == _STAY else _COLUMNS[cell]
    if len(table) != len(Phase) * len(Input):
        raise ValueError("the table of phases is not total")
    return table


TABLE = _read(_ROWS)
"""Next phase for each pair; None: nothing changes; IllegalTransition: it cannot happen."""


def next_phase(phase: Phase, given: Input) -> Phase | None:
    """The phase to enter, or None to stay. Raises IllegalTransition."""
    found = TABLE[phase, given]
    if isinstance(found, IllegalTransition):
        raise IllegalTransition(phase, given)
    return found
