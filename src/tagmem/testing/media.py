"""Media in memory: the verified fake of `ports.Media`, for a world in one process.

Its bytes are sparse (blocks that were never written read zero), so a pool of terabytes costs
nothing. A *hand* is what a process has: a way to read and write that lasts as long as the medium
lets it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence

from tagmem.ports import Holding, MediaPiece, Wiped

BLOCK_BYTES = 4096


class Bytes:
    """A sparse file."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}
        self.gone = False
        """Cut to nothing: whoever touches it faults."""

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes. Raises OSError when they were taken away."""
        if self.gone:
            raise OSError("the mapping faults")
        for at, byte in enumerate(data, offset):
            block = self._blocks.setdefault(at // BLOCK_BYTES, bytearray(BLOCK_BYTES))
            block[at % BLOCK_BYTES] = byte

    def read(self, offset: int, length: int) -> bytes:
        """Bytes as they are. Raises OSError when they were taken away."""
        if self.gone:
            raise OSError("the mapping faults")
        zero = bytes(BLOCK_BYTES)
        return bytes(
            self._blocks.get(at // BLOCK_BYTES, zero)[at % BLOCK_BYTES]
            for at in range(offset, offset + length)
        )

    def wipe(self, offset: int, length: int) -> None:
        """Make whole blocks read zero."""
        first, last = offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES
        for block in [block for block in self._blocks if first <= block < last]:
            del self._blocks[block]

    def zero(self, offset: int, length: int) -> bool:
        """Whether a range reads zero."""
        first, last = offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES
        return not any(any(self._blocks[b]) for b in self._blocks if first <= b < last)


class MemoryMedia:
    """The by-tag layout in memory."""

    def __init__(self) -> None:
        self.files: dict[str, Bytes] = {}
        self.links: dict[str, dict[str, Bytes]] = {}
        self.stale: dict[tuple[str, str], int] = {}
        """Per host directory."""
        self.broken: set[str] = set()
        """Allocations that cannot be wiped, to see what happens then."""
        self._incarnation = ""
        self._incarnations = 0

    def positions(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[MediaPiece, ...]:
        """Offsets in the allocation's own bytes."""
        return tuple([MediaPiece(at, length) for _, length, at in pieces])

    def create(self, allocation: str, pool: int, pieces: Sequence[MediaPiece]) -> None:
        """Make bytes exist."""
        self.files.setdefault(allocation, Bytes())

    def expose(self, allocation: str, directory: str) -> None:
        """Link them."""
        if allocation not in self.files:
            raise FileNotFoundError(allocation)
        self.links.setdefault(directory, {})[allocation] = self.files[allocation]

    def mark_stale(self, allocation: str, directory: str, seed: int) -> None:
        """Remember the seed."""
        self.stale[directory, allocation] = seed

    def conceal(self, allocation: str, directory: str) -> None:
        """Take the link away."""
        self.links.get(directory, {}).pop(allocation, None)

    def descriptor(self, allocation: str, pool: int, *, read_only: bool) -> int:
        """There are none in memory."""
        raise OSError("media in memory have no descriptors")

    def hand(self, allocation: str, directory: str) -> Bytes | None:
        """What a process on that host gets when it opens the tag."""
        return self.links.get(directory, {}).get(allocation)

    def revoke(
        self,
        allocation: str,
        pool: int,
        pieces: Sequence[MediaPiece],
        *,
        only: str = "",
        others: Sequence[str] = (),
    ) -> Sequence[Holding]:
        """Alone: fresh bytes in place of the old. With `only`: that link."""
        if only:
            self.conceal(allocation, only)
            return ()
        for directory in self.links:
            self.conceal(allocation, directory)
        old = self.files.get(allocation)
        if old is not None:
            old.gone = True
            self.files[allocation] = Bytes()
        return ()

    def sanitise(
        self, allocation: str, pool: int, pieces: Sequence[MediaPiece], *, part: bool = False
    ) -> Generator[None, None, Wiped]:
        """Wipe, look, and give up."""
        yield
        length = sum(piece.length for piece in pieces)
        held = self.files.get(allocation)
        if held is None:
            return Wiped(punched=True, sanitised_bytes=length, read_back_bytes=0)
        if allocation in self.broken:
            raise OSError(f"{allocation} does not read zero")
        for piece in pieces:
            held.wipe(piece.offset, piece.length)
            if not held.zero(piece.offset, piece.length):
                raise OSError(f"{allocation} does not read zero")
        if not part:
            self.drop(allocation, pool)
        return Wiped(punched=True, sanitised_bytes=length, read_back_bytes=length)

    def drop(self, allocation: str, pool: int) -> None:
        """Remove the bytes and every link."""
        for directory in self.links:
            self.conceal(allocation, directory)
        held = self.files.pop(allocation, None)
        if held is not None:
            held.gone = True

    def incarnation(self) -> str:
        """The present one."""
        return self._incarnation

    def renew(self) -> str:
        """Forget everything."""
        for allocation in list(self.files):
            self.drop(allocation, 0)
        self._incarnations += 1
        self._incarnation = f"memory-{self._incarnations}"
        return self._incarnation

    def reconcile(
        self, files: Mapping[str, bool], exposed: Mapping[str, Sequence[str]]
    ) -> tuple[list[str], set[tuple[str, str]]]:
        """Keep what the device knows."""
        for directory, links in self.links.items():
            for allocation in [name for name in links if name not in exposed.get(directory, ())]:
                self.conceal(allocation, directory)
        missing = sorted(name for name, must in files.items() if must and name not in self.files)
        for allocation in [name for name in self.files if name not in files]:
            self.drop(allocation, 0)
        kept = {(directory, name) for directory, links in self.links.items() for name in links}
        return missing, kept
