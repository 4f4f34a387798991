"""Whether a hypervisor's process still has bytes: what the kernel says, not what the process says.

A process that agreed to unmap memory has not yet done it; QEMU answers before it does. Only these
two listings of /proc are proof that it can touch the bytes no more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

Identity = tuple[int, int]
"""(device, inode) of a file."""
Range = tuple[int, int]
"""(offset, length) within a file."""

_PAGE_BYTES = 4096
_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S{4} ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+)", re.MULTILINE
)


class Holds(msgspec.Struct, frozen=True):
    """What a process has of some files. Falsy when it has nothing of them."""

    mappings: int = 0
    descriptors: int = 0
    unseen: str = ""
    """Why the process could not be looked at; then nothing is known."""

    def __bool__(self) -> bool:
        return bool(self.mappings or self.descriptors or self.unseen)

    def __str__(self) -> str:
        if self.unseen:
            return f"cannot be looked at ({self.unseen})"
        return f"has {self.mappings} mappings and {self.descriptors} descriptors of the bytes"


def identity_of(descriptor: int) -> Identity:
    """Of an open file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def holds(
    pid: int,
    ranges: Mapping[Identity, Sequence[Range]],
    opened: Collection[Identity],
    proc: str = "/proc",
) -> Holds:
    """What process `pid` maps of these ranges, and how often it has open the files in `opened`.

    A process that has ended has nothing.
    """
    if pid <= 0:
        return Holds(unseen="its process is not known")
    try:
        mappings = _mappings(f"{proc}/{pid}/maps", ranges)
        return Holds(mappings, _descriptors(f"{proc}/{pid}/fd", opened))
    except (FileNotFoundError, ProcessLookupError):
        return Holds()
    except OSError as error:
        return Holds(unseen=error.strerror or "error")


def touched(pid: int, identity: Identity, offset: int, proc: str = "/proc") -> bool:
    """Whether process `pid`, or the guest that it runs, has used the page at `offset` of a file
    through its mapping. False when that cannot be seen.
    """
    try:
        with open(f"{proc}/{pid}/maps", "rb") as file:
            text = file.read()
        for match in _LINE.finditer(text):
            start, end, at, major, minor = (int(group, 16) for group in match.groups()[:5])
            inside = at <= offset < at + end - start
            if inside and (os.makedev(major, minor), int(match.group(6))) == identity:
                entry = 8 * ((start + offset - at) // _PAGE_BYTES)
                with open(f"{proc}/{pid}/pagemap", "rb", buffering=0) as pages:
                    found = os.pread(pages.fileno(), 8, entry)
                return bool(int.from_bytes(found, "little") >> 63)
    except OSError:
        pass
    return False


def _mappings(path: str, ranges: Mapping[Identity, Sequence[Range]]) -> int:
    with open(path, "rb") as file:
        text = file.read()
    found = 0
    for match in _LINE.finditer(text):
        start, end, offset, major, minor = (int(group, 16) for group in match.groups()[:5])
        for at, length in ranges.get((os.makedev(major, minor), int(match.group(6))), ()):
            found += offset < at + length and at < offset + end - start
    return found


def _descriptors(path: str, opened: Collection[Identity]) -> int:
    if not opened:
        return 0
    found = 0
    for name in os.listdir(path):
        try:
            status = os.stat(f"{path}/{name}")
        except FileNotFoundError:
            continue
        found += (status.st_dev, status.st_ino) in opened
    return found
