"""The ASGI application: finds the handler, turns what it raises into a problem document, sends
its answer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from tagmem.base.errors import StorageFailed
from tagmem.domain.outcome import Outcome, Reply
from tagmem.engine import QueueFull
from tagmem.orchestrator.asgi import (
    ClientGone,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    Stream,
    respond,
)
from tagmem.orchestrator.problems import PROBLEM_TYPE, Refused, encode, problem
from tagmem.orchestrator.routing import Route, compile_routes, find
from tagmem.orchestrator.sessions import Sessions

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = b"1"


class Application:
    """What the HTTP server calls for each request and each WebSocket."""

    def __init__(
        self,
        routes: Sequence[Route],
        handlers: object,
        sessions: Sessions,
        answers: Counter[int],
    ) -> None:
        """`handlers` has a method for each route; `answers` is counted up by HTTP status."""
        self._root = compile_routes(routes, handlers)
        self._sessions = sessions
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except Refused as refused:
            answer = refusal(refused)
        except QueueFull as full:
            answer = refusal(Refused(Reply(Outcome.QUEUE_IS_FULL, detail=str(full))))
        except StorageFailed as failure:
            answer = refusal(Refused(Reply(Outcome.STORAGE_FAILED, detail=str(failure))))
        except ClientGone:
            return
        if isinstance(answer, Response):
            self._answers[answer.status] += 1
            await respond(send, answer)
        else:
            self._answers[200] += 1
            await answer.run(receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response | Stream:
        path: str = scope["path"]
        node, parameters = find(self._root, path)
        if node is None:
            raise Refused(Reply(Outcome.PATH_IS_UNKNOWN, path, f"there is nothing at {path}"))
        method: str = scope["method"]
        handler = node.handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = sorted(node.handlers)
            if "GET" in node.handlers:
                allowed.append("HEAD")
            names = ", ".join(allowed)
            reply = Reply(
                Outcome.METHOD_IS_NOT_ALLOWED,
                path,
                field="method",
                limit=f"one of {names}",
                value=method,
            )
            raise Refused(reply, ((b"allow", names.encode()),))
        return await handler(Request(scope, receive, parameters))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        steps = scope["path"].split("/")
        if len(steps) == 5 and steps[1:3] == ["v1", "hosts"] and steps[4] == "session":
            await self._sessions.serve(steps[3], receive, send)
            return
        await receive()
        await send({"type": "websocket.close", "code": 1008})


def refusal(refused: Refused) -> Response:
    """The problem document of a refused request."""
    document = problem(refused.reply)
    headers = refused.headers
    if document.transient:
        headers = (*headers, (b"retry-after", RETRY_AFTER_SECONDS))
    return Response(document.status, encode(document), headers, PROBLEM_TYPE)
