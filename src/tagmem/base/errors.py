"""One tree of exceptions, so that a caller can tell its own mistake from a peer's and from an
unknown outcome.

TagmemError
├── LocalError            our caller asked for something that cannot be: do not retry unchanged
│   ├── InvalidInput      a field is outside its limit (names field, limit and value)
│   ├── NotFound          no such tag, host or appliance
│   ├── Conflict          the state of the named thing forbids it
│   └── Unsupported       tagmem does not do this, and says so instead of pretending
├── RemoteError           a peer or device answered with an error: its code tells whether to retry
├── OutcomeUnknown        an answer is missing: ask again what happened before freeing or retrying
└── StorageFailed         the durable store refused a commit: nothing of it took effect
"""

from __future__ import annotations

from enum import Enum


class Retry(Enum):
    """What a caller may do after an error."""

    NEVER = "never"
    LATER = "later"
    AFTER_QUERY = "after-query"


class TagmemError(Exception):
    """Something went wrong in tagmem."""

    retry: Retry = Retry.NEVER

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or type(self).__name__).split("\n")[0])


class LocalError(TagmemError):
    """The request cannot be carried out as it stands."""


class InvalidInput(LocalError):
    """A field is outside its limit."""

    def __init__(self, field: str, limit: str, value: object) -> None:
        self.field = field
        self.limit = limit
        self.value = value
        super().__init__(f"{field}: must be {limit}, got {value!r}")


class NotFound(LocalError):
    """There is no such thing."""


class Conflict(LocalError):
    """The present state forbids this."""


class Unsupported(LocalError):
    """tagmem does not do this."""


class RemoteError(TagmemError):
    """A peer or device answered with an error."""

    def __init__(self, peer: str, code: int, message: str, *, retry: Retry = Retry.NEVER) -> None:
        self.peer = peer
        self.code = code
        self.retry = retry
        super().__init__(f"{peer}: {message} (code {code:#x})")


class OutcomeUnknown(TagmemError):
    """No answer came: whether the request took effect is unknown."""

    retry = Retry.AFTER_QUERY


class StorageFailed(TagmemError):
    """The durable store refused to commit."""

    retry = Retry.LATER
