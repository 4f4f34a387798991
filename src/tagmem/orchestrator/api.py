"""The handlers of API v1: decode, submit an event, render the outcome.

An answer is rendered at the committed state: inside the engine when it is the answer to an event
(`render`), or between two commits when it only reads. So nothing is shown that a crash could take
back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar
from uuid import uuid4

import msgspec

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import Tag
from tagmem.base.limits import LIST_PAGE_MAX
from tagmem.base.units import Nanoseconds
from tagmem.domain.effects import (
    AttachCapacity,
    HandOver,
    LaunchWorkload,
    PublishCapacity,
    RefreshAppliance,
    RegisterAppliance,
    RegisterHost,
    RetainCapacity,
    StopWorkload,
)
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import (
    ApplianceState,
    AttachmentRecord,
    AttachmentState,
    CapacityRecord,
    CapacityState,
    MoveStep,
    Reference,
)
from tagmem.engine import Engine
from tagmem.orchestrator import documents
from tagmem.orchestrator.answers import allowed, applied, location, ok, revision, unmatched
from tagmem.orchestrator.asgi import Request, Response, Stream, name_of
from tagmem.orchestrator.config import parse_address
from tagmem.orchestrator.documents import View
from tagmem.orchestrator.inputs import (
    create_event,
    idempotency_key,
    integer,
    release_event,
    with_plan,
)
from tagmem.orchestrator.metrics import Metrics
from tagmem.orchestrator.problems import Refused, refuse_field
from tagmem.orchestrator.routes import CAPACITIES_PAGE, EVENTS_PAGE
from tagmem.orchestrator.sessions import Sessions
from tagmem.orchestrator.stream import STREAMS_MAX, EventStream, concerns
from tagmem.orchestrator.watch import HISTORY_PAGE, Feed, Judge, Waiters
from tagmem.ports import Event
from tagmem.wire import rest

DocumentT = TypeVar("DocumentT", bound=msgspec.Struct)

SCAN_PAGES_MAX = 64
"""Pages of history that one filtered request reads before it answers with what it has."""
_OVER = frozenset({AttachmentState.RELEASED, AttachmentState.REFUSED})
_LEAVING = frozenset({AttachmentState.RELEASING, AttachmentState.FENCING, AttachmentState.RELEASED})

encode = msgspec.json.Encoder().encode
_capacity_request = msgspec.json.Decoder(rest.CapacityRequest)
_hand_over_request = msgspec.json.Decoder(rest.HandOverRequest)
_publish_request = msgspec.json.Decoder(rest.PublishRequest)
_attachment_request = msgspec.json.Decoder(rest.AttachmentRequest)
_workload_request = msgspec.json.Decoder(rest.WorkloadRequest)
_appliance_request = msgspec.json.Decoder(rest.ApplianceRequest)
_host_request = msgspec.json.Decoder(rest.HostRequest)


class Api:
    """What the routes' handlers need, and the handlers."""

    def __init__(
        self,
        engine: Engine,
        view: View,
        sessions: Sessions,
        waiters: Waiters,
        feed: Feed,
        metrics: Metrics,
        *,
        version: str,
        started_ns: Nanoseconds,
        deadlines_ns: Mapping[str, Nanoseconds],
    ) -> None:
        """`deadlines_ns` are those of a release's rungs, where the request gives none."""
        self._engine = engine
        self._view = view
        self._sessions = sessions
        self._waiters = waiters
        self._feed = feed
        self._metrics = metrics
        self._version = version
        self._started_ns = started_ns
        self._deadlines_ns = deadlines_ns

    # ---- capacities

    async def list_capacities(self, request: Request) -> Response:
        query = request.query("after", "limit", "host", "state", "owner", "appliance")
        limit = integer(query, "limit", CAPACITIES_PAGE, 1, LIST_PAGE_MAX)
        after = query.get("after", "")
        if "state" in query and query["state"] not in {state.value for state in CapacityState}:
            limits = "one of " + ", ".join(state.value for state in CapacityState)
            raise refuse_field("state", limits, query["state"])

        def page() -> Response:
            tags = self._selected(query, after)
            items = tuple(
                documents.capacity(self._view, self._view.capacities[tag]) for tag in tags[:limit]
            )
            more = items[-1].tag if len(tags) > limit else None
            return Response(200, encode(rest.CapacityPage(items, more)))

        return await self._engine.read(page)

    def _selected(self, query: Mapping[str, str], after: str) -> list[str]:
        view = self._view
        if "host" in query:
            host = name_of(query["host"], "host")
            found = [view.capacities[tag] for tag in view.tags_on(host) if tag in view.capacities]
        else:
            found = list(view.capacities.values())
        owner, state, appliance = query.get("owner"), query.get("state"), query.get("appliance")
        return sorted(
            record.tag
            for record in found
            if record.tag > after
            and (owner is None or record.owner == owner)
            and (state is None or record.state.value == state)
            and (appliance is None or record.appliance == appliance)
        )

    async def get_capacity(self, request: Request) -> Response:
        tag = request.tag()
        return await self._engine.read(
            lambda: self._show(request, tag, lambda held: documents.capacity(self._view, held))
        )

    async def get_attachment(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")

        def show(held: CapacityRecord) -> rest.AttachmentDocument:
            return documents.attachment(self._view, held, self._attachment(tag, host))

        return await self._engine.read(lambda: self._show(request, tag, show))

    async def get_workload(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")

        def show(_: CapacityRecord) -> rest.WorkloadDocument:
            found = documents.workload(self._attachment(tag, host))
            if found is None:
                raise Refused(Reply(Outcome.WORKLOAD_IS_UNKNOWN, f"{tag}/{host}"))
            return found

        return await self._engine.read(lambda: self._show(request, tag, show))

    def _show(
        self, request: Request, tag: Tag, show: Callable[[CapacityRecord], msgspec.Struct]
    ) -> Response:
        held = self._capacity(tag)
        document = show(held)
        if request.seen(held.revision):
            return Response(304, b"", revision(held))
        return Response(200, encode(document), revision(held))

    async def create_capacity(self, request: Request) -> Response:
        return await self._create(request, Tag(str(uuid4())), await self._wanted(request))

    async def put_capacity(self, request: Request) -> Response:
        tag = request.tag()
        wanted = await self._wanted(request)
        if b"if-none-match" in request.headers or b"if-match" in request.headers:
            await self._engine.read(lambda: self._check_put(request, tag))
        return await self._create(request, tag, wanted)

    def _check_put(self, request: Request, tag: Tag) -> None:
        held = self._view.capacities.get(tag)
        if held is not None and request.seen(held.revision):
            limit = f'not "{held.revision}"'
            unmatched(tag, "If-None-Match", limit, request.header(b"if-none-match"))
        if held is not None:
            allowed(request, held)
        elif request.header(b"if-match"):
            limit = "absent, for there is no such capacity"
            unmatched(tag, "If-Match", limit, request.header(b"if-match"))

    async def _wanted(self, request: Request) -> rest.CapacityRequest:
        return await request.decode(_capacity_request)

    async def _create(self, request: Request, tag: Tag, wanted: rest.CapacityRequest) -> Response:
        key = idempotency_key(request)
        put = request.scope["method"] == "PUT"
        event = create_event(tag, wanted, key)
        held_tag = tag

        def subject(reply: Reply) -> Tag:
            nonlocal held_tag
            held_tag = Tag(reply.subject) if reply.subject else tag
            if put and held_tag != tag:
                detail = f"the key was used for tag {held_tag} before"
                raise Refused(Reply(Outcome.IDEMPOTENCY_KEY_REUSED, key, detail))
            return held_tag

        def judge() -> Response | None:
            return self._ready(held_tag, wanted.hosts)

        return await self._change(request, event, tag, judge, subject=subject)

    async def release_capacity(self, request: Request) -> Response:
        tag = request.tag()
        event = release_event(request, tag, "", self._deadlines_ns, await self._match(request, tag))

        def judge() -> Response | None:
            held = self._view.capacities.get(tag)
            if held is None:
                return Response(204)
            if held.state is CapacityState.QUARANTINED:
                raise Refused(Reply(Outcome.TAG_IS_QUARANTINED, tag, held.fault))
            return None

        return await self._change(request, event, tag, judge)

    # ---- hand-over, publication, reference

    async def hand_over(self, request: Request) -> Response:
        tag = request.tag()
        wanted = await request.decode(_hand_over_request)
        source, target = name_of(wanted.source, "from"), name_of(wanted.target, "to")
        match = await self._match(request, tag)
        key = idempotency_key(request)
        event = HandOver(tag, source, target, if_match=match, idempotency_key=key)
        event = with_plan(event, request, self._deadlines_ns)
        return await self._change(request, event, tag, lambda: self._moved(tag, (target,)))

    async def publish(self, request: Request) -> Response:
        tag = request.tag()
        wanted = await request.decode(_publish_request)
        hosts = tuple(name_of(host, "to") for host in wanted.to)
        match = await self._match(request, tag)
        key = idempotency_key(request)
        event = PublishCapacity(tag, hosts, if_match=match, idempotency_key=key)
        event = with_plan(event, request, self._deadlines_ns)
        return await self._change(request, event, tag, lambda: self._moved(tag, hosts))

    def _moved(self, tag: Tag, hosts: tuple[str, ...]) -> Response | None:
        """The answer once the move is over. Raises Refused when it failed, or a host refused."""
        held = self._capacity(tag)
        move = held.move
        if move is not None and move.active:
            return None
        if move is not None and move.step is MoveStep.FAILED:
            having = [a.host for a in self._view.attachments_of(tag) if a.state not in _OVER]
            where = f"{', '.join(having)} has it" if having else f"it is {held.state.value}"
            detail = f"{move.kind.value} failed: {move.reason}; {where}"
            raise Refused(Reply(Outcome.MOVE_FAILED, tag, detail))
        return self._ready(tag, hosts)

    async def retain_capacity(self, request: Request) -> Response:
        return await self._retain(request, retain=True)

    async def unretain_capacity(self, request: Request) -> Response:
        return await self._retain(request, retain=False)

    async def _retain(self, request: Request, *, retain: bool) -> Response:
        tag = request.tag()
        match = await self._match(request, tag)

        def judge() -> Response | None:
            held = self._capacity(tag)
            # Before a host has it there is nothing to refer to yet.
            waits = retain and held.retain and held.state is not CapacityState.RESERVED
            wanted = Reference.HELD if waits else Reference.NONE
            return self._document(200, held) if held.reference is wanted else None

        event = RetainCapacity(tag, retain, match)
        return await self._change(request, event, tag, judge)

    # ---- attachments and workloads

    async def attach_capacity(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")
        if request.headers.get(b"content-length", b"0") != b"0":
            await request.decode(_attachment_request)
        await self._match(request, tag)
        event = AttachCapacity(tag, host)
        return await self._change(request, event, tag, lambda: self._ready(tag, (host,)))

    async def release_attachment(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")
        event = release_event(
            request, tag, host, self._deadlines_ns, await self._match(request, tag)
        )

        def judge() -> Response | None:
            held = self._view.capacities.get(tag)
            if held is None:
                return Response(204)
            attached = self._view.attachment(tag, host)
            if attached is None or attached.state in _OVER:
                return self._document(200, held)
            return None

        return await self._change(request, event, tag, judge)

    async def launch_workload(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")
        wanted = await request.decode(_workload_request)
        await self._match(request, tag)
        key = idempotency_key(request)
        # The same key is the same launch, and a launch is named by its id.
        chosen = wanted.id or (hashlib.sha256(key.encode()).hexdigest()[:32] if key else "")
        launch = chosen or str(uuid4())
        event = LaunchWorkload(tag, host, launch, wanted.command, wanted.environment)

        def judge() -> Response | None:
            return self._workload_has(tag, host, launch, 200, ("running", "exited", "failed"))

        return await self._change(request, event, tag, judge)

    async def stop_workload(self, request: Request) -> Response:
        tag, host = request.tag(), request.name(1, "host")
        await self._match(request, tag)

        def judge() -> Response | None:
            attached = self._attachment(tag, host)
            launch = attached.workload.id if attached.workload else ""
            return self._workload_has(tag, host, launch, 200, ("exited", "failed"))

        return await self._change(request, StopWorkload(tag, host), tag, judge)

    def _workload_has(
        self, tag: Tag, host: str, launch: str, status: int, states: tuple[str, ...]
    ) -> Response | None:
        held = self._capacity(tag)
        attached = self._attachment(tag, host)
        if attached.state in _OVER:
            raise Refused(Reply(Outcome.TAG_IS_NOT_ATTACHED, f"{tag}/{host}", attached.reason))
        shown = documents.workload(attached)
        if shown is None or shown.id != launch or shown.state not in states:
            return None
        return self._document(status, held)

    # ---- a change and its answer

    async def _change(
        self,
        request: Request,
        event: Event,
        tag: Tag,
        judge: Judge,
        *,
        subject: Callable[[Reply], Tag] | None = None,
    ) -> Response:
        """Submit; answer at once, or (`Prefer: wait=`) when `judge` has an answer or the time is
        up.
        """
        seconds = request.wait_seconds()
        first = Response(202)
        about = tag

        def render(reply: Reply) -> asyncio.Future[Response] | None:
            nonlocal first, about
            if not reply.outcome.ok:
                raise Refused(reply)
            about = subject(reply) if subject else tag
            held = self._view.capacities.get(about)
            if held is None and request.scope["method"] != "DELETE":
                detail = f"capacity {about} has been released since"
                raise Refused(Reply(Outcome.TAG_IS_UNKNOWN, about, detail))
            first = (
                Response(204)
                if held is None
                else self._document(reply.outcome.facts.http_status, held)
            )
            if not seconds:
                return None
            answer = judge()
            if answer is None:
                return self._waiters.add(about, judge)
            # What became of it at once keeps the status of its beginning: created stays 201.
            first = answer if answer.status == 204 else first._replace(body=answer.body)
            return None

        waiting = await self._engine.submit(event, render)
        if waiting is None:
            return first
        answer = await self._held(about, waiting, seconds)
        if answer is not None:
            headers = (*answer.headers, applied(seconds))
            if first.status == 201:
                # Held or not, what was made is answered as made: the status and its Location.
                return answer._replace(status=201, headers=(*headers, location(about)))
            return answer._replace(headers=headers)
        late = await self._engine.read(lambda: self._late(about))
        return late._replace(headers=(*late.headers, applied(seconds)))

    async def _held(
        self, about: str, waiting: asyncio.Future[Response], seconds: float
    ) -> Response | None:
        """The answer when it comes in time; None when it does not."""
        try:
            async with asyncio.timeout(seconds):
                return await waiting
        except TimeoutError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # the waiters were ended: the process is going
        finally:
            self._waiters.forget(about, waiting)

    def _late(self, tag: Tag) -> Response:
        held = self._view.capacities.get(tag)
        return Response(204) if held is None else self._document(202, held)

    def _ready(self, tag: Tag, hosts: tuple[str, ...]) -> Response | None:
        """The answer once every one of `hosts` has the capacity ready.

        Raises Refused when one never will.
        """
        held = self._capacity(tag)
        if held.state in (CapacityState.RELEASING, CapacityState.SANITISING):
            raise Refused(Reply(Outcome.TAG_IS_BEING_RELEASED, tag))
        if held.state is CapacityState.QUARANTINED:
            raise Refused(Reply(Outcome.TAG_IS_QUARANTINED, tag, held.fault))
        ready = True
        for host in hosts:
            attached = self._view.attachment(tag, host)
            if attached is None or attached.state in _LEAVING:
                raise Refused(Reply(Outcome.TAG_IS_BEING_RELEASED, f"{tag}/{host}"))
            if attached.state is AttachmentState.REFUSED:
                why = f"host {host} refused: {attached.reason or 'it gave no reason'}"
                raise Refused(Reply(Outcome.HOST_REFUSED_OFFER, f"{tag}/{host}", why, value=host))
            if attached.state is not AttachmentState.ATTACHED or not attached.ready:
                ready = False
        return self._document(200, held) if ready else None

    async def _match(self, request: Request, tag: Tag) -> int | None:
        """Honour `If-Match`: the revision that it allows and that is the present one, for events
        that carry it further; None without the header.
        """
        if request.if_match() is None:
            return None
        return await self._engine.read(lambda: allowed(request, self._capacity(tag)))

    def _document(self, status: int, held: CapacityRecord) -> Response:
        headers = revision(held)
        if status == 201:
            headers = (*headers, location(held.tag))
        return Response(status, encode(documents.capacity(self._view, held)), headers)

    def _capacity(self, tag: str) -> CapacityRecord:
        held = self._view.capacities.get(tag)
        if held is None:
            raise Refused(Reply(Outcome.TAG_IS_UNKNOWN, tag, f"there is no capacity {tag}"))
        return held

    def _attachment(self, tag: str, host: str) -> AttachmentRecord:
        attached = self._view.attachment(tag, host)
        if attached is None:
            why = f"capacity {tag} is not attached to host {host}"
            raise Refused(Reply(Outcome.HOST_DOES_NOT_HOLD_TAG, f"{tag}/{host}", why))
        return attached

    # ---- appliances and hosts

    async def list_appliances(self, request: Request) -> Response:
        request.query()

        def page() -> Response:
            records = sorted(self._view.appliances.values(), key=lambda each: each.id)
            items = tuple(documents.appliance(self._view, record) for record in records)
            return Response(200, encode(rest.ApplianceList(items)))

        return await self._engine.read(page)

    async def get_appliance(self, request: Request) -> Response:
        name = request.name(0, "appliance")
        return await self._engine.read(lambda: self._appliance(name, 200))

    async def get_appliance_map(self, request: Request) -> Response:
        name = request.name(0, "appliance")

        def show() -> Response:
            self._appliance(name, 200)
            record = self._view.appliances[name]
            return Response(200, encode(documents.extent_map(self._view, record)))

        return await self._engine.read(show)

    async def put_appliance(self, request: Request) -> Response:
        name = request.name(0, "appliance")
        wanted = await request.decode(_appliance_request)
        try:
            parse_address(wanted.address, "address")
        except InvalidInput as error:
            raise refuse_field(error.field, error.limit, wanted.address) from None

        def judge() -> Response | None:
            record = self._view.appliances.get(name)
            if record is None or record.state is not ApplianceState.READY:
                return None
            return self._appliance(name, 200)

        return await self._register(
            request,
            RegisterAppliance(name, wanted.address),
            f"appliance/{name}",
            judge,
            lambda status: self._appliance(name, status),
        )

    async def refresh_appliance(self, request: Request) -> Response:
        name = request.name(0, "appliance")
        answer: Response = await self._engine.submit(
            RefreshAppliance(name),
            lambda reply: self._appliance(name, ok(reply).facts.http_status),
        )
        return answer

    def _appliance(self, name: str, status: int) -> Response:
        record = self._view.appliances.get(name)
        if record is None:
            raise Refused(Reply(Outcome.APPLIANCE_IS_UNKNOWN, name, f"no appliance {name}"))
        return Response(status, encode(documents.appliance(self._view, record)))

    async def list_hosts(self, request: Request) -> Response:
        request.query()

        def page() -> Response:
            records = sorted(self._view.hosts.values(), key=lambda each: each.id)
            items = tuple(
                documents.host(self._view, record, connected=self._sessions.connected(record.id))
                for record in records
            )
            return Response(200, encode(rest.HostList(items)))

        return await self._engine.read(page)

    async def get_host(self, request: Request) -> Response:
        name = request.name(0, "host")
        return await self._engine.read(lambda: self._host(name, 200))

    async def put_host(self, request: Request) -> Response:
        name = request.name(0, "host")
        wanted = await request.decode(_host_request)

        def judge() -> Response | None:
            return self._host(name, 200) if self._sessions.connected(name) else None

        return await self._register(
            request,
            RegisterHost(name, wanted.links),
            f"host/{name}",
            judge,
            lambda status: self._host(name, status),
        )

    async def _register(
        self,
        request: Request,
        event: Event,
        subject: str,
        judge: Judge,
        show: Callable[[int], Response],
    ) -> Response:
        seconds = request.wait_seconds()
        first = Response(202)

        def render(reply: Reply) -> asyncio.Future[Response] | None:
            nonlocal first
            first = show(ok(reply).facts.http_status)
            if not seconds or judge() is not None:
                return None
            return self._waiters.add(subject, judge)

        waiting = await self._engine.submit(event, render)
        if waiting is None:
            return first
        answer = await self._held(subject, waiting, seconds)
        if answer is not None:
            return answer._replace(status=first.status, headers=(applied(seconds),))
        late = await self._engine.read(lambda: show(202))
        return late._replace(headers=(applied(seconds),))

    def _host(self, name: str, status: int) -> Response:
        record = self._view.hosts.get(name)
        if record is None:
            raise Refused(Reply(Outcome.HOST_IS_UNKNOWN, name, f"no host {name}"))
        connected = self._sessions.connected(name)
        return Response(status, encode(documents.host(self._view, record, connected=connected)))

    async def list_quarantine(self, request: Request) -> Response:
        request.query()

        def page() -> Response:
            records = sorted(self._view.quarantine.values(), key=lambda each: each.id)
            items = tuple(documents.quarantined(record) for record in records)
            return Response(200, encode(rest.QuarantineList(items)))

        return await self._engine.read(page)

    # ---- questions

    async def explain(self, request: Request) -> Response:
        wanted = await self._wanted(request)
        event = create_event(Tag(str(uuid4())), wanted, "")

        def answer() -> Response:
            explained = self._view.explain(event)
            if isinstance(explained, Reply):
                raise Refused(explained)
            return Response(200, encode(explained))

        return await self._engine.read(answer)

    async def list_events(self, request: Request) -> Response | Stream:
        query = request.query("after", "limit", "subject")
        limit = integer(query, "limit", EVENTS_PAGE, 1, LIST_PAGE_MAX)
        subject = query.get("subject", "")
        if "text/event-stream" in request.header(b"accept"):
            resumed = request.header(b"last-event-id")
            position = {"Last-Event-ID": resumed} if resumed else query
            name = "Last-Event-ID" if resumed else "after"
            after = integer(position, name, self._feed.last, 0, 2**63 - 1)
            if EventStream.open_now >= STREAMS_MAX:
                detail = f"{STREAMS_MAX} event streams are open already"
                raise Refused(Reply(Outcome.QUEUE_IS_FULL, detail=detail))
            return EventStream(self._feed, after, subject)
        after = integer(query, "after", 0, 0, 2**63 - 1)
        return Response(200, encode(await self._events(after, limit, subject)))

    async def _events(self, after: int, limit: int, subject: str) -> rest.EventPage:
        items: list[rest.EventDocument] = []
        scanned = after
        for _ in range(SCAN_PAGES_MAX):
            page = await self._feed.page(scanned, limit if not subject else HISTORY_PAGE)
            if not page:
                break
            for event in page:
                scanned = event.id
                if concerns(event, subject):
                    items.append(event)
                    if len(items) == limit:
                        break
            if len(items) == limit:
                break
        return rest.EventPage(tuple(items), scanned, self._feed.last)

    async def get_health(self, request: Request) -> Response:
        request.query()
        return await self._engine.read(lambda: Response(200, encode(self._health())))

    def _health(self) -> rest.HealthDocument:
        view = self._view
        states = {record.id: record.state.value for record in view.appliances.values()}
        ready = all(state == ApplianceState.READY.value for state in states.values())
        return rest.HealthDocument(
            status="ok" if ready else "degraded",
            version=self._version,
            started_ns=self._started_ns,
            capacities=len(view.capacities),
            quarantined=len(view.quarantine),
            appliances=dict(sorted(states.items())),
            hosts=len(view.hosts),
            hosts_connected=len(self._sessions),
            events_waiting=self._engine.waiting,
        )

    async def get_metrics(self, request: Request) -> Response:
        request.query()
        text = await self._engine.read(lambda: self._metrics.text(self._view, self._sessions))
        return Response(200, text.encode(), (), b"text/plain; version=0.0.4; charset=utf-8")

    async def get_openapi(self, request: Request) -> Response:
        from tagmem.orchestrator.openapi import document

        request.query()
        return Response(200, encode(document(self._version)))
