"""Builds what a host agent and the kernel surface, as real files, for tests that map tags."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

TAG = "6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f"
OTHER = "00000000-0000-4000-8000-000000000001"
MIB = 1 << 20


def surface(
    run_dir: Path,
    size: int = 2 * MIB,
    *,
    tag: str = TAG,
    name: str = "dax0.1",
    read_only: bool = False,
    content: bytes = b"",
    pieces: Sequence[tuple[int, int]] | None = None,
    sharing: str = "",
) -> Path:
    """One tag in a run directory. With `pieces` there is no file: the media are by DPA."""
    folder = run_dir / name
    folder.mkdir(parents=True)
    values = {
        "size": size,
        "align": 2 * MIB,
        "uuid": tag,
        "mode": "devdax",
        "read_only": int(read_only),
        **({"sharing": sharing} if sharing else {}),
    }
    for attribute, value in values.items():
        (folder / attribute).write_text(f"{value}\n")
    listed = pieces if pieces is not None else [(0, size)]
    (folder / "extents").write_text(json.dumps([{"offset": o, "length": n} for o, n in listed]))
    if pieces is None:
        with open(folder / name, "wb") as media:
            media.truncate(size)
            media.write(content)
    by_tag = run_dir / "by-tag"
    by_tag.mkdir(exist_ok=True)
    os.symlink(f"../{name}/{name}", by_tag / tag)
    return folder / name


def kernel_device(sysfs: Path, dev: Path, name: str, *, tag: str, size: int) -> Path:
    """A DAX device as the DCD patches surface it; its bytes are a file in place of /dev/daxX.Y."""
    folder = sysfs / "bus/dax/devices" / name
    folder.mkdir(parents=True)
    for attribute, value in {"size": size, "align": 2 * MIB, "uuid": tag}.items():
        (folder / attribute).write_text(f"{value}\n")
    dev.mkdir(exist_ok=True)
    with open(dev / name, "wb") as media:
        media.truncate(size)
    return dev / name
