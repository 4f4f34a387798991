"""The agents' WebSockets: what each host is to reach goes down, what it has comes up.

Level-triggered in both directions. Down, only the newest Desired of each tag waits to be sent, so
a slow agent holds back nothing and costs one message per tag at most. Up, an agent that talks
faster than its words can be made durable is read more slowly. Calls from host to host pass through
as they are (`relay.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from tagmem.base.errors import InvalidInput, StorageFailed
from tagmem.base.ids import ApplianceId, HostId, parse_name, parse_tag
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.domain.effects import HostConnected, HostDisconnected, HostObserved, RegisterHost
from tagmem.domain.outcome import Reply
from tagmem.domain.records import Holder, WorkloadStatus
from tagmem.engine import Engine, QueueFull
from tagmem.orchestrator.asgi import Message, Receive, Send
from tagmem.orchestrator.documents import View
from tagmem.orchestrator.relay import Relay
from tagmem.wire import agentapi
from tagmem.wire.agentapi import (
    PROTOCOL_VERSION,
    Hello,
    Observed,
    PeerAnswer,
    PeerCall,
    Rejected,
    SyncDone,
    WorkloadReport,
    decode_to_orchestrator,
    encode,
)

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 256 * 1024
HELLO_SECONDS = 10.0
OBSERVED_IN_FLIGHT_MAX = 64
"""Observations of one host that may wait for their commit before it is read on."""
SESSIONS_MAX = 4_096
"""Hosts of one pod."""
ANSWERS_WAITING_MAX = 64
"""Of calls that wait for one agent to read them; beyond it the session ends."""
HOLDERS_MAX = 64
TEXT_MAX = 4_096

CLOSE_GOING, CLOSE_POLICY, CLOSE_TOO_BIG, CLOSE_DISPLACED = 1001, 1008, 1009, 4001


class SessionRefused(Exception):
    """An agent said something that ends its session; the text is the reason it is given."""

    def __init__(self, reason: str, code: int = CLOSE_POLICY) -> None:
        super().__init__(reason)
        self.code = code


class Session:
    """One agent's connection after its Hello."""

    def __init__(self, host: HostId, send: Send, *, peer_calls: bool = False) -> None:
        self.host = host
        self.peer_calls = peer_calls
        self._send = send
        self._pending: dict[str, bytes] = {}
        self._said: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self.closing: tuple[int, str] | None = None

    def push(self, subject: str, data: bytes) -> None:
        """Send `data`, unless something newer about `subject` takes its place before.

        Its place is kept, so that nothing which was to be sent before SyncDone slips behind it.
        """
        self._pending[subject] = data
        self._wake.set()

    def say(self, message: agentapi.Message) -> None:
        """Send a message that nothing newer takes the place of."""
        if len(self._said) >= ANSWERS_WAITING_MAX:
            self.close(CLOSE_POLICY, "what is said to it is not read")
            return
        self._said.append(encode(message))
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """End the session from this side."""
        self.closing = self.closing or (code, reason)
        self._wake.set()

    async def write(self) -> None:
        """Send what is pending until the session is closed from this side."""
        while self.closing is None:
            await self._wake.wait()
            self._wake.clear()
            while self._pending and self.closing is None:
                subject = next(iter(self._pending))
                data = self._pending.pop(subject)
                await self._send({"type": "websocket.send", "text": data.decode()})
            while self._said and self.closing is None:
                data = self._said.popleft()
                await self._send({"type": "websocket.send", "text": data.decode()})


