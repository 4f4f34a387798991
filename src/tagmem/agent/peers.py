"""Calls between host agents, which reach each other through the orchestrator alone.

This agent's own calls wait here for their answers; what another host asks is carried out here if
this host's configuration lets that host ask. The orchestrator vouches for who asks, over a session
that it has authenticated. Nothing is kept: when the session ends, the outcome of what waits is
unknown, and what another has asked goes on with nobody to tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    OutcomeUnknown,
    TagmemError,
    Unsupported,
    kind_of,
    of_kind,
)
from tagmem.base.limits import PEER_BYTES_MAX, PEER_CALL_NS, PEER_CALLS_MAX
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.wire.agentapi import Message, PeerAnswer, PeerCall, PeerRequest

log = logging.getLogger(__name__)

SLACK_NS = 5 * SECOND
"""The orchestrator says first that a call is overdue; this agent waits a little longer."""

Serve = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""(host that asks, request). Raises TagmemError."""
Say = Callable[[Message], None]


class PeerDesk:
    """`ports.Peers`, and the other half of it: what other hosts ask of this one."""

    def __init__(
        self,
        allowed: bool | tuple[str, ...],
        serve: Serve,
        *,
        deadline_ns: Nanoseconds = PEER_CALL_NS + SLACK_NS,
    ) -> None:
        """`allowed`: every host, none, or these."""
        self._allowed = allowed
        self._serve = serve
        self._deadline_ns = deadline_ns
        self._say: Say | None = None
        self._why_not = "no orchestrator is connected"
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[PeerAnswer]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    # ---- the session

    def opened(self, say: Say | None) -> None:
        """A session is in order; without `say`, its orchestrator passes no calls on."""
        self._say = say
        self._why_not = "the orchestrator is too old to pass calls on"

    def closed(self) -> None:
        """The session has ended, with whatever was asked in it."""
        self._say, self._why_not = None, "no orchestrator is connected"
        for waiting in self._waiting.values():
            if not waiting.done():
                told = "the session with the orchestrator ended before the answer came"
                waiting.set_exception(OutcomeUnknown(told))

    def hear(self, message: PeerRequest | PeerAnswer) -> None:
        """What the orchestrator has passed on."""
        if isinstance(message, PeerAnswer):
            waiting = self._waiting.get(message.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            return
        if self._say is None:
            return
        if len(self._serving) >= PEER_CALLS_MAX:
            busy = Conflict(f"{PEER_CALLS_MAX} requests of other hosts are under way already")
            self._say(_failed(message.id, busy))
            return
        task = asyncio.get_running_loop().create_task(self._carry_out(message, self._say))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    # ---- what this host asks

    async def call(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `ports.Peers`."""
        data = msgspec.json.encode(request)
        if len(data) > PEER_BYTES_MAX:
            raise InvalidInput("request", f"at most {PEER_BYTES_MAX} bytes", len(data))
        if self._say is None:
            raise Unsupported(f"host {host} cannot be asked: {self._why_not}")
        self._last_id += 1
        number = self._last_id
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._say(PeerCall(number, host, msgspec.Raw(data)))
            async with asyncio.timeout(self._deadline_ns / SECOND):
                answered = await waiting
        except TimeoutError:
            raise OutcomeUnknown(f"host {host} has not answered in time") from None
        finally:
            del self._waiting[number]
        if answered.error or answered.kind:
            raise of_kind(answered.kind, f"host {host}: {answered.error}")
        return _read(answered.answer, f"answer of {host}")

    # ---- what others ask

    async def _carry_out(self, message: PeerRequest, say: Say) -> None:
        try:
            if not self.allows(message.from_host):
                raise Unsupported(
                    f"it takes no calls from {message.from_host[:63]}"
                    " ([vms] accept_migrations in its configuration says whose)"
                )
            told = await self._serve(message.from_host, _read(message.request, "request"))
            data = msgspec.json.encode(told, enc_hook=str)
            if len(data) > PEER_BYTES_MAX:
                raise OutcomeUnknown(f"it was done; its answer has {len(data)} bytes, too many")
            answer = PeerAnswer(message.id, msgspec.Raw(data))
        except TagmemError as error:
            answer = _failed(message.id, error)
        if self._say is say:
            say(answer)
        else:
            log.warning("host %s will not hear what became of its call", message.from_host)

    def allows(self, host: str) -> bool:
        """Whether that host may ask anything of this one."""
        return self._allowed if isinstance(self._allowed, bool) else host in self._allowed


def _read(data: msgspec.Raw, what: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(what, "a JSON object", str(error)) from None


def _failed(number: int, error: TagmemError) -> PeerAnswer:
    return PeerAnswer(number, error=str(error), kind=kind_of(error))
