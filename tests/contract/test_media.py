"""What any medium promises an appliance: files by tag, one file by DPA, and the fake in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tagmem.appliance.media import ByDpaMedia, ByTagMedia, open_media
from tagmem.base.errors import Conflict, InvalidInput
from tagmem.base.units import MIB
from tagmem.ports import Media, MediaPiece, Wiped
from tagmem.testing.media import MemoryMedia

B = 2 * MIB
T1 = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
T2 = "00000000-0000-4000-8000-000000000002"
W1, W2 = "w1", "w2"
ROWS = ((4 * B, B, 0), (B, B, B))
"""(pool offset, length, offset in the allocation): content order is not address order."""


class Bench(Protocol):
    """A medium, and a process that uses it."""

    @property
    def media(self) -> Media: ...

    def directory(self, host: str) -> str: ...
    def write(self, allocation: str, at: int, data: bytes) -> None: ...
    def read(self, allocation: str, at: int, length: int) -> bytes: ...


class Files:
    def __init__(self, root: Path, layout: str) -> None:
        self.root = root
        self.layout = layout
        self.media: ByTagMedia | ByDpaMedia = self.open()
        self.media.renew()

    def open(self) -> ByTagMedia | ByDpaMedia:
        hosts = [self.directory(W1), self.directory(W2)]
        return open_media(self.layout, self.root, hosts, {0: 8 * B})

    def directory(self, host: str) -> str:
        return str(self.root / "hosts" / host)

    def write(self, allocation: str, at: int, data: bytes) -> None:
        descriptor = self.media.descriptor(allocation, 0, read_only=False)
        os.pwrite(descriptor, data, at)
        os.close(descriptor)

    def read(self, allocation: str, at: int, length: int) -> bytes:
        descriptor = self.media.descriptor(allocation, 0, read_only=True)
        data = os.pread(descriptor, length, at)
        os.close(descriptor)
        return data


class Memory:
    def __init__(self) -> None:
        self.media = MemoryMedia()
        self.media.renew()

    def directory(self, host: str) -> str:
        return host

    def write(self, allocation: str, at: int, data: bytes) -> None:
        self.media.files[allocation].write(at, data)

    def read(self, allocation: str, at: int, length: int) -> bytes:
        return self.media.files[allocation].read(at, length)


@pytest.fixture
def shm() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["by-tag", "by-dpa", "memory"])
def bench(request: pytest.FixtureRequest, shm: Path) -> Iterator[Bench]:
    if request.param == "memory":
        yield Memory()
        return
    files = Files(shm, request.param)
    yield files
    files.media.close()


@pytest.fixture
def files(shm: Path) -> Iterator[Files]:
    files = Files(shm, "by-tag")
    yield files
    files.media.close()


def finish(job: Generator[None, None, Wiped]) -> Wiped:
    found: list[Wiped] = []

    def run() -> Generator[None, None, None]:
        found.append((yield from job))

    for _ in run():
        pass
    return found[0]


def made(bench: Bench, allocation: str = T1) -> tuple[MediaPiece, ...]:
    pieces = bench.media.positions(ROWS)
    bench.media.create(allocation, 0, pieces)
    bench.media.expose(allocation, bench.directory(W1))
    return pieces


def test_new_bytes_read_zero_and_stay(bench: Bench) -> None:
    pieces = made(bench)
    assert bench.read(T1, pieces[0].offset, 100) == bytes(100)
    bench.write(T1, pieces[1].offset, b"here")
    made(bench)
    assert bench.read(T1, pieces[1].offset, 4) == b"here"


def test_wiped_bytes_were_read_back(bench: Bench) -> None:
    pieces = made(bench)
    for piece in pieces:
        bench.write(T1, piece.offset, b"secret")
    wiped = finish(bench.media.sanitise(T1, 0, pieces))
    assert (wiped.punched, wiped.sanitised_bytes, wiped.read_back_bytes) == (True, 2 * B, 2 * B)
    pieces = made(bench, T2)
    assert bench.read(T2, pieces[0].offset, 100) == bytes(100)
    finish(bench.media.sanitise(T1, 0, ()))


def test_part_of_a_tag_is_wiped_alone(bench: Bench) -> None:
    pieces = made(bench)
    for piece in pieces:
        bench.write(T1, piece.offset, b"secret")
    wiped = finish(bench.media.sanitise(T1, 0, pieces[:1], part=True))
    assert wiped.read_back_bytes == B
    assert bench.read(T1, pieces[0].offset, 6) == bytes(6)
    assert bench.read(T1, pieces[1].offset, 6) == b"secret"


def test_revoked_bytes_are_nobodys(bench: Bench) -> None:
    pieces = made(bench)
    assert bench.media.revoke(T1, 0, pieces) == ()
    finish(bench.media.sanitise(T1, 0, pieces))


def test_everything_may_be_said_twice(bench: Bench) -> None:
    made(bench)
    for _ in range(2):
        bench.media.conceal(T1, bench.directory(W1))
        bench.media.conceal(T2, bench.directory(W2))
    for _ in range(2):
        bench.media.drop(T1, 0)


def test_a_new_incarnation_has_another_name(bench: Bench) -> None:
    first = bench.media.incarnation()
    assert first
    made(bench)
    second = bench.media.renew()
    assert second != first
    assert bench.media.incarnation() == second


def test_reconciling_keeps_what_the_device_knows(bench: Bench) -> None:
    made(bench)
    made(bench, T2)
    missing, _ = bench.media.reconcile({T1: True}, {bench.directory(W1): [T1]})
    assert missing == []
    pieces = made(bench)
    assert bench.read(T1, pieces[0].offset, 1) == b"\0"


# ---- what files do beyond that


def test_links_follow_exposure_and_nothing_else_is_touched(files: Files) -> None:
    made(files)
    made(files, T2)
    mine = Path(files.directory(W1), "notes.txt")
    mine.write_text("mine")
    link = Path(files.directory(W1), T1)
    assert os.path.samefile(link, files.root / "media" / T1)
    wanted = {files.directory(W1): [T2]}
    assert files.media.reconcile({T2: True, "gone": True}, wanted) == (
        ["gone"],
        {(files.directory(W1), T2)},
    )
    assert mine.exists()
    assert not link.exists()
    assert sorted(os.listdir(files.root / "media")) == [T2]


@pytest.mark.parametrize("change", [lambda f: os.truncate(f, 100), lambda f: os.truncate(f, 9 * B)])
def test_files_that_an_application_cut_or_grew_are_wiped_whole(
    files: Files, change: Callable[[Path], None]
) -> None:
    pieces = made(files)
    files.write(T1, 0, b"secret")
    link = Path(files.directory(W1), T1)
    change(link)
    stale = os.open(link, os.O_RDWR)
    wiped = finish(files.media.sanitise(T1, 0, pieces))
    assert wiped.read_back_bytes >= 2 * B
    assert os.fstat(stale).st_size == 0
    os.close(stale)
    assert not link.exists()


def test_a_stale_descriptor_reaches_nobodys_bytes(files: Files) -> None:
    pieces = made(files)
    stale = os.open(Path(files.directory(W1), T1), os.O_RDWR)
    files.media.revoke(T1, 0, pieces)
    os.pwrite(stale, b"late", 0)
    assert files.read(T1, 0, 4) == bytes(4)
    os.close(stale)


def test_media_are_one_process_own(files: Files) -> None:
    with pytest.raises(Conflict, match="media_dir"):
        files.open()


def test_media_that_cannot_be_used_are_named(shm: Path) -> None:
    (shm / "file").write_text("")
    with pytest.raises(InvalidInput, match="media_dir"):
        open_media("by-tag", shm / "file", [], {})
    with pytest.raises(InvalidInput, match="hugetlbfs"):
        open_media("by-tag", shm, [], {}, hugetlbfs=True)


def test_what_shows_a_tag_to_guests_stands_in_front_of_its_capacity(tmp_path: Path) -> None:
    """Written beforehand, because a host may be allowed to read only; and wiped with the rest."""
    host = tmp_path / "host"
    media = ByTagMedia(
        tmp_path, [str(host)], head_bytes=8192, header=lambda name, size: (4096, name.encode())
    )
    pieces = media.positions([(0, 4096, 0)])
    media.create("some-tag", 0, pieces)
    media.expose("some-tag", str(host))
    assert (host / "some-tag").read_bytes() == bytes(4096) + b"some-tag".ljust(8192, b"\0")
    for _ in media.sanitise("some-tag", 0, pieces):
        pass
    assert not (host / "some-tag").exists() or not any((host / "some-tag").read_bytes())
    media.close()
