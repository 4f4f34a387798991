"""Which handler answers which path: one table for dispatch and for the OpenAPI document.

A path is looked up step by step in a tree of dictionaries, so its cost does not grow with the
number of routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from tagmem.orchestrator.asgi import Request, Response, Stream

Handler = Callable[[Request], Awaitable[Response | Stream]]


class Query(msgspec.Struct, frozen=True):
    """A query parameter, as a JSON schema and a sentence."""

    name: str
    schema: dict[str, Any]
    about: str


class Route(msgspec.Struct, frozen=True):
    """One operation of the API.

    `handler` is the name of a method, which is also the operation's id.
    """

    method: str
    path: str
    handler: str
    about: str
    answers: dict[int, type[msgspec.Struct] | None]
    body: type[msgspec.Struct] | None = None
    query: tuple[Query, ...] = ()
    waits: bool = False
    """`Prefer: wait=` is honoured."""
    matches: bool = False
    """`If-Match` is honoured."""
    revised: bool = False
    """The answer carries an ETag; `If-None-Match` is honoured on GET."""
    keyed: bool = False
    """`Idempotency-Key` is honoured."""
    streams: bool = False
    """Server-sent events, when the client accepts them."""
    media_type: str = "application/json"


class Node:
    """One step of a path: what may follow it, and what answers here."""

    __slots__ = ("handlers", "literals", "parameter")

    def __init__(self) -> None:
        self.literals: dict[str, Node] = {}
        self.parameter: Node | None = None
        self.handlers: dict[str, Handler] = {}


def compile_routes(routes: Sequence[Route], owner: object) -> Node:
    """The tree of `routes`, whose handlers are methods of `owner`.

    Raises AttributeError for a missing one.
    """
    root = Node()
    for route in routes:
        node = root
        for step in route.path.split("/")[1:]:
            if step.startswith("{"):
                node.parameter = node.parameter or Node()
                node = node.parameter
            else:
                node = node.literals.setdefault(step, Node())
        node.handlers[route.method] = getattr(owner, route.handler)
    return root


def find(root: Node, path: str) -> tuple[Node | None, tuple[str, ...]]:
    """Where a path leads, and the values of its parameters; None when it leads nowhere."""
    node = root
    parameters: tuple[str, ...] = ()
    for step in path.split("/")[1:]:
        literal = node.literals.get(step)
        if literal is not None:
            node = literal
        elif node.parameter is not None and step:
            node = node.parameter
            parameters = (*parameters, step)
        else:
            return None, ()
    return (node, parameters) if node.handlers else (None, ())
