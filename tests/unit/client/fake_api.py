"""An orchestrator's API that does as it is told: real HTTP on a Unix socket, in this process.

`answers` are by method and path; `steps` are what happens while somebody watches: each is an event
that the stream sends after its change was made, so that a client that looks after an event finds
it.
"""

from __future__ import annotations

import http.server
import socketserver
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec

from tagmem.domain.outcome import Outcome, Reply
from tagmem.orchestrator.problems import problem
from tagmem.wire import rest

Answer = tuple[int, Any]
Change = Callable[[], None]

STREAM_SECONDS_MAX = 30.0


class Request(msgspec.Struct, frozen=True):
    """What a client sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class FakeApi:
    """Start with `with`; `url` is for clients."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "api.sock"
        self.url = f"unix:{self.path}"
        self.answers: dict[tuple[str, str], Any] = {}
        self.requests: list[Request] = []
        self.events: list[rest.EventDocument] = []
        self.steps: list[tuple[Change, rest.EventDocument]] = []
        self.drop = 0
        """So many requests are read, and their connection is closed without an answer."""
        self.stream_ends = False
        self.ended = threading.Event()
        self._server = _Server(str(self.path), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def on(self, method: str, path: str, answer: Any) -> None:
        """Answer with a document, an Outcome or Reply, (status, document), or what a function
        returns.
        """
        self.answers[method, path] = answer

    def then(self, type_: str, subject: str, change: Change = lambda: None, **data: Any) -> None:
        """While somebody watches: make `change`, then tell of it."""
        number = len(self.events) + len(self.steps) + 1
        document = rest.EventDocument(number, number * 10**9, type_, subject, data)
        self.steps.append((change, document))

    def happened(self, type_: str, subject: str, **data: Any) -> None:
        """An event of the past."""
        number = len(self.events) + 1
        self.events.append(rest.EventDocument(number, number * 10**9, type_, subject, data))

    def sent(self, method: str, path: str) -> Request:
        """The last request of this kind."""
        return [r for r in self.requests if (r.method, r.path) == (method, path)][-1]

    def answer(self, request: Request) -> Answer:
        if request.path == "/v1/events":
            return 200, self._page(request)
        found = self.answers.get((request.method, request.path), Outcome.TAG_IS_UNKNOWN)
        if callable(found):
            found = found(request)
        if isinstance(found, Outcome):
            found = Reply(found, subject=request.path.rpartition("/")[2])
        if isinstance(found, Reply):
            document = problem(found)
            return document.status, document
        return found if isinstance(found, tuple) else (200, found)

    def _page(self, request: Request) -> rest.EventPage:
        after, limit = int(request.query.get("after", 0)), int(request.query.get("limit", 2))
        items = tuple(e for e in self.events if e.id > after)[:limit]
        last = self.events[-1].id if self.events else 0
        return rest.EventPage(items, items[-1].id if items else after, last)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, api: FakeApi) -> None:
        super().__init__(path, _Handler)
        self.api = api


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "test"

    def log_message(self, *_: Any) -> None:
        """Nothing: the test looks at `requests`."""

    def _serve(self) -> None:
        api = self.server.api
        parts = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = dict(urllib.parse.parse_qsl(parts.query))
        request = Request(
            self.command, urllib.parse.unquote(parts.path), query, dict(self.headers), body
        )
        api.requests.append(request)
        if api.drop:
            api.drop -= 1
            self.close_connection = True
            return
        if self.headers.get("Accept") == "text/event-stream":
            self._stream(int(self.headers.get("Last-Event-ID", 0)))
            return
        status, document = api.answer(request)
        data = b"" if status == 204 else msgspec.json.encode(document)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _stream(self, after: int) -> None:
        api = self.server.api
        # What is asked for while a stream that ends is being read is for the next one.
        due = len(api.steps)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b": hello\n\n")
        for event in [e for e in api.events if e.id > after]:
            self._send(event)
        while api.steps and (due > 0 or not api.stream_ends):
            due -= 1
            change, event = api.steps.pop(0)
            change()
            api.events.append(event)
            self._send(event)
        if not api.stream_ends:
            api.ended.wait(STREAM_SECONDS_MAX)

    def _send(self, event: rest.EventDocument) -> None:
        self.wfile.write(b"id: %d\ndata: %s\n\n" % (event.id, msgspec.json.encode(event)))
        self.wfile.flush()


TAG = "6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f"
MIB = 1 << 20


def attachment(host: str = "w1", **changed: Any) -> rest.AttachmentDocument:
    """An attachment that is ready, but for what is said."""
    fields: dict[str, Any] = {
        "host": host,
        "state": "attached",
        "ready": True,
        "read_only": False,
        "dax_path": "/run/tagmem/dax0.1/dax0.1",
        "reason": "",
        "rung": "",
        "holders": (),
        "workload": None,
        "dpas": ((0x1000, 256 * MIB),),
    }
    return rest.AttachmentDocument(**{**fields, **changed})


def capacity(*attachments: rest.AttachmentDocument, **changed: Any) -> rest.CapacityDocument:
    """A capacity of 256 MiB, active, but for what is said."""
    fields: dict[str, Any] = {
        "tag": TAG,
        "size_bytes": 256 * MIB,
        "state": "active",
        "tagged": True,
        "guaranteed": True,
        "sharing": "none",
        "owner": "",
        "appliance": "a0",
        "region": 0,
        "extents": (rest.ExtentDocument(0, 0, 256 * MIB),),
        "attachments": attachments,
        "created_ns": 1_700_000_000_123_000_000,
        "revision": 3,
        "fault": "",
    }
    return rest.CapacityDocument(**{**fields, **changed})


def workload(name: str = "run-1", **changed: Any) -> rest.WorkloadDocument:
    """A workload that runs, but for what is said."""
    fields: dict[str, Any] = {
        "id": name,
        "command": ("sleep", "1"),
        "state": "running",
        "pid": 4711,
        "exit_code": None,
        "reason": "",
        "log_path": "",
    }
    return rest.WorkloadDocument(**{**fields, **changed})
