"""A shared tag of no appliance: one run directory per host, as its agent would make it, whose bytes
are that host's view. What `tagmem.open` finds there, it opens like any other.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from tagmem.base.ids import Tag

ALIGN_BYTES = 4096


class View:
    """One host's view: a file that the host maps, and that is filled line by line as it looks."""

    def __init__(self, directory: Path, tag: Tag, size_bytes: int, *, host: int) -> None:
        self.run_dir = directory
        self.host = host
        name = "dax0.1"
        device = directory / name
        device.mkdir(parents=True)
        (directory / "by-tag").mkdir()
        self.path = device / name
        with self.path.open("wb") as file:
            file.truncate(size_bytes)
        for attribute, value in {
            "size": str(size_bytes),
            "align": str(ALIGN_BYTES),
            "uuid": tag,
            "mode": "devdax",
            "read_only": "0",
            "sharing": "software-coherent",
            "extents": f'[{{"offset":0,"length":{size_bytes}}}]',
        }.items():
            (device / attribute).write_text(f"{value}\n", encoding="ascii")
        (directory / "by-tag" / tag).symlink_to(f"../{name}/{name}")
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.bytes = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)

    @property
    def identity(self) -> str:
        """As the tracer is told of it."""
        status = self.path.stat()
        return f"{status.st_dev}:{status.st_ino}:{self.host}"

    def close(self) -> None:
        """Let go of it."""
        self.bytes.close()
