"""Makes a guest's sysfs and /dev from the recorded trees, and takes devices away again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tagmem.guest.find import Roots

DATA = Path(__file__).parents[2] / "data" / "guest-sysfs"
PMEM = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
VHOST = "c0ffee00-1111-4222-8333-444455556666"
SIZE = 4 << 20
"""Bytes that a device node's stand-in really has: enough to map."""


def roots_in(base: Path) -> Roots:
    """An empty guest."""
    for name in ("sys/bus/dax/devices", "sys/bus/pci/devices", "sys/bus/pci/slots", "dev", "run"):
        (base / name).mkdir(parents=True, exist_ok=True)
    return Roots(str(base / "sys"), str(base / "dev"), str(base / "run" / "tagmem"))


def plug(base: Path, *kinds: str) -> None:
    """The devices of these recorded trees come."""
    for kind in kinds:
        for line in (DATA / f"{kind}.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                _make(base, line)


def _make(base: Path, line: str) -> None:
    if line.endswith(" !"):
        path = base / line[:-2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, SIZE)
    elif " -> " in line:
        name, target = line.split(" -> ")
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        if "/driver" in name:
            driver = Path(os.path.normpath(path.parent / target))
            driver.mkdir(parents=True, exist_ok=True)
    else:
        name, _, value = line.partition(" =")
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value.strip().replace("\\n", "\n") + "\n")


def unplug(base: Path, name: str) -> None:
    """A DAX device goes, as when its slot is switched off."""
    link = base / "sys/bus/dax/devices" / name
    folder = link.resolve()
    link.unlink()
    shutil.rmtree(folder)
    (base / "dev" / name).unlink()


def bind(base: Path, name: str, driver: str = "device_dax") -> None:
    """A DAX device changes its driver; without one it has no node."""
    link = (base / "sys/bus/dax/devices" / name).resolve() / "driver"
    link.unlink(missing_ok=True)
    node = base / "dev" / name
    node.unlink(missing_ok=True)
    if driver:
        link.symlink_to(base / "sys/bus/dax/drivers" / driver)
    if driver == "device_dax":
        node.touch()
        os.truncate(node, SIZE)


def plug_raw_namespace(base: Path, name: str) -> None:
    """Persistent memory whose header came too late."""
    folder = base / "sys/bus/nd/devices" / name
    folder.mkdir(parents=True)
    (folder / "mode").write_text("memory\n")  # as the kernel has it, and not: raw
    (folder / "driver").symlink_to("../../drivers/nd_pmem")


def unplug_namespace(base: Path, name: str) -> None:
    """It becomes something else."""
    shutil.rmtree(base / "sys/bus/nd/devices" / name)
