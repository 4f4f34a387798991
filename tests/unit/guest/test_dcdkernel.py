"""A guest whose kernel drives dynamic capacity itself, made up from the documented layout of the
Linux DCD series: what the agent asks of sysfs, and that it leaves the device to its driver.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.unit.guest.trees import bind, roots_in

from tagmem.base.errors import Conflict, OutcomeUnknown, Unsupported
from tagmem.base.ids import NIL_TAG
from tagmem.guest.cxl import Cxl, write
from tagmem.guest.dcdkernel import DcdKernel
from tagmem.guest.find import find
from tagmem.wire.guest import Told

MIB = 1 << 20
TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
OTHER = "0f2a8a3c-1c5d-4e6f-9a7b-3b2d1c0e4f55"
BASE, DPA = 0xA90000000, 256 * MIB
AT, SIZE = 64 * MIB, 4 * MIB
EXTENT = Told(TAG, "cxl", serial="0xabc", size_bytes=SIZE, dpa=DPA + AT)
KNOWN = EXTENT._replace(serial="", resource=BASE + AT)
ROOT = "sys/devices/platform/ACPI0017:00/root0"
REGION = f"{ROOT}/decoder0.0/region0"
DAX = f"{REGION}/dax_region0"
PCI = "sys/devices/pci0000:20/0000:20:00.0/0000:21:00.0"


class Kernel:
    """The tree, and what the kernel does when an attribute of it is written."""

    def __init__(self, base: Path, *, region: bool = True) -> None:
        self.base = base
        self.written: list[tuple[str, str]] = []
        self.wrong = 0
        """How far from where it was asked for an untagged claim comes out."""
        self.put(f"{PCI}/mem0/serial", "0xabc")
        self.put(f"{PCI}/mem0/dynamic_ram_1/size", "0x40000000")
        self.put(f"{PCI}/class", "0x050210")
        (base / "sys/bus/pci/drivers/cxl_pci").mkdir(parents=True)
        self.link(f"{PCI}/driver", "sys/bus/pci/drivers/cxl_pci")
        self.link("sys/bus/cxl/devices/mem0", f"{PCI}/mem0")
        self.link("sys/bus/pci/devices/0000:21:00.0", PCI)
        endpoint = f"{ROOT}/port1/endpoint2"
        self.put(f"{endpoint}/decoder2.0/mode", "dynamic_ram_1")
        self.put(f"{endpoint}/decoder2.0/dpa_resource", f"{DPA:#x}")
        self.link(f"{endpoint}/uport", f"{PCI}/mem0")
        self.link("sys/bus/cxl/devices/decoder2.0", f"{endpoint}/decoder2.0")
        if region:
            self.put(f"{REGION}/target0", "decoder2.0")
            self.put(f"{REGION}/resource", f"{BASE:#x}")
            self.link("sys/bus/cxl/devices/region0", REGION)
            self.link("sys/bus/cxl/devices/dax_region0", DAX)
            self.device("dax0.0")
        self.roots = roots_in(base)
        self.dcd = DcdKernel(self.roots.sysfs, self.react, 0, 0)
        self.cxl = Cxl(self.roots, self.claim, str(base / "dev/mem"), kernel=self.dcd)

    def put(self, name: str, value: str) -> None:
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")

    def read(self, name: str) -> str:
        return (self.base / name).read_text().strip()

    def link(self, name: str, target: str) -> None:
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.base / target, path.parent))

    def device(self, name: str) -> None:
        self.put(f"{DAX}/{name}/size", "0")
        self.put(f"{DAX}/{name}/uuid", NIL_TAG)
        self.put(f"{DAX}/{name}/align", str(2 * MIB))
        self.put(f"{DAX}/{name}/resource", f"{BASE:#x}")
        self.link(f"sys/bus/dax/devices/{name}", f"{DAX}/{name}")

    def accept(self, number: int, at: int = AT, size: int = SIZE, tag: str = "") -> None:
        """The driver has answered an offer."""
        folder = f"{DAX}/extent0.{number}"
        self.put(f"{folder}/offset", f"{at:#x}")
        self.put(f"{folder}/length", f"{size:#x}")
        if tag:
            self.put(f"{folder}/uuid", tag)

    def release(self, number: int) -> None:
        """The device has asked, and nobody has it."""
        shutil.rmtree(self.base / DAX / f"extent0.{number}")

    def react(self, path: str, value: str) -> None:
        """As the series says: a uuid claims, size 0 lets go."""
        folder, name = os.path.split(os.path.relpath(path, self.base))
        self.written.append((f"{os.path.basename(folder)}/{name}", value))
        if name == "uuid":
            for extent in sorted((self.base / DAX).glob("extent*")):
                tag = (extent / "uuid").read_text().strip() if (extent / "uuid").exists() else "0"
                if tag == value:
                    at = int((extent / "offset").read_text(), 0) + self.wrong
                    self.put(f"{folder}/resource", f"{BASE + at:#x}")
                    self.put(f"{folder}/size", str(int((extent / "length").read_text(), 0)))
                    self.put(f"{folder}/uuid", tag if tag != "0" else NIL_TAG)
                    return
            raise FileNotFoundError(2, "no such allocation")
        write(path, value)
        self.put(f"{folder}/uuid", NIL_TAG)

    def claim(self, name: str, driver: str) -> None:
        bind(self.base, name)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.mark.parametrize("tag", ["", TAG])
def test_an_extent_is_claimed_and_the_device_left_to_its_driver(kernel: Kernel, tag: str) -> None:
    """QEMU sends no tag; a device that does has it in sysfs."""
    kernel.accept(0, tag=tag)
    assert kernel.cxl.take(EXTENT) == BASE + AT
    assert kernel.written == [("dax0.0/uuid", tag or "0")]
    assert os.readlink(kernel.base / PCI / "driver").endswith("cxl_pci")
    assert not (kernel.base / PCI / "driver_override").exists()
    assert not (kernel.base / "sys/bus/pci/drivers/cxl_pci/unbind").exists()
    [found] = find(kernel.roots, [KNOWN])
    assert (found.tag, found.kind, found.name) == (TAG, "cxl-dcd", "dax0.0")
    assert (found.resource, found.size_bytes) == (BASE + AT, SIZE)


def test_one_that_is_claimed_is_found_again(kernel: Kernel) -> None:
    kernel.accept(0)
    assert kernel.cxl.take(EXTENT) == kernel.cxl.take(EXTENT)
    assert len(kernel.written) == 1


def test_it_goes_back_when_no_device_has_it(kernel: Kernel) -> None:
    kernel.accept(0)
    kernel.cxl.take(EXTENT)
    with pytest.raises(Conflict, match=r"dax0\.0 lies over"):
        kernel.cxl.give(EXTENT)
    (kernel.base / "sys/bus/dax/drivers/device_dax").mkdir(parents=True, exist_ok=True)
    kernel.cxl.drop("dax0.0")
    assert kernel.read("sys/bus/dax/drivers/device_dax/unbind") == "dax0.0"
    assert kernel.written[-1] == ("dax0.0/size", "0")
    assert not (kernel.base / DAX / "dax_region").exists(), "the empty device stays, for the next"
    with pytest.raises(OutcomeUnknown, match="has not given"):
        kernel.cxl.give(EXTENT)
    kernel.release(0)
    kernel.cxl.give(EXTENT)


def test_what_the_kernel_has_not_accepted_is_not_waited_for_for_ever(kernel: Kernel) -> None:
    with pytest.raises(OutcomeUnknown, match="has not accepted"):
        kernel.cxl.take(EXTENT)
    assert kernel.written == []


@pytest.mark.parametrize(("size", "tag"), [(2 * SIZE, ""), (SIZE, OTHER)])
def test_what_is_not_as_the_host_said_is_left_alone(kernel: Kernel, size: int, tag: str) -> None:
    kernel.accept(0, size=size, tag=tag)
    with pytest.raises(Conflict):
        kernel.cxl.take(EXTENT)
    assert kernel.written == []


def test_a_claim_that_comes_out_elsewhere_is_let_go(kernel: Kernel) -> None:
    """Extents without a tag are alike to the kernel: only their place tells."""
    kernel.accept(0)
    kernel.wrong = 8 * MIB
    with pytest.raises(Conflict, match="another extent without a tag"):
        kernel.cxl.take(EXTENT)
    assert kernel.written == [("dax0.0/uuid", "0"), ("dax0.0/size", "0")]


def test_without_an_empty_device_nothing_is_claimed(kernel: Kernel) -> None:
    kernel.accept(0)
    kernel.put(f"{DAX}/dax0.0/size", str(SIZE))
    with pytest.raises(Unsupported, match="no empty DAX device"):
        kernel.cxl.take(EXTENT)


def test_without_a_region_the_command_that_makes_one_is_told(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, region=False)
    with pytest.raises(Unsupported, match="cxl create-region -t dynamic_ram_1 mem0"):
        kernel.cxl.take(EXTENT)
    assert not (kernel.base / PCI / "driver_override").exists()


def test_such_a_kernel_needs_no_marked_window(kernel: Kernel) -> None:
    assert kernel.dcd.present()
    assert kernel.cxl.features() == (("cxl",) if os.geteuid() == 0 else ())


def test_a_device_of_another_serial_or_without_dynamic_capacity_is_not_its(kernel: Kernel) -> None:
    assert kernel.dcd.region("0xdef") is None
    assert kernel.dcd.region("") is None
    shutil.rmtree(kernel.base / PCI / "mem0/dynamic_ram_1")
    kernel.put(f"{ROOT}/port1/endpoint2/decoder2.0/mode", "ram")
    assert kernel.dcd.region("0xabc") is None
    assert not kernel.dcd.present()


def test_a_window_that_is_not_yet_made_is_nobodys_memory(kernel: Kernel) -> None:
    """The serial is that of all extents: told by it alone, none of them is taken for the tag."""
    kernel.accept(0, tag="")
    kernel.cxl.take(EXTENT)
    assert find(kernel.roots, [EXTENT]) == []
