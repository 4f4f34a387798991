"""A fake of `Lines` that says what was asked of it, so that tests can read the order of things."""

from __future__ import annotations


class RecordingLines:
    """Lines that say what was asked of them."""

    line_bytes = 64
    effective = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def write_back(self, offset: int, length: int) -> None:
        self.seen.append(("write back", offset, length))

    def fence(self) -> None:
        self.seen.append(("fence", 0, 0))

    def invalidate(self, offset: int, length: int) -> None:
        self.seen.append(("invalidate", offset, length))
