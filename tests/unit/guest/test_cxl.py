"""What the agent does to a guest's sysfs for CXL memory, on made-up trees: which files it writes,
in which cases it leaves them alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from struct import pack_into

import pytest
from tests.unit.guest.test_dcdctl import WINDOW, OnType3
from tests.unit.guest.trees import bind, plug, roots_in

from tagmem.base.errors import Conflict, InvalidInput, NotFound, Unsupported
from tagmem.guest import cxl
from tagmem.guest.cxl import Cxl, Device, serial_of
from tagmem.guest.find import Roots, find
from tagmem.testing import type3
from tagmem.testing.type3 import Type3
from tagmem.wire.guest import Told

MIB = 1 << 20
TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
AT = 64 * MIB
SIZE = 4 * MIB
EXTENT = Told(TAG, "cxl", serial="0xabc", size_bytes=SIZE, dpa=AT)
ADDRESS = "0000:21:00.0"
PCI = f"sys/devices/pci0000:20/0000:20:00.0/{ADDRESS}"
HMEM = "sys/devices/platform/hmem.0"


class Guest:
    """A tree, and an agent's hand on it; the device is the simulated one."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.roots = roots_in(base)
        self.roots = self.roots._replace(proc=str(base / "proc"))
        self.device = Type3()
        self.cxl = _OnTree(self)
        self.put("sys/firmware/acpi/tables/CEDT", type3.cedt())
        self.put("sys/bus/dax/drivers_autoprobe", "1\n")
        (base / "sys/bus/dax/drivers/device_dax").mkdir(parents=True)

    def put(self, name: str, value: str | bytes) -> Path:
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.encode() if isinstance(value, str) else value)
        return path

    def read(self, name: str) -> str:
        return (self.base / name).read_text()

    def link(self, name: str, target: str) -> None:
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.base / target, path.parent))

    def claim(self, name: str, driver: str) -> None:
        """As the kernel binds device_dax when it is told to."""
        assert not driver
        bind(self.base, name)

    def dax(self, name: str, at: int, size: int, driver: str = "") -> None:
        """A DAX device in the region of specific-purpose memory over the window."""
        folder = f"{HMEM}/{name}"
        self.put(f"{folder}/resource", f"{at:#x}\n")
        self.put(f"{folder}/size", f"{size}\n")
        self.put(f"{folder}/align", f"{2 * MIB}\n")
        self.link(f"sys/bus/dax/devices/{name}", folder)
        if driver:
            bind(self.base, name, driver)

    def region(self, seed: str = "dax1.1") -> None:
        """dax_hmem's region over all of the window, empty, with its seed device."""
        self.put(f"{HMEM}/dax_region/size", f"{1 << 30}\n")
        self.put(f"{HMEM}/dax_region/seed", f"{seed}\n")
        self.dax("dax1.0", WINDOW, 0)
        # Nobody has it before it is created: it says nothing of itself yet.
        self.put(f"{HMEM}/{seed}/align", f"{2 * MIB}\n")
        self.link(f"sys/bus/dax/devices/{seed}", f"{HMEM}/{seed}")

    def pci(self, address: str = ADDRESS, serial: int = 0xABC, driver: str = "") -> str:
        folder = f"sys/devices/pci0000:20/0000:20:00.0/{address}"
        config = bytearray(Type3.config())
        pack_into("<I", config, 0x100, cxl.SERIAL_CAPABILITY | 1 << 16 | 0x10C << 20)
        pack_into("<Q", config, 0x104, serial)
        self.put(f"{folder}/config", bytes(config))
        self.put(f"{folder}/class", "0x050210\n")
        self.link(f"sys/bus/pci/devices/{address}", folder)
        if driver:
            (self.base / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            self.link(f"{folder}/driver", f"sys/bus/pci/drivers/{driver}")
        return folder


class _OnTree(Cxl):
    def __init__(self, guest: Guest) -> None:
        super().__init__(guest.roots, guest.claim, region_seconds=0)
        self._guest = guest

    def _open(self, told: Told, *, dynamic: bool, seconds: float = 2.0) -> Device:
        return OnType3(self._guest.device)

    def _modprobe(self, modules: object) -> None:
        """No module of the machine under test."""


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


# ---- dynamic capacity


def test_an_extent_becomes_a_dax_device_of_its_own_place(guest: Guest) -> None:
    guest.region()
    guest.device.offer((AT, SIZE))
    assert guest.cxl.take(EXTENT) == WINDOW + AT
    assert [(e.start_dpa, e.length_bytes) for e in guest.device.accepted] == [(AT, SIZE)]
    assert guest.read(f"{HMEM}/dax_region/create") == "1"
    start, end = guest.read(f"{HMEM}/dax1.1/mapping").split("-")
    assert (int(start, 16), int(end, 16)) == (WINDOW + AT, WINDOW + AT + SIZE - 1)
    assert os.readlink(guest.base / HMEM / "dax1.1/driver").endswith("device_dax")
    assert guest.read("sys/bus/dax/drivers_autoprobe") == "1", "as it was before"


def test_one_that_is_there_already_is_found(guest: Guest) -> None:
    guest.region()
    guest.dax("dax1.2", WINDOW + AT, SIZE)
    guest.device.offer((AT, SIZE))
    guest.cxl.take(EXTENT)
    assert not (guest.base / HMEM / "dax_region/create").exists()
    known = EXTENT._replace(serial="", resource=WINDOW + AT)
    [found] = find(guest.roots, [known])
    assert (found.tag, found.kind, found.size_bytes) == (TAG, "cxl-dcd", SIZE)


def test_what_was_not_offered_is_not_touched(guest: Guest) -> None:
    guest.region()
    guest.device.offer((0, SIZE))
    with pytest.raises(NotFound, match="was not offered"):
        guest.cxl.take(EXTENT)
    assert guest.device.accepted == []
    assert not (guest.base / HMEM / "dax1.1/mapping").exists()


def test_a_window_that_was_left_to_ram_says_what_the_kernel_lacks(guest: Guest) -> None:
    guest.device.offer((AT, SIZE))
    with pytest.raises(Unsupported, match="memmap=SIZE%BASE"):
        guest.cxl.take(EXTENT)
    assert guest.read("sys/bus/dax/drivers_autoprobe") == "1", "also when it fails"


def test_a_window_that_somebody_uses_whole_is_not_cut(guest: Guest) -> None:
    guest.put(f"{HMEM}/dax_region/size", f"{1 << 30}\n")
    guest.dax("dax1.0", WINDOW, 1 << 30, "kmem")
    guest.device.offer((AT, SIZE))
    with pytest.raises(Unsupported, match="given to kmem whole"):
        guest.cxl.take(EXTENT)
    assert guest.read(f"{HMEM}/dax1.0/size") == f"{1 << 30}\n"


def test_a_seed_that_is_taken_is_not_reused(guest: Guest) -> None:
    guest.region()
    guest.dax("dax1.2", WINDOW + 8 * MIB, SIZE)
    guest.put(f"{HMEM}/dax_region/seed", "dax1.2\n")
    guest.device.offer((AT, SIZE))
    with pytest.raises(Unsupported, match="makes no DAX device"):
        guest.cxl.take(EXTENT)


def test_an_extent_is_given_back_once_nothing_lies_over_it(guest: Guest) -> None:
    guest.region()
    guest.device.offer((AT, SIZE))
    guest.cxl.take(EXTENT)
    guest.dax("dax1.7", WINDOW + AT + SIZE - 2 * MIB, SIZE, "device_dax")
    with pytest.raises(Conflict, match=r"dax1\.7 lies over"):
        guest.cxl.give(EXTENT)
    assert guest.device.accepted
    guest.cxl.drop("dax1.7")
    assert guest.read("sys/bus/dax/drivers/device_dax/unbind") == "dax1.7"
    assert guest.read(f"{HMEM}/dax1.7/size") == "0"
    assert guest.read(f"{HMEM}/dax_region/delete") == "dax1.7"
    guest.cxl.give(EXTENT)
    guest.cxl.give(EXTENT)
    assert guest.device.accepted == []


@pytest.mark.parametrize(
    ("words", "able"),
    [
        ("quiet memmap=1024M%0xa90000000+0xefffffff", True),
        ("memmap=1G%0xa90000000-1+0xefffffff", True),
        ("memmap=1024M%0x100000000+0xefffffff", False),
        ("memmap=1024M%0xa90000000", False),
        ("quiet", False),
    ],
)
def test_a_guest_says_whether_its_window_is_marked(guest: Guest, words: str, able: bool) -> None:
    mem = guest.put("dev/mem", "")
    guest.put("proc/cmdline", words)
    found = Cxl(guest.roots, guest.claim, str(mem)).features()
    root = os.geteuid() == 0
    assert found == (("cxl-static", *(("cxl",) if able else ())) if root else ())
    assert Cxl(guest.roots, guest.claim, str(mem) + "?").features() == ()


# ---- which device


def opened(guest: Guest, told: Told = EXTENT) -> Device:
    return Cxl(guest.roots, guest.claim)._open(told, dynamic=False, seconds=0)


def test_a_device_is_known_by_its_serial_and_kept_from_drivers(guest: Guest) -> None:
    guest.pci("0000:22:00.0", 0xDEF)
    folder = guest.pci()
    device = opened(guest)
    assert device.folder == os.path.realpath(guest.base / folder)
    assert guest.read(f"{folder}/driver_override") == "tagmem"


def test_a_driver_that_has_it_is_asked_to_let_go(guest: Guest) -> None:
    guest.pci(driver="cxl_pci")
    with pytest.raises(Conflict, match="bound to cxl_pci"):
        opened(guest)
    assert guest.read("sys/bus/pci/drivers/cxl_pci/unbind") == ADDRESS


@pytest.mark.parametrize("serial", ["", "0x0", "0x123"])
def test_a_serial_that_nothing_has_opens_nothing(guest: Guest, serial: str) -> None:
    folder = guest.pci()
    with pytest.raises(NotFound):
        opened(guest, EXTENT._replace(serial=serial))
    assert not (guest.base / folder / "driver_override").exists()


def test_two_devices_of_one_serial_are_not_guessed_between(guest: Guest) -> None:
    guest.pci()
    guest.pci("0000:22:00.0")
    with pytest.raises(NotFound, match="found: 2"):
        opened(guest)


def test_the_window_is_the_one_of_the_bridge_above(guest: Guest) -> None:
    guest.pci()
    device = opened(guest)
    with pytest.raises(NotFound, match="leads to host bridge -1"):
        device._window()
    guest.put("sys/devices/pci0000:20/firmware_node/uid", "12\n")
    bridge, window = device._window()
    assert (bridge, window.base) == (0xA80000000, WINDOW)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config[:64],
        lambda config: bytes(0x100) + b"\xff" * 64,
        # A list that runs in a circle.
        lambda config: bytes(0x100) + (0x23 | 1 << 16 | 0x100 << 20).to_bytes(4, "little") * 8,
        lambda _: b"",
    ],
)
def test_a_serial_is_read_from_any_garbage(spoil: Callable[[bytes], bytes]) -> None:
    assert serial_of(spoil(Type3.config())) == 0


