"""What the orchestrator and a host's agent say to each other: JSON messages over one WebSocket.

Level-triggered: every message carries the whole wanted or observed state of one tag, stamped with
the revision it belongs to, so a lost, repeated or late message does no harm. The agent opens with
Hello; the orchestrator answers with one Desired per tag that concerns the host, then SyncDone; from
then on either side sends what changes. A tag that is not named between Hello and SyncDone is not
wanted on that host.

Beside that, one agent may call another through the orchestrator, because hosts share no other
network: a PeerCall goes up, a PeerRequest down to the host that is named, and a PeerAnswer comes
back the same way. Calls are not kept anywhere: when a session ends, the outcome of what was under
way on it is unknown. Either side says in its greeting that it can do this (`peer_calls`) and is
sent none of these messages otherwise, so that agents and orchestrators from before still serve.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1

Goal = Literal["attached", "released"]
Phase = Literal["absent", "expected", "refused", "attached", "releasing", "released"]


class Message(
    msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=False
):
    """Base of both directions; `type` names the class."""


class Workload(msgspec.Struct, frozen=True, omit_defaults=True):
    """A command to run on the tag; `id` is new for each launch: a repeat launches nothing."""

    id: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}
    stop: bool = False


class WorkloadReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a workload."""

    id: str
    state: Literal["pending", "running", "exited", "failed"]
    pid: int = 0
    exit_code: int | None = None
    reason: str = ""
    log_path: str = ""


class HolderReport(msgspec.Struct, frozen=True):
    """A process that maps the tag or has it open."""

    pid: int
    name: str
    how: Literal["maps", "open"]


class Hello(Message, frozen=True):
    """First message of an agent."""

    host: str
    boot_id: str
    """Changes when the host has restarted, that is, when it holds no mapping from before."""
    links: dict[str, int]
    """Appliance name to LD-ID, as configured on the host."""
    protocol: int = PROTOCOL_VERSION
    peer_calls: bool = False
    """It understands PeerRequest; whether it does what it is asked is another question."""


class Desired(Message, frozen=True):
    """What the host is to reach for one tag."""

    tag: str
    revision: int
    goal: Goal
    appliance: str
    size_bytes: int
    tagged: bool = True
    read_only: bool = False
    extents: tuple[tuple[int, int], ...] = ()
    """(DPA, length) in this host's view, in sequence order: what the offer must show."""
    workload: Workload | None = None
    up_to: str = "detach"
    """Highest rung that the agent may climb by itself: `ask`, `stop` or `detach`."""
    deadlines_ns: dict[str, int] = {}
    kill_holders: bool = False
    """The restart rung on an emulated host: end every process that still holds the tag."""
    shared: bool = False
    """Other hosts have the tag too. On emulated hosts their processes map the same file, and must
    not be taken for this host's."""
    held_back: bool = False
    """Accept it and surface nothing yet: another host still writes it. A later revision says
    when."""
    sharing: str = ""
    """How it is shared, for the programs that map it; empty is not said."""


class SyncDone(Message, frozen=True):
    """All Desired of this host have been sent."""

    epoch: int = 0
    """The leader's fencing epoch; an agent refuses a lower one than it has seen."""
    peer_calls: bool = False
    """It passes PeerCall on."""


class Observed(Message, frozen=True):
    """What the host has for one tag."""

    tag: str
    revision: int
    """Of the Desired that the agent has acted upon."""
    phase: Phase
    dax_path: str = ""
    reason: str = ""
    """Why it was refused, or what holds up the release; for people."""
    rung: str = ""
    holders: tuple[HolderReport, ...] = ()
    workload: WorkloadReport | None = None
    proved: bool = False
    """With phase `released`: the agent checked that nothing maps or holds the tag, then released
    it.
    """


class PeerCall(Message, frozen=True):
    """Up: ask another host's agent something on this agent's behalf."""

    id: int
    """The caller's own; no two of its calls under way have the same."""
    host: str
    request: msgspec.Raw
    """A JSON object of at most `PEER_BYTES_MAX` bytes, which the orchestrator does not read."""


class PeerRequest(Message, frozen=True):
    """Down: another host's agent asks; the orchestrator vouches for who that is."""

    id: int
    """The orchestrator's own."""
    from_host: str
    request: msgspec.Raw


class PeerAnswer(Message, frozen=True):
    """Of a PeerRequest (up), or of a PeerCall (down)."""

    id: int
    answer: msgspec.Raw = msgspec.Raw(b"null")
    """A JSON object of at most `PEER_BYTES_MAX` bytes; null with an error."""
    error: str = ""
    kind: str = ""
    """With an error: which (`base/errors.py: kind_of`)."""


class Rejected(Message, frozen=True):
    """The orchestrator does not accept this session; the agent shows why and tries again later."""

    reason: str


ToAgent = Desired | SyncDone | Rejected | PeerRequest | PeerAnswer
ToOrchestrator = Hello | Observed | PeerCall | PeerAnswer

_to_agent: msgspec.json.Decoder[ToAgent] = msgspec.json.Decoder(ToAgent)
_to_orchestrator: msgspec.json.Decoder[ToOrchestrator] = msgspec.json.Decoder(ToOrchestrator)
_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """One message as JSON text."""
    return _encoder.encode(message)


def decode_to_agent(data: bytes | str) -> ToAgent:
    """Raises msgspec.ValidationError (a ValueError) naming the field."""
    return _to_agent.decode(data)


def decode_to_orchestrator(data: bytes | str) -> ToOrchestrator:
    """Raises msgspec.ValidationError (a ValueError) naming the field."""
    return _to_orchestrator.decode(data)
