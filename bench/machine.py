"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path

from bench.measure import Sample
from bench.report import scaled


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sync_times(directory: Path, size_bytes: int, count: int = 100) -> Sample:
    """Seconds of one write of `size_bytes` behind the last, with fdatasync, as a log does it."""
    times: list[float] = []
    data = os.urandom(size_bytes)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(count):
            begun = time.perf_counter()
            file.write(data)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return Sample(tuple(times))


def describe(directory: Path) -> list[str]:
    """Lines about this machine and the disk below `directory`."""
    sync = sync_times(directory, 4096)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    disk = f"{scaled(sync.median, 's')} (p99 {scaled(sync.at(0.99), 's')})"
    return [
        f"- CPU: {cpu_name()}, {os.cpu_count()} cores; {memory_bytes() / 2**30:.0f} GiB of memory",
        f"- {platform.system()} {platform.release()}; {python}",
        f"- 4 KiB written and fdatasync'ed: {disk} where the daemons keep their state",
    ]
