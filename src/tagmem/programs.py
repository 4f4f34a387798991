"""Composition roots: the only place where real clocks, sockets and stores meet.

Each section loads its daemon inside its function, so that starting one costs nothing for the
others.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tagmem.orchestrator.config import OrchestratorConfig
    from tagmem.ports import Store

# ---- what every daemon has


def _prepare() -> None:
    """Logs to stderr, and as many descriptors as this process may have."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(main: Coroutine[Any, Any, None]) -> None:
    import uvloop

    # What was loaded until here stays: the collector need not look at it again.
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


# ---- orchestrator


def orchestrator(config: Path | None, overrides: Mapping[str, Any]) -> int:
    """Be the orchestrator until SIGTERM; the exit code.

    Raises Conflict when its state directory or an address is in use, InvalidInput for a wrong
    configuration, StorageFailed when its database cannot be used.
    """
    _prepare()
    from tagmem.domain.effects import DurableEffect
    from tagmem.domain.records import KINDS
    from tagmem.io.lockfile import StateDirectory
    from tagmem.orchestrator.config import load
    from tagmem.orchestrator.server import Listening
    from tagmem.store.sqlite import SqliteStore

    settings = load(config, overrides)
    with (
        StateDirectory(settings.state_dir, field="state_dir") as directory,
        closing(Listening(settings.endpoints())) as listening,
        closing(SqliteStore(directory.path / "orchestrator.db", KINDS, DurableEffect)) as store,
    ):
        _run(_orchestrate(settings, store, listening.sockets))
    return 0


async def _orchestrate(
    settings: OrchestratorConfig, store: Store, sockets: Sequence[socket.socket]
) -> None:
    from tagmem import __version__
    from tagmem.domain.machine import OrchestratorMachine
    from tagmem.io import stream
    from tagmem.io.clock import SystemClock
    from tagmem.orchestrator.fabric import Links
    from tagmem.orchestrator.service import Orchestrator

    async def dial(address: str) -> stream.Connection:
        return await stream.connect(address.removeprefix("unix:"))

    clock = SystemClock()
    service = Orchestrator(
        settings,
        OrchestratorMachine(),
        store,
        clock,
        lambda engine, _view: Links(engine, clock, dial),
        __version__,
    )
    await service.run(sockets)
