"""The proof names real processes that hold a file, and claims nothing that it could not see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tagmem.agent.proof import Proof, Prover, Target

HOLD = """
import mmap, os, sys
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
if how == "maps":
    kept = mmap.mmap(fd, 4096)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bytes_of_a_tag(tmp_path: Path) -> Path:
    path = tmp_path / "host" / "tag"
    path.parent.mkdir()
    path.write_bytes(bytes(8192))
    return path


def target(path: Path, *, shared: bool = False, paths: bool = True) -> Target:
    status = path.stat()
    identity = ((status.st_dev, status.st_ino),)
    ours = (str(path.parent) + "/",)
    return Target("t", (str(path),) if paths else (), identity, ours, shared=shared)


@pytest.fixture
def holder(bytes_of_a_tag: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    how = getattr(request, "param", "maps")
    path = bytes_of_a_tag
    arguments = [sys.executable, "-S", "-c", HOLD, how, str(path)]
    child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.communicate()


@pytest.mark.parametrize("holder", ["maps", "open"], indirect=True)
def test_a_holder_is_named(bytes_of_a_tag: Path, holder: subprocess.Popen[str]) -> None:
    proof = Prover().check([target(bytes_of_a_tag)])["t"]
    assert [h.pid for h in proof.holders] == [holder.pid]
    assert proof.holders[0].name.startswith("python")
    holder.communicate("")
    assert Prover().check([target(bytes_of_a_tag)])["t"] == Proof()


def test_a_holder_is_named_when_the_name_has_gone(
    bytes_of_a_tag: Path, holder: subprocess.Popen[str]
) -> None:
    wanted = target(bytes_of_a_tag, paths=False)
    bytes_of_a_tag.unlink()
    assert [h.pid for h in Prover().check([wanted])["t"].holders] == [holder.pid]


def test_what_nobody_opened_needs_no_look(bytes_of_a_tag: Path) -> None:
    prover = Prover()
    assert prover.check([target(bytes_of_a_tag)]) == {"t": Proof()}
    assert prover.looks == 0


def proc_of(tmp_path: Path, *pids: int) -> str:
    """A /proc with these processes alone: on some machines not even root may read all of them."""
    proc = tmp_path / "few"
    proc.mkdir()
    for pid in pids:
        (proc / str(pid)).symlink_to(f"/proc/{pid}")
    return str(proc)


def test_many_tags_share_one_look(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    targets = []
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        status = path.stat()
        targets.append(Target(str(number), (), ((status.st_dev, status.st_ino),), ()))
    prover = Prover(proc_of(tmp_path, holder.pid))
    assert all(proof == Proof() for proof in prover.check(targets).values())
    assert prover.looks == 1


def test_the_device_itself_is_no_holder(
    bytes_of_a_tag: Path, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    prover = Prover(proc_of(tmp_path, holder.pid))
    prover.excluded = {holder.pid}
    assert prover.check([target(bytes_of_a_tag)])["t"] == Proof()


def test_another_hosts_process_counts_only_where_nothing_is_shared(
    bytes_of_a_tag: Path, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    mine = tmp_path / "mine"
    os.link(bytes_of_a_tag, mine)
    status = mine.stat()
    identity = ((status.st_dev, status.st_ino),)
    prover = Prover(proc_of(tmp_path, holder.pid))
    for shared, expected in ((True, 0), (False, 1)):
        wanted = Target("t", (str(mine),), identity, (f"{tmp_path}/run/",), shared=shared)
        proof = prover.check([wanted])["t"]
        assert proof.complete
        assert len(proof.holders) == expected


def test_processes_that_may_not_be_read_leave_nothing_proved(bytes_of_a_tag: Path) -> None:
    wanted = target(bytes_of_a_tag, paths=False)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        proof = Prover().check([wanted])["t"]
    finally:
        os.seteuid(user)
    assert not proof.complete
    assert "may not be read" in proof.reason


def test_an_invisible_holder_is_not_proved_away(
    bytes_of_a_tag: Path, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    empty = tmp_path / "proc"
    empty.mkdir()
    proof = Prover(str(empty)).check([target(bytes_of_a_tag)])["t"]
    assert not proof.complete
    assert "no process in /proc shows it" in proof.reason


def test_holders_are_ended_when_the_host_is_restarted(
    bytes_of_a_tag: Path, holder: subprocess.Popen[str]
) -> None:
    prover = Prover()
    assert [h.pid for h in prover.kill(target(bytes_of_a_tag))] == [holder.pid]
    assert holder.wait(5) == -9
    assert prover.check([target(bytes_of_a_tag)])["t"] == Proof()
