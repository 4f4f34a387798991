"""What every suite with real guests shares: the lab, one event loop per module, guests that end.

Booting is the dear part, so a module boots a guest once and looks at it in many tests. What guests
are made from is brought by the first module that needs it, and stays in the cache.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from tests.vm.world import FAILED

from tagmem.lab.boot import Guest, Lab
from tagmem.lab.qemus import NAMES
from tagmem.lab.spec import GuestSpec

T = TypeVar("T")

HERE = Path(__file__).parent
TEST_SECONDS = 900
"""A test's limit, its fixtures included: the first one downloads what guests are made from."""


class Run(Protocol):
    """Runs a coroutine in the module's event loop, where its guests live."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...


Boot = Callable[[GuestSpec], Guest]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        FAILED.append(report.nodeid)


@pytest.fixture(scope="session")
def lab() -> Lab:
    """Both QEMUs and the guest image."""

    def report(line: str) -> None:
        sys.stderr.write(f"lab: {line}\n")

    lab = Lab(report=report)
    for name in NAMES:
        lab.qemu(name)
    lab.image()
    return lab


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The module's event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def boot(lab: Lab, run: Run, request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Boots a guest and waits for its agent. All are ended after the module's last test.

    The logs of a module in which a test failed are kept, and named.
    """
    failed_before = request.session.testsfailed
    guests: list[Guest] = []

    async def started(guest: Guest) -> Guest:
        return await guest.__aenter__()

    def begin(spec: GuestSpec) -> Guest:
        guest = lab.guest(spec)
        guests.append(guest)
        return run(started(guest))

    yield begin
    for guest in reversed(guests):
        run(guest.stop())
        if request.session.testsfailed > failed_before:
            sys.stderr.write(f"guest {guest.spec.name}: {guest.where()}\n")
        else:
            guest.remove_logs()
