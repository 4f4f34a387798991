"""A host's own view of a tag on a region with `stale_caches`: made when the tag comes, written back
and wiped when it goes.

The view is the host's whole cache: what its programs map. It is a private file, so it holds bytes
of the tag that the appliance does not know of; before the tag is given back, they are written to
memory, as a host flushes its caches, and the file is cut to nothing, so that a stale mapping of it
faults. docs/coherence.md says what it is for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress

from tagmem.ports import DaxSource
from tagmem.shared.stale import MEDIUM, SEED, SHADOW, StaleLines

MARK = ".stale"
"""After the name of the bytes in the host's directory: the appliance's word, and the seed."""
FILES = (MEDIUM, SHADOW, SEED)
VIEW = "view"
"""Its name once the device has gone."""
_COPY_BYTES = 1 << 20
_ZEROS = bytes(_COPY_BYTES)
_SEED_BYTES_MAX = 32


def seed_of(source: DaxSource) -> str:
    """The seed that the appliance left for these bytes; empty where caches are honest."""
    if source.read_only or not source.path or source.path.startswith("/proc/"):
        return ""
    try:
        with open(source.path + MARK, encoding="ascii") as file:
            text = file.read(_SEED_BYTES_MAX).strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    return text if text.isdecimal() else ""


def build(folder: str, name: str, source: DaxSource, seed: str) -> None:
    """View, shadow and seed beside the bytes, which are `medium` in `folder` already."""
    for target in (name, SHADOW):
        _copy(f"{folder}/{MEDIUM}", f"{folder}/{target}")
    with open(f"{folder}/{SEED}", "x", encoding="ascii") as file:
        file.write(f"{seed} {source.pieces[0].offset} {source.size_bytes}\n")


def is_stale(folder: str) -> bool:
    """Whether a device's directory has a view."""
    return os.path.exists(f"{folder}/{SEED}")


def put_away(folder: str, name: str, kept: str) -> None:
    """Keep what is to be written back, out of sight, until the device is given up."""
    os.makedirs(kept, exist_ok=True)
    for file in (name, *FILES):
        with suppress(FileNotFoundError):
            os.rename(f"{folder}/{file}", f"{kept}/{VIEW if file == name else file}")


def identities(folder: str, name: str) -> Sequence[tuple[int, int]]:
    """Of view and memory: whoever has one of them holds the tag."""
    found = []
    for file in (name, MEDIUM, SHADOW):
        with suppress(FileNotFoundError):
            status = os.stat(f"{folder}/{file}")
            found.append((status.st_dev, status.st_ino))
    return tuple(found)


def give_up(kept: str) -> None:
    """Write back what is dirty, wipe the view, forget it. Idempotent. Raises OSError."""
    if not os.path.isdir(kept):
        return
    with suppress(FileNotFoundError):
        with open(f"{kept}/{SEED}", encoding="ascii") as file:
            _, offset, size = map(int, file.read().split())
        # Memory that was fenced is cut to nothing, and takes nothing any more.
        if os.stat(f"{kept}/{MEDIUM}").st_size >= offset + size:
            lines = StaleLines(kept, VIEW, offset=offset, size_bytes=size)
            lines.write_back_all()
            lines.release()
    for name in (VIEW, SHADOW):
        with suppress(FileNotFoundError):
            os.truncate(f"{kept}/{name}", 0)
    shutil.rmtree(kept)


def _copy(source: str, target: str) -> None:
    """A sparse copy: zeros take no memory."""
    with open(source, "rb") as here, open(target, "xb") as there:
        os.fchmod(there.fileno(), 0o600)
        os.truncate(there.fileno(), os.fstat(here.fileno()).st_size)
        at = 0
        while data := here.read(_COPY_BYTES):
            if data != _ZEROS[: len(data)]:
                there.seek(at)
                there.write(data)
            at += len(data)
