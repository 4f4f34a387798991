"""Workloads: started once, watched, stopped whole, and found again by the next agent.

Each has a directory `<state>/workloads/<tag>.<id>/` with its output (`log`) and, written by a small
shell that outlives the agent (`supervise.sh`), its process number and how it ended. A workload ends
with its main process: what that leaves in its cgroup or process group is killed then.

In its own cgroup (v2) nothing escapes `kill`; without one a process that leaves the session does,
and is then found by the proof, as a holder, by name.
"""

from __future__ import annotations

import logging
import os
import re
import select
import shutil
import signal
import subprocess
from pathlib import Path

from tagmem.base.errors import NotFound
from tagmem.client import launch
from tagmem.wire.agentapi import Workload, WorkloadReport

log = logging.getLogger(__name__)

MARKER = "TAGMEM_WORKLOAD"
KEPT_MAX = 1024
"""Directories of workloads that have ended; the oldest go first, with their output."""
EMPTY_POLLS_MAX = 20
EMPTY_POLL_MS = 50
"""Killed processes leave their cgroup when the kernel has taken them down."""
_SCRIPT = Path(__file__).with_name("supervise.sh")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def find_cgroup(name: str, mounts: str = "/proc/self/mounts") -> Path | None:
    """A cgroup v2 directory of our own to make workloads' cgroups in; None where we may not."""
    for line in Path(mounts).read_text().splitlines():
        fields = line.split()
        if fields[2] != "cgroup2":
            continue
        base = Path(fields[1].replace("\\040", " ")) / name
        try:
            base.mkdir(exist_ok=True)
            probe = base / f"probe-{os.getpid()}"
            probe.mkdir()
            probe.rmdir()
        except OSError:
            continue
        if (base / "cgroup.procs").exists():
            return base
    return None


