"""Dynamic capacity in a guest whose kernel drives it: sysfs is asked, and the device left to its
driver.

The surface is that of the Linux DCD series (v11, June 2026): a memory device has a partition
`dynamic_ram_1`, the DAX region of its CXL region shows an `extentX.Y` for each that was accepted,
and an empty DAX device claims one allocation when its tag, or 0 for one without, is written to its
`uuid`. QEMU sends no tags, so what was claimed is known by where it lies. Extents go back by
themselves, when the device asks for them and no DAX device has them.

Tried on a made-up tree of that layout only: there was no such kernel.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tagmem.base.errors import Conflict, OutcomeUnknown, Unsupported
from tagmem.base.ids import NIL_TAG
from tagmem.guest.find import attribute, is_dynamic
from tagmem.wire.guest import Told

APPEAR_SECONDS = 5.0
"""An offer is accepted within a moment, by a thread of the kernel's."""
GO_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_UNTAGGED = "0"


class DaxRegion(NamedTuple):
    """Where a device's dynamic capacity is shown."""

    folder: str
    """The DAX region's, with extents and DAX devices in it."""
    resource: int
    """Physical address of the region's first byte."""
    dpa: int
    """Of the device, there."""


class Place(NamedTuple):
    """A DAX device."""

    folder: str
    resource: int
    size: int


class DcdKernel:
    """The kernel's driver of dynamic capacity, where it has one. `put` writes an attribute; all
    raise OSError, TagmemError.
    """

    def __init__(
        self,
        sysfs: str,
        put: Callable[[str, str], None],
        appear_seconds: float = APPEAR_SECONDS,
        go_seconds: float = GO_SECONDS,
    ) -> None:
        self._cxl = f"{sysfs}/bus/cxl/devices"
        self._dax = f"{sysfs}/bus/dax/devices"
        self._put = put
        self._appear_seconds = appear_seconds
        self._go_seconds = go_seconds

    def present(self) -> bool:
        """Whether it drives any device here."""
        return any(self._dynamic(folder) for folder in glob.glob(f"{self._cxl}/mem*"))

    def region(self, serial: str) -> DaxRegion | None:
        """That of the memory device of a serial; None: the kernel has no hand on its dynamic
        capacity. Raises Unsupported where nobody has made a region of it yet.
        """
        for folder in glob.glob(f"{self._cxl}/mem*"):
            if serial and _number(attribute(folder, "serial")) == int(serial, 16):
                made = self._region_of(folder)
                if made is None and self._dynamic(folder):
                    name = os.path.basename(folder)
                    raise Unsupported(
                        f"{name}: its dynamic capacity is in no region "
                        f"(cxl create-region -t dynamic_ram_1 {name})"
                    )
                return made
        return None

    @staticmethod
    def _dynamic(folder: str) -> bool:
        return bool(glob.glob(f"{folder}/dynamic_ram_*"))

    def _region_of(self, memdev: str) -> DaxRegion | None:
        """The dynamic region that the endpoint of a memory device is the only target of."""
        device = os.path.realpath(memdev)
        for region in sorted(glob.glob(f"{self._cxl}/region*")):
            decoder = attribute(region, "target0")
            folder = os.path.realpath(f"{self._cxl}/{decoder}")
            if not decoder or os.path.realpath(f"{os.path.dirname(folder)}/uport") != device:
                continue
            dax = f"{os.path.realpath(region)}/dax_{os.path.basename(region)}"
            dynamic = attribute(folder, "mode").startswith("dynamic_ram") or is_dynamic(dax)
            if dynamic and not attribute(region, "target1"):
                resource = _number(attribute(region, "resource"))
                return DaxRegion(dax, resource, _number(attribute(folder, "dpa_resource")))
        return None

    def take(self, region: DaxRegion, told: Told) -> tuple[str, int]:
        """(name, physical address) of the DAX device of an extent that the kernel has accepted,
        claimed if it was not. Raises OutcomeUnknown when the kernel does not accept it in time,
        Conflict for what is somebody else's.
        """
        at = told.dpa - region.dpa
        self._wait(
            lambda: self._extent(region, at) is not None,
            self._appear_seconds,
            f"the kernel has not accepted {told.dpa:#x}",
        )
        length, tag = self._extent(region, at) or (0, "")
        if length != told.size_bytes or tag not in ("", NIL_TAG, told.tag):
            raise Conflict(f"{told.dpa:#x}: the kernel has {length} bytes of tag {tag or 'none'}")
        wanted = (region.resource + at, length)
        for place in self._devices(region):
            if place[1:] == wanted:
                return os.path.basename(place.folder), wanted[0]
        empty = [place.folder for place in self._devices(region) if not place.size]
        if not empty:
            raise Unsupported(f"{region.folder}: no empty DAX device to claim the extent with")
        self._put(f"{empty[0]}/uuid", told.tag if tag == told.tag else _UNTAGGED)
        made = _place(empty[0])
        if made[1:] != wanted:
            self._put(f"{empty[0]}/size", "0")
            raise Conflict(
                f"{os.path.basename(empty[0])} has {made.size} bytes at {made.resource:#x}: "
                f"another extent without a tag, not {told.size_bytes} at {wanted[0]:#x}"
            )
        return os.path.basename(empty[0]), wanted[0]

    def give(self, region: DaxRegion, told: Told) -> None:
        """Return when the kernel has given an extent back, for which the device has asked. Raises
        Conflict while a DAX device has it, OutcomeUnknown when it is not given in time.
        """
        at = told.dpa - region.dpa
        start = region.resource + at
        for place in self._devices(region):
            if place.resource < start + told.size_bytes and start < place.resource + place.size:
                name = os.path.basename(place.folder)
                raise Conflict(f"{name} lies over {told.dpa:#x}+{told.size_bytes:#x}")
        self._wait(
            lambda: self._extent(region, at) is None,
            self._go_seconds,
            f"the kernel has not given {told.dpa:#x} back",
        )

    def drop(self, folder: str) -> None:
        """Let go of what a DAX device has claimed; it is empty then, for another."""
        self._put(f"{folder}/size", "0")

    def _extent(self, region: DaxRegion, at: int) -> tuple[int, str] | None:
        """(length, tag) of the extent at an offset of the region."""
        for folder in glob.glob(f"{region.folder}/extent*"):
            if _number(attribute(folder, "offset"), -1) == at:
                return _number(attribute(folder, "length")), attribute(folder, "uuid")
        return None

    def _devices(self, region: DaxRegion) -> Iterator[Place]:
        for name in sorted(glob.glob(f"{self._dax}/dax*")):
            folder = os.path.realpath(name)
            if os.path.dirname(folder) == region.folder:
                yield _place(folder)

    @staticmethod
    def _wait(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() >= end:
                raise OutcomeUnknown(otherwise)
            time.sleep(_LOOK_SECONDS)


def _place(folder: str) -> Place:
    return Place(folder, _number(attribute(folder, "resource")), _number(attribute(folder, "size")))


def _number(text: str, otherwise: int = 0) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return otherwise