class Sessions:
    """Every agent that is connected, by host."""

    def __init__(
        self,
        engine: Engine,
        view: View,
        *,
        self_registration: bool,
        changed: Callable[[str], None],
    ) -> None:
        """`changed` is told of each host that comes or goes."""
        self._engine = engine
        self._view = view
        self._self_registration = self_registration
        self._changed = changed
        self._sessions: dict[str, Session] = {}
        self._relay = Relay(self._sessions.get)
        self._overdue: asyncio.TimerHandle | None = None
        self._arriving: Counter[str] = Counter()
        """Hosts whose HostConnected is being committed. An old session that ends meanwhile must
        not disconnect what is only just connected."""

    def __len__(self) -> int:
        return len(self._sessions)

    def connected(self, host: str) -> bool:
        """Whether the host's agent is connected now."""
        return host in self._sessions

    def tell(self, host: str, tag: str) -> None:
        """Send what is wanted for `tag`; called at the committed state (effect TellHost)."""
        session = self._sessions.get(host)
        if session is None:
            return
        wanted = self._view.desired(host, tag)
        if wanted is not None:
            session.push(tag, encode(wanted))

    def end(self) -> None:
        """The process is going: every agent is told, and dials again."""
        if self._overdue is not None:
            self._overdue.cancel()
        for session in self._sessions.values():
            session.close(CLOSE_GOING, "the orchestrator is stopping")

    async def serve(self, host: str, receive: Receive, send: Send) -> None:
        """One WebSocket, from its connect to its end."""
        await receive()
        await send({"type": "websocket.accept"})
        try:
            session = await self._greet(host, receive, send)
        except SessionRefused as refused:
            log.warning("agent of host %s refused: %s", host, refused)
            await send({"type": "websocket.send", "text": encode(Rejected(str(refused))).decode()})
            await send(_close(refused.code, str(refused)))
            return
        except TimeoutError:
            await send(_close(CLOSE_POLICY, f"no Hello within {HELLO_SECONDS:g} s"))
            return
        if session is not None:
            await self._converse(session, receive, send)

    async def _greet(self, host: str, receive: Receive, send: Send) -> Session | None:
        """The session of a proper Hello; None when the agent went away first."""
        try:
            name = HostId(parse_name(host, "host"))
        except InvalidInput as error:
            raise SessionRefused(str(error)) from None
        async with asyncio.timeout(HELLO_SECONDS):
            message = await receive()
        if message["type"] != "websocket.receive":
            return None
        hello = _decode(message)
        if not isinstance(hello, Hello):
            raise SessionRefused("the first message must be Hello")
        _check_hello(name, hello)
        if len(self._sessions) >= SESSIONS_MAX and name not in self._sessions:
            raise SessionRefused(f"{SESSIONS_MAX} agents are connected already")
        links = {ApplianceId(appliance): ld for appliance, ld in hello.links.items()}
        await self._register(name, hello)
        session = Session(name, send, peer_calls=hello.peer_calls)
        self._arriving[name] += 1
        try:
            await self._submit(
                HostConnected(name, hello.boot_id, links), lambda reply: self._open(session, reply)
            )
        finally:
            self._arriving[name] -= 1
            self._leave(name)
        return session

    def _leave(self, host: HostId) -> None:
        """Unless a session of the host is there or on its way, the machine is told that it went."""
        if self._arriving[host] > 0:
            return
        del self._arriving[host]
        if host not in self._sessions:
            self._engine.post(HostDisconnected(host))
            self._changed(host)

    async def _register(self, host: HostId, hello: Hello) -> None:
        """Make the host known, with its links. Raises SessionRefused where that may not be."""
        known = await self._engine.read(lambda: self._view.hosts.get(host))
        if known is not None and known.links == hello.links:
            return
        if not self._self_registration:
            if known is None:
                how = f"PUT /v1/hosts/{host}"
                raise SessionRefused(f"host {host} is unknown; register it with {how}")
            return  # the machine judges the links that it has against those of the Hello
        _check(await self._submit(RegisterHost(host, dict(hello.links))))

    async def _submit(
        self, event: HostConnected | RegisterHost, render: Callable[[Reply], None] | None = None
    ) -> Reply | None:
        try:
            reply: Reply | None = await self._engine.submit(event, render)
        except StorageFailed as failure:
            raise SessionRefused(str(failure)) from None
        return reply

    def _open(self, session: Session, reply: Reply) -> None:
        """At the committed HostConnected: displace the old session, send all that concerns the
        host.
        """
        _check(reply)
        old = self._sessions.pop(session.host, None)
        if old is not None:
            old.close(CLOSE_DISPLACED, "a newer session of this host has begun")
        self._sessions[session.host] = session
        for tag in self._view.tags_on(session.host):
            self.tell(session.host, tag)
        session.push("", encode(SyncDone(peer_calls=True)))
        self._changed(session.host)

    async def _converse(self, session: Session, receive: Receive, send: Send) -> None:
        reader = asyncio.create_task(self._read(session, receive))
        writer = asyncio.create_task(session.write())
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
            self._relay.left(session)
            if self._sessions.get(session.host) is session:
                del self._sessions[session.host]
                self._leave(session.host)
        for outcome in ended:
            if isinstance(outcome, SessionRefused):
                log.warning("agent of host %s: %s", session.host, outcome)
                session.close(outcome.code, str(outcome))
            elif isinstance(outcome, Exception):
                log.error("agent session of host %s failed", session.host, exc_info=outcome)
                session.close(1011, "the orchestrator failed to read this session")
        if session.closing is not None:
            await send(_close(*session.closing))

    async def _read(self, session: Session, receive: Receive) -> None:
        """Until the agent goes, or says what ends the session (SessionRefused)."""
        in_flight = 0
        while (message := await receive())["type"] == "websocket.receive":
            observed = _decode(message)
            if isinstance(observed, Hello):
                raise SessionRefused("a second Hello: open a new session instead")
            if session.closing is not None:
                return
            if not isinstance(observed, Observed):
                self._pass_on(session, observed)
                continue
            event = observed_event(session.host, observed)
            in_flight += 1
            if in_flight < OBSERVED_IN_FLIGHT_MAX:
                self._engine.post(event)
                continue
            in_flight = 0
            try:
                await self._engine.submit(event)
            except QueueFull:
                self._engine.post(event)
                await self._engine.read(_nothing)

    def _pass_on(self, session: Session, message: PeerCall | PeerAnswer) -> None:
        if isinstance(message, PeerCall):
            self._relay.call(session, message, _now())
        else:
            self._relay.answer(session, message)
        self._set_timer()

    def _set_timer(self) -> None:
        """For the oldest call; one that was answered meanwhile costs a look."""
        due = self._relay.next_deadline()
        if due is not None and self._overdue is None:
            delay = max(0, due - _now()) / SECOND
            self._overdue = asyncio.get_running_loop().call_later(delay, self._give_up_calls)

    def _give_up_calls(self) -> None:
        self._overdue = None
        self._relay.tick(_now())
        self._set_timer()


