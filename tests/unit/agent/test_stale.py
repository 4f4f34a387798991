"""Hosts whose caches lie, on an emulated appliance's region: two run directories on one memory."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

import pytest

import tagmem
from tagmem import shared
from tagmem.agent.devices import EmulatedDax
from tagmem.agent.proof import Prover, Target
from tagmem.base.errors import InvalidInput
from tagmem.ports import DaxSource, MediaPiece
from tagmem.shared.stale import StaleLines, lines_of

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
SIZE = 1 << 20


class Pod:
    """One tag on hosts a and b."""

    def __init__(self, base: Path, seed: int = 1, head: int = 0) -> None:
        self.base, self.head = base, head
        self.medium = base / "medium"
        self.medium.touch()
        os.truncate(self.medium, head + SIZE)
        self.devices: dict[str, EmulatedDax] = {}
        for host in ("a", "b"):
            (base / host).mkdir()
            os.link(self.medium, base / host / TAG)
            (base / host / f"{TAG}.stale").write_text(f"{seed}\n")
            self.devices[host] = EmulatedDax(base / host / "run")
            self.devices[host].surface(self.source(host))

    def source(self, host: str) -> DaxSource:
        pieces = (MediaPiece(self.head, SIZE),)
        return DaxSource(TAG, 0, SIZE, 1 << 21, False, str(self.base / host / TAG), pieces)

    def open(self, host: str) -> tagmem.Capacity:
        return tagmem.open(TAG, timeout=0, run_dir=self.base / host / "run")

    def lines(self, capacity: tagmem.Capacity) -> StaleLines:
        lines = lines_of(capacity)
        assert isinstance(lines, StaleLines)
        return lines


@pytest.fixture(params=[0, 2 << 20])
def pod(request: pytest.FixtureRequest, tmp_path: Path) -> Pod:
    return Pod(tmp_path, head=request.param)


def test_a_store_is_seen_when_it_was_published_and_refreshed(pod: Pod) -> None:
    with pod.open("a") as here, pod.open("b") as there:
        assert here.stale_caches
        mine, other = pod.lines(here), pod.lines(there)
        here.view[100:105] = b"hello"
        assert there.view[100:105] == bytes(5)
        other.invalidate(100, 5)
        assert there.view[100:105] == bytes(5), "nobody has written it back"
        mine.write_back(100, 5)
        mine.fence()
        other.invalidate(100, 5)
        assert bytes(there.view[100:105]) == b"hello"
        mine.release()
        other.release()


def test_what_is_not_invalidated_stays_old_until_the_cache_moves(pod: Pod) -> None:
    with pod.open("a") as here, pod.open("b") as there:
        mine = pod.lines(here)
        here.view[0:1] = b"x"
        mine.write_back(0, 1)
        mine.fence()
        assert there.view[0] == 0
        mine.release()


def test_caches_move_by_themselves_the_same_for_a_seed(tmp_path: Path) -> None:
    def moments(base: Path) -> list[int]:
        """When a line that nobody wrote back arrives in memory."""
        found = []
        base.mkdir()
        pod = Pod(base, seed=3)
        with pod.open("a") as here:
            lines = pod.lines(here)
            for number in range(200):
                here.view[64] = number % 255 + 1
                lines.write_back(0, 1)
                lines.write_back(64, 0)
                lines.invalidate(128, 64)
                # Touched, so that an eviction may choose it.
                lines._recent.append(1)
                if pod.medium.read_bytes()[64] == here.view[64]:
                    found.append(number)
            lines.release()
        return found

    first = moments(tmp_path / "one")
    assert 0 < len(first) < 200
    assert first == moments(tmp_path / "two")


def test_objects_are_right_and_a_forgotten_flush_is_not(pod: Pod) -> None:
    class Forgets(StaleLines):
        def write_back(self, offset: int, length: int) -> None:
            if not 4096 <= offset < 8192:
                super().write_back(offset, length)

    run = {host: pod.base / host / "run" for host in ("a", "b")}
    with shared.create(TAG, run_dir=run["a"], timeout=0) as writer:
        writer.put("x", b"right" * 100)
        with shared.open(TAG, run_dir=run["b"], timeout=0) as reader:
            assert bytes(reader.get("x")) == b"right" * 100
            writer.put("y", b"later")
            assert bytes(reader.get("y")) == b"later"
    with pod.open("a") as capacity:
        folder, name = os.path.split(capacity.path)
        lines = Forgets(folder, name, offset=pod.head, size_bytes=SIZE)
        coherence = shared.SoftwareCoherent(lines)
        with shared.create(capacity, coherence=coherence, replace=True) as writer:
            writer.put("z", b"never seen")
            with pytest.raises(shared.Corrupt):
                shared.open(TAG, run_dir=run["b"], timeout=0)
        lines.release()


def test_a_release_writes_back_and_wipes_the_view(pod: Pod) -> None:
    with pod.open("a") as here:
        here.view[70:73] = b"new"
    view = os.open(pod.devices["a"].found()[TAG], os.O_RDWR)
    mapped = mmap.mmap(view, 4096)
    devices = pod.devices["a"]
    assert devices.withdraw(TAG) == ()
    before = devices.identities(TAG)
    assert os.fstat(view).st_ino in {inode for _, inode in before}
    assert EmulatedDax(pod.base / "a" / "run").identities(TAG) == before, "also a new agent's"
    devices.give_up(TAG)
    devices.give_up(TAG)
    assert devices.identities(TAG) == ()
    assert os.fstat(view).st_size == 0
    at = pod.head + 70
    assert pod.medium.read_bytes()[at : at + 3] == b"new", "a host flushes before it gives away"
    assert os.listdir(pod.base / "a" / "run") == ["by-tag"]
    mapped.close()
    os.close(view)


def test_memory_that_was_fenced_takes_nothing_back(pod: Pod) -> None:
    with pod.open("a") as here:
        here.view[0:3] = b"new"
    pod.devices["a"].withdraw(TAG)
    os.truncate(pod.medium, 0)
    pod.devices["a"].give_up(TAG)
    assert pod.medium.stat().st_size == 0


def test_a_holder_of_the_view_alone_is_found(pod: Pod) -> None:
    devices = pod.devices["a"]
    path = devices.found()[TAG]
    child = os.fork()
    if child == 0:
        held = os.open(path, os.O_RDONLY)
        signal.pause()
        os._exit(held)
    try:
        paths = (str(pod.base / "a" / TAG), *devices.views(TAG))
        target = Target(TAG, paths, tuple(devices.identities(TAG)))
        found: tuple[int, ...] = ()
        while child not in found:
            found = tuple(h.pid for h in Prover().check([target])[TAG].holders)
        assert not Prover().alone(target)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert Prover().alone(target)
    assert not Prover().alone(target._replace(paths=paths[:1])), "one file is not all of them"


def test_ranges_are_checked(pod: Pod) -> None:
    with pod.open("a") as here:
        lines = pod.lines(here)
        for offset, length in ((-1, 1), (SIZE, 1), (0, SIZE + 1)):
            with pytest.raises(InvalidInput):
                lines.write_back(offset, length)
            with pytest.raises(InvalidInput):
                lines.invalidate(offset, length)
        lines.release()
