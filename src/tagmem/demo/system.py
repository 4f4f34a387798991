"""The demo's system as a whole: its configuration, its start, whether it is ready, its end.

Between the commands (`up`, `down`, `demo`), which talk to people, and the supervisor, which only
minds processes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tagmem.base.errors import Conflict, OutcomeUnknown, TagmemError
from tagmem.base.units import Bytes
from tagmem.client.session import Client
from tagmem.demo.configs import api_url, check_head_room, config_texts
from tagmem.demo.layout import APPLIANCE, DAEMONS, HOSTS, SHARED_MEMORY, Layout
from tagmem.wire import rest

READY_SECONDS = 30.0
STOP_SECONDS = 60.0
EARLY_DEATHS_MAX = 4
"""A daemon that died so often while the system started will not come up."""
_LOG_LINES = 12
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Stray:
    """A process that belongs to a system although its supervisor has ended."""

    pid: int
    command: str


def prepare(layout: Layout, *, tcp: bool = True, head_room: Bytes | None = None) -> None:
    """Make the directories, and write the configuration files that are not there yet.

    `tcp`: the API is to listen on a port as well. Raises Conflict when a directory cannot be made
    or written, and for files that have another `head_room`.
    """
    folders = [layout.state, layout.state / "log", layout.media]
    folders += [layout.exposed(host) for host in HOSTS] + [layout.run_dir(host) for host in HOSTS]
    folders += [layout.data(daemon) for daemon in DAEMONS]
    try:
        if not SHARED_MEMORY.is_dir():
            raise Conflict(f"{SHARED_MEMORY} is not there: media need a tmpfs")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        layout.volatile.chmod(0o700)
        texts = config_texts(layout, tcp=tcp, head_room=head_room or 0)
        for path, text in texts.items():
            if not path.exists():
                path.write_text(text, encoding="utf-8")
        if head_room is not None:
            check_head_room(layout, head_room)
        layout.url.write_text(api_url(layout) + "\n", encoding="utf-8")
    except OSError as error:
        raise Conflict(
            f"state directory {layout.state}: {error.strerror}: {error.filename}"
        ) from error


def is_running(layout: Layout) -> bool:
    """Whether a supervisor has the layout now; told by its lock, which cannot outlive it."""
    try:
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def start(layout: Layout) -> subprocess.Popen[bytes]:
    """Start the supervisor, detached. It may be asked for its exit code; it need not be."""
    with layout.log("supervisor").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tagmem.demo.supervisor", str(layout.state)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=layout.state,
        )


def status(layout: Layout) -> dict[str, dict[str, object]]:
    """What the supervisor last wrote of each daemon: pid, restarts, early_deaths, last_exit."""
    try:
        document = json.loads(layout.status.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    daemons: dict[str, dict[str, object]] = document["daemons"]
    return daemons


def wait_ready(
    layout: Layout, seconds: float = READY_SECONDS, *, deaths_max: int = EARLY_DEATHS_MAX
) -> rest.HealthDocument:
    """Until the API answers, the appliance has been read and both hosts are connected.

    Raises OutcomeUnknown with the last words of whichever daemon is not well: has died
    `deaths_max` times just after it was started.
    """
    deadline = time.monotonic() + seconds
    why = "the orchestrator does not answer"
    while time.monotonic() < deadline:
        try:
            with Client(url(layout), timeout=5.0) as client:
                health = client.health()
            waiting = _not_ready(health)
            if not waiting:
                return health
            why = waiting
        except TagmemError as error:
            why = str(error)
        failing = [n for n, d in status(layout).items() if _number(d, "early_deaths") >= deaths_max]
        if failing:
            name = failing[0]
            raise OutcomeUnknown(
                f"{name} does not stay up; its log ends:\n{last_words(layout, name)}"
            )
        time.sleep(_POLL_SECONDS)
    raise OutcomeUnknown(f"not ready in {seconds:g} s: {why}; see {layout.state / 'log'}")


def _not_ready(health: rest.HealthDocument) -> str:
    """What is still missing; empty when nothing is."""
    state = health.appliances.get(APPLIANCE, "not registered")
    if state != "ready":
        return f"appliance {APPLIANCE} is {state}"
    if health.hosts_connected < len(HOSTS):
        return f"{health.hosts_connected} of {len(HOSTS)} hosts are connected"
    return ""


def _number(facts: dict[str, object], name: str) -> int:
    value = facts.get(name, 0)
    return value if isinstance(value, int) else 0


def url(layout: Layout) -> str:
    """Where the API is, as `up` wrote it."""
    return layout.url.read_text(encoding="utf-8").strip()


def last_words(layout: Layout, daemon: str) -> str:
    """The end of a daemon's log."""
    try:
        lines = layout.log(daemon).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(lines[-_LOG_LINES:]) or "(empty)"


def stop(layout: Layout, supervisor: subprocess.Popen[bytes] | None = None) -> list[Stray]:
    """Have the supervisor stop everything; then end what is left. Returns what had to be killed."""
    deadline = time.monotonic() + STOP_SECONDS
    pid = _supervisor_pid(layout)
    if is_running(layout) and pid:
        os.kill(pid, signal.SIGTERM)
    while is_running(layout):
        if time.monotonic() > deadline:
            raise OutcomeUnknown(f"the supervisor (pid {pid}) does not end")
        time.sleep(_POLL_SECONDS)
    if supervisor is not None:
        supervisor.wait(STOP_SECONDS)
    left = strays(layout)
    for stray in left:
        end(stray)
    while strays(layout):
        if time.monotonic() > deadline:
            raise OutcomeUnknown(f"still running: {strays(layout)}")
        time.sleep(_POLL_SECONDS)
    layout.status.unlink(missing_ok=True)
    layout.url.unlink(missing_ok=True)
    return left


def remove_volatile(layout: Layout) -> None:
    """Take media, sockets and run directories away."""
    shutil.rmtree(layout.volatile, ignore_errors=True)


def strays(layout: Layout, *, workloads: bool = True) -> list[Stray]:
    """Processes of this system: daemons by their configuration file, workloads by environment,
    VMs, and the brokers of their windows, by their sockets. People's shells have the run directory
    in their environment too.
    """
    marks = {str(layout.config(daemon)).encode() for daemon in DAEMONS}
    runs = {f"TAGMEM_RUN_DIR={layout.run_dir(host)}".encode() for host in HOSTS}
    sockets = tuple(f"{layout.run_dir(host)}/vm/".encode() for host in HOSTS)
    servants = (b"qemu-system", b"broker")
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended, or is somebody else's
        workload = any(item.startswith(b"TAGMEM_WORKLOAD=") for item in environment)
        machine = any(name in item for name in servants for item in argv) and any(
            socket in item for socket in sockets for item in argv
        )
        ours = machine or (workload and not runs.isdisjoint(environment))
        if marks.intersection(argv) or (workloads and ours):
            command = b" ".join(argv).decode(errors="replace").strip()
            found.append(Stray(int(entry), command))
    return found


def _supervisor_pid(layout: Layout) -> int:
    try:
        return int(json.loads(layout.status.read_text(encoding="utf-8"))["supervisor"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def end(stray: Stray) -> None:
    """`kill -9`, since nobody is left who would stop it in order."""
    try:
        os.kill(stray.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
