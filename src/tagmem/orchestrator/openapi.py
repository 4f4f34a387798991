"""The OpenAPI 3.1 document, made from the route table and the types, so it cannot lag behind them.

Imported when somebody asks for it: its schemas are no part of starting up. A copy is kept in
docs/openapi.json, where a change of the API shows in review.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

from tagmem.orchestrator.asgi import WAIT_SECONDS_MAX
from tagmem.orchestrator.routes import NAME_SCHEMA, ROUTES
from tagmem.orchestrator.routing import Route
from tagmem.wire import rest

_REFERENCE = "#/components/schemas/{name}"
_PROBLEM_TYPE = "application/problem+json"
_ABOUT = (
    "Lends memory by name: capacity is offered to hosts under a tag, found there as a DAX device, "
    "given back, wiped and offered again. Sizes are bytes, times nanoseconds since 1970. Errors "
    "are RFC 9457 problems whose `code` is stable. Agents of hosts speak over the WebSocket "
    "/v1/hosts/{host}/session, which is not described here."
)
_PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "tag": {
        "description": "A UUID, not nil.",
        "schema": {"type": "string", "format": "uuid"},
    },
    "host": {
        "description": "A host's name.",
        "schema": NAME_SCHEMA,
    },
    "appliance": {
        "description": "An appliance's name.",
        "schema": NAME_SCHEMA,
    },
}


@cache
def document(version: str) -> dict[str, Any]:
    """The whole document, for the version of this program."""
    types: set[type[msgspec.Struct]] = {rest.Problem}
    for route in ROUTES:
        types.update(kind for kind in route.answers.values() if kind is not None)
        if route.body is not None:
            types.add(route.body)
    types.add(rest.EventDocument)
    ordered = sorted(types, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "tagmem orchestrator",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }
    # Through JSON once, so that tuples in defaults are the arrays that readers of the document
    # expect.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))
    return plain


def rendered(version: str) -> str:
    """The document as the file that is kept in docs/."""
    return msgspec.json.format(msgspec.json.encode(document(version)), indent=1).decode() + "\n"


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler,
        "summary": route.about,
        "responses": {
            str(status): _answer(route, status, kind)
            for status, kind in sorted(route.answers.items())
        },
    }
    parameters = [*_parameters(route)]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": route.body is not rest.AttachmentRequest,
            "content": {"application/json": {"schema": _schema(route.body)}},
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in route.path.split("/"):
        if step.startswith("{"):
            name = step.strip("{}")
            found.append({"name": name, "in": "path", "required": True} | _PATH_PARAMETERS[name])
    found.extend(
        {"name": each.name, "in": "query", "description": each.about, "schema": each.schema}
        for each in route.query
    )
    if route.waits:
        found.append(
            _header(
                "Prefer",
                f"`wait=SECONDS` (at most {WAIT_SECONDS_MAX:g}) holds the answer until the request "
                "has come to its end or failed; 202 with the present document when time is up.",
            )
        )
    if route.matches:
        found.append(
            _header("If-Match", "The revision (ETag) that the caller has seen, in quotes.")
        )
    if route.revised and route.method == "GET":
        found.append(_header("If-None-Match", "Answer 304 when the revision is still this one."))
    if route.keyed:
        found.append(_header("Idempotency-Key", "Repeats under one key change nothing.", 255))
    if route.streams:
        about = "Resume a stream behind this event."
        found.append(_header("Last-Event-ID", about, pattern=r"^[0-9]{1,18}$"))
    return found


def _header(
    name: str, about: str, length: int | None = None, pattern: str | None = None
) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if pattern is not None:
        schema["pattern"] = pattern
    if length is not None:
        schema["maxLength"] = length
    return {"name": name, "in": "header", "description": about, "schema": schema}


def _answer(route: Route, status: int, kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if kind is not None:
        media_type = _PROBLEM_TYPE if kind is rest.Problem else route.media_type
        answer["content"] = {media_type: {"schema": _schema(kind)}}
        if route.streams and kind is not rest.Problem:
            answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    elif status == 200:
        schema = {"type": "string" if route.media_type == "text/plain" else "object"}
        answer["content"] = {route.media_type: {"schema": schema}}
    if route.revised and status in (200, 201, 202, 304) and route.method != "DELETE":
        answer["headers"] = {"ETag": {"schema": {"type": "string"}, "description": "Revision."}}
    return answer


def _schema(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
