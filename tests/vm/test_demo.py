"""`tagmem demo --vm`: the seven steps with memcached in a guest, as a newcomer runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tagmem.demo import system
from tagmem.demo.layout import Layout
from tagmem.lab.boot import Lab

DEMO_SECONDS = 600


def test_the_demo_with_memcached_in_a_guest(lab: Lab, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tagmem", "demo", "--vm", "--state-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
    )
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr
    loaded = re.search(r"read back\s+([\d,]+) of \1 equal", told)
    assert loaded, told
    assert int(loaded[1].replace(",", "")) >= 200_000
    assert f"{loaded[1]} of {loaded[1]} found in the tag's extents" in told
    assert re.search(r"in the guest\s+/dev/dax\S+: 134,217,728 bytes, uuid [0-9a-f-]{36}", told)
    assert re.search(r"mapped by\s+QEMU \(pid \d+\) ok", told)
    assert "no DAX device and no memcached, ok" in told
    assert "no process maps the bytes or has them open" in told
    assert re.search(r"read in db2\s+134,217,728 bytes as vhost-pmem, all zero", told)
    layout = Layout.of(tmp_path)
    assert not system.is_running(layout)
    assert not system.strays(layout)
    assert not layout.volatile.exists()
