"""What a host's agent and its broker say to each other: lines of JSON, one question or answer each.

The two are processes of their own, and the broker is the older one after an update of tagmem: it
stays while a guest has a window. So the version is said first. Questions that take bytes back
(Hello, List, Revoke, Forget, End) stay what they are in every version; an agent of another version
asks no others.

Questions carry an id; answers come in any order. What nobody asked for is news of a window.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from tagmem.base.errors import InvalidInput, TagmemError, kind_of, of_kind
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.presenter.contract import Tagged
from tagmem.presenter.endpoint import Report
from tagmem.presenter.window import Goal

VERSION = 1
LINE_BYTES_MAX = 256 * 1024
"""A tag in as many pieces as a window may have, with paths of a kilobyte, has half of it."""
PENDING_BYTES_MAX = 1 << 20
"""Of answers that an agent has not read."""
CLIENTS_MAX = 8
QUESTIONS_MAX = 512
"""Of one agent that are being answered: two for each VM that a host may have."""
WINDOWS_MAX = 1024
_DEADLINE_NS_MAX = 3600 * SECOND

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Duration = Annotated[int, msgspec.Meta(ge=0, le=_DEADLINE_NS_MAX)]
Pid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Question(msgspec.Struct, frozen=True, tag_field="do"):
    """Base of what can be asked."""


class Hello(Question, frozen=True, tag="hello"):
    """Who is there? Greeting."""


class List(Question, frozen=True, tag="list"):
    """Every window. Reports."""


class Open(Question, frozen=True, tag="open"):
    """`Broker.open`. Opened."""

    vm: Name
    device: Name
    tagged: Tagged
    adopt: Goal | None = None
    qemu_pid: Pid = 0


class Mapped(Question, frozen=True, tag="mapped"):
    """`Broker.mapped`. Done."""

    vm: Name
    device: Name
    deadline_ns: Duration


class Look(Question, frozen=True, tag="look"):
    """`Broker.found`. Looked."""

    vm: Name
    device: Name
    deadline_ns: Duration


class Revoke(Question, frozen=True, tag="revoke"):
    """`Broker.revoke`. Done."""

    vm: Name
    device: Name
    deadline_ns: Duration


class Forget(Question, frozen=True, tag="forget"):
    """`Broker.forget`. Done."""

    vm: Name
    device: Name


class End(Question, frozen=True, tag="end"):
    """End, if there is no window. Done, and then the connection ends."""


class Answer(msgspec.Struct, frozen=True, tag_field="told"):
    """Base of what is told."""


class Greeting(Answer, frozen=True, tag="hello"):
    """The broker's version of this protocol, the release of tagmem, and its process."""

    version: int
    release: str
    pid: Pid


class Reports(Answer, frozen=True, tag="windows"):
    """What is known of every window."""

    windows: tuple[Report, ...]


class Opened(Answer, frozen=True, tag="opened"):
    """Where QEMU is to connect."""

    path: str


class Looked(Answer, frozen=True, tag="looked"):
    """Whether the guest has found the header."""

    found: bool | None


class Done(Answer, frozen=True, tag="done"):
    """It is so now."""


class Failed(Answer, frozen=True, tag="failed"):
    """It is not, and why."""

    kind: str
    error: str


class News(Answer, frozen=True, tag="news"):
    """A window has changed."""

    window: Report


AnyQuestion = Hello | List | Open | Mapped | Look | Revoke | Forget | End
AnyAnswer = Greeting | Reports | Opened | Looked | Done | Failed
NEWS = -1
"""The id of what nobody asked for."""


class Asked(msgspec.Struct, frozen=True):
    """A line to the broker."""

    id: Id
    ask: AnyQuestion


class Told(msgspec.Struct, frozen=True):
    """A line from the broker."""

    id: int
    tell: AnyAnswer | News


Line = TypeVar("Line", Asked, Told)


def encode(line: Asked | Told) -> bytes:
    """One line, its end included."""
    return msgspec.json.encode(line) + b"\n"


def decode(line: bytes, kind: type[Line]) -> Line:
    """Raises InvalidInput."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput("line", "as documented", str(error)[:200]) from None


def failure(error: TagmemError) -> Failed:
    """An error as it is told."""
    return Failed(kind_of(error), str(error)[:2000])


def error_of(told: Failed) -> TagmemError:
    """The error that was told."""
    return of_kind(told.kind, told.error)


def capped(deadline_ns: Nanoseconds) -> Nanoseconds:
    """A deadline that may be asked for."""
    return max(0, min(deadline_ns, _DEADLINE_NS_MAX))
