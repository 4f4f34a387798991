"""The processes of a program under check: started, told apart from others, known to be at rest.

A seed decides the order only if nobody may come first by being quick. So before somebody gets a
turn, every thread of the program must have come to an access, or wait for something else.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from tagmem.base.errors import NotFound, Unsupported

_AT_REST = frozenset("SZXTt")
"""States of /proc/PID/stat in which a thread does not run by itself."""


class Processes:
    """Sessions of processes: each command and whatever it starts."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._known: set[int] = set()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], stdout: int | None
    ) -> None:
        """Start one in a session of its own. Raises NotFound, Unsupported (it cannot be run)."""
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=stdout, start_new_session=True
            )
        except FileNotFoundError:
            raise NotFound(f"no such command: {command[0]}") from None
        except OSError as error:
            raise Unsupported(f"{command[0]} cannot be run: {error.strerror}") from None
        self._started.append(process)
        self._known.add(process.pid)

    def met(self, pid: int) -> None:
        """One has said that it is there."""
        self._known.add(pid)

    def look(self) -> None:
        """Find those that have not: a look through all of /proc."""
        sessions = {process.pid for process in self._started}
        for name in os.listdir("/proc"):
            fields = _fields(f"/proc/{name}/stat") if name.isdecimal() else []
            if fields and int(fields[3]) in sessions and fields[0] != "Z":
                self._known.add(int(name))

    def at_rest(self, *, but: frozenset[int] = frozenset()) -> bool:
        """Whether no thread of any of them runs; threads of `but` are known not to."""
        for pid in tuple(self._known):
            try:
                threads = os.listdir(f"/proc/{pid}/task")
            except FileNotFoundError:
                self._known.discard(pid)
                continue
            for thread in threads:
                if int(thread) not in but:
                    fields = _fields(f"/proc/{pid}/task/{thread}/stat")
                    if fields and fields[0] not in _AT_REST:
                        return False
        return True

    def codes(self) -> list[int | None]:
        """Exit codes, in the order of starting; None of who runs."""
        return [process.poll() for process in self._started]

    @property
    def running(self) -> bool:
        """Whether a command has not ended."""
        return None in self.codes()

    def end(self, seconds: float = 5.0) -> None:
        """Kill what is left of the sessions."""
        for process in self._started:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def _fields(path: str) -> list[str]:
    """State, parent, group, session and so on; nothing of who has gone."""
    try:
        with open(path, "rb") as file:
            return file.read().rpartition(b") ")[2].decode("ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return []
