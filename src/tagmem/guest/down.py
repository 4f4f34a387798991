"""`tagmem guest down`: have the agent of this guest give every tag back, and wait until it has.

For whatever ends a kernel without asking services first: `kexec -e` above all. The agent holds a
lock in its run directory for as long as it lives, so its end is seen whoever started it, and a
number that is another process's by now is never signalled.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import suppress

from tagmem.base.errors import Conflict, OutcomeUnknown

DOWN_SECONDS = 45.0
"""An agent asks holders for 5 s, stops them for 3 s, gives the host 10 s, and ejects."""
_LOCK = "agent.lock"
_POLL_SECONDS = 0.05


def take_lock(run: str) -> int:
    """Be the agent of this run directory; the descriptor that says so. Raises Conflict, OSError."""
    os.makedirs(run, mode=0o755, exist_ok=True)
    descriptor = os.open(f"{run}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.read(descriptor, 20).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise Conflict(f"process {number} is the agent of {run}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def down(run: str, seconds: float = DOWN_SECONDS) -> None:
    """End the agent of this run directory in order.

    Raises Conflict that names the tags that are still here afterwards (somebody holds them, or
    there is no agent to give them back), OutcomeUnknown when the agent does not end in time.
    """
    end = time.monotonic() + seconds
    with suppress(FileNotFoundError):
        descriptor = os.open(f"{run}/{_LOCK}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _end_holder(descriptor, end)
        finally:
            os.close(descriptor)
    left: list[str] = []
    with suppress(FileNotFoundError):
        left = sorted(name for name in os.listdir(f"{run}/by-tag") if not name.startswith("."))
    if left:
        raise Conflict(f"not given back: {', '.join(left)}")


def _end_holder(descriptor: int, end: float) -> None:
    asked = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return
        if time.monotonic() >= end:
            raise OutcomeUnknown("the guest's agent has not ended")
        if not asked:
            asked = _ask(descriptor)
        time.sleep(_POLL_SECONDS)


def _ask(descriptor: int) -> bool:
    """Whether somebody was asked; the lock is taken a moment before its file is written."""
    text = os.pread(descriptor, 20, 0)
    if not text.strip().isdigit():
        return False
    with suppress(ProcessLookupError):
        os.kill(int(text), signal.SIGTERM)
    return True
