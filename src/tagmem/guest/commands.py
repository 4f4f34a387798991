"""Commands that the host has the guest run: started in a session of their own, their output sent as
it comes, ended whole.

A command ends with its first process: what that leaves in its session's process group is killed
then, as a host's workloads are. Output waits while the host is slow, and is dropped (and counted)
beyond its bound or when no host listens, so that an application never stands still for a reader
that has gone.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterable
from typing import IO

from tagmem.base.errors import NotFound
from tagmem.client.launch import fill
from tagmem.wire.guest import OUTPUT_BYTES_MAX, Exec, Exited, Failed, Message, Output, Started

COMMANDS_MAX = 64
PIPE_READS_MAX = 64
"""More than a full pipe, in parts of a message's size."""


class Command:
    """One running command."""

    def __init__(self, request: Exec, process: subprocess.Popen[bytes]) -> None:
        self.request = request
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self.streams: dict[int, IO[bytes]] = {}
        self.sent_bytes = 0
        self.dropped_bytes = 0
        self.ended = False

    def signal(self, number: int) -> None:
        """To every process of its group. The number stays ours until the process is reaped."""
        if not self.ended:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                return


class Commands:
    """All running commands, on the agent's selector."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        send: Callable[[Message], None],
        listening: Callable[[], bool],
    ) -> None:
        self._selector = selector
        self._send = send
        self._listening = listening
        self._running: dict[int, Command] = {}
        self._reading = True
        self.changed: Callable[[], None] = lambda: None
        """Told whenever a command has ended."""

    def start(self, request: Exec, values: dict[str, str], environment: dict[str, str]) -> None:
        """Start it, and answer."""
        if request.id in self._running or len(self._running) >= COMMANDS_MAX:
            reason = f"{len(self._running)} commands run; at most {COMMANDS_MAX}, each with its id"
            self._send(Failed(request.id, "busy", reason))
            return
        argv: list[str] = list(request.argv)
        try:
            argv = [fill(argument, values) for argument in argv]
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if request.input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **request.env, **environment},
                start_new_session=True,
                bufsize=0,
            )
        except (OSError, ValueError, NotFound) as error:
            code = "absent" if isinstance(error, FileNotFoundError | NotFound) else "failed"
            self._send(Failed(request.id, code, f"{argv[0][:200]}: {error}"[:2000]))
            return
        command = self._running[request.id] = Command(request, process)
        if process.stdin is not None:
            _give(process.stdin, request.input)
        self._send(Started(request.id, process.pid))
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            command.streams[number] = stream
            if self._reading:
                self._register(command, number)
        self._selector.register(
            command.pidfd, selectors.EVENT_READ, lambda _events: self._ended(command)
        )

    def all(self) -> list[Command]:
        """Every running command."""
        return list(self._running.values())

    def get(self, exec_id: int) -> Command | None:
        """The command that the request of this id started, while it runs."""
        return self._running.get(exec_id)

    def close(self) -> None:
        """The agent ends, and with it the readers of their output: so do they."""
        for command in self._running.values():
            command.signal(signal.SIGKILL)
            command.process.wait()
            if not command.ended:
                self._selector.unregister(command.pidfd)
                os.close(command.pidfd)
            for number in list(command.streams):
                self._close(command, number)
        self._running.clear()

    def throttle(self, *, full: bool) -> None:
        """Stop reading output while the host is slow; go on when it is not."""
        if full is not self._reading:
            return
        self._reading = not full
        for command in list(self._running.values()):
            for number in list(command.streams):
                if full:
                    self._selector.unregister(command.streams[number])
                else:
                    self._register(command, number)
        if not full:
            self._finish(list(self._running.values()))

    def _register(self, command: Command, number: int) -> None:
        self._selector.register(
            command.streams[number],
            selectors.EVENT_READ,
            lambda _events: self._pump(command, number),
        )

    def _pump(self, command: Command, number: int) -> bool:
        """Send what one stream has, once; False when it has no more for now."""
        stream = command.streams.get(number)
        if stream is None:
            return False
        try:
            data = os.read(stream.fileno(), OUTPUT_BYTES_MAX)
        except BlockingIOError:
            return False
        if not data:
            self._close(command, number)
            return False
        room = command.request.output_max - command.sent_bytes if self._listening() else 0
        if room > 0:
            self._send(Output(command.request.id, number, data[:room]))
            command.sent_bytes += min(room, len(data))
        command.dropped_bytes += max(len(data) - max(room, 0), 0)
        return True

    def _close(self, command: Command, number: int) -> None:
        stream = command.streams.pop(number)
        if self._reading:
            self._selector.unregister(stream)
        stream.close()

    def _ended(self, command: Command) -> None:
        command.ended = True
        self._selector.unregister(command.pidfd)
        os.close(command.pidfd)
        # Not reaped yet, so the group's number is still ours: nothing of it outlives this.
        try:
            os.killpg(command.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        command.process.wait()
        self._finish([command])

    def _finish(self, commands: Iterable[Command]) -> None:
        """Whose process has ended sends the rest of its output, as far as the host takes it."""
        for command in commands:
            if not command.ended or not self._reading:
                continue
            for number in list(command.streams):
                # Somebody who left the group may go on writing for ever.
                for _ in range(PIPE_READS_MAX):
                    if not self._pump(command, number):
                        break
            for number in list(command.streams):
                self._close(command, number)
            del self._running[command.request.id]
            code = command.process.returncode
            code = 128 - code if code < 0 else code
            self._send(Exited(command.request.id, code & 0xFF, command.dropped_bytes))
            self.changed()


def _give(stream: IO[bytes], data: bytes) -> None:
    """All of it at once: it is less than a pipe takes."""
    try:
        stream.write(data)
        stream.close()
    except OSError:
        return
