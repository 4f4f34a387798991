"""DAX devices of a host whose kernel has dynamic capacity: sysfs is asked, nothing is emulated.

The surface is that of the Linux DCD series: a DAX region shows its extents with their tags, and an
empty DAX device claims one allocation when the tag is written to its `uuid`. The device is let go
by setting its size to 0, and only after the proof: unbinding a mapped device would take the bytes
from under its holder. What is taken out of sight first is the name under `by-tag`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tagmem.agent import records as r
from tagmem.base.ids import NIL_TAG
from tagmem.base.limits import DAX_ALIGN_BYTES
from tagmem.base.units import Dpa
from tagmem.ports import DaxSource, Effect, Event, MediaPiece

LOOK_SECONDS = 0.5
"""How often sysfs is looked at: it tells nobody when an extent comes."""


class KernelDax:
    """`ports.DaxDevices` over `/sys/bus` and `/dev`; `run` has the by-tag names."""

    def __init__(self, run: Path, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._by_tag = run / "by-tag"
        self._dax = sys / "bus" / "dax" / "devices"
        self._cxl = sys / "bus" / "cxl" / "devices"
        self._dev = dev
        self._by_tag.mkdir(parents=True, exist_ok=True)

    def surface(self, source: DaxSource) -> str:
        """Claim the allocation of a tag; see `ports.DaxDevices`."""
        device = self._claimed(source.tag) or self._claim(source.tag)
        size = int(_read(device / "size"))
        if size != source.size_bytes:
            raise OSError(
                errno.EINVAL, f"{device.name}: size must be {source.size_bytes}, is {size}"
            )
        path = self._dev / device.name
        link = self._by_tag / source.tag
        if not link.is_symlink():
            link.symlink_to(path)
        return str(path)

    def _claim(self, tag: str) -> Path:
        region = next((number for number, found in self._extents() if found == tag), None)
        if region is None:
            raise OSError(errno.ENOENT, f"no DAX region has an extent of tag {tag}")
        for device in sorted(self._dax.glob(f"dax{region}.*")):
            if _read(device / "size") == "0" and _read(device / "uuid") in ("", NIL_TAG):
                (device / "uuid").write_text(tag + "\n")
                return device
        raise OSError(errno.EBUSY, f"DAX region {region} has no empty device to claim {tag} with")

    def held(self) -> dict[str, tuple[MediaPiece, ...]]:
        """The allocations that this host has accepted, by tag."""
        return {tag: self.pieces(tag) for tag in {found for _, found in self._extents()} if tag}

    def _extents(self) -> Iterator[tuple[int, str]]:
        for extent in sorted(self._cxl.glob("dax_region*/extent*")):
            region = int(extent.parent.name.removeprefix("dax_region"))
            yield region, _read(extent / "uuid")

    def pieces(self, tag: str) -> tuple[MediaPiece, ...]:
        """The extents of a tag as offsets into its DAX region, in the kernel's order."""
        found = []
        for extent in self._cxl.glob("dax_region*/extent*"):
            if _read(extent / "uuid") == tag:
                number = int(extent.name.rpartition(".")[2])
                piece = MediaPiece(
                    int(_read(extent / "offset"), 0), int(_read(extent / "length"), 0)
                )
                found.append((number, piece))
        return tuple(piece for _, piece in sorted(found, key=lambda pair: pair[0]))

    def _claimed(self, tag: str) -> Path | None:
        for device in sorted(self._dax.glob("dax*")):
            if _read(device / "uuid") == tag and _read(device / "size") != "0":
                return device
        return None

    def withdraw(self, tag: str) -> tuple[str, ...]:
        """Take the name away; see `ports.DaxDevices`."""
        (self._by_tag / tag).unlink(missing_ok=True)
        return ()

    def give_up(self, tag: str) -> None:
        """Set the device's size to 0, which returns the allocation to its region."""
        device = self._claimed(tag)
        if device is None:
            return
        driver = device / "driver" / "unbind"
        if driver.exists():
            driver.write_text(device.name + "\n")
        (device / "size").write_text("0\n")

    def found(self) -> Mapping[str, str]:
        """Tag to path."""
        return {link.name: os.readlink(link) for link in self._by_tag.iterdir()}

    def descriptor(self, tag: str) -> int:
        """A device node keeps its name."""
        return -1

    def pool(self, tag: str) -> tuple[str, Sequence[MediaPiece]] | None:
        """None: the kernel's devices have the bytes themselves."""
        return None

    def views(self, tag: str) -> Sequence[str]:
        """None: the kernel's devices have the bytes alone."""
        return ()

    def identities(self, tag: str) -> Sequence[tuple[int, int]]:
        """Of the device node."""
        device = self._claimed(tag)
        if device is None:
            return ()
        try:
            status = os.stat(self._dev / device.name)
        except FileNotFoundError:
            return ()
        return ((status.st_dev, status.st_ino),)


class KernelAppliance:
    """An appliance behind the kernel's own driver, in place of a mailbox session.

    The driver answers offers by its own rules, and returns a tag's extents when the device asks
    for them and no DAX device has them. So there is nothing to accept and nothing to send here:
    what the kernel has is read, and a tag counts as returned when its DAX device was given up.
    """

    def __init__(self, name: str, devices: KernelDax, post: Callable[[Event], None]) -> None:
        self.peer_pid = 0
        self._name = name
        self._devices = devices
        self._post = post
        self._seen: tuple[r.Extent, ...] | None = None
        self._given_up: set[str] = set()

    async def run(self) -> None:
        """Look at sysfs again and again; until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, *, always: bool = False) -> None:
        """Post what the kernel has, if it has changed."""
        held = self._devices.held()
        self._given_up &= held.keys()
        extents = tuple(
            r.Extent(Dpa(piece.offset), piece.length, tag)
            for tag in sorted(held.keys() - self._given_up)
            for piece in held[tag]
        )
        if always or extents != self._seen:
            fresh = self._seen is None
            region = (r.Region(Dpa(0), 1 << 52, DAX_ALIGN_BYTES),)
            self._post(r.DeviceRead(self._name, region, extents, fresh))
            self._seen = extents

    def perform(self, effect: Effect) -> None:
        """Carry out one effect of the loop."""
        if isinstance(effect, r.ReturnExtents):
            self._given_up.add(effect.tag)
            self._post(r.Returned(self._name, effect.tag, 0))
        elif isinstance(effect, r.ReadDevice):
            self.look(always=True)

    def ask_media(self, tag: str) -> bool:
        """The kernel's devices need no file; see `KernelDax.surface`."""
        return False


def _read(attribute: Path) -> str:
    """An attribute's value; empty where the kernel hides it."""
    try:
        return attribute.read_text().strip()
    except FileNotFoundError:
        return ""
