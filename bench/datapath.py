"""Read and write bandwidth through `tagmem.open`, against a raw `mmap` of the same file.

Both map the same bytes of shared memory; they are copied by numpy, so it is the memory that is
measured.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import tagmem
from bench.measure import interleave
from bench.placement import tag_of
from bench.report import Figure, Report, compared

AIM = 0.99
_TAG = tag_of(1)
SHARED_MEMORY = "/dev/shm"
Array = NDArray[np.uint64]


@contextmanager
def surfaced(size_bytes: int) -> Iterator[Path]:
    """A run directory with one DAX device, as a host agent makes it; yields its path."""
    with tempfile.TemporaryDirectory(prefix="tagmem-bench-", dir=SHARED_MEMORY) as name:
        run_dir = Path(name)
        device = run_dir / "dax0.1"
        device.mkdir()
        media = device / "dax0.1"
        with media.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        attributes = {
            "size": size_bytes,
            "align": 2 << 20,
            "uuid": _TAG,
            "mode": "devdax",
            "read_only": 0,
        }
        for attribute, value in attributes.items():
            (device / attribute).write_text(f"{value}\n", "utf-8")
        (run_dir / "by-tag").mkdir()
        (run_dir / "by-tag" / _TAG).symlink_to("../dax0.1/dax0.1")
        yield run_dir


def _bandwidth(size_bytes: int, copy: Callable[[], object], repeats: int) -> Callable[[], float]:
    def measure() -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            copy()
        return size_bytes * repeats / (time.perf_counter() - begun)

    return measure


def run(*, quick: bool) -> Report:
    size = (64 if quick else 512) << 20
    rounds = 11 if quick else 61
    figures: list[Figure] = []
    with surfaced(size) as run_dir:
        path = run_dir / "dax0.1" / "dax0.1"
        with path.open("r+b") as file, tagmem.open(_TAG, run_dir=run_dir, timeout=0) as capacity:
            raw = mmap.mmap(file.fileno(), size)
            ours: Array = capacity.numpy(np.uint64)
            floor: Array = np.frombuffer(raw, np.uint64)
            here: Array = np.arange(size // 8, dtype=np.uint64)

            # The first touch makes page tables, which is not bandwidth.
            def write(to: Array) -> Callable[[], object]:
                return lambda: np.copyto(to, here)

            def read(source: Array) -> Callable[[], object]:
                return lambda: np.copyto(here, source)

            write(ours)()
            write(floor)()
            for name, kind in (("write", write), ("read", read)):
                pair = interleave(
                    _bandwidth(size, kind(ours), 1), _bandwidth(size, kind(floor), 1), rounds
                )
                met = pair.ratio.median >= AIM
                figures.append(compared(f"{name} bandwidth", pair, "B/s", f"at least {AIM}", met))
            figures.append(_opening(run_dir, path, size, rounds))
            del ours, floor
            raw.close()
    about = f"{size >> 20} MiB of shared memory, one thread. Opening and mapping is its own line."
    return Report("datapath", about, tuple(figures))


def _opening(run_dir: Path, path: Path, size: int, rounds: int) -> Figure:
    def by_tag() -> float:
        begun = time.perf_counter()
        with tagmem.open(_TAG, run_dir=run_dir, timeout=0):
            return time.perf_counter() - begun

    def by_path() -> float:
        begun = time.perf_counter()
        fd = os.open(path, os.O_RDWR)
        mapping = mmap.mmap(fd, size)
        os.close(fd)
        taken = time.perf_counter() - begun
        mapping.close()
        return taken

    pair = interleave(by_tag, by_path, rounds * 10)
    return compared("tagmem.open against open and mmap", pair, "s")
