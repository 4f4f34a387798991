"""The machine of one attachment: one capacity on one host, from the plan to the proof that it is
over.

Theory of operation. An attachment is PLANNED when it is committed, before anybody outside knows of
it. The appliance starts the add (OFFERED) and reports what the host took: all of it (ATTACHED),
nothing (REFUSED), or a part, which nobody can use and which is therefore released again. Answers
and their reports may overtake each other, so an acceptance is taken in PLANNED too.

A missing answer never decides anything: the attachment becomes UNKNOWN and stays so until the
appliance's own lists have been read, which then say held, pending or absent.

RELEASING lasts until two facts are there, in whatever order they come: the appliance says that the
host no longer has the extents (`gone`), and the host has proved that nothing uses them (`proved`)
or it was fenced (`fenced`). FENCING is the same with a forced release on its way. Only both facts
together end in RELEASED. REFUSED and RELEASED hold nothing; from there a new attachment to the same
host may be planned.

An appliance that shows a host as holder of what it refused or gave back is believed: the attachment
is RELEASING again and the proofs start over. Each pair that cannot happen is ILLEGAL: it changes
nothing, and is noted.
"""

from __future__ import annotations

from enum import Enum

from tagmem.domain.records import AttachmentState


class Happening(Enum):
    """What can befall an attachment."""

    PLAN = "plan"
    STARTED = "add started"
    ADD_FAILED = "add failed"
    ACCEPTED = "accepted"
    TOOK_PART = "took a part"
    DECLINED = "declined"
    NO_ANSWER = "no answer"
    SEEN_HELD = "seen held"
    SEEN_PENDING = "seen pending"
    SEEN_ABSENT = "seen absent"
    RELEASE = "release wanted"
    RETURNED = "returned"
    FORCE = "force"
    OVER = "over"


class Verdict(Enum):
    """What a table says beside a next state."""

    ILLEGAL = "ILLEGAL"


ILLEGAL = Verdict.ILLEGAL

_S = AttachmentState
_H = Happening

_ROWS: dict[AttachmentState, dict[Happening, AttachmentState]] = {
    _S.PLANNED: {
        _H.STARTED: _S.OFFERED,
        _H.ADD_FAILED: _S.REFUSED,
        _H.ACCEPTED: _S.ATTACHED,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.REFUSED,
        _H.NO_ANSWER: _S.UNKNOWN,
        _H.SEEN_HELD: _S.ATTACHED,
        _H.SEEN_PENDING: _S.OFFERED,
        _H.SEEN_ABSENT: _S.PLANNED,
        _H.RELEASE: _S.RELEASING,
    },
    _S.OFFERED: {
        _H.STARTED: _S.OFFERED,
        _H.ACCEPTED: _S.ATTACHED,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.REFUSED,
        _H.NO_ANSWER: _S.OFFERED,
        _H.SEEN_HELD: _S.ATTACHED,
        _H.SEEN_PENDING: _S.OFFERED,
        _H.SEEN_ABSENT: _S.REFUSED,
        _H.RELEASE: _S.RELEASING,
    },
    _S.ATTACHED: {
        _H.STARTED: _S.ATTACHED,
        _H.ADD_FAILED: _S.ATTACHED,
        _H.ACCEPTED: _S.ATTACHED,
        _H.NO_ANSWER: _S.ATTACHED,
        _H.SEEN_HELD: _S.ATTACHED,
        _H.SEEN_ABSENT: _S.RELEASING,
        _H.RELEASE: _S.RELEASING,
        _H.RETURNED: _S.RELEASING,
    },
    _S.REFUSED: {
        _H.PLAN: _S.PLANNED,
        _H.STARTED: _S.REFUSED,
        _H.ADD_FAILED: _S.REFUSED,
        _H.ACCEPTED: _S.RELEASING,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.REFUSED,
        _H.NO_ANSWER: _S.REFUSED,
        _H.SEEN_HELD: _S.RELEASING,
        _H.SEEN_PENDING: _S.RELEASING,
        _H.SEEN_ABSENT: _S.REFUSED,
    },
    _S.UNKNOWN: {
        _H.STARTED: _S.OFFERED,
        _H.ADD_FAILED: _S.REFUSED,
        _H.ACCEPTED: _S.ATTACHED,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.REFUSED,
        _H.NO_ANSWER: _S.UNKNOWN,
        _H.SEEN_HELD: _S.ATTACHED,
        _H.SEEN_PENDING: _S.OFFERED,
        _H.SEEN_ABSENT: _S.PLANNED,
        _H.RELEASE: _S.RELEASING,
    },
    _S.RELEASING: {
        _H.STARTED: _S.RELEASING,
        _H.ADD_FAILED: _S.RELEASING,
        _H.ACCEPTED: _S.RELEASING,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.RELEASING,
        _H.NO_ANSWER: _S.RELEASING,
        _H.SEEN_HELD: _S.RELEASING,
        _H.SEEN_PENDING: _S.RELEASING,
        _H.SEEN_ABSENT: _S.RELEASING,
        _H.RELEASE: _S.RELEASING,
        _H.RETURNED: _S.RELEASING,
        _H.FORCE: _S.FENCING,
        _H.OVER: _S.RELEASED,
    },
    _S.FENCING: {
        _H.STARTED: _S.FENCING,
        _H.ADD_FAILED: _S.FENCING,
        _H.ACCEPTED: _S.FENCING,
        _H.TOOK_PART: _S.FENCING,
        _H.DECLINED: _S.FENCING,
        _H.NO_ANSWER: _S.FENCING,
        _H.SEEN_HELD: _S.FENCING,
        _H.SEEN_PENDING: _S.FENCING,
        _H.SEEN_ABSENT: _S.FENCING,
        _H.RELEASE: _S.FENCING,
        _H.RETURNED: _S.FENCING,
        _H.FORCE: _S.FENCING,
        _H.OVER: _S.RELEASED,
    },
    _S.RELEASED: {
        _H.PLAN: _S.PLANNED,
        _H.STARTED: _S.RELEASED,
        _H.ADD_FAILED: _S.RELEASED,
        _H.ACCEPTED: _S.RELEASING,
        _H.TOOK_PART: _S.RELEASING,
        _H.DECLINED: _S.RELEASED,
        _H.NO_ANSWER: _S.RELEASED,
        _H.SEEN_HELD: _S.RELEASING,
        _H.SEEN_PENDING: _S.RELEASING,
        _H.SEEN_ABSENT: _S.RELEASED,
        _H.RETURNED: _S.RELEASED,
    },
}

TABLE: dict[tuple[AttachmentState, Happening], AttachmentState | Verdict] = {
    (state, happening): _ROWS[state].get(happening, ILLEGAL)
    for state in AttachmentState
    for happening in Happening
}
"""Total: every state and every happening."""

OVER = frozenset({_S.REFUSED, _S.RELEASED})
"""The host holds nothing and is not being offered anything."""
WANTED = frozenset({_S.PLANNED, _S.OFFERED, _S.ATTACHED, _S.UNKNOWN})
"""The host shall have it."""
LEAVING = frozenset({_S.RELEASING, _S.FENCING})