def _now() -> Nanoseconds:
    """Of the loop: calls do not outlive the process."""
    return int(asyncio.get_running_loop().time() * SECOND)


def _check(reply: Reply | None) -> None:
    if reply is not None and not reply.outcome.ok:
        raise SessionRefused(reply.detail or reply.outcome.title)


def _nothing() -> None:
    """Reads nothing: only the wait for the commit counts."""


def _close(code: int, reason: str) -> Message:
    # A close frame's payload has 125 bytes, two of which are the code (RFC 6455 5.5).
    short = reason.encode()[:120].decode("utf-8", "ignore")
    return {"type": "websocket.close", "code": code, "reason": short}


def _decode(message: Message) -> agentapi.ToOrchestrator:
    data = message.get("text") or message.get("bytes") or b""
    if len(data) > MESSAGE_BYTES_MAX:
        limit = f"a message may have {MESSAGE_BYTES_MAX} bytes, this one has {len(data)}"
        raise SessionRefused(limit, CLOSE_TOO_BIG)
    try:
        return decode_to_orchestrator(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SessionRefused(f"not a message of the agent API: {error}") from None


def _check_hello(host: HostId, hello: Hello) -> None:
    if hello.protocol != PROTOCOL_VERSION:
        raise SessionRefused(f"protocol: must be {PROTOCOL_VERSION}, got {hello.protocol}")
    if hello.host != host:
        raise SessionRefused(f"host: must be {host} as in the path, got {hello.host[:63]}")
    if len(hello.boot_id) > 128:
        raise SessionRefused(f"boot_id: must be at most 128 characters, got {len(hello.boot_id)}")
    for appliance, ld in hello.links.items():
        try:
            parse_name(appliance, "links")
        except InvalidInput as error:
            raise SessionRefused(str(error)) from None
        if not 0 <= ld <= 0xFFFF:
            raise SessionRefused(f"links.{appliance}: must be 0 to 65535, got {ld}")


def observed_event(host: HostId, observed: Observed) -> HostObserved:
    """An observation as the machine takes it, with every text bounded."""
    try:
        tag = parse_tag(observed.tag)
    except InvalidInput as error:
        raise SessionRefused(str(error)) from None
    if not 0 <= observed.revision < 2**63:
        raise SessionRefused(f"revision: must be 0 to 2^63 - 1, got {observed.revision}")
    return HostObserved(
        host=host,
        tag=tag,
        revision=observed.revision,
        phase=observed.phase,
        dax_path=observed.dax_path[:TEXT_MAX],
        reason=observed.reason[:TEXT_MAX],
        rung=observed.rung[:32],
        holders=tuple(
            Holder(who.pid, who.name[:TEXT_MAX], who.how) for who in observed.holders[:HOLDERS_MAX]
        ),
        workload=_status(observed.workload),
        proved=observed.proved,
    )


def _status(report: WorkloadReport | None) -> WorkloadStatus | None:
    if report is None:
        return None
    return WorkloadStatus(
        id=report.id[:128],
        state=report.state,
        pid=report.pid,
        exit_code=report.exit_code,
        reason=report.reason[:TEXT_MAX],
        log_path=report.log_path[:TEXT_MAX],
    )
