"""The appliance's bytes: files on tmpfs or hugetlbfs, in one of two layouts, and the proof that
they are wiped.

*By tag*: one file per allocation, `media/<tag>`, hard-linked as `<host directory>/<tag>` while the
host has it. The inode is never used for another tag, so a mapping that outlives its tag reaches
nobody's bytes: revoking puts a fresh file in its place and truncates the old one, on which stale
mappings then fault. *By DPA*: one sparse file per pool, `media/pool<n>`, at media offsets, for a
device model that wants the whole address space; hosts get a descriptor. Isolation between hosts is
then the device model's, not ours.

Wiping takes the pages away (truncation or MADV_REMOVE, which tmpfs and hugetlbfs both have) and
then reads every byte back. Nothing is inferred from holes: reading a hole runs at 18 GB/s, so the
proof is cheap.

Not protected: root can write through a read-only descriptor by opening it again; a host's workloads
that run as others cannot (the file's mode is 0600). Files may have been shortened or grown by
applications (memcached does): wiping covers what is there and what should be.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from tagmem.appliance.holders import holders
from tagmem.base.errors import Conflict, InvalidInput
from tagmem.base.units import MIB, Bytes
from tagmem.ports import Holding, MediaPiece, Wiped

READ_BYTES = 1 * MIB
"""Compared at once. Each read lets other threads run; taking turns costs more than the bytes."""
CHUNK_BYTES = 64 * MIB
"""Work between two yields."""
_ZEROS = bytes(READ_BYTES)
_OURS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|untagged-[0-9]+")
"""Names that a host directory may get from us; nothing else there is ever removed."""
FILE_MODE = 0o600
STALE_MARK = ".stale"
"""After a link's name: says that this host's view of it lies, and the seed."""


class NotZero(OSError):
    """Bytes that were wiped read back as something else."""


class _FileMedia:
    """What both layouts share: the directory, its lock, its incarnation, wiping a range."""

    def __init__(self, directory: Path, host_directories: Iterable[str]) -> None:
        self.directory = directory
        self.media = directory / "media"
        self._hosts = tuple(host_directories)
        self._lock = -1
        try:
            self.media.mkdir(mode=0o700, parents=True, exist_ok=True)
            for host in self._hosts:
                Path(host).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Conflict(f"media_dir: {directory} is in use by another process") from None
        except OSError as error:
            self.close()
            limit = f"a directory that can be used ({error.strerror})"
            raise InvalidInput("media_dir", limit, str(error.filename or directory)) from None

    def close(self) -> None:
        """Let another process use the directory. The bytes stay."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # A directory's name, because hugetlbfs has no files that can be written, and no links.

    def incarnation(self) -> str:
        """The name given by the last `renew`; empty when there is none."""
        names = [entry.name for entry in self._marks()]
        return names[0] if len(names) == 1 else ""

    def _begin_incarnation(self) -> str:
        for old in self._marks():
            old.rmdir()
        name = str(uuid4())
        (self.directory / "incarnation" / name).mkdir(parents=True)
        return name

    def _marks(self) -> list[Path]:
        try:
            return list((self.directory / "incarnation").iterdir())
        except FileNotFoundError:
            return []

    def _open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _read_back(self, fd: int, start: int, length: Bytes) -> Generator[None, None, int]:
        buffer = bytearray(READ_BYTES)
        view = memoryview(buffer)
        at, end = start, start + length
        since = 0
        while at < end:
            wanted = min(READ_BYTES, end - at)
            got = os.preadv(fd, [view[:wanted]], at)
            if got == 0:
                raise NotZero(f"only {at - start} of {length} bytes could be read back")
            # Past `got` the buffer still holds zeros: its first ones, or those compared before.
            if buffer != _ZEROS:
                raise NotZero(f"bytes near {at} do not read zero after wiping")
            at += got
            since += got
            if since >= CHUNK_BYTES:
                since = 0
                yield
        return length


Header = Callable[[str, Bytes], tuple[Bytes, bytes]]
"""(allocation, its size) to (how far in front of the capacity, what stands there)."""


