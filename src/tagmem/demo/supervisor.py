"""Keeps the demo's daemons running: starts them, restarts one that dies, stops all in order.

A process of its own, so that `tagmem up` can return; without threads or an event loop, because
everything that it waits for is a signal or a time. Where systemd is at hand, units do this job.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tagmem.demo.layout import APPLIANCE, DAEMONS, HOSTS, ORCHESTRATOR, Layout

BACKOFF_SECONDS_MIN = 0.05
BACKOFF_SECONDS_MAX = 2.0
STABLE_SECONDS = 1.0
"""After running for so long, a daemon's next death counts as its first."""
STOP_SECONDS = 10.0

_VERBS = {APPLIANCE: "appliance", ORCHESTRATOR: "orchestrator"} | dict.fromkeys(HOSTS, "host")
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True)
class Daemon:
    """One supervised process; `pid` is 0 while it is down."""

    name: str
    argv: list[str]
    pid: int = 0
    started_at: float = 0.0
    restart_at: float = 0.0
    restarts: int = 0
    early_deaths: int = 0
    last_exit: str = ""


class Supervisor:
    """The daemons of one layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._daemons = {name: Daemon(name, command_line(layout, name)) for name in DAEMONS}

    def run(self) -> None:
        """Until SIGTERM: start what is down and due, reap what ended. Then stop everything."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        # Workloads outlive a killed agent on purpose; their remains then come to us, not to init.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        stopping = False
        while not stopping:
            self._start_due()
            due = [d.restart_at for d in self._daemons.values() if not d.pid]
            pause = max(min(due) - time.monotonic(), 0.0) if due else 3600.0
            received = signal.sigtimedwait(_SIGNALS, pause)
            if received is not None and received.si_signo != signal.SIGCHLD:
                say(f"signal {received.si_signo}: stopping")
                stopping = True
            self._reap()
        self._stop_all()

    def _start_due(self) -> None:
        changed = False
        for daemon in self._daemons.values():
            if not daemon.pid and daemon.restart_at <= time.monotonic():
                daemon.pid = _spawn(daemon.argv, self._layout.log(daemon.name))
                daemon.started_at = time.monotonic()
                say(f"{daemon.name}: started, pid {daemon.pid}")
                changed = True
        if changed:
            self._write_status()

    def _reap(self) -> None:
        """Take in every child that ended; plan the restart of those that are daemons."""
        changed = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for daemon in self._daemons.values():
                if daemon.pid == pid:
                    self._died(daemon, os.waitstatus_to_exitcode(status))
                    changed = True
        if changed:
            self._write_status()

    def _died(self, daemon: Daemon, code: int) -> None:
        ran = time.monotonic() - daemon.started_at
        daemon.early_deaths = 1 if ran >= STABLE_SECONDS else daemon.early_deaths + 1
        pause = min(BACKOFF_SECONDS_MIN * 2 ** (daemon.early_deaths - 1), BACKOFF_SECONDS_MAX)
        daemon.pid = 0
        daemon.restarts += 1
        daemon.restart_at = time.monotonic() + pause
        daemon.last_exit = f"signal {-code}" if code < 0 else f"exit code {code}"
        say(f"{daemon.name}: ended ({daemon.last_exit}) after {ran:.1f} s, again in {pause:.2f} s")

    def _stop_all(self) -> None:
        """In the opposite order; whoever does not end in time is killed, and the log says so."""
        for name in reversed(DAEMONS):
            daemon = self._daemons[name]
            if not daemon.pid:
                continue
            os.kill(daemon.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while daemon.pid:
                left = deadline - time.monotonic()
                if left <= 0:
                    say(f"{name}: still there after {STOP_SECONDS:g} s, killing it")
                    os.kill(daemon.pid, signal.SIGKILL)
                    deadline = time.monotonic() + STOP_SECONDS
                    left = STOP_SECONDS
                signal.sigtimedwait(_SIGNALS, left)
                self._reap()
            say(f"{name}: stopped")

    def _write_status(self) -> None:
        """Replace the status file as a whole, so that a reader sees one moment."""
        document = {
            "supervisor": os.getpid(),
            "daemons": {
                d.name: {
                    "pid": d.pid,
                    "restarts": d.restarts,
                    "early_deaths": d.early_deaths,
                    "last_exit": d.last_exit,
                }
                for d in self._daemons.values()
            },
        }
        fresh = self._layout.status.with_suffix(".new")
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self._layout.status)


def command_line(layout: Layout, daemon: str) -> list[str]:
    """How one daemon is started: as anybody would by hand."""
    config = str(layout.config(daemon))
    return [sys.executable, "-m", "tagmem", _VERBS[daemon], "--config", config]


def _spawn(argv: list[str], log: Path) -> int:
    """Start a process in a group of its own, with no signal blocked and its output in a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.posix_spawn(
        argv[0],
        argv,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setpgroup=0,
        setsigmask=[],
        setsigdef=_SIGNALS,
    )


def say(text: str) -> None:
    """One line into the supervisor's log, which is its standard output."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    os.write(1, f"{stamp} {text}\n".encode())


def main(argv: list[str]) -> int:
    """`python -m tagmem.demo.supervisor STATE_DIR`; ends at once when another one has the lock."""
    layout = Layout.of(argv[1])
    lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another supervisor has this state directory")
        return 1
    os.chdir(layout.state)
    Supervisor(layout).run()
    layout.status.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
