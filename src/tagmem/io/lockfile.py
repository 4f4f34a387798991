"""One process per state directory, and a clear word to the second one.

The lock is the kernel's, on the file `lock` in the directory: it ends with the process that has it,
however that ends. The process number in the file is for people.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tagmem.base.errors import Conflict, InvalidInput, LocalError

_LIMITS = {
    errno.EACCES: "a directory that this user may write to",
    errno.EPERM: "a directory that this user may write to",
    errno.EROFS: "a directory on a file system that is not read-only",
    errno.ENOSPC: "a directory on a file system with room left",
    errno.EDQUOT: "a directory on a file system with room left for this user",
    errno.ENOTDIR: "a directory",
    errno.EEXIST: "a directory",
}


class StateDirectory:
    """A directory that this process alone uses, from `__init__` to `release`. Made if missing.

    Raises Conflict when another process has it (and names it); InvalidInput when it cannot be used:
    no directory, read-only, full.
    """

    def __init__(self, path: Path | str, *, field: str = "state directory") -> None:
        self.path = Path(path)
        self._descriptor = -1
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path / "lock", flags, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Always as long, so that nothing of an older number stays behind it.
            os.pwrite(self._descriptor, f"{os.getpid():<10}\n".encode(), 0)
            os.fsync(self._descriptor)
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise Conflict(f"{field}: {self.path} is in use by {holder}") from None
        except OSError as error:
            self.release()
            raise self._unusable(field, error) from error

    def _holder(self) -> str:
        pid = ""
        with suppress(OSError):
            pid = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
        return f"process {pid}" if pid.isdigit() else "another process"

    def _unusable(self, field: str, error: OSError) -> LocalError:
        limit = _LIMITS.get(error.errno or 0)
        if limit is None:
            return InvalidInput(field, f"a usable directory ({error.strerror})", str(self.path))
        return InvalidInput(field, limit, str(self.path))

    def release(self) -> None:
        """Let another process have it. The lock file stays: removing it races with the next."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