class ByTagMedia(_FileMedia):
    """One file per allocation.

    `head_bytes` of each file in front of its bytes are no capacity: room for the header that shows
    the tag to a guest. They are wiped and given up with the rest. `header` writes it beforehand, so
    that a host which may only read finds it.
    """

    def __init__(
        self,
        directory: Path,
        host_directories: Iterable[str],
        *,
        head_bytes: Bytes = 0,
        header: Header | None = None,
    ) -> None:
        super().__init__(directory, host_directories)
        self._head_bytes = head_bytes
        self._header = header if head_bytes else None

    def positions(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[MediaPiece, ...]:
        """Offsets in the allocation's own file."""
        head = self._head_bytes
        return tuple([MediaPiece(head + at, length) for _, length, at in pieces])

    def create(self, allocation: str, pool: int, pieces: Sequence[MediaPiece]) -> None:
        """The file at its full length, unless it is there: an application may have cut it since."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.media / allocation, flags, FILE_MODE)
        except FileExistsError:
            return
        try:
            os.ftruncate(fd, _end(pieces))
            if self._header is not None:
                before, content = self._header(allocation, _end(pieces) - self._head_bytes)
                os.pwrite(fd, content, self._head_bytes - before)
        finally:
            os.close(fd)

    def expose(self, allocation: str, directory: str) -> None:
        """A hard link of the file in the host's directory."""
        link = os.path.join(directory, allocation)
        try:
            os.link(self.media / allocation, link)
        except FileExistsError:
            if not os.path.samefile(self.media / allocation, link):
                os.unlink(link)
                os.link(self.media / allocation, link)

    def mark_stale(self, allocation: str, directory: str, seed: int) -> None:
        """A file beside the link, for the host's agent, which makes the view."""
        Path(directory, allocation + STALE_MARK).write_text(f"{seed}\n", encoding="ascii")

    def conceal(self, allocation: str, directory: str) -> None:
        """Take the link away."""
        for name in (allocation, allocation + STALE_MARK):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))

    def descriptor(self, allocation: str, pool: int, *, read_only: bool) -> int:
        """The allocation's file."""
        mode = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(self.media / allocation, mode | os.O_CLOEXEC | os.O_NOFOLLOW)

    def revoke(
        self,
        allocation: str,
        pool: int,
        pieces: Sequence[MediaPiece],
        *,
        only: str = "",
        others: Sequence[str] = (),
    ) -> Sequence[Holding]:
        """Alone: a fresh file takes the old one's place, and the old one is cut to nothing.

        With `only`: the link goes, and whoever came through it is named, because the bytes must
        stay.
        """
        path = self.media / allocation
        if only:
            self.conceal(allocation, only)
            return holders(path, pieces, others=others, by_open=True)
        for host in self._hosts:
            self.conceal(allocation, host)
        try:
            old = self._open(path)
        except FileNotFoundError:
            return ()
        try:
            fresh = self.media / f".{allocation}"
            with suppress(FileNotFoundError):
                fresh.unlink()
            self.create(fresh.name, pool, pieces)
            fresh.rename(path)
            os.ftruncate(old, 0)
        finally:
            os.close(old)
        return ()

    def sanitise(
        self, allocation: str, pool: int, pieces: Sequence[MediaPiece], *, part: bool = False
    ) -> Generator[None, None, Wiped]:
        """Whole: cut, grow again, read back, remove. Part: punch the pieces and read them back."""
        path = self.media / allocation
        try:
            fd = self._open(path)
        except FileNotFoundError:
            # A crash came between the removal and its record, or the whole tag went before.
            length = sum(piece.length for piece in pieces)
            return Wiped(punched=True, sanitised_bytes=length, read_back_bytes=0)
        try:
            size = os.fstat(fd).st_size
            if part:
                wiped = yield from self._wipe_part(fd, size, pieces)
            else:
                wiped = yield from self._wipe_whole(fd, max(size, _end(pieces)))
                for host in self._hosts:
                    self.conceal(allocation, host)
                path.unlink()
                os.ftruncate(fd, 0)
            return wiped
        finally:
            os.close(fd)

    def _wipe_whole(self, fd: int, size: Bytes) -> Generator[None, None, Wiped]:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        read = yield from self._read_back(fd, 0, size)
        return Wiped(punched=True, sanitised_bytes=size, read_back_bytes=read)

    def _wipe_part(
        self, fd: int, size: Bytes, pieces: Sequence[MediaPiece]
    ) -> Generator[None, None, Wiped]:
        done = read = 0
        for piece in pieces:
            done += piece.length
            length = min(piece.length, size - piece.offset)
            if length > 0:
                _punch(fd, piece.offset, length)
                read += yield from self._read_back(fd, piece.offset, length)
        return Wiped(punched=True, sanitised_bytes=done, read_back_bytes=read)

    def drop(self, allocation: str, pool: int) -> None:
        """Remove the file and its links."""
        for host in self._hosts:
            self.conceal(allocation, host)
        with suppress(FileNotFoundError):
            (self.media / allocation).unlink()

    def renew(self) -> str:
        """Remove every file and link of ours."""
        self.reconcile({}, {})
        return self._begin_incarnation()

    def reconcile(
        self, files: Mapping[str, bool], exposed: Mapping[str, Sequence[str]]
    ) -> tuple[list[str], set[tuple[str, str]]]:
        """Remove files and links that the device does not know; name what we lack and have."""
        inodes = {entry.name: entry.inode() for entry in os.scandir(self.media)}
        kept: set[tuple[str, str]] = set()
        for host in self._hosts:
            wanted = set(exposed.get(host, ()))
            for entry in os.scandir(host):
                # A link to an older file of that name is none.
                if entry.name in wanted and entry.inode() == inodes.get(entry.name):
                    kept.add((host, entry.name))
                elif _OURS.fullmatch(entry.name):
                    self.conceal(entry.name, host)
        for name in inodes.keys() - files.keys():
            with suppress(FileNotFoundError):
                fd = self._open(self.media / name)
                os.ftruncate(fd, 0)
                os.close(fd)
                (self.media / name).unlink()
        return sorted(name for name, must in files.items() if must and name not in inodes), kept


