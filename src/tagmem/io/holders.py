"""Who has the bytes of a tag: the proof that a release stands on, on a host and inside a guest.

The kernel itself is asked first: a write lease is granted only on a file that nobody else has open,
and a mapping counts as open, in every process, container and kernel subsystem alike. It takes
microseconds and no look at any process, and it is given up at once. Where it is refused, or does
not exist (devices), one look through /proc serves all tags that wait: it names the holders, and it
is a proof only when every process could be read. The look begins after the names are gone.

A character device is known by its number, whatever node a process opened it through; its mappings
are told by /proc/PID/map_files.

Standard library only: the guest agent has nothing else.

Not seen: pages that were pinned (RDMA, vmsplice) by a process that has unmapped them since, and
without a lease descriptors that are on their way through a socket.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import stat
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

F_SETSIG = 10
"""Not in Python 3.11's fcntl module."""
ROUNDS_MAX = 8
"""Looks through /proc for processes that were born during the last look."""
_DELETED = " (deleted)"
_LINE = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) \S{3}(\S) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([0-9]+)[ ]*(.*)$",
    re.MULTILINE,
)

Identity = tuple[int, int]
"""(device, inode) of a file; (DEVICE, number) of a character device."""
DEVICE = -1


class Holding(NamedTuple):
    """A process that maps or has open a file."""

    pid: int
    name: str
    how: str


class Target(NamedTuple):
    """One tag to be proved unused."""

    tag: str
    paths: tuple[str, ...]
    """Where we ourselves can still open the bytes: names of a regular file, or of all of them."""
    identities: tuple[Identity, ...]
    ours: tuple[str, ...] = ()
    """Directories of this host."""
    descriptor: int = -1
    """The bytes, open, where we have no path to them."""
    shared: bool = False
    """Other hosts on this machine have the same file: only what was opened under `ours` counts."""


class Proof(NamedTuple):
    """Nobody and `complete`: proved."""

    holders: tuple[Holding, ...] = ()
    complete: bool = True
    reason: str = ""


class Prover:
    """Looks for holders. `excluded` are processes that stand for the device: the appliances.

    `threads` looks at each thread too, which may have descriptors of its own and may outlive the
    first: without a lease there is no other way to see those.
    """

    def __init__(self, proc: str = "/proc", *, threads: bool = False) -> None:
        self._proc = proc
        self._threads = threads
        self.excluded: set[int] = set()
        self.looks = 0
        """Looks through /proc so far."""

    def alone(self, target: Target) -> bool:
        """Whether the kernel itself says that nobody has the bytes: in microseconds, with no look.

        False is no answer yet: then `check`.
        """
        return not self._identities_of(target) or bool(_lease(target))

    @staticmethod
    def _identities_of(target: Target) -> frozenset[Identity]:
        found = frozenset(target.identities) | _identities(target.paths)
        if target.descriptor < 0:
            return found
        status = os.fstat(target.descriptor)
        return found | {(status.st_dev, status.st_ino)}

    def check(self, targets: Sequence[Target]) -> dict[str, Proof]:
        """Each tag's proof, or its holders."""
        proofs: dict[str, Proof] = {}
        left: list[tuple[Target, frozenset[Identity], bool]] = []
        for target in targets:
            identities = self._identities_of(target)
            if not identities:
                # No bytes were ever within reach of this host, or there is no file to them.
                proofs[target.tag] = Proof()
                continue
            leased = _lease(target)
            if leased:
                proofs[target.tag] = Proof()
            else:
                left.append((target, identities, leased is False))
        if left:
            proofs.update(self._look(left))
        return proofs

    def _look(self, left: list[tuple[Target, frozenset[Identity], bool]]) -> dict[str, Proof]:
        wanted = {identity for _, identities, _ in left for identity in identities}
        look = _Look(self._proc, wanted, threads=self._threads)
        look.run()
        self.looks += 1
        return {
            target.tag: self._judge(target, identities, look, refused=refused)
            for target, identities, refused in left
        }

    def _judge(
        self, target: Target, identities: Collection[Identity], look: _Look, *, refused: bool
    ) -> Proof:
        holders: list[Holding] = []
        of_device = False
        for pid, name, how, identity, path in look.found:
            if identity not in identities:
                continue
            if pid in self.excluded:
                of_device = True
            elif target.shared and not path.startswith(target.ours):
                of_device = True  # Another host's; it proves its own release.
            else:
                holders.append(Holding(pid, name, how))
        first: dict[int, Holding] = {}
        for holder in holders:
            first.setdefault(holder.pid, holder)
        unique = tuple(first[pid] for pid in sorted(first))
        if unique:
            return Proof(unique, look.complete, look.reason)
        if not look.complete:
            return Proof((), complete=False, reason=look.reason)
        if refused and not of_device and _lease(target) is False:
            reason = "the kernel says that it is open, and no process in /proc shows it"
            return Proof((), complete=False, reason=reason)
        return Proof()

    def kill(
        self,
        target: Target,
        number: int = signal.SIGKILL,
        only: Callable[[int], bool] = lambda _: True,
    ) -> tuple[Holding, ...]:
        """A signal to each process that holds the tag now (of those, `only`); who they were."""
        identities = self._identities_of(target)
        look = _Look(self._proc, identities, threads=self._threads)
        look.run()
        proof = self._judge(target, identities, look, refused=False)
        chosen = tuple(holder for holder in proof.holders if only(holder.pid))
        for holder in chosen:
            try:
                pidfd = os.pidfd_open(holder.pid)
            except ProcessLookupError:
                continue
            try:
                # The number may have passed to another process since; it is looked at once more.
                again = _Look(self._proc, identities, threads=self._threads)
                again.process(holder.pid)
                if again.found:
                    signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)
        return chosen


