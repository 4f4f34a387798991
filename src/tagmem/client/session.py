"""The orchestrator's API as a Python object: requests, their errors, waiting, the event stream.

Synchronous, on `http.client`, over TCP or a Unix socket, with one connection kept open; msgspec
decodes the documents of `wire/rest`. The standard library's client is here because the command line
must feel instant: it loads in a third of the time of the alternatives.

Every request that this class makes may be repeated safely (tags and workload ids are chosen here),
so a connection that ends without an answer is tried again; when that does not help either, the
outcome is unknown, and says so.
"""

from __future__ import annotations

import http.client
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self, TypeVar

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    Retry,
    TagmemError,
    Unsupported,
)
from tagmem.wire import rest

T = TypeVar("T")

_ATTEMPTS_MAX = 3
_BACKOFF_SECONDS = 0.05
_BODY_BYTES_MAX = 256 << 20
_EVENT_BYTES_MAX = 1 << 20
_RETURN_SECONDS = 0.05
"""Between attempts to find an orchestrator that is away."""
_LOOK_AGAIN_SECONDS = 2.0
"""While waiting, the thing itself is looked at this often even when no event tells of it."""


class Unreachable(TagmemError):
    """The orchestrator cannot be reached."""

    retry = Retry.LATER


class WaitTimeout(TagmemError, TimeoutError):
    """What was waited for did not come about in time."""

    retry = Retry.AFTER_QUERY


class ApiError(TagmemError):
    """The orchestrator answered with a problem; `problem` is the document."""

    def __init__(self, problem: rest.Problem) -> None:
        self.problem = problem
        self.retry = Retry.LATER if problem.transient else Retry.NEVER
        TagmemError.__init__(self, sentence(problem))


class RefusedInput(ApiError, InvalidInput):
    """A field of the request is outside its limit."""

    def __init__(self, problem: rest.Problem) -> None:
        ApiError.__init__(self, problem)
        self.field = problem.field
        self.limit = problem.limit
        self.value = problem.value


class UnknownThing(ApiError, NotFound):
    """There is no such tag, host or appliance."""


class StateForbids(ApiError, Conflict):
    """The present state forbids the request."""


class NotDone(ApiError, Unsupported):
    """The orchestrator does not do this."""


class NotNow(ApiError, RemoteError):
    """The same request may succeed later."""


def sentence(problem: rest.Problem) -> str:
    """The problem in one line, with field, limit and value where they are named."""
    text = problem.detail or problem.title
    if problem.field and problem.limit and problem.limit not in text:
        text = f"{text}: {problem.field} must be {problem.limit}, got {problem.value!r}"
    return text


def error_of(problem: rest.Problem) -> ApiError:
    """The exception for a problem document."""
    if problem.code >= 90 or problem.status == 501:
        return NotDone(problem)
    if problem.code >= 70 or problem.status >= 500:
        return NotNow(problem)
    if problem.code >= 50 or problem.status in (409, 412):
        return StateForbids(problem)
    if problem.code >= 30 or problem.status == 404:
        return UnknownThing(problem)
    return RefusedInput(problem)


