"""DAX devices: one suite for the emulated host and the kernel's surface (a recorded tree)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from tagmem.agent.devices import EmulatedDax
from tagmem.agent.kernel import KernelDax
from tagmem.base.units import MIB
from tagmem.ports import DaxDevices, DaxSource, MediaPiece

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
OTHER = "0f2a8a3c-1c5d-4e6f-9a7b-3b2d1c0e4f55"
ABSENT = "11111111-2222-4333-8444-555555555555"
SIZES = {TAG: 4 * MIB, OTHER: 2 * MIB}
SYSFS = Path(__file__).parent.parent / "data" / "sysfs"


class RecordedKernel(KernelDax):
    """Does what the kernel does when a tag is written: the device gets the size of its extents."""

    def _claim(self, tag: str) -> Path:
        device = super()._claim(tag)
        size = sum(piece.length for piece in self.pieces(tag))
        (device / "size").write_text(f"{size}\n")
        return device


class Host:
    def __init__(self, kind: str, base: Path) -> None:
        self.kind, self.run, self.media = kind, base / "run", base / "media"
        self.sys, self.dev = base / "sys", base / "dev"
        self.media.mkdir()
        self.dev.mkdir()
        shutil.copytree(SYSFS, self.sys)
        for name in ("dax0.0", "dax0.1"):
            (self.dev / name).touch()
        for tag, size in SIZES.items():
            os.truncate(_touch(self.media / tag), size)

    def devices(self) -> DaxDevices:
        if self.kind == "kernel":
            return RecordedKernel(self.run, self.sys, self.dev)
        return EmulatedDax(self.run)

    def source(self, tag: str) -> DaxSource:
        size = SIZES.get(tag, 2 * MIB)
        pieces = (MediaPiece(0, size),)
        return DaxSource(tag, 0, size, 2 * MIB, False, str(self.media / tag), pieces)


def _touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.fixture(params=["emulated", "kernel"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return Host(request.param, tmp_path)


def test_a_tag_surfaces_under_its_name(host: Host) -> None:
    devices = host.devices()
    path = devices.surface(host.source(TAG))
    assert Path(path).exists()
    assert (host.run / "by-tag" / TAG).resolve() == Path(path).resolve()
    assert Path(devices.found()[TAG]).resolve() == Path(path).resolve()
    status = os.stat(path)
    assert devices.identities(TAG) == ((status.st_dev, status.st_ino),)


def test_surfacing_again_changes_nothing(host: Host) -> None:
    devices = host.devices()
    path = devices.surface(host.source(TAG))
    assert devices.surface(host.source(TAG)) == path
    assert host.devices().surface(host.source(TAG)) == path, "nor does a new agent"


def test_two_tags_have_two_devices(host: Host) -> None:
    devices = host.devices()
    first, second = devices.surface(host.source(TAG)), devices.surface(host.source(OTHER))
    assert first != second
    assert set(devices.found()) == {TAG, OTHER}


def test_what_is_withdrawn_is_not_found(host: Host) -> None:
    devices = host.devices()
    devices.surface(host.source(TAG))
    identity = devices.identities(TAG)
    assert devices.withdraw(TAG) == ()
    assert not os.path.lexists(host.run / "by-tag" / TAG)
    assert TAG not in devices.found()
    assert devices.identities(TAG) == identity, "its holders can still be looked for"
    assert devices.withdraw(TAG) == ()


def test_it_surfaces_again_after_being_withdrawn(host: Host) -> None:
    devices = host.devices()
    devices.surface(host.source(TAG))
    devices.withdraw(TAG)
    assert Path(devices.surface(host.source(TAG))).exists()


def test_what_is_given_up_is_forgotten(host: Host) -> None:
    devices = host.devices()
    devices.surface(host.source(TAG))
    devices.withdraw(TAG)
    devices.give_up(TAG)
    devices.give_up(TAG)
    assert devices.identities(TAG) == ()
    assert host.devices().found() == {}


def test_what_is_not_there_cannot_surface(host: Host) -> None:
    devices = host.devices()
    with pytest.raises(OSError, match=ABSENT):
        devices.surface(host.source(ABSENT))
    assert ABSENT not in devices.found()
    assert not os.path.lexists(host.run / "by-tag" / ABSENT)


# ---- the emulated host alone


def test_attributes_read_as_in_sysfs(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    source = msgspec.structs.replace(host.source(TAG), sharing="hardware-coherent")
    path = Path(host.devices().surface(source))
    values = {entry.name: entry.read_text() for entry in path.parent.iterdir() if entry != path}
    assert values == {
        "size": "4194304\n",
        "align": "2097152\n",
        "uuid": TAG + "\n",
        "mode": "devdax\n",
        "read_only": "0\n",
        "extents": '[{"offset":0,"length":4194304}]\n',
        "sharing": "hardware-coherent\n",
    }
    assert path.parent.name == path.name == "dax0.1"


def test_where_a_pool_has_the_bytes_is_found_by_the_next_agent(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    pieces = (MediaPiece(8 * MIB, 2 * MIB), MediaPiece(0, 2 * MIB))
    source = DaxSource(TAG, 0, 4 * MIB, 2 * MIB, False, "", pieces, pool="/media/pool 0")
    devices = host.devices()
    devices.surface(source)
    devices.surface(host.source(OTHER))
    assert devices.pool(TAG) == host.devices().pool(TAG) == ("/media/pool 0", pieces)
    assert devices.pool(OTHER) is None, "it has a file of its own"
    assert devices.withdraw(TAG) == ()
    assert devices.pool(TAG) is None


def test_files_left_beside_the_bytes_go_and_are_named(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    devices = host.devices()
    path = Path(devices.surface(host.source(TAG)))
    path.with_name(path.name + ".meta").write_text("state")
    assert devices.withdraw(TAG) == ("dax0.1.meta",)
    assert not path.parent.exists()
    assert (host.media / TAG).exists(), "the bytes are the appliance's"


def test_bytes_that_lost_their_last_name_stay_open_until_given_up(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    devices = host.devices()
    devices.surface(host.source(TAG))
    devices.surface(host.source(OTHER))
    (host.media / TAG).unlink()  # As an appliance does that takes a tag by force.
    devices.withdraw(TAG)
    devices.withdraw(OTHER)
    assert devices.descriptor(OTHER) == -1
    descriptor = devices.descriptor(TAG)
    assert os.fstat(descriptor).st_nlink == 0
    devices.give_up(TAG)
    assert devices.descriptor(TAG) == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_names_are_used_again_lowest_first(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    devices = host.devices()
    devices.surface(host.source(TAG))
    assert devices.surface(host.source(OTHER)).endswith("dax0.2")
    devices.withdraw(TAG)
    assert host.devices().surface(host.source(TAG)).endswith("dax0.1")


def test_halves_of_a_crash_are_cleared_away(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    path = Path(host.devices().surface(host.source(TAG)))
    (host.run / ".new-dax0.2").mkdir()
    (host.run / ".gone-dax0.3").mkdir()
    (host.run / "by-tag" / TAG).unlink()
    (host.run / "by-tag" / OTHER).symlink_to("../dax0.9/dax0.9")
    assert host.devices().found() == {TAG: str(path)}
    assert sorted(entry.name for entry in host.run.iterdir()) == ["by-tag", "dax0.1"]
    assert [entry.name for entry in (host.run / "by-tag").iterdir()] == [TAG]


def test_a_read_only_tag_cannot_be_written_even_by_root(tmp_path: Path) -> None:
    host = Host("emulated", tmp_path)
    source = DaxSource(TAG, 0, SIZES[TAG], 2 * MIB, True, str(host.media / TAG), ())
    devices = host.devices()
    if os.geteuid() != 0:
        with pytest.raises(PermissionError, match="a read-only tag needs it"):
            devices.surface(source)
        return
    path = devices.surface(source)
    with pytest.raises(OSError, match="Read-only"):
        os.open(path, os.O_RDWR)
    assert Path(path).read_bytes()[:1] == b"\0"
    devices.withdraw(TAG)
    assert not Path(path).parent.exists()


def test_the_kernel_keeps_the_order_of_extents() -> None:
    kernel = KernelDax(Path(os.devnull).parent / "shm" / f"tagmem-test-{os.getpid()}", SYSFS)
    try:
        assert kernel.pieces(TAG) == (MediaPiece(0, 2 * MIB), MediaPiece(8 * MIB, 2 * MIB))
    finally:
        shutil.rmtree(f"/dev/shm/tagmem-test-{os.getpid()}")