class ByDpaMedia(_FileMedia):
    """One sparse file per pool."""

    def __init__(
        self, directory: Path, host_directories: Iterable[str], pools: Mapping[int, Bytes]
    ) -> None:
        super().__init__(directory, host_directories)
        self._pools = dict(pools)
        if self.incarnation():
            self._make()

    def _path(self, pool: int) -> Path:
        return self.media / f"pool{pool}"

    def _make(self) -> None:
        # What is there keeps its size: a wrong configuration must not cut it.
        for pool, size in self._pools.items():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                fd = os.open(self._path(pool), flags, FILE_MODE)
            except FileExistsError:
                continue
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)

    def positions(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[MediaPiece, ...]:
        """Media offsets are file offsets."""
        return tuple([MediaPiece(start, length) for start, length, _ in pieces])

    def create(self, allocation: str, pool: int, pieces: Sequence[MediaPiece]) -> None:
        """Nothing to do: free bytes of the pool read zero."""

    def expose(self, allocation: str, directory: str) -> None:
        """Nothing to do: hosts ask for a descriptor."""

    def mark_stale(self, allocation: str, directory: str, seed: int) -> None:
        """Not by DPA: the configuration refuses it."""

    def conceal(self, allocation: str, directory: str) -> None:
        """Nothing to do."""

    def descriptor(self, allocation: str, pool: int, *, read_only: bool) -> int:
        """The pool's file."""
        mode = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(self._path(pool), mode | os.O_CLOEXEC | os.O_NOFOLLOW)

    def revoke(
        self,
        allocation: str,
        pool: int,
        pieces: Sequence[MediaPiece],
        *,
        only: str = "",
        others: Sequence[str] = (),
    ) -> Sequence[Holding]:
        """Names who maps the bytes. Whoever merely has the pool open cannot be told apart by
        range.
        """
        return holders(self._path(pool), pieces, others=others, by_open=False)

    def sanitise(
        self, allocation: str, pool: int, pieces: Sequence[MediaPiece], *, part: bool = False
    ) -> Generator[None, None, Wiped]:
        """Punch the pieces and read them back."""
        fd = self._open(self._path(pool))
        try:
            if os.fstat(fd).st_size < self._pools[pool]:
                os.ftruncate(fd, self._pools[pool])
            read = 0
            for piece in pieces:
                _punch(fd, piece.offset, piece.length)
                read += yield from self._read_back(fd, piece.offset, piece.length)
            done = sum(piece.length for piece in pieces)
            return Wiped(punched=True, sanitised_bytes=done, read_back_bytes=read)
        finally:
            os.close(fd)

    def drop(self, allocation: str, pool: int) -> None:
        """Nothing to do: the region is configured to keep its bytes."""

    def renew(self) -> str:
        """Make every pool anew."""
        for name in os.listdir(self.media):
            (self.media / name).unlink()
        self._make()
        return self._begin_incarnation()

    def reconcile(
        self, files: Mapping[str, bool], exposed: Mapping[str, Sequence[str]]
    ) -> tuple[list[str], set[tuple[str, str]]]:
        """Pools are there or the incarnation is gone; hosts have nothing in their directories."""
        return [], {(host, name) for host, names in exposed.items() for name in names}


def _end(pieces: Sequence[MediaPiece]) -> int:
    return max((piece.offset + piece.length for piece in pieces), default=0)


def _punch(fd: int, offset: int, length: Bytes) -> None:
    # fallocate(2) with FALLOC_FL_PUNCH_HOLE by another name, which Python has.
    with mmap.mmap(fd, length, offset=offset) as window:
        window.madvise(mmap.MADV_REMOVE)


def file_system(path: Path) -> str:
    """The type of the file system that a directory is on, as the kernel names it."""
    found, length = "", -1
    for line in Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if (path == Path(mount) or Path(mount) in path.parents) and len(mount) >= length:
            found, length = kind, len(mount)
    return found


def open_media(
    layout: str,
    directory: Path,
    host_directories: Sequence[str],
    pools: Mapping[int, Bytes],
    *,
    hugetlbfs: bool = False,
    head_bytes: Bytes = 0,
    header: Header | None = None,
) -> ByTagMedia | ByDpaMedia:
    """The media in `directory`, made if missing.

    Raises InvalidInput, or Conflict when another process has it.
    """
    if hugetlbfs and file_system(directory.resolve()) != "hugetlbfs":
        raise InvalidInput("media_dir", "on a hugetlbfs (hugetlbfs = true)", str(directory))
    if layout == "by-dpa":
        return ByDpaMedia(directory, host_directories, pools)
    media = ByTagMedia(directory, host_directories, head_bytes=head_bytes, header=header)
    device = os.stat(media.media).st_dev
    for host in host_directories:
        if os.stat(host).st_dev != device:
            media.close()
            limit = f"on the file system of media_dir ({directory}), because tags are hard links"
            raise InvalidInput("host: directory", limit, host)
    return media
