"""The machine of a capacity: what its attachments and its owner's wish together make of it.

Theory of operation. A capacity is RESERVED while no host has or is offered it, ACTIVE while one
has, RELEASING once its owner wants it back in the pool, SANITISING when every holder has given it
back and the appliance has not yet said that the media is clean. If that takes too long it is
QUARANTINED: shown, not used, not free. It ends (FREE) only from there on: every attachment over,
media clean, owner willing. A capacity that one host gave back while the owner keeps it becomes
RESERVED again when it is clean; one that is to outlive its hosts becomes RETAINED with its bytes.

The state is never set; it follows. After each event that touches a capacity, `turn.settle` works
out which Condition now holds and looks up the next state here. A pair that the rules exclude is
ILLEGAL, and then the books contradict themselves.
"""

from __future__ import annotations

from enum import Enum

from tagmem.domain.records import CapacityState


class Condition(Enum):
    """What holds for a capacity and its attachments."""

    IN_USE = "in use"
    """The owner keeps it, and some host has it or is to have it."""
    LEAVING = "leaving"
    """Somebody wants it given back, and some attachment is not over."""
    GIVEN_BACK = "given back"
    """No host has it any more; the media is not known to be clean."""
    OVERDUE = "overdue"
    """The same, for longer than sanitising may take."""
    KEPT = "kept"
    """No host has it; the fabric manager's reference keeps its bytes."""
    IDLE = "idle"
    """No host has it, and the media is clean; the owner keeps it."""
    DONE = "done"
    """No host has it, the media is clean, and the owner wants it back in the pool."""


class Verdict(Enum):
    """What the table says beside a next state."""

    ILLEGAL = "ILLEGAL"
    FREE = "FREE"
    """The records are deleted and the extents are free."""


ILLEGAL = Verdict.ILLEGAL
FREE = Verdict.FREE

_S = CapacityState
_C = Condition

_ROWS: dict[CapacityState, dict[Condition, CapacityState | Verdict]] = {
    _S.RESERVED: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.SANITISING,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
    _S.ACTIVE: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.SANITISING,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
    _S.RETAINED: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.SANITISING,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
    _S.RELEASING: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.SANITISING,
        _C.OVERDUE: _S.QUARANTINED,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
    _S.SANITISING: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.SANITISING,
        _C.OVERDUE: _S.QUARANTINED,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
    _S.QUARANTINED: {
        _C.IN_USE: _S.ACTIVE,
        _C.LEAVING: _S.RELEASING,
        _C.GIVEN_BACK: _S.QUARANTINED,
        _C.OVERDUE: _S.QUARANTINED,
        _C.KEPT: _S.RETAINED,
        _C.IDLE: _S.RESERVED,
        _C.DONE: FREE,
    },
}

TABLE: dict[tuple[CapacityState, Condition], CapacityState | Verdict] = {
    (state, condition): _ROWS[state].get(condition, ILLEGAL)
    for state in CapacityState
    for condition in Condition
}
"""Total: every state and every condition."""
