"""Holders of character devices and of threads: what a guest's proof needs beyond a host's (whose
tests are in unit/agent/test_proof.py)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from tagmem.io.holders import DEVICE, Proof, Prover, Target, identities_of

OPEN = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(1, flush=True); sys.stdin.read()"


def few(tmp_path: Path, *pids: int) -> str:
    proc = tmp_path / "proc"
    proc.mkdir()
    for pid in pids:
        (proc / str(pid)).symlink_to(f"/proc/{pid}")
    return str(proc)


def test_a_device_is_known_by_its_number_whatever_its_node(tmp_path: Path) -> None:
    """Here /dev/full through its one node; the target knows of another, which is gone."""
    status = os.stat("/dev/full")
    assert stat.S_ISCHR(status.st_mode)
    file, device = identities_of("/dev/full")
    assert (file, device) == ((status.st_dev, status.st_ino), (DEVICE, status.st_rdev))
    with subprocess.Popen(
        [sys.executable, "-S", "-c", OPEN, "/dev/full"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        prover = Prover(few(tmp_path, child.pid), threads=True)
        [proof] = prover.check([Target("t", (), (device,))]).values()
        other = (DEVICE, os.makedev(1, 250))
        nobody = prover.check([Target("t", (), (other,))])["t"]
        child.communicate(b"")
    assert [(holder.pid, holder.how) for holder in proof.holders] == [(child.pid, "open")]
    assert nobody == Proof()


THREAD = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def run():
    assert libc.unshare(0x400) == 0  # CLONE_FILES: descriptors of its own from here on
    os.open(sys.argv[1], os.O_RDWR)
    print(1, flush=True)
    threading.Event().wait()
threading.Thread(target=run, daemon=True).start()
sys.stdin.read()
"""


def test_a_threads_own_descriptors_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"x")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", THREAD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        proc = few(tmp_path, child.pid)
        target = Target("t", (), identities_of(str(path)))
        seen = Prover(proc, threads=True).check([target])["t"]
        child.communicate(b"")
    assert [holder.pid for holder in seen.holders] == [child.pid]


def test_the_look_itself_is_no_holder(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"x")
    proc = few(tmp_path, os.getpid())
    with path.open("rb"):
        proof = Prover(proc, threads=True).check([Target("t", (), identities_of(str(path)))])
    assert proof == {"t": Proof()}
