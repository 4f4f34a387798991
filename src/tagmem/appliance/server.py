"""The appliance as a running whole: ports, sessions, the engine, media. It touches the world; it
decides nothing.

One session per port; a new one displaces the old, whose connection is closed and whose unread bytes
are dropped. Commands of a session take effect in the order in which they came; questions are
answered at once when everything that the device says is durable, and through the queue otherwise,
so no answer runs ahead of its commit. An answer to 4802h leaves after the host's way to the bytes
has been made.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from tagmem.appliance.config import ApplianceConfig
from tagmem.appliance.dispatch import (
    Ask,
    FmDispatch,
    HostDispatch,
    Identity,
    Immediate,
    PortDispatch,
    Said,
)
from tagmem.appliance.sanitiser import Sanitiser
from tagmem.base.errors import Conflict
from tagmem.base.limits import CCI_OUTSTANDING_MAX, CCI_PAYLOAD_BYTES_MAX
from tagmem.base.units import KIB
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_check import check_device
from tagmem.domain.device_records import (
    DC_LOG,
    FM_PORT,
    Adopt,
    Answer,
    Code,
    Conceal,
    Drop,
    Expose,
    FencePlan,
    MediaLost,
    MediaView,
    Notify,
    Query,
    Respond,
    Sanitise,
    SessionStarted,
)
from tagmem.engine import Engine, QueueFull
from tagmem.ports import Batch, Clock, Effect, Event, Media, Store
from tagmem.wire.cci import Opcode, ReturnCode, return_code_name
from tagmem.wire.exchange import Request, Responder
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream

log = logging.getLogger(__name__)

OUTSTANDING_MAX = 2 * CCI_OUTSTANDING_MAX
"""Commands of one session that wait for the commit; more are left in the socket."""
UNREAD_BYTES_MAX = 8 * CCI_PAYLOAD_BYTES_MAX
"""Answers that a peer has not read; beyond that its commands are left in the socket."""
WAITING_EVENTS_MAX = 4096
QUEUED_BYTES = 64 * KIB
REPORT_RETRY_SECONDS = 1.0
"""Between two attempts to keep an observation that the store refused."""


class Connection(Protocol):
    """One connected socket (`io.stream.Connection`)."""

    pending_bytes: int

    def attach(self, peer: Any) -> None: ...
    def send(self, data: bytes, descriptor: int = -1) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self, reason: str = "closed") -> None: ...


class Listener(Protocol):
    """A listening socket."""

    def close(self) -> None: ...


Listen = Callable[[str, Callable[[Any], None]], Listener]
"""Listens at a path and gives each connection to a function."""


class Session:
    """One connection to one port, until it is displaced or ends."""

    def __init__(self, server: Appliance, dispatch: PortDispatch, connection: Connection) -> None:
        self._server = server
        self._dispatch = dispatch
        self._connection = connection
        self._responder = Responder(MctpStream(DEVICE_EID, FM_EID))
        self._outstanding = 0
        self._paused = False
        self._flush_due = False
        self._notify_due = False
        self._loop = asyncio.get_running_loop()
        self.open = True

    # ---- told by the connection

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes from the peer; nothing in them can do more than end this session."""
        for descriptor in descriptors:
            os.close(descriptor)
        for item in self._responder.feed(data):
            if not self.open:
                return
            if isinstance(item, Request):
                self._take(item)
                continue
            log.warning("port %s: %s", self._server.port_name(self._dispatch.port), item.reason)
            if item.fatal:
                self.end(item.reason)
                return
        self._flush()

    def drained(self) -> None:
        """The peer reads again."""
        self._unpause()

    def closed(self, reason: str) -> None:
        """The connection is gone; what was committed stays, its answers go nowhere."""
        self.open = False
        self._server.ended(self, reason)

    # ---- told by the server

    def notify(self) -> None:
        """Tell the peer, once for all records of a commit, that its log has some."""
        self._notify_due = True
        self._flush_soon()

    def end(self, reason: str) -> None:
        """Close the connection."""
        if self.open:
            self.open = False
            self._connection.close(reason)

    @property
    def port(self) -> int:
        """The port it is on."""
        return self._dispatch.port

    # ---- commands

    def _take(self, request: Request) -> None:
        plan = self._dispatch.plan(request.opcode, request.body)
        if isinstance(plan, Immediate):
            self._say(request, (plan.code, plan.body), plan.reason)
            return
        answer = self._server.ask_now(plan.event) if not self._outstanding else None
        if answer is not None:
            self._answer(request, plan, answer)
            return
        try:
            future = self._server.ask(plan.event)
        except QueueFull:
            self._say(request, (ReturnCode.RETRY_REQUIRED, None), "too many commands wait")
            return
        self._outstanding += 1
        future.add_done_callback(partial(self._durable, request, plan))
        if self._outstanding >= OUTSTANDING_MAX:
            self._pause()

    def _durable(self, request: Request, plan: Ask, future: asyncio.Future[Any]) -> None:
        self._outstanding -= 1
        if future.cancelled():
            return
        failure = future.exception()
        if not self.open:
            return
        if failure is not None:
            self._fail(request, plan, str(failure))
        else:
            self._answer(request, plan, future.result())
        self._flush_soon()
        self._unpause()

    def _fail(self, request: Request, plan: Ask, reason: str) -> None:
        said: Said = (ReturnCode.INTERNAL_ERROR, None)
        self._say(request, said if plan.wrap is None else plan.wrap(said), reason)

    def _answer(self, request: Request, plan: Ask, answer: Answer) -> None:
        if request.opcode == Opcode.FENCE and answer.code == Code.SUCCESS:
            assert isinstance(answer.value, tuple)
            task = self._server.fence(answer.value)
            task.add_done_callback(partial(self._fenced, request))
            return
        if isinstance(plan.event, Respond):
            trouble = self._server.exposure_trouble(plan.event.ld)
            if trouble and answer.code == Code.SUCCESS:
                self._fail(request, plan, trouble)
                return
        if request.opcode == Opcode.GET_EXTENT_MEDIA and isinstance(answer.value, MediaView):
            self._give_media(request, plan, answer)
            return
        self._say(request, plan.said(answer), answer.reason)

    def _give_media(self, request: Request, plan: Ask, answer: Answer) -> None:
        assert isinstance(answer.value, MediaView)
        try:
            descriptor = self._server.descriptor(answer.value)
        except OSError as error:
            self._fail(request, plan, f"media of {answer.value.file}: {error.strerror}")
            return
        # The descriptor must travel with this response's bytes, so nothing may stand before them.
        self._flush()
        self._say(request, plan.said(answer), "")
        self._connection.send(self._responder.outgoing(), descriptor)

    def _fenced(self, request: Request, task: asyncio.Task[str]) -> None:
        if task.cancelled() or not self.open:
            return
        failure = task.exception()
        if failure is not None:
            self._say(request, (ReturnCode.INTERNAL_ERROR, None), str(failure))
        elif task.result():
            self._say(request, (ReturnCode.BUSY, None), task.result())
        else:
            self._say(request, (ReturnCode.SUCCESS, None), "")
        self._flush()

    def _say(self, request: Request, said: Said, reason: str) -> None:
        code, body = said
        if code != ReturnCode.SUCCESS or reason:
            log.info(
                "port=%s opcode=%04x answer=%s reason=%r",
                self._server.port_name(self._dispatch.port),
                request.opcode,
                return_code_name(code),
                reason,
            )
        self._responder.respond(request, ReturnCode(code), body)
        if self._responder.pending_bytes >= QUEUED_BYTES:
            self._flush()

    # ---- flow

    def _flush_soon(self) -> None:
        """A commit brings many answers: they leave together."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._notify_due:
            self._notify_due = False
            self._responder.notify(1 << DC_LOG)
        if self._responder.pending_bytes and self.open:
            self._connection.send(self._responder.outgoing())
            if self._connection.pending_bytes > UNREAD_BYTES_MAX:
                self._pause()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._connection.pause_reading()

    def _unpause(self) -> None:
        if (
            self._paused
            and self.open
            and self._outstanding < OUTSTANDING_MAX // 2
            and self._connection.pending_bytes <= UNREAD_BYTES_MAX // 2
        ):
            self._paused = False
            self._connection.resume_reading()


class Appliance:
    """One appliance process, less its adapters."""

    def __init__(
        self,
        config: ApplianceConfig,
        store: Store,
        clock: Clock,
        media: Media,
        version: str,
    ) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._media = media
        self.machine = DeviceMachine(config.spec())
        self.engine = Engine(self.machine, store, clock, self._perform)
        self._sessions: dict[int, Session] = {}
        self._trouble: dict[int, str] = {}
        self._directories = config.host_directories
        self._sanitiser: Sanitiser | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        identity = Identity(
            config.name, version, self.machine.spec, by_dpa=config.layout == "by-dpa"
        )
        hosts = tuple(
            HostDispatch(identity, ld, config.payload_bytes(ld)) for ld in range(len(config.host))
        )
        self._dispatch: dict[int, PortDispatch] = dict(enumerate(hosts))
        self._dispatch[FM_PORT] = FmDispatch(identity, hosts)
        self._paths = {ld: host.socket for ld, host in enumerate(config.host)}
        # Last, so that whoever finds this port finds them all.
        self._paths[FM_PORT] = config.fm_socket
        self._stop = asyncio.Event()

    # ---- life

    async def run(self, listen: Listen) -> None:
        """Serve until `stop`. Raises Conflict, InvalidInput or StorageFailed when it cannot."""
        loaded = self.engine.restore()
        outbox = self._match_world(list(loaded.outbox))
        # A store that contradicts itself is not served from.
        check_device(self.machine.state)
        self._sanitiser = Sanitiser(self._media, self._report)
        engine = asyncio.create_task(self.engine.run())
        engine.add_done_callback(lambda _: self._stop.set())
        listeners: list[Listener] = []
        try:
            for effect in outbox:
                self._perform(effect)
            for port, path in self._paths.items():
                listeners.append(listen(path, partial(self._accept, port)))
            log.info(
                "appliance %s: %d hosts, %d regions, %d tags, %d to sanitise",
                self._config.name,
                len(self._config.host),
                len(self._config.region),
                len(self.machine.state.tags),
                len(outbox),
            )
            await self._stop.wait()
        finally:
            for listener in listeners:
                listener.close()
            for session in list(self._sessions.values()):
                session.end("the appliance stops")
            await self.engine.stop()
            await asyncio.to_thread(self._sanitiser.close)
            # A failed engine raises here: the process must end and look again at what there is.
            await engine

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def _match_world(self, outbox: list[Effect]) -> list[Effect]:
        """Before anything listens: rows, configuration and media must belong together."""
        row = self.machine.state.spec_row
        incarnation = self._media.incarnation()
        if row is None or (self.machine.state.misfit and not self.machine.state.foreign):
            self._commit(Adopt(self._media.renew()))
            outbox = []
        elif self.machine.state.misfit:
            raise Conflict(
                f"{self._config.state_dir}: {self.machine.state.foreign} allocations were made "
                "under another configuration of regions or hosts; release them under that one first"
            )
        elif row.media != incarnation:
            log.critical(
                "media %s are gone (was the machine restarted?): %d tags are lost, "
                "and every host starts empty",
                row.media,
                len(self.machine.state.tags),
            )
            self._commit(MediaLost(self._media.renew()))
            outbox = []
        self._reconcile_media()
        return outbox

    def _commit(self, event: Event) -> None:
        now = self._clock.now()
        step = self.machine.step(event, now)
        assert isinstance(step.reply, Answer)
        if step.reply.code != Code.SUCCESS:
            raise Conflict(step.reply.reason)
        self._store.commit(Batch([step], now))

    def _reconcile_media(self) -> None:
        exposed: dict[str, list[str]] = {}
        exposures = self.machine.exposures()
        for effect in exposures:
            if not self.machine.spec.regions[effect.region].read_only:
                exposed.setdefault(self._directories[effect.ld], []).append(effect.file)
        files = self.machine.files()
        missing, kept = self._media.reconcile(files, exposed)
        for name in missing:
            log.warning("media of %s were not there and are made anew, reading zero", name)
        for effect in exposures:
            if effect.file in missing or (self._directories[effect.ld], effect.file) not in kept:
                self._expose(effect)

    # ---- sessions

    def port_name(self, port: int) -> str:
        """What people call a port."""
        return "fm" if port == FM_PORT else self._config.host[port].name

    def _accept(self, port: int, connection: Connection) -> None:
        old = self._sessions.get(port)
        if old is not None:
            old.end("displaced by a new session")
        log.info("port=%s session begins", self.port_name(port))
        session = Session(self, self._dispatch[port], connection)
        self._sessions[port] = session
        # Before any command of the new session, and behind all of the old one's.
        self._report(SessionStarted(port))
        connection.attach(session)

    def _report(self, event: Event) -> None:
        # What is true now stays true until it can be kept: a full disk ends nothing.
        future = self.engine.report(event)
        future.add_done_callback(partial(self._reported, event))

    def _reported(self, event: Event, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None and not self._stop.is_set():
            asyncio.get_running_loop().call_later(REPORT_RETRY_SECONDS, self._report, event)

    def ended(self, session: Session, reason: str) -> None:
        """A session's connection is gone."""
        log.info("port=%s session ends: %s", self.port_name(session.port), reason)
        if self._sessions.get(session.port) is session:
            del self._sessions[session.port]

    def ask_now(self, event: Event) -> Answer | None:
        """The answer to a question, if what the device says now is durable; None: it must queue."""
        if isinstance(event, Query) and self.engine.settled:
            return self.machine.query(event)
        return None

    def ask(self, event: Event) -> asyncio.Future[Any]:
        """The machine's answer when it is durable. Raises QueueFull."""
        if self.engine.waiting >= WAITING_EVENTS_MAX:
            raise QueueFull
        return self.engine.report(event)

    # ---- effects

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, Sanitise):
            assert self._sanitiser is not None
            self._sanitiser.perform(effect)
        elif isinstance(effect, Notify):
            session = self._sessions.get(effect.port)
            if session is not None and session.open:
                session.notify()
        elif isinstance(effect, Expose):
            self._expose(effect)
        elif isinstance(effect, Conceal):
            self._media.conceal(effect.file, self._directories[effect.ld])
        elif isinstance(effect, Drop):
            self._media.drop(effect.file, effect.pool)

    def _expose(self, effect: Expose) -> None:
        pieces = self._media.positions((p.start, p.length, p.at) for p in effect.pieces)
        try:
            self._media.create(effect.file, effect.pool, pieces)
            # A link cannot be read-only by itself, so a read-only view is had by descriptor alone.
            if not self.machine.spec.regions[effect.region].read_only:
                self._media.expose(effect.file, self._directories[effect.ld])
                seed = self._config.region[effect.region].stale_caches
                if seed is not None:
                    self._media.mark_stale(effect.file, self._directories[effect.ld], seed)
        except OSError as error:
            self._trouble[effect.ld] = f"{effect.file} cannot be reached by the host: {error}"
            log.error("%s", self._trouble[effect.ld])

    def exposure_trouble(self, ld: int) -> str:
        """Why the host cannot reach what it just accepted; told once."""
        return self._trouble.pop(ld, "")

    def descriptor(self, view: MediaView) -> int:
        """A descriptor of an accepted tag's bytes. Raises OSError."""
        return self._media.descriptor(view.file, view.pool, read_only=view.read_only)

    def fence(self, plans: tuple[FencePlan, ...]) -> asyncio.Task[str]:
        """Carry fences out; the result names who still holds something."""
        task = asyncio.create_task(asyncio.to_thread(self._fence, plans))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _fence(self, plans: tuple[FencePlan, ...]) -> str:
        for plan in plans:
            pieces = self._media.positions((p.start, p.length, p.at) for p in plan.pieces)
            only = self._directories[plan.ld] if plan.shared else ""
            others = [d for ld, d in enumerate(self._directories) if ld != plan.ld]
            holding = self._media.revoke(
                plan.file, plan.pool, pieces, only=only, others=others if plan.shared else ()
            )
            if holding:
                return ", ".join(f"{h.name}[{h.pid}] {h.how} {plan.file}" for h in holding)
        return ""