def identities_of(path: str) -> tuple[Identity, ...]:
    """What a holder of the file or character device at `path` has open. Raises OSError."""
    status = os.stat(path)
    found = [(status.st_dev, status.st_ino)]
    if stat.S_ISCHR(status.st_mode):
        found.append((DEVICE, status.st_rdev))
    return tuple(found)


def _identities(paths: Sequence[str]) -> frozenset[Identity]:
    found = set()
    for path in paths:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _lease(target: Target) -> bool | None:
    """Whether nobody else has the bytes open; None when the kernel does not say."""
    leased: dict[Identity, bool | None] = {}
    for path in target.paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            leased[status.st_dev, status.st_ino] = _lease_on(fd)
        finally:
            os.close(fd)
    if not leased:
        return None if target.descriptor < 0 else _lease_on(target.descriptor)
    if False in leased.values():
        return False
    # Bytes in several files are nobody's only if there was a lease on each.
    several = len(target.identities) > 1 and not set(target.identities) <= leased.keys()
    return None if several or None in leased.values() else True


def _lease_on(fd: int) -> bool | None:
    try:
        # An opener who comes now breaks the lease; the signal must be one that is ignored.
        fcntl.fcntl(fd, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


class _Look:
    """One look through /proc."""

    def __init__(self, proc: str, wanted: Collection[Identity], *, threads: bool) -> None:
        self._proc = proc
        self._threads = threads
        self._wanted = frozenset(wanted)
        self._inodes = {str(inode).encode() for device, inode in wanted if device != DEVICE}
        self._devices = any(device == DEVICE for device, _ in wanted)
        self._unread: set[int] = set()
        self.found: list[tuple[int, str, str, Identity, str]] = []
        self.complete = True
        self.reason = ""

    def run(self) -> None:
        """Every process but ourselves; again for those born meanwhile."""
        seen = {os.getpid()}
        for _ in range(ROUNDS_MAX):
            pids = {int(name) for name in os.listdir(self._proc) if name.isdecimal()} - seen
            if not pids:
                break
            for pid in pids:
                self.process(pid)
            seen |= pids
        else:
            self._incomplete("processes are started faster than they can be looked at")
        if self._unread:
            shown = ", ".join(map(str, sorted(self._unread)[:8]))
            self._incomplete(f"processes may not be read: {shown} ({len(self._unread)} in all)")

    def _incomplete(self, reason: str) -> None:
        self.complete, self.reason = False, reason

    def process(self, pid: int) -> None:
        """What one process has open and maps; one that has gone has nothing."""
        mapped = self._task(pid, f"{self._proc}/{pid}", mapped=False)
        if not self._threads:
            return
        try:
            threads = set(os.listdir(f"{self._proc}/{pid}/task")) - {str(pid)}
        except (FileNotFoundError, ProcessLookupError):
            return
        for thread in threads:
            mapped = self._task(pid, f"{self._proc}/{pid}/task/{thread}", mapped=mapped)

    def _task(self, pid: int, directory: str, *, mapped: bool) -> bool:
        """One thread; True once the mappings, which all threads share, have been read."""
        try:
            mapped = mapped or self._maps(pid, directory)
            self._descriptors(pid, directory)
        except (FileNotFoundError, ProcessLookupError):
            pass
        except PermissionError:
            self._unread.add(pid)
        return mapped

    def _maps(self, pid: int, directory: str) -> bool:
        """False when there are none: a kernel thread, or a thread that has ended."""
        with open(f"{directory}/maps", "rb") as file:
            data = file.read()
        for where, sharing, major, minor, inode, path in _LINE.findall(data):
            if inode in self._inodes:
                identity = (os.makedev(int(major, 16), int(minor, 16)), int(inode))
                if identity in self._wanted:
                    self._add(pid, "maps", identity, os.fsdecode(path))
                    continue
            if self._devices and sharing == b"s" and inode != b"0":
                self._mapped_device(pid, f"{self._proc}/{pid}/map_files/{where.decode()}")
        return bool(data)

    def _mapped_device(self, pid: int, link: str) -> None:
        """A shared mapping may be of the device through another node than the one that we know."""
        try:
            status = os.stat(link)
        except FileNotFoundError:
            return
        self._device(pid, "maps", status, link)

    def _device(self, pid: int, how: str, status: os.stat_result, link: str) -> bool:
        identity = (DEVICE, status.st_rdev)
        if not stat.S_ISCHR(status.st_mode) or identity not in self._wanted:
            return False
        self._add(pid, how, identity, os.readlink(link))
        return True

    def _descriptors(self, pid: int, directory: str) -> None:
        directory = f"{directory}/fd"
        for name in os.listdir(directory):
            link = f"{directory}/{name}"
            try:
                status = os.stat(link)
                identity = (status.st_dev, status.st_ino)
                if identity in self._wanted:
                    self._add(pid, "open", identity, os.readlink(link))
                elif self._devices:
                    self._device(pid, "open", status, link)
            except FileNotFoundError:
                continue

    def _add(self, pid: int, how: str, identity: Identity, path: str) -> None:
        try:
            with open(f"{self._proc}/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        except (FileNotFoundError, ProcessLookupError):
            name = "?"
        self.found.append((pid, name, how, identity, path.removesuffix(_DELETED)))
