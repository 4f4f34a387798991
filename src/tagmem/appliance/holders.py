"""Who maps or has open a file, read from /proc: what a fence must know before it may say that it
holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tagmem.ports import Holding, MediaPiece


def holders(
    path: Path, pieces: Sequence[MediaPiece], *, others: Sequence[str] = (), by_open: bool
) -> tuple[Holding, ...]:
    """Processes (not this one) that map any of `pieces` of the file at `path` or, asked so, have it
    open.

    Those that reached it through one of the directories in `others` are left out. A process that
    ends while it is looked at holds nothing; one that may not be looked at is not seen, so the
    appliance should run as root.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    key = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    found: list[Holding] = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        how = _how(name, key, pieces, tuple(f"{other}/" for other in others), by_open=by_open)
        if how:
            found.append(Holding(int(name), _command(name), how))
    return tuple(found)


def _how(
    pid: str,
    key: tuple[int, int, int],
    pieces: Sequence[MediaPiece],
    others: tuple[str, ...],
    *,
    by_open: bool,
) -> str:
    for offset, length, through in _mappings(pid, key):
        touches = any(
            max(offset, piece.offset) < min(offset + length, piece.offset + piece.length)
            for piece in pieces
        )
        if touches and not (others and through.startswith(others)):
            return "maps"
    if by_open and any(
        not (others and through.startswith(others)) for through in _descriptors(pid, key)
    ):
        return "open"
    return ""


def _mappings(pid: str, key: tuple[int, int, int]) -> Iterator[tuple[int, int, str]]:
    """(file offset, length, path as it was opened) of each mapping of one file."""
    inode = b" %d " % key[2]
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            lines = [line for line in file if inode in line]
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return
    for line in lines:
        fields = line.split(None, 5)
        major, _, minor = fields[3].partition(b":")
        if (int(major, 16), int(minor, 16), int(fields[4])) != key:
            continue
        low, _, high = fields[0].partition(b"-")
        through = os.fsdecode(fields[5].rstrip(b"\n")) if len(fields) > 5 else ""
        yield int(fields[2], 16), int(high, 16) - int(low, 16), through


def _descriptors(pid: str, key: tuple[int, int, int]) -> Iterator[str]:
    """The path as it was opened, of each descriptor of one file."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return
    for name in names:
        try:
            status = os.stat(f"{directory}/{name}")
            if (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) == key:
                yield os.readlink(f"{directory}/{name}")
        except OSError:
            continue


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
    except OSError:
        return ""