@pytest.mark.parametrize(
    ("told", "field"),
    [
        (EXTENT._replace(serial=""), "told.serial"),
        (EXTENT._replace(dpa=1), "told.dpa"),
        (EXTENT._replace(size_bytes=3 * MIB), "told.size_bytes"),
        (EXTENT._replace(size_bytes=0), "told.size_bytes"),
    ],
)
def test_what_cannot_be_an_extent_is_refused(told: Told, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        cxl.check(told)
    assert caught.value.field == field


# ---- a device per tag


def test_a_region_is_taken_apart_before_its_device_leaves(tmp_path: Path) -> None:
    roots: Roots = roots_in(tmp_path)
    plug(tmp_path, "cxl-static")
    told = Told(TAG, "cxl-static", serial="0xabc")
    [memory] = find(roots, [told])
    (tmp_path / "sys/bus/cxl/drivers/cxl_region").mkdir(parents=True)
    Cxl(roots, lambda _, __: None).tear_down(memory)
    sysfs = tmp_path / "sys"
    root = sysfs / "devices/platform/ACPI0017:00/root0/decoder0.0"
    assert (sysfs / "bus/dax/drivers/device_dax/unbind").read_text() == "dax5.0"
    assert (sysfs / "bus/cxl/drivers/cxl_region/unbind").read_text() == "region0"
    assert (root / "region0/commit").read_text() == "0"
    assert (root / "delete_region").read_text() == "region0"
