"""A disk that fails when told to, below SQLite: each write of a commit can be made its last.

Every write, truncation and flush of a file of the store is one *point*, counted from 0. A Fault
names the point at which the disk fails, how, and whether it stays broken. Nothing is injected into
SQLite's shared memory, which is not on stable storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import apsw


class Failure(Enum):
    """How a disk fails."""

    FULL = "no space left"
    SHORT = "half of the bytes, then no space left"
    ERROR = "input/output error"


@dataclass
class Fault:
    """When and how to fail. Used by one FaultyVfs; `points` counts what was done while armed."""

    at: int = -1
    """The point that fails; negative: none does."""
    failure: Failure = Failure.FULL
    lasting: bool = False
    """True: every point after it fails as well, as on a disk that was pulled out."""
    points: int = 0
    failed: int = 0

    def strikes(self) -> bool:
        """Count one point; whether it has to fail."""
        point = self.points
        self.points += 1
        struck = self.at >= 0 and (point == self.at or (self.lasting and point > self.at))
        self.failed += struck
        return struck

    def arm(self, at: int, failure: Failure, *, lasting: bool) -> None:
        """Count from 0 again and fail at point `at`."""
        self.at, self.failure, self.lasting = at, failure, lasting
        self.points = self.failed = 0


class FaultyVfs(apsw.VFS):
    """The operating system's files under the name `name`, with faults. `unregister` when done."""

    def __init__(self, name: str, fault: Fault) -> None:
        self.fault = fault
        super().__init__(name, "")

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        """A file with faults."""
        return _FaultyFile(self.fault, name, flags)


class _FaultyFile(apsw.VFSFile):
    def __init__(self, fault: Fault, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._fault = fault
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's name
        if self._fault.strikes():
            if self._fault.failure is Failure.SHORT:
                super().xWrite(bytes(data[: len(data) // 2]), offset)
            raise _error(self._fault.failure, apsw.SQLITE_IOERR_WRITE)
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802 - SQLite's name
        if self._fault.strikes():
            raise _error(Failure.ERROR, apsw.SQLITE_IOERR_TRUNCATE)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
        if self._fault.strikes():
            raise _error(Failure.ERROR, apsw.SQLITE_IOERR_FSYNC)
        super().xSync(flags)


def _error(failure: Failure, code: int) -> apsw.Error:
    if failure is not Failure.ERROR:
        return apsw.FullError(failure.value)
    error = apsw.IOError(failure.value)
    # What the type stubs leave out: the finer code is read from this attribute.
    setattr(error, "extendedresult", code)  # noqa: B010
    return error
