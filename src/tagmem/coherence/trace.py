"""What the tracer (tracer.c) says of a traced program: events as bytes, and where in the program
they came from.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tagmem.base.errors import Unsupported

LIBRARY = Path(__file__).with_name("libtracer.so")
GO, GO_TO_FENCE = b"g", b"f"
EVENT_BYTES_MAX = 4096
SITE_FRAMES_MAX = 6
_HEAD = struct.Struct("<IIQQQQQIIII16s")
_FRAME = re.compile(r'^\s+File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$', re.MULTILINE)
_MAP = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)$")


class Kind(IntEnum):
    """Of an event; numbers of tracer.c."""

    ACCESS = 1
    DONE = 2
    FENCE = 3
    PAUSE = 4
    UNFENCED = 5
    HELLO = 6


@dataclass(frozen=True)
class Frame:
    """One line of a program: a Python function's, or an address in a file of machine code."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.name})" if self.line else f"{self.file} {self.name}"


Site = tuple[Frame, ...]
"""Innermost first."""


@dataclass(frozen=True)
class Event:
    """One message of a thread. `source` and `target` are where RSI and RDI point, in the tag or far
    beyond its end.
    """

    kind: Kind
    host: int
    offset: int
    pc: int
    caller: int
    source: int
    target: int
    write: bool
    pid: int
    tid: int
    code: bytes
    stack: str


def decode_event(data: bytes) -> Event:
    """One message. Raises ValueError for anything else: the program may have scribbled on it."""
    if len(data) < _HEAD.size:
        raise ValueError(f"an event of {len(data)} bytes")
    kind, host, offset, pc, caller, source, target, write, pid, tid, length, code = (
        _HEAD.unpack_from(data)
    )
    stack = data[_HEAD.size : _HEAD.size + length].decode("utf-8", "replace")
    return Event(
        Kind(kind), host, offset, pc, caller, source, target, bool(write), pid, tid, code, stack
    )


def library() -> Path:
    """The tracer. Raises Unsupported where it was not built, or has no means to trace."""
    import platform

    machine = platform.machine()
    if machine != "x86_64":
        raise Unsupported(
            f"programs are traced by page protection and single steps on x86-64, not on {machine}; "
            "code that is given a Memory runs on tagmem.coherence.hosts.SimulatedHost anywhere"
        )
    if not LIBRARY.exists():
        raise Unsupported(
            f"the tracer was not built with this installation ({LIBRARY.name}): a C compiler does"
        )
    return LIBRARY


def python_frames(stack: str) -> Site:
    """What faulthandler wrote."""
    return tuple(
        Frame(found["file"], int(found["line"]), found["name"])
        for found in _FRAME.finditer(stack[: stack.rfind("\n") + 1])
    )[:SITE_FRAMES_MAX]


class Code:
    """Addresses of machine code, as file and offset; maps are read while the process is there."""

    def __init__(self) -> None:
        self._maps: dict[int, list[tuple[int, int, int, str]]] = {}

    def frames(self, event: Event) -> Site:
        """Where an instruction is; and in a library also who called it, as far as that is known."""
        here = self._place(event.pid, event.pc)
        if ".so" not in here.file:
            return (here,)
        caller = self._place(event.pid, event.caller)
        return (here, caller) if caller.file != "?" else (here,)

    def _place(self, pid: int, address: int) -> Frame:
        for attempt in range(2):
            if attempt or pid not in self._maps:
                self._maps[pid] = _read_maps(pid)
            for low, high, offset, path in self._maps[pid]:
                if low <= address < high:
                    return Frame(path, 0, f"+{address - low + offset:#x}")
        return Frame("?", 0, f"{address:#x}")


def _read_maps(pid: int) -> list[tuple[int, int, int, str]]:
    try:
        text = Path(f"/proc/{pid}/maps").read_text("utf-8", "replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        match = _MAP.match(line)
        if match and "x" in match[3] and match[5]:
            found.append((int(match[1], 16), int(match[2], 16), int(match[4], 16), match[5]))
    return found


def source_line(frame: Frame) -> str:
    """A frame for people: of machine code, the source line too, where binutils and debug
    information are there to tell it.
    """
    import subprocess

    if frame.line or frame.file == "?":
        return str(frame)
    try:
        told = subprocess.run(
            ["addr2line", "-f", "-C", "-e", frame.file, frame.name.lstrip("+")],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return str(frame)
    if len(told) != 2 or told[0] == "??":
        return str(frame)
    place = "" if told[1].startswith("??") else f" {told[1]}"
    return f"{frame} {told[0]}{place}"


def source_lines(site: object) -> list[str]:
    """A place in a traced program, innermost first."""
    return [source_line(frame) for frame in site] if isinstance(site, tuple) else []