class Client:
    """One orchestrator, at `http://host:port` or `unix:/path/to/socket`. Not for several threads at
    once.
    """

    def __init__(
        self, url: str, *, timeout: float = 30.0, patience: float = 2.0, absence: float = 15.0
    ) -> None:
        """All in seconds: `timeout` bounds each answer, `patience` how long "come back later" is
        retried, `absence` how long waiting and event streams outlast an orchestrator that is away.
        """
        self.url = url
        self._timeout = timeout
        self._patience = patience
        self._absence = absence
        self._address = _parse_url(url)
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- capacities

    def capacities(self, **filters: str) -> Iterator[rest.CapacityDocument]:
        """Every capacity in the order of the tags; filters as the API has them (`owner`, `host`,
        `state`).
        """
        after = ""
        while True:
            query = {**filters, **({"after": after} if after else {})}
            page = self._get("/v1/capacities", rest.CapacityPage, query)
            yield from page.items
            if not page.next:
                return
            after = page.next

    def capacity(self, tag: str) -> rest.CapacityDocument:
        """Raises UnknownThing."""
        return self._get(_path("capacities", tag), rest.CapacityDocument)

    def create(
        self, request: rest.CapacityRequest, tag: str | None = None
    ) -> rest.CapacityDocument:
        """Create a capacity under `tag` (None: a new one). The same request again is harmless."""
        if tag is None:
            import uuid

            tag = str(uuid.uuid4())
        path = _path("capacities", tag)
        return self._call("PUT", path, rest.CapacityDocument, request)

    def attach(self, tag: str, host: str) -> rest.CapacityDocument:
        """Offer a capacity to one more host."""
        path = _path("capacities", tag, "attachments", host)
        return self._call("PUT", path, rest.CapacityDocument, rest.AttachmentRequest())

    def hand_over(
        self,
        tag: str,
        source: str,
        target: str,
        *,
        up_to: str = "",
        deadlines: Mapping[str, float] | None = None,
        if_match: int | None = None,
    ) -> rest.CapacityDocument:
        """Begin to hand a shared capacity with its contents from one host to another.

        How far the release of `source` may climb is said as for `release`.
        """
        path, body = _path("capacities", tag, "hand-over"), rest.HandOverRequest(source, target)
        return self._begin(path, body, up_to, deadlines, if_match)

    def publish(
        self,
        tag: str,
        hosts: Sequence[str],
        *,
        up_to: str = "",
        deadlines: Mapping[str, float] | None = None,
        if_match: int | None = None,
    ) -> rest.CapacityDocument:
        """Begin to publish read-only capacity: its writer and `hosts` read, and nobody writes."""
        path, body = _path("capacities", tag, "publish"), rest.PublishRequest(tuple(hosts))
        return self._begin(path, body, up_to, deadlines, if_match)

    def _begin(
        self,
        path: str,
        body: rest.Body,
        up_to: str,
        deadlines: Mapping[str, float] | None,
        if_match: int | None,
    ) -> rest.CapacityDocument:
        query, headers = _plan(up_to, deadlines), _matching(if_match)
        data = self._request("POST", path, body, query=query, headers=headers)
        return _decode(data, rest.CapacityDocument, self.url)

    def retain(self, tag: str, retain: bool = True) -> rest.CapacityDocument:
        """Have a shared capacity outlive its last host, or no longer."""
        path = _path("capacities", tag, "reference")
        return self._call("PUT" if retain else "DELETE", path, rest.CapacityDocument)

    def release(
        self,
        tag: str,
        host: str = "",
        *,
        up_to: str = "",
        deadlines: Mapping[str, float] | None = None,
        if_match: int | None = None,
    ) -> rest.CapacityDocument | None:
        """Begin to give a capacity back, from one host or from all. None: nothing of it is left
        already.

        `deadlines` are seconds by rung of the ladder; `if_match` is the revision that the caller
        has seen.
        """
        path = _path("capacities", tag, *(("attachments", host) if host else ()))
        query, headers = _plan(up_to, deadlines), _matching(if_match)
        data = self._request("DELETE", path, query=query, headers=headers)
        return _decode(data, rest.CapacityDocument, self.url) if data else None

    def launch(self, tag: str, host: str, request: rest.WorkloadRequest) -> rest.CapacityDocument:
        """Have `host` run a command on the tag."""
        path = _path("capacities", tag, "attachments", host, "workload")
        return self._call("POST", path, rest.CapacityDocument, request)

    def stop(self, tag: str, host: str) -> rest.CapacityDocument:
        """Have `host` stop the command that runs on the tag."""
        path = _path("capacities", tag, "attachments", host, "workload")
        return self._call("DELETE", path, rest.CapacityDocument)

    def explain(self, request: rest.CapacityRequest) -> rest.ExplanationDocument:
        """Where a request would go, and why; nothing is changed."""
        return self._call("POST", "/v1/explain", rest.ExplanationDocument, request)

    # ---- hosts and appliances

    def hosts(self) -> tuple[rest.HostDocument, ...]:
        """Every registered host."""
        return self._get("/v1/hosts", rest.HostList).items

    def host(self, name: str) -> rest.HostDocument:
        """Raises UnknownThing."""
        return self._get(_path("hosts", name), rest.HostDocument)

    def register_host(self, name: str, links: dict[str, int]) -> rest.HostDocument:
        """Name a host and its LD on each appliance that it reaches."""
        body = rest.HostRequest(links=links)
        return self._call("PUT", _path("hosts", name), rest.HostDocument, body)

    def appliances(self) -> tuple[rest.ApplianceDocument, ...]:
        """Every registered appliance."""
        return self._get("/v1/appliances", rest.ApplianceList).items

    def appliance(self, name: str) -> rest.ApplianceDocument:
        """Raises UnknownThing."""
        return self._get(_path("appliances", name), rest.ApplianceDocument)

    def appliance_map(self, name: str) -> rest.ApplianceMapDocument:
        """What lies where on an appliance."""
        return self._get(_path("appliances", name, "map"), rest.ApplianceMapDocument)

    def register_appliance(self, name: str, address: str) -> rest.ApplianceDocument:
        """Name an appliance and where its fabric-manager port is."""
        body = rest.ApplianceRequest(address=address)
        return self._call("PUT", _path("appliances", name), rest.ApplianceDocument, body)

    def refresh_appliance(self, name: str) -> rest.ApplianceDocument:
        """Compare with the appliance's own lists now."""
        path = _path("appliances", name, "refresh")
        return self._call("POST", path, rest.ApplianceDocument)

    def quarantine(self) -> tuple[rest.QuarantineDocument, ...]:
        """What lies on appliances and was not put there by this orchestrator."""
        return self._get("/v1/quarantine", rest.QuarantineList).items

    def health(self) -> rest.HealthDocument:
        """How the orchestrator is."""
        return self._get("/v1/health", rest.HealthDocument)

    # ---- events

    def history(self, after: int = 0) -> Iterator[rest.EventDocument]:
        """Every event after number `after` that has happened so far."""
        while True:
            page = self._get("/v1/events", rest.EventPage, {"after": str(after)})
            yield from page.items
            if not page.items or page.next >= page.last:
                return
            after = page.next

    def last_event(self) -> int:
        """The number of the newest event."""
        return self._get("/v1/events", rest.EventPage, {"limit": "1"}).last

    def events(
        self, after: int = 0, *, timeout: float | None = None
    ) -> Iterator[rest.EventDocument]:
        """Events after number `after` as they happen; resumes where it was when the connection
        breaks.

        `timeout`: end after so many seconds without an event (None: never). Raises Unreachable when
        the orchestrator stays away.
        """
        heard = time.monotonic()
        while True:
            why = "it ends at once"  # an orderly end: the orchestrator is going, or restarting
            try:
                for event in self._stream(after, timeout):
                    after = event.id
                    heard = time.monotonic()
                    yield event
            except TimeoutError:
                return
            except (OSError, http.client.HTTPException) as error:
                why = _why(error)
            if time.monotonic() - heard > self._absence:
                raise Unreachable(f"{self.url}: the event stream stays away: {why}")
            time.sleep(_RETURN_SECONDS)

    def _stream(self, after: int, timeout: float | None) -> Iterator[rest.EventDocument]:
        connection = _Connection(self._address, timeout)
        try:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            connection.request("GET", "/v1/events", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise error_of(_problem(response.status, response.read(_BODY_BYTES_MAX)))
            decoder = msgspec.json.Decoder(rest.EventDocument)
            data = b""
            while line := response.readline(_EVENT_BYTES_MAX):
                name, _, value = line.rstrip(b"\r\n").partition(b":")
                if name == b"data":
                    data += value.removeprefix(b" ")
                elif not line.strip() and data:
                    yield decoder.decode(data)
                    data = b""
        finally:
            connection.close()

    # ---- waiting

    def wait(
        self,
        look: Callable[[], T | None],
        *,
        subjects: frozenset[str] = frozenset(),
        timeout: float | None = None,
        after: int | None = None,
        on_event: Callable[[rest.EventDocument], None] | None = None,
        late: Callable[[], str] | None = None,
    ) -> T:
        """Call `look` until it returns something: at once, after each event about one of
        `subjects`, now and then.

        `on_event` sees those events. Raises WaitTimeout with the sentence of `late`; `timeout` in
        seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if after is None:
            after = self.last_event()
        seen = time.monotonic()

        def attempt() -> T | None:
            nonlocal seen
            try:
                found = look()
            except (Unreachable, OutcomeUnknown):
                if time.monotonic() - seen > self._absence:
                    raise
                return None
            seen = time.monotonic()
            return found

        while True:
            found = attempt()
            if found is not None:
                return found
            pause = _LOOK_AGAIN_SECONDS
            if deadline is not None:
                pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                raise WaitTimeout(late() if late else f"not done in {timeout:g} s")
            for event in self.events(after, timeout=pause):
                after = event.id
                if subjects and not concerns(event, subjects):
                    continue
                if on_event is not None:
                    on_event(event)
                found = attempt()
                if found is not None:
                    return found
                if deadline is not None and time.monotonic() >= deadline:
                    break

    # ---- requests

    def _get(self, path: str, kind: type[T], query: Mapping[str, str] | None = None) -> T:
        return self._call("GET", path, kind, query=query)

    def _call(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: rest.Body | None = None,
        *,
        query: Mapping[str, str] | None = None,
    ) -> T:
        return _decode(self._request(method, path, body, query=query), kind, self.url)

    def _request(
        self,
        method: str,
        path: str,
        body: rest.Body | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of a successful answer. Raises ApiError for any other."""
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        content = b"" if body is None else msgspec.json.encode(body)
        sent = {"Accept": "application/json, application/problem+json", **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        patient_until = time.monotonic() + self._patience
        attempt = 0
        while True:
            attempt += 1
            status, data = self._exchange(method, target, content, sent)
            if status < 400:
                return data
            problem = _problem(status, data)
            jitter = 0.5 + time.monotonic_ns() % 1000 / 1000
            pause = _BACKOFF_SECONDS * 2**attempt * jitter
            # 507 is transient too, but room comes when somebody gives memory back, not in seconds.
            again = problem.transient and status == 503
            if not again or time.monotonic() + pause > patient_until:
                raise error_of(problem)
            time.sleep(pause)

    def _exchange(
        self, method: str, target: str, content: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """One request and its answer; a connection that broke is opened again."""
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            kept = self._connection is not None
            connection = self._connection = self._connection or _Connection(
                self._address, self._timeout
            )
            try:
                if not kept:
                    connection.connect()
            except OSError as error:
                self.close()
                raise Unreachable(f"no orchestrator answers at {self.url}: {_why(error)}") from None
            try:
                connection.request(method, target, body=content or None, headers=dict(headers))
                response = connection.getresponse()
                data = response.read(_BODY_BYTES_MAX)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept connection may have been closed since; what we send may be repeated.
                if attempt == _ATTEMPTS_MAX or isinstance(error, TimeoutError):
                    raise OutcomeUnknown(
                        f"{self.url}: no answer to {method} {target}: {_why(error)}; "
                        "whether it took effect is unknown"
                    ) from None
            else:
                if response.will_close:
                    self.close()
                return response.status, data
        raise AssertionError("unreachable: the loop returns or raises")


class _Connection(http.client.HTTPConnection):
    """HTTP over TCP, or over a Unix socket when the address is a path."""

    def __init__(self, address: str | tuple[str, int], timeout: float | None) -> None:
        host, port = ("localhost", 80) if isinstance(address, str) else address
        super().__init__(host, port, timeout=timeout)
        self._path = address if isinstance(address, str) else ""

    def connect(self) -> None:
        """Open the connection."""
        if not self._path:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


def concerns(event: rest.EventDocument, subjects: frozenset[str]) -> bool:
    """Whether an event is about one of these tags, hosts or appliances."""
    first = event.subject.partition("/")[0]
    return first in subjects or event.data.get("tag") in subjects


def _parse_url(url: str) -> str | tuple[str, int]:
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if path.startswith("/"):
            return path
    elif url.startswith("http://"):
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.hostname and parts.path in ("", "/") and not parts.query:
                return parts.hostname, parts.port or 80
        except ValueError:
            pass  # a port that is not one
    raise InvalidInput("url", "http://HOST:PORT or unix:/PATH", url)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(urllib.parse.quote(part, safe="") for part in parts)


def _plan(up_to: str, deadlines: Mapping[str, float] | None) -> dict[str, str]:
    """How far a release may climb, as a query; `deadlines` are seconds by rung."""
    query = {"up_to": up_to} if up_to else {}
    query.update({f"{rung}_seconds": f"{s:g}" for rung, s in (deadlines or {}).items()})
    return query


def _matching(if_match: int | None) -> dict[str, str]:
    return {} if if_match is None else {"If-Match": f'"{if_match}"'}


def _decode(data: bytes, kind: type[T], url: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise RemoteError(url, 0, f"an answer that is no API v1 document: {error}") from None


def _problem(status: int, data: bytes) -> rest.Problem:
    try:
        return msgspec.json.decode(data, type=rest.Problem)
    except msgspec.MsgspecError:
        reason = http.client.responses.get(status, "error")
        detail = f"HTTP {status} {reason}, without a problem document (is this tagmem's port?)"
        return rest.Problem("about:blank", reason, status, detail, 0, "")


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
