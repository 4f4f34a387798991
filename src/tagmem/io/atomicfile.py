"""Whole files or none: a reader, or a crash, finds the old content or the new one.

The new content goes to a temporary file beside the old, is flushed, takes the name, and then the
directory is flushed, because a name is on stable storage only when its directory is.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

from tagmem.base.errors import StorageFailed


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make `content` the file at `path`, durably. Raises StorageFailed; the old file then stays."""
    temporary = ""
    try:
        descriptor, temporary = mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = ""
        sync_directory(path.parent)
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if temporary:
            with suppress(OSError):
                Path(temporary).unlink()


def sync_directory(directory: Path) -> None:
    """Put the names in a directory on stable storage. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