class Workloads:
    """The workloads of one host. Blocking; the service calls it from a worker thread."""

    def __init__(self, state: Path, run: Path, cgroup: Path | None = None) -> None:
        self._base = state / "workloads"
        self._base.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._cgroup = cgroup
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @staticmethod
    def key(tag: str, workload_id: str) -> str:
        """Names a workload's directory, its cgroup, and its marker in the environment."""
        return f"{tag}.{_UNSAFE.sub('_', workload_id)[:64]}"

    def close(self) -> None:
        """The agent ends in order: leave no empty cgroup behind. Workloads go on."""
        if self._cgroup is not None:
            try:
                self._cgroup.rmdir()
            except OSError as error:
                log.info("%s stays: %s", self._cgroup, error.strerror)

    # ---- starting

    def launch(
        self, tag: str, workload: Workload, dax_path: str, size_bytes: int
    ) -> WorkloadReport:
        """Start a workload, unless one of this id was ever started; what it is now."""
        key = self.key(tag, workload.id)
        directory = self._base / key
        if key in self._children or (directory / "claim").exists():
            return self.look(tag, workload.id)
        self._prune()
        directory.mkdir(exist_ok=True)
        (directory / "id").write_text(workload.id)
        log_path = directory / "log"
        known = launch.values(tag, dax_path, size_bytes)
        environment, reason = dict(os.environ), ""
        try:
            command = [launch.fill(argument, known) for argument in workload.command]
            environment |= {k: launch.fill(v, known) for k, v in workload.environment.items()}
        except NotFound as error:
            command, reason = [], str(error)
        environment |= launch.variables(tag, dax_path, size_bytes, str(self._run)) | {MARKER: key}
        if not command or shutil.which(command[0], path=environment.get("PATH")) is None:
            reason = reason or f"command: must be a program on this host, got {command[:1]!r}"
            (directory / "claim").mkdir(exist_ok=True)
            (directory / "reason").write_text(reason)
            return WorkloadReport(workload.id, "failed", reason=reason, log_path=str(log_path))
        procs = self._make_cgroup(key)
        with log_path.open("ab") as log:
            child = subprocess.Popen(
                ["/bin/sh", str(_SCRIPT), str(directory), procs, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._children[key] = child
        return WorkloadReport(workload.id, "running", child.pid, log_path=str(log_path))

    def _make_cgroup(self, key: str) -> str:
        if self._cgroup is None:
            return ""
        group = self._cgroup / key
        try:
            group.mkdir(exist_ok=True)
        except OSError:
            return ""
        return str(group / "cgroup.procs")

    def _prune(self) -> None:
        entries = [entry for entry in os.scandir(self._base) if entry.is_dir()]
        if len(entries) <= KEPT_MAX:
            return
        ended = [e for e in entries if (Path(e.path) / "status").exists()]
        ended.sort(key=lambda entry: entry.stat().st_mtime_ns)
        for entry in ended[: len(entries) - KEPT_MAX]:
            shutil.rmtree(entry.path)

    # ---- watching

    def adopt(self) -> dict[str, WorkloadReport]:
        """The newest workload of each tag that an earlier agent started."""
        found: dict[str, tuple[int, WorkloadReport]] = {}
        for entry in os.scandir(self._base):
            directory = Path(entry.path)
            if not (directory / "claim").exists() or not (directory / "id").exists():
                continue
            tag = entry.name[:36]
            report = self.look(tag, (directory / "id").read_text())
            started = (directory / "claim").stat().st_mtime_ns
            if tag not in found or found[tag][0] < started:
                found[tag] = (started, report)
        return {tag: report for tag, (_, report) in found.items()}

    def look(self, tag: str, workload_id: str) -> WorkloadReport:
        """What became of a workload, from its directory and its process."""
        key = self.key(tag, workload_id)
        directory = self._base / key
        log_path = str(directory / "log")
        child = self._children.get(key)
        pid = _number(directory / "pid") or (child.pid if child is not None else 0)
        if pid and self._alive(key, pid):
            return WorkloadReport(workload_id, "running", pid, log_path=log_path)
        self._reap(key)
        code = _number(directory / "status")
        if code is not None:
            return WorkloadReport(workload_id, "exited", pid, code, log_path=log_path)
        reason = _text(directory / "reason")
        if not reason and (directory / "killed").exists():
            return WorkloadReport(workload_id, "exited", pid, 137, "killed", log_path)
        reason = reason or "it is gone and left no exit status"
        return WorkloadReport(workload_id, "failed", pid, reason=reason, log_path=log_path)

    def _alive(self, key: str, pid: int) -> bool:
        """Whether `pid` is this workload's shell: the number alone could be somebody else's now."""
        child = self._children.get(key)
        if child is not None and child.pid == pid:
            return child.poll() is None
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False
        return f"{MARKER}={key}".encode() in environment.split(b"\0")

    def watch(self, tag: str, workload_id: str) -> int | None:
        """A pidfd that becomes readable when the workload has ended; None: it has."""
        report = self.look(tag, workload_id)
        if report.state != "running":
            return None
        try:
            pidfd = os.pidfd_open(report.pid)
        except ProcessLookupError:
            return None
        if self.look(tag, workload_id).state != "running":
            os.close(pidfd)
            return None
        return pidfd

    def _reap(self, key: str) -> None:
        """The main process has ended: nothing of the workload outlives it."""
        child = self._children.pop(key, None)
        if child is not None:
            child.wait()
        pid = _number(self._base / key / "pid")
        if self._cgroup is not None and (self._cgroup / key).is_dir():
            self._kill_cgroup(key)
            _remove_cgroup(self._cgroup / key)
        elif pid and child is not None:
            # The group's number stays ours as long as it has members, and we have just reaped.
            _signal_group(pid, signal.SIGKILL)

    # ---- stopping

    def stop(self, tag: str, workload_id: str, how: str) -> WorkloadReport:
        """SIGTERM to the group, or SIGKILL to all of it; what the workload is then."""
        key = self.key(tag, workload_id)
        directory = self._base / key
        directory.mkdir(exist_ok=True)
        try:
            (directory / "claim").mkdir()
        except FileExistsError:
            pass  # It runs, or has run.
        else:
            (directory / "id").write_text(workload_id)
            (directory / "reason").write_text("it was stopped before it was started")
        report = self.look(tag, workload_id)
        if report.state != "running":
            return report
        if how == "term":
            _signal_group(report.pid, signal.SIGTERM)
            return report
        (directory / "killed").touch()
        if not self._kill_cgroup(key):
            _signal_group(report.pid, signal.SIGKILL)
        return report

    def _kill_cgroup(self, key: str) -> bool:
        if self._cgroup is None:
            return False
        group = self._cgroup / key
        try:
            if not (group / "cgroup.procs").read_text().strip():
                return False
            (group / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            return self._kill_each(group)
        except OSError:
            return False
        return True

    @staticmethod
    def _kill_each(group: Path) -> bool:
        """Kernels before 5.14 have no cgroup.kill."""
        killed = False
        for _ in range(16):
            pids = _text(group / "cgroup.procs").split()
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
                except ProcessLookupError:
                    continue
            if not pids:
                break
        return killed


def _remove_cgroup(group: Path) -> None:
    """Remove a cgroup whose processes have been killed; one that stays busy is left for later."""
    with (group / "cgroup.events").open() as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        for _ in range(EMPTY_POLLS_MAX):
            events.seek(0)
            if "populated 0" in events.read():
                break
            poll.poll(EMPTY_POLL_MS)
    try:
        group.rmdir()
    except OSError as error:
        log.warning("%s could not be removed: %s", group, error.strerror)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
