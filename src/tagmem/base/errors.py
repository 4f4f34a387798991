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

from collections.abc import Callable
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


# ---- errors that were somebody else's first


class ToldInput(InvalidInput):
    """A field is outside its limit, in the words of who found it so."""

    def __init__(self, text: str) -> None:
        self.field, self.limit, self.value = "request", "as the other side wants it", None
        TagmemError.__init__(self, text)


class ToldRemote(RemoteError):
    """A peer's error, in the words of who was told it."""

    def __init__(self, text: str) -> None:
        self.peer, self.code = "", 0
        TagmemError.__init__(self, text)


_KINDS: tuple[tuple[str, type[TagmemError], Callable[[str], TagmemError]], ...] = (
    ("invalid", InvalidInput, ToldInput),
    ("not-found", NotFound, NotFound),
    ("conflict", Conflict, Conflict),
    ("unsupported", Unsupported, Unsupported),
    ("remote", RemoteError, ToldRemote),
    ("unknown", OutcomeUnknown, OutcomeUnknown),
    ("storage", StorageFailed, StorageFailed),
)


def kind_of(error: TagmemError) -> str:
    """The word for an error where it is told to another process."""
    return next((word for word, kind, _ in _KINDS if isinstance(error, kind)), "failed")


def of_kind(kind: str, text: str) -> TagmemError:
    """The error of that word again; of an unknown word, one that promises nothing."""
    make = next((make for word, _, make in _KINDS if word == kind), TagmemError)
    return make(text)
