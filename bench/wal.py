"""What a SQLite log says about commits: how many there were, and how large.

Counted in the file itself (https://www.sqlite.org/fileformat2.html#walformat), so the daemons are
measured as they are, and the floor makes as many writes of the same sizes.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = 32
_FRAME_HEADER = 24
_FRAME = struct.Struct(">II8s")


def commits(database: Path) -> list[int]:
    """Bytes of each commit in the log of `database` since it was last begun anew, in order."""
    path = database.with_name(database.name + "-wal")
    if not path.exists():
        return []
    data = path.read_bytes()
    if len(data) < _HEADER:
        return []
    page_bytes = int.from_bytes(data[8:12], "big")
    salt = data[16:24]
    sizes: list[int] = []
    at, begun = _HEADER, _HEADER
    while at + _FRAME_HEADER + page_bytes <= len(data):
        _, pages_after, found = _FRAME.unpack_from(data, at)
        if found != salt:
            break  # a frame of an earlier round
        at += _FRAME_HEADER + page_bytes
        if pages_after:
            sizes.append(at - begun)
            begun = at
    return sizes
