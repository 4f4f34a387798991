"""DAX devices of an emulated host: a directory per tag that looks like sysfs and the device in one.

    <run>/dax<region>.<n>/    dax<region>.<n> (the bytes), size, align, uuid, mode, read_only,
                              extents, sharing
    <run>/by-tag/<uuid>       a link to the bytes

Of media by DPA there are no bytes to link, but `pool`, the file of which `extents` are parts.

A device is built aside and renamed into place, and renamed aside before it is taken apart, so that
nobody ever finds half of one. The bytes are a hard link of the appliance's file: an application
that unlinks it, or puts a file of its own beside it, harms nobody else.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tagmem.agent import stale
from tagmem.ports import DaxSource, MediaPiece
from tagmem.shared.stale import MEDIUM, SHADOW

ATTRIBUTES = ("size", "align", "uuid", "mode", "read_only", "extents", "sharing", "pool")
_NEW = ".new-"
_GONE = ".gone-"
_KEPT = ".kept-"
"""Of a view that is still to be written back: the tag follows."""
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096
_MNT_DETACH = 2


class EmulatedDax:
    """`ports.DaxDevices` in a run directory. One agent per run directory."""

    def __init__(self, run: Path) -> None:
        # Text rather than Path: half the time of making a device would go into joining names.
        self._run = str(run)
        self._by_tag = f"{run}/by-tag"
        self._names: dict[str, str] = {}
        """Tag to the device's name."""
        self._identities: dict[str, tuple[int, int]] = {}
        """Kept from withdrawal until the device is given up: the bytes have no name then."""
        self._orphans: dict[str, int] = {}
        """Open bytes that have no name any more: the appliance took them, or an application has
        unlinked them. Those with a name are not kept open, lest we be taken for a holder."""
        self._free: dict[int, list[int]] = {}
        self._next: dict[int, int] = {}
        os.makedirs(self._by_tag, exist_ok=True)
        self._find()

    def _find(self) -> None:
        """Take up what an earlier agent left: whole devices stay, halves go."""
        for entry in sorted(Path(self._run).iterdir()):
            if entry.name.startswith((_NEW, _GONE)):
                if entry.name.startswith(_GONE) and (entry / "uuid").is_file():
                    tag = (entry / "uuid").read_text().strip()
                    self._put_away(str(entry), entry.name.removeprefix(_GONE), tag)
                self._remove(str(entry))
            elif entry.name.startswith("dax") and (entry / "uuid").is_file():
                tag = (entry / "uuid").read_text().strip()
                self._names[tag] = entry.name
                region, number = _numbers(entry.name)
                self._next[region] = max(self._next.get(region, 1), number + 1)
                self._link(tag, entry.name)
        taken = set(self._names.values())
        for region, following in self._next.items():
            names = ((n, f"dax{region}.{n}") for n in range(1, following))
            self._free[region] = [number for number, name in names if name not in taken]
        for link in Path(self._by_tag).iterdir():
            if link.name not in self._names:
                link.unlink()

    def surface(self, source: DaxSource) -> str:
        """Make the device of a tag; see `ports.DaxDevices`."""
        name = self._names.get(source.tag)
        if name is None:
            name = self._build(source)
        self._link(source.tag, name)
        folder = f"{self._run}/{name}"
        return f"{folder}/{name}" if source.path else folder

    def _build(self, source: DaxSource) -> str:
        name = self._take_name(source.region)
        aside = f"{self._run}/{_NEW}{name}"
        try:
            os.mkdir(aside)
            if seed := stale.seed_of(source):
                _place(source.path, f"{aside}/{MEDIUM}", read_only=False)
                stale.build(aside, name, source, seed)
            elif source.path:
                _place(source.path, f"{aside}/{name}", read_only=source.read_only)
                status = os.stat(f"{aside}/{name}")
                self._identities[source.tag] = (status.st_dev, status.st_ino)
            for attribute, value in _attributes(source).items():
                path = f"{aside}/{attribute}"
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
                try:
                    os.write(fd, value.encode() + b"\n")
                finally:
                    os.close(fd)
            os.rename(aside, f"{self._run}/{name}")
        except OSError:
            self._remove(aside)
            self._give_name(name)
            raise
        self._names[source.tag] = name
        return name

    def _link(self, tag: str, name: str) -> None:
        target = f"../{name}/{name}"
        link = f"{self._by_tag}/{tag}"
        try:
            if os.readlink(link) == target:
                return
        except FileNotFoundError:
            pass
        aside = f"{self._by_tag}/{_NEW}{tag}"
        with suppress(FileNotFoundError):
            os.unlink(aside)
        os.symlink(target, aside)
        os.rename(aside, link)

    def withdraw(self, tag: str) -> tuple[str, ...]:
        """Take the device out of sight; see `ports.DaxDevices`."""
        name = self._names.get(tag)
        with suppress(FileNotFoundError):
            os.unlink(f"{self._by_tag}/{tag}")
        if name is None:
            return ()
        device = f"{self._run}/{name}"
        fd = -1
        try:
            fd = os.open(f"{device}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(fd)
            self._identities[tag] = (status.st_dev, status.st_ino)
        except FileNotFoundError:
            pass  # An application has unlinked it, or there is no path: what was seen first counts.
        aside = f"{self._run}/{_GONE}{name}"
        os.rename(device, aside)
        self._put_away(aside, name, tag)
        del self._names[tag]
        left = tuple(sorted(set(os.listdir(aside)) - {name, *ATTRIBUTES}))
        self._remove(aside)
        self._give_name(name)
        if fd >= 0:
            self._orphan(tag, fd)
        return left

    def _put_away(self, aside: str, name: str, tag: str) -> None:
        if stale.is_stale(aside):
            stale.put_away(aside, name, f"{self._run}/{_KEPT}{tag}")

    def _orphan(self, tag: str, fd: int) -> None:
        if os.fstat(fd).st_nlink:
            os.close(fd)
            return
        self._drop_orphan(tag)
        self._orphans[tag] = fd

    def _drop_orphan(self, tag: str) -> None:
        fd = self._orphans.pop(tag, -1)
        if fd >= 0:
            os.close(fd)

    def descriptor(self, tag: str) -> int:
        """Of bytes without a name."""
        return self._orphans.get(tag, -1)

    def give_up(self, tag: str) -> None:
        """Forget the bytes; see `ports.DaxDevices`."""
        stale.give_up(f"{self._run}/{_KEPT}{tag}")
        self._identities.pop(tag, None)
        self._drop_orphan(tag)

    def found(self) -> Mapping[str, str]:
        """Tag to path."""
        return {tag: f"{self._run}/{name}/{name}" for tag, name in self._names.items()}

    def identities(self, tag: str) -> Sequence[tuple[int, int]]:
        """Of the tag's bytes."""
        name = self._names.get(tag)
        device = self._stale(tag)
        if device:
            return stale.identities(device, name or stale.VIEW)
        identity = self._identities.get(tag)
        if identity is None and name is not None:
            try:
                status = os.stat(f"{self._run}/{name}/{name}")
            except FileNotFoundError:
                return ()
            identity = self._identities[tag] = (status.st_dev, status.st_ino)
        return () if identity is None else (identity,)

    def pool(self, tag: str) -> tuple[str, Sequence[MediaPiece]] | None:
        """As it was given when the device was made, by this agent or an earlier one."""
        try:
            folder = f"{self._run}/{self._names[tag]}"
            path = Path(folder, "pool").read_text(encoding="utf-8").rstrip("\n")
            pieces = json.loads(Path(folder, "extents").read_bytes())
        except (KeyError, FileNotFoundError):
            return None
        return path, tuple(MediaPiece(piece["offset"], piece["length"]) for piece in pieces)

    def views(self, tag: str) -> Sequence[str]:
        """Where caches lie: what the programs of this host map, and what came from memory."""
        device = self._stale(tag)
        if not device:
            return ()
        return f"{device}/{self._names.get(tag) or stale.VIEW}", f"{device}/{SHADOW}"

    def _stale(self, tag: str) -> str:
        """The directory that has a host's own view of the tag, if there is one."""
        name = self._names.get(tag)
        device = f"{self._run}/{name}" if name else f"{self._run}/{_KEPT}{tag}"
        return device if stale.is_stale(device) else ""

    # ---- names

    def _take_name(self, region: int) -> str:
        free = self._free.setdefault(region, [])
        if free:
            return f"dax{region}.{heapq.heappop(free)}"
        number = self._next.get(region, 1)
        self._next[region] = number + 1
        return f"dax{region}.{number}"

    def _give_name(self, name: str) -> None:
        region, number = _numbers(name)
        heapq.heappush(self._free.setdefault(region, []), number)

    def _remove(self, directory: str) -> None:
        if not os.path.exists(directory):
            return
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
                continue
            try:
                os.unlink(entry.path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                _unmount(entry.path)
                os.unlink(entry.path)
        os.rmdir(directory)


def _numbers(name: str) -> tuple[int, int]:
    prefix = _GONE if name.startswith(_GONE) else ""
    region, _, number = name.removeprefix(prefix).removeprefix("dax").partition(".")
    return int(region), int(number)


def _attributes(source: DaxSource) -> dict[str, str]:
    pieces = [{"offset": piece.offset, "length": piece.length} for piece in source.pieces]
    values = {
        "size": str(source.size_bytes),
        "align": str(source.align_bytes),
        "uuid": source.tag,
        "mode": "devdax",
        "read_only": "1" if source.read_only else "0",
        "extents": json.dumps(pieces, separators=(",", ":")),
        "sharing": source.sharing,
    }
    return values | ({"pool": source.pool} if source.pool else {})


def _place(source: str, target: str, *, read_only: bool) -> None:
    """Give the bytes at `source` another name, which cannot be written through if `read_only`."""
    if read_only:
        _mount_read_only(source, target)
        return
    # Python follows a link (as /proc/self/fd/N is) only when a directory is given as well.
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.link(source, target, src_dir_fd=root, follow_symlinks=True)
    except OSError as error:
        if error.errno != errno.EXDEV or source.startswith("/proc/"):
            raise
        os.symlink(source, target)
    finally:
        os.close(root)


def _mount_read_only(source: str, target: str) -> None:
    """A bind mount: even root gets EROFS. Raises OSError where mounting is not allowed."""
    Path(target).touch()
    for flags in (_MS_BIND, _MS_BIND | _MS_REMOUNT | _MS_RDONLY):
        _libc("mount", source.encode(), os.fsencode(target), None, flags, None)


def _unmount(target: str) -> None:
    _libc("umount2", os.fsencode(target), _MNT_DETACH)


def _libc(call: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [
        ctypes.c_ulong(argument) if isinstance(argument, int) else argument
        for argument in arguments
    ]
    if getattr(libc, call)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)} (a read-only tag needs it)")
