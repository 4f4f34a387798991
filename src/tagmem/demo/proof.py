"""Looks for itself: which bytes the media hold, and which processes hold the media.

The demo does not take the daemons' word for what it claims. These functions read the appliance's
files and /proc directly, with code of their own.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_CHUNK_BYTES = 4 << 20
_ZEROS = bytes(_CHUNK_BYTES)
_ITEMS = tuple(
    re.compile(prefix + rb"[^\0]{1,250})\0([^\r\n]*)\r\n") for prefix in (rb"(sense:", rb"(file:")
)


def media_files(folder: Path) -> list[Path]:
    """Every file with bytes of the appliance, once, however many names link to it."""
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            if status.st_size:
                files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def find_items(path: Path) -> dict[bytes, tuple[int, bytes]]:
    """The demo's records that lie in a file as memcached keeps them: key to (offset, value).

    An item is a header, the key, a zero byte, the value and a line end; so keys and values are
    there in the clear, and one pass finds them all.
    """
    found: dict[bytes, tuple[int, bytes]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for pattern in _ITEMS:
            for match in pattern.finditer(memory):
                found[match[1]] = (match.start(1), match[2])
    return found


def count_needles(files: Iterable[Path], needles: Iterable[bytes]) -> int:
    """How many of the needles are anywhere in the files."""
    wanted = set(needles)
    missing = set(wanted)
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            missing = {needle for needle in missing if memory.find(needle) < 0}
    return len(wanted) - len(missing)


def first_nonzero(view: memoryview) -> int:
    """Offset of the first chunk that is not all zero; -1 when every byte is zero."""
    for start in range(0, len(view), _CHUNK_BYTES):
        chunk = bytes(view[start : start + _CHUNK_BYTES])
        if chunk != _ZEROS[: len(chunk)]:
            return start
    return -1


def nonzero_file(path: Path) -> int:
    """As first_nonzero, of a whole file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        view = memoryview(memory)
        try:
            return first_nonzero(view)
        finally:
            view.release()


def holders(path: Path) -> list[tuple[int, str]]:
    """(pid, name) of every process that maps the file or has it open; by inode, not by name."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return list(holders_of_inode(status.st_dev, status.st_ino))


def holders_of_inode(device: int, inode: int) -> Iterator[tuple[int, str]]:
    """As holders, for a file whose names may be gone already."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _holds(entry, device, inode):
            try:
                name = Path(f"/proc/{entry}/comm").read_text(encoding="utf-8").strip()
            except OSError:
                continue  # it ended while we looked
            yield int(entry), name


def command_line(pid: int) -> list[str]:
    """The arguments of a process; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def parent(pid: int) -> int:
    """The parent of a process; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The name, in brackets, may hold anything; what follows it are numbers.
    return int(text.rpartition(")")[2].split()[1])


def _holds(pid: str, device: int, inode: int) -> bool:
    number = f"{os.major(device):02x}:{os.minor(device):02x}"
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                fields = line.split(maxsplit=5)
                if fields[3] == number and fields[4] == str(inode):
                    return True
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                status = os.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if (status.st_dev, status.st_ino) == (device, inode):
                return True
    except OSError:
        return False  # it ended, or is a kernel thread, or is somebody else's
    return False
