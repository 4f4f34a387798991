"""Every answer that the system gives to a request, once: number, HTTP status, exit code, and
whether to retry.

Numbers are stable: clients may keep them. Names read as sentences. Where several could be given,
the lowest number wins, so the order below is the order of the checks.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec


class Outcome(IntEnum):
    """What became of a request."""

    OK = 0
    CREATED = 1
    ALREADY_SO = 2
    """The same request was carried out before; nothing changed."""
    ACCEPTED = 3
    """Begun; watch the capacity for its end."""

    FIELD_OUT_OF_RANGE = 10
    TAG_IS_NIL = 11
    NAME_IS_MALFORMED = 12
    SIZE_IS_ZERO = 13
    SIZE_IS_NOT_ALIGNED = 14
    SIZE_EXCEEDS_EVERY_REGION = 15
    SIZE_EXCEEDS_POOL = 16
    SHARING_NEEDS_A_TAG = 17
    COMMAND_IS_EMPTY = 18
    BODY_IS_MALFORMED = 19
    BODY_IS_TOO_LARGE = 20
    MEDIA_TYPE_IS_NOT_SUPPORTED = 21
    METHOD_IS_NOT_ALLOWED = 22

    HOST_IS_UNKNOWN = 30
    APPLIANCE_IS_UNKNOWN = 31
    TAG_IS_UNKNOWN = 32
    HOST_CANNOT_REACH_APPLIANCE = 33
    HOST_DOES_NOT_HOLD_TAG = 34
    REGION_IS_UNKNOWN = 35
    WORKLOAD_IS_UNKNOWN = 36
    PATH_IS_UNKNOWN = 37

    TAG_EXISTS_WITH_OTHER_PARAMETERS = 50
    NAME_EXISTS_WITH_OTHER_PARAMETERS = 51
    TAG_IS_BEING_RELEASED = 52
    TAG_IS_NOT_ATTACHED = 53
    TAG_IS_NOT_SHARABLE = 54
    TAG_IS_QUARANTINED = 55
    REVISION_DOES_NOT_MATCH = 56
    WORKLOAD_IS_RUNNING = 57
    IDEMPOTENCY_KEY_REUSED = 58
    TAG_IS_STILL_HELD = 59
    HOST_REFUSED_OFFER = 60
    TAG_IS_MOVING = 61
    """It is being handed over or published."""
    TAG_IS_NOT_PUBLISHED = 62
    """Its writer has it alone until it is published."""
    MOVE_FAILED = 63
    """A hand-over or publication ended without its goal; `detail` says who has the capacity."""

    NOT_ENOUGH_FREE_CAPACITY = 70
    NO_CONTIGUOUS_CAPACITY = 71
    TOO_MANY_EXTENTS = 72
    APPLIANCE_IS_IN_DOUBT = 73
    QUEUE_IS_FULL = 74
    STORAGE_FAILED = 75

    NOT_SUPPORTED = 90

    @property
    def facts(self) -> Facts:
        """HTTP status, exit code, and whether the same request may succeed later."""
        return _FACTS[self]

    @property
    def transient(self) -> bool:
        """Whether repeating the same request later may succeed."""
        return _FACTS[self].transient

    @property
    def ok(self) -> bool:
        """Whether the request was carried out or begun."""
        return self < 10

    @property
    def title(self) -> str:
        """The name as a sentence."""
        return self.name.replace("_", " ").lower()


class Facts(NamedTuple):
    """How an outcome is rendered at the borders."""

    http_status: int
    exit_code: int
    transient: bool


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_CONFLICT, EXIT_TIMEOUT, EXIT_UNAVAILABLE = (
    range(7)
)
"""Exit codes of every command; 124-127 are left to the shell and to `tagmem run`'s child."""


def _facts(outcome: Outcome) -> Facts:
    special = {
        Outcome.OK: Facts(200, EXIT_OK, False),
        Outcome.CREATED: Facts(201, EXIT_OK, False),
        Outcome.ALREADY_SO: Facts(200, EXIT_OK, False),
        Outcome.ACCEPTED: Facts(202, EXIT_OK, False),
        Outcome.BODY_IS_MALFORMED: Facts(400, EXIT_USAGE, False),
        Outcome.BODY_IS_TOO_LARGE: Facts(413, EXIT_USAGE, False),
        Outcome.MEDIA_TYPE_IS_NOT_SUPPORTED: Facts(415, EXIT_USAGE, False),
        Outcome.METHOD_IS_NOT_ALLOWED: Facts(405, EXIT_USAGE, False),
        Outcome.REVISION_DOES_NOT_MATCH: Facts(412, EXIT_CONFLICT, False),
        Outcome.HOST_CANNOT_REACH_APPLIANCE: Facts(409, EXIT_CONFLICT, False),
        Outcome.IDEMPOTENCY_KEY_REUSED: Facts(422, EXIT_CONFLICT, False),
        Outcome.NOT_ENOUGH_FREE_CAPACITY: Facts(507, EXIT_UNAVAILABLE, True),
        Outcome.NO_CONTIGUOUS_CAPACITY: Facts(507, EXIT_UNAVAILABLE, True),
        Outcome.TOO_MANY_EXTENTS: Facts(507, EXIT_UNAVAILABLE, True),
        Outcome.NOT_SUPPORTED: Facts(501, EXIT_FAILED, False),
    }
    if outcome in special:
        return special[outcome]
    if outcome < 30:
        return Facts(422, EXIT_USAGE, False)
    if outcome < 50:
        return Facts(404, EXIT_NOT_FOUND, False)
    if outcome < 70:
        return Facts(409, EXIT_CONFLICT, False)
    return Facts(503, EXIT_UNAVAILABLE, True)


_FACTS: dict[Outcome, Facts] = {outcome: _facts(outcome) for outcome in Outcome}


class Reply(msgspec.Struct, frozen=True):
    """The machine's answer to one request. `field`, `limit` and `value` name what was wrong, where
    something was.
    """

    outcome: Outcome
    subject: str = ""
    detail: str = ""
    field: str = ""
    limit: str = ""
    value: str = ""
