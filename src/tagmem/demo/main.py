"""The three commands: `up` leaves a system running, `down` ends it, `demo` shows the seven steps.

Each returns an exit code, and says what it does through the one console.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tagmem.base.errors import TagmemError
from tagmem.base.units import Bytes, format_size
from tagmem.client.session import Client, UnknownThing
from tagmem.demo import system
from tagmem.demo.chaos import Chaos, Choose, running, seeded
from tagmem.demo.configs import check_head_room
from tagmem.demo.console import Console
from tagmem.demo.dataset import RECORDS_MAX, records
from tagmem.demo.layout import APPLIANCE, DAEMONS, HOSTS, ORCHESTRATOR, Layout
from tagmem.demo.patience import TooLate, insist, until
from tagmem.demo.steps import Steps
from tagmem.demo.vmsteps import VmSteps

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
RELEASE_SECONDS = 30.0


def up(
    state_dir: str | Path, head_room: Bytes | None = None, *, console: Console | None = None
) -> int:
    """Start a system and leave it running; says what runs where. Twice is fine.

    `head_room`: what its appliance leaves in front of each tag's bytes, for VMs; None: nothing, or
    what its files say.
    """
    say = console or Console()
    layout = Layout.of(state_dir)
    try:
        if system.is_running(layout):
            if head_room is not None:
                check_head_room(layout, head_room)
            system.wait_ready(layout)
            say.heading("tagmem is running already")
        else:
            begun = time.monotonic()
            _start(layout, head_room=head_room)
            say.heading(f"tagmem is up in {time.monotonic() - begun:.2f} s")
    except TagmemError as error:
        say.failure(str(error))
        return EXIT_FAILED
    _tell_parts(say, layout)
    _tell_next(say, layout)
    return EXIT_OK


def down(state_dir: str | Path, purge: bool = False, *, console: Console | None = None) -> int:
    """Give back what is held, stop every process, take the media away; `purge`: the state too."""
    say = console or Console()
    layout = Layout.of(state_dir)
    try:
        was_running = system.is_running(layout)
        kept = _give_all_back(say, layout) if was_running else 0
        for stray in system.stop(layout):
            say.fact("killed", f"pid {stray.pid}: {stray.command}")
        if kept and not purge:
            say.fact("media kept", f"{layout.volatile}, because {kept} tags did not come back")
        else:
            system.remove_volatile(layout)
        if purge:
            shutil.rmtree(layout.state, ignore_errors=True)
    except TagmemError as error:
        say.failure(str(error))
        return EXIT_FAILED
    say.heading("tagmem is down" if was_running else "tagmem was not running")
    if not purge and layout.state.exists():
        say.fact("state kept", f"{layout.state}")
    return EXIT_FAILED if kept else EXIT_OK


def demo(
    state_dir: str | Path | None = None,
    chaos_seed: int | None = None,
    *,
    records_max: int = RECORDS_MAX,
    choose: Choose | None = None,
    console: Console | None = None,
    vm: bool = False,
) -> int:
    """The seven steps. Without `state_dir` in a folder of its own, which is removed at the end.

    `chaos_seed` kills daemons while it runs; `choose` says which ones when (step and moment to a
    daemon's name), and has the system recover between the steps. `vm`: memcached runs in a guest.
    """
    say = console or Console()
    folder = None if state_dir else tempfile.mkdtemp(prefix="tagmem-demo-")
    layout = Layout.of(state_dir or str(folder))
    if choose is not None:
        chaos = Chaos(layout, choose, lambda: system.wait_ready(layout, deaths_max=sys.maxsize))
    else:
        chaos = Chaos(layout) if chaos_seed is None else Chaos(layout, seeded(chaos_seed))
    code = EXIT_FAILED
    with _stoppable():
        try:
            where = "in a virtual machine" if vm else "on one machine"
            say.heading(f"tagmem demo: the seven steps with a real memcached, {where}")
            _demonstrate(say, layout, chaos, records_max, VmSteps if vm else Steps)
            code = EXIT_OK
        except TagmemError as error:
            say.failure(str(error))
            say.fact("logs", f"{layout.state / 'log'}")
        except KeyboardInterrupt:
            say.line()
            say.line("interrupted; cleaning up")
            code = EXIT_INTERRUPTED
    if code == EXIT_OK:
        say.table()
        if chaos.killed:
            say.fact("kill -9", f"{len(chaos.killed)} times; nothing was lost")
        say.line()
        say.heading("Every record was right, every byte came back and reads zero.")
    if folder is not None and code != EXIT_FAILED:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _demonstrate(
    say: Console, layout: Layout, chaos: Chaos, records_max: int, steps: type[Steps]
) -> None:
    """Start a system, run the steps, end the system; whatever happens, nothing is left running."""
    data = records(records_max)
    if system.is_running(layout):
        raise TooLate(f"a system runs in {layout.state} already: `tagmem down` ends it")
    begun = time.monotonic()
    supervisor = _start(layout, for_demo=True)
    try:
        system.wait_ready(layout)
        say.fact("started", f"{time.monotonic() - begun:.2f} s")
        _tell_parts(say, layout)
        with Client(system.url(layout), timeout=10.0) as client:
            steps(say, layout, client, data, chaos).run()
    finally:
        # A second Ctrl-C must not leave processes behind.
        with _deaf():
            system.stop(layout, supervisor)
            system.remove_volatile(layout)


def _start(
    layout: Layout, *, for_demo: bool = False, head_room: Bytes | None = None
) -> subprocess.Popen[bytes]:
    """Start everything and wait until it is ready. What fails to start is stopped again."""
    system.prepare(layout, tcp=not for_demo, head_room=head_room)
    for stray in system.strays(layout, workloads=False):
        # A supervisor that was killed left them, and a new one could not watch them. Workloads go
        # on: the new agents find them.
        system.end(stray)
    supervisor = system.start(layout)
    if not for_demo:
        try:
            system.wait_ready(layout)
        except (TagmemError, KeyboardInterrupt):
            system.stop(layout, supervisor)
            raise
    return supervisor


def _give_all_back(say: Console, layout: Layout) -> int:
    """Release every capacity, so that the state that stays speaks of nothing that is gone.

    Returns how many would not come back in time.
    """
    try:
        with Client(system.url(layout)) as client:
            held = [capacity.tag for capacity in client.capacities()]
            for tag in held:
                _release(client, tag)
            left = len(held)
            try:
                until(lambda: not list(client.capacities()) or None, "all back", RELEASE_SECONDS)
                left = 0
            except TooLate:
                left = len(list(client.capacities()))
    except (TagmemError, FileNotFoundError) as error:
        say.fact("not asked", f"the orchestrator cannot be asked to release: {error}")
        return 0
    if held:
        say.fact("given back", f"{len(held) - left} of {len(held)} capacities")
    return left


def _release(client: Client, tag: str) -> None:
    try:
        insist(lambda: client.release(tag, up_to="stop"), 10.0)
    except UnknownThing:
        pass


def _tell_parts(say: Console, layout: Layout) -> None:
    """What runs where."""
    pids = running(layout)
    with Client(system.url(layout)) as client:
        appliance = insist(lambda: client.appliance(APPLIANCE))
    regions = "; ".join(
        f"region {r.index}: {format_size(r.size_bytes)}{', sharable' if r.sharable else ''}"
        for r in appliance.regions
    )
    what = {
        APPLIANCE: f"appliance, {regions}",
        ORCHESTRATOR: f"orchestrator, API at {system.url(layout)}",
    } | {host: f"host, DAX devices in {layout.run_dir(host)}" for host in HOSTS}
    for name in DAEMONS:
        say.fact(name, f"pid {pids.get(name, 0):<7} {what[name]}")


def _tell_next(say: Console, layout: Layout) -> None:
    """What to type next."""
    say.fact("logs, state", str(layout.state))
    say.line()
    say.line("Now try:")
    for command in (
        f"export TAGMEM_STATE_DIR={layout.state}",
        "tagmem appliance show a0",
        "tagmem capacity create --size 64M --host w1",
        "tagmem capacity list",
        "tagmem down",
    ):
        say.line(f"   {command}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: with everything cleaned up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C and its kin wait."""
    kin = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in kin}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
