"""Writes initramfs archives (cpio, format newc): making a guest needs neither root nor `cpio`.

Owners are root's, device nodes are named and not made, times are one and the same and the order is
alphabetical: the same tree gives the same archive. Linux reads archives that follow one another as
one, each laid over the last, which is how a guest's code is changed without touching its image.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tagmem.base.errors import InvalidInput

BLOCK_BYTES = 512
"""An archive is padded to this, so that another may follow it."""
_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_FIELD_MAX = 0xFFFF_FFFF


class Archive:
    """One cpio archive being written; `close` ends it with its trailer."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._number = 0
        self._written = 0
        self._directories: set[str] = set()

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A directory, and those that it lies in. One that is there already stays as it is."""
        name = name.strip("/")
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        if name and name not in self._directories:
            self._directories.add(name)
            self._entry(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file with this content."""
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node."""
        self._parents(name)
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def tree(self, root: Path) -> None:
        """Everything below a directory, as it is there, except who owns it and when it changed."""
        for path in _walk(root):
            name = path.relative_to(root).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                self.link(name, path.readlink().as_posix())
            elif stat.S_ISDIR(status.st_mode):
                self.directory(name, stat.S_IMODE(status.st_mode) | 0o555)
            elif stat.S_ISREG(status.st_mode):
                mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
                self.file(name, path.read_bytes(), mode)
            else:
                raise InvalidInput("tree", "directories, files and links", name)

    def close(self) -> None:
        """The trailer, and padding so that another archive may follow."""
        self._number = -1
        self._entry(_TRAILER, 0)
        self._write(bytes(-self._written % BLOCK_BYTES))

    def _parents(self, name: str) -> None:
        parent = name.strip("/").rpartition("/")[0]
        if parent:
            self.directory(parent)

    def _entry(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        name = name.strip("/")
        if not name or ".." in name.split("/"):
            raise InvalidInput("name", "a path within the archive", name)
        if len(data) > _FIELD_MAX:
            raise InvalidInput("size", f"at most {_FIELD_MAX} bytes", len(data))
        self._number += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, time, size, device (2), node (2), length of name, checksum
        fields = (self._number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
        self._write(_MAGIC + b"".join(b"%08X" % field for field in fields) + path)
        self._write(bytes(-self._written % 4))
        self._write(data)
        self._write(bytes(-self._written % 4))

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._written += len(data)


def _walk(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
