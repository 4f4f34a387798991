"""The OpenAPI document is current and valid, and a live orchestrator does what it says.

schemathesis makes requests from the document, good and bad ones, and holds every answer against it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis.checks import CHECKS
from tests.unit.orchestrator.world import OTHER, TAG, World

import tagmem
from tagmem.orchestrator.config import TcpEndpoint
from tagmem.orchestrator.openapi import document, rendered
from tagmem.orchestrator.routes import ROUTES
from tagmem.orchestrator.server import Listening

COPY = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_copy_in_docs_is_current() -> None:
    current = rendered(tagmem.__version__)
    assert COPY.read_text("utf-8") == current, f"write {COPY.name} anew (see docs/HACKING.md)"


def test_the_document_is_valid_openapi() -> None:
    validate(document(tagmem.__version__))


def test_every_route_is_described_once() -> None:
    paths = document(tagmem.__version__)["paths"]
    described = [(path, method) for path, methods in paths.items() for method in methods]
    assert sorted(described) == sorted((route.path, route.method.lower()) for route in ROUTES)
    identifiers = [
        methods[method]["operationId"] for methods in paths.values() for method in methods
    ]
    assert len(set(identifiers)) == len(identifiers)


# ---- live


class Live(threading.Thread):
    """An orchestrator that listens, with a played appliance behind it."""

    def __init__(self) -> None:
        super().__init__(name="live orchestrator")
        self.listening = Listening([TcpEndpoint("127.0.0.1", 0)])
        port = self.listening.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._ready = threading.Event()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._world = World()
        served = asyncio.create_task(self._world.orchestrator.run(self.listening.sockets))
        await self._world.prepare()
        await self._world.call("PUT", f"/v1/capacities/{TAG}", {"size_bytes": 2**21})
        body = {"size_bytes": 2**22, "hosts": ["h0"], "owner": "someone"}
        await self._world.call("PUT", f"/v1/capacities/{OTHER}", body)
        await self._world.accept(OTHER)
        self._ready.set()
        await served

    def __enter__(self) -> Self:
        self.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._world.orchestrator.stop)
        self.join()
        self.listening.close()


@pytest.fixture(scope="module")
def live() -> Iterator[str]:
    with Live() as running:
        yield running.url


KNOWN: dict[str, list[str]] = {"tag": [TAG, OTHER], "host": ["h0", "h1"], "appliance": ["a0"]}
"""Half of the requests are about what exists; generated names never hit anything."""

schema = schemathesis.openapi.from_dict(document(tagmem.__version__))
# A precondition that fails, and a large body, are told of before anything else is looked at.
schema.config.checks.negative_data_rejection.expected_statuses += ["412", "413"]
schema.config.checks.positive_data_acceptance.expected_statuses += ["412", "413"]


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, str] | None) -> Any:
    if not path_parameters or context.operation.method.upper() == "DELETE":
        return path_parameters
    return {
        name: KNOWN[name][len(str(value)) // 2 % len(KNOWN[name])] if len(str(value)) % 2 else value
        for name, value in path_parameters.items()
    }


@schema.parametrize()
@hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_answers_are_as_described(case: Any, live: str) -> None:
    # A stream has no end to wait for; it has tests of its own.
    case.headers = {
        name: value
        for name, value in (case.headers or {}).items()
        if name.lower() not in {"accept", "last-event-id"}
    }
    if (case.headers or {}).get("Prefer"):
        case.headers["Prefer"] = "wait=0.01"
    # A schema cannot say that a size is aligned or a key new; the machine refuses with 422.
    beyond_schemas = [CHECKS.get_one("positive_data_acceptance")] if case.operation.body else []
    case.call_and_validate(base_url=live, timeout=10, excluded_checks=beyond_schemas)
