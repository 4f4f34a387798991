"""Placeholders, and the library that lets a program take a DAX device for a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tagmem.client import launch

TAG = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
FILE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8192)
os.posix_fallocate(fd, 0, 16384)
memory = mmap.mmap(fd, 4096)
memory[:2] = b"ab"
memory.flush()
os.fsync(fd)
os.fdatasync(fd)
print(os.fstat(fd).st_size)
for wrong in (lambda: os.ftruncate(fd, -1), lambda: os.ftruncate(0, 4096), lambda: os.fsync(99)):
    try:
        wrong()
    except OSError as error:
        print(error.errno)
"""


def test_other_braces_stay_as_they_are() -> None:
    known = launch.values(TAG, "/dev/dax0.0", 4096)
    assert launch.fill("{dax} {size} {tag} {x} {{dax}}", known) == (
        f"/dev/dax0.0 4096 {TAG} {{x}} {{/dev/dax0.0}}"
    )
    assert launch.fill("{dax}", launch.values(TAG, "", 4096)) == "{dax}"


def test_the_library_leaves_files_alone(tmp_path: Path) -> None:
    name, value = launch.AS_FILE
    environment = os.environ | {name: launch.fill(value, launch.values(TAG, "", 0))}
    script = [sys.executable, "-S", "-c", FILE, str(tmp_path / "file")]
    told = {
        preloaded: subprocess.run(
            script, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
        for preloaded, env in ((True, environment), (False, dict(os.environ)))
    }
    assert told[True].stderr == told[False].stderr == ""
    assert told[True].stdout == told[False].stdout
    assert told[True].stdout.startswith("16384\n22\n")
