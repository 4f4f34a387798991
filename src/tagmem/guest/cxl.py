"""CXL memory that no stock kernel makes usable inside a VM, made usable by the guest's agent.

*Dynamic capacity* (`Cxl.take`, `Cxl.give`): the device is driven from here (`dcd`), with the
kernel's own driver kept off it. Its window was marked as specific-purpose memory at boot, so
dax_hmem has a DAX region over it, which can be cut as one likes: one DAX device per extent, where
the extent lies. Where nothing was accepted there is no device, and nobody can touch it.

*Static devices* (`Cxl.commit`): kernels refuse to commit decoders inside a VM, because they cannot
invalidate caches there, and adopt those that were committed before their driver came.

While any of this goes on, the kernel is told not to give DAX devices to whatever driver is first:
that might be kmem, which makes RAM of them.

A device whose dynamic capacity the kernel drives is left to it (`dcdkernel`).

What the host says is checked against the device: ranges that it did not offer are not touched.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from tagmem.base.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Unsupported
from tagmem.guest import dcd
from tagmem.guest.dcdkernel import DcdKernel
from tagmem.guest.find import Roots, attribute, claimable, driver_of, find
from tagmem.guest.mmio import Mapped, Registers, perform
from tagmem.wire.guest import Memory, Told

CXL_MEMORY_CLASS = "0x0502"
BRIDGE_BYTES = 64 * 1024
MEM_ENABLE = 1 << 2
SERIAL_CAPABILITY = 3
OURS = "tagmem"
"""A driver that there is not: a device that is overridden with it stays without one."""
STATIC_MODULES = ("cxl_acpi", "cxl_port", "cxl_mem", "cxl_pci", "dax_cxl", "device_dax")
WINDOW_MODULES = ("device_dax", "dax_hmem")
REGION_SECONDS = 5.0
"""The kernel makes DAX regions in the background, after it has looked for CXL."""
_LOOK_SECONDS = 0.02


class Range(NamedTuple):
    """Of a device's addresses."""

    dpa: int
    length: int


class Device:
    """One CXL memory device, its registers mapped. Raises OSError, TagmemError."""

    def __init__(
        self, address: str = "", sysfs: str = "/sys", mem: str = "/dev/mem", *, dynamic: bool = True
    ) -> None:
        self._sysfs = sysfs
        self._mem = mem
        self._spaces: dict[str, Registers] = {}
        self.folder = _only(sysfs, address)
        if driver_of(self.folder):
            raise Conflict(
                f"{self.folder} is bound to {driver_of(self.folder)}: its mailbox is the kernel's"
            )
        _enable(self.folder)
        with open(f"{self.folder}/config", "rb") as file:
            self._locator = dcd.locate(file.read(4096))
        if dynamic:
            bar, offset = self._locator.blocks[dcd.DEVICE_BLOCK]
            device = Mapped(f"{self.folder}/resource{bar}")
            self._spaces["device"] = device
            mailbox = self.do(dcd.Mailbox.find(offset, device.span))
            self.driver = dcd.Driver(mailbox, keep_asked=True)

    def close(self) -> None:
        """Unmap the registers: the kernel's drivers want some of them for themselves."""
        for space in self._spaces.values():
            if isinstance(space, Mapped):
                space.close()
        self._spaces.clear()

    def do(self, steps: dcd.Steps[Any]) -> Any:
        """Carry an operation out."""
        return perform(steps, self._spaces)

    def news(self) -> list[dcd.Event]:
        """Start, and what waits."""
        events: list[dcd.Event] = self.do(self.driver.start())
        return events

    def commit(self, length: int = 0) -> int:
        """Commit the decoders from the base of the device's window, over all regions or `length`;
        that base.

        DPA 0 lies at the base, so a range's place is the base plus its DPA.
        """
        bridge, window = self._window()
        if not length:
            ends = (region.base + region.decode_length for region in self.driver.regions)
            length = max(ends, default=0)
        if not length:
            raise Unsupported("the device has no capacity")
        unit = dcd.DECODER_UNIT_BYTES
        size = min(-(-length // unit) * unit, window.size)
        bar, offset = self._locator.blocks[dcd.COMPONENT_BLOCK]
        component = Mapped(f"{self.folder}/resource{bar}")
        self._spaces["component"] = component
        decoders = self.do(dcd.Decoders.find("component", offset, component.span))
        if decoders is None:
            raise Unsupported("the device has no HDM decoders")
        if self.do(decoders.committed(0)) != (window.base, size):
            self._commit_bridge(bridge, window, size)
            self.do(decoders.program(0, window.base, size))
        self._enable_memory()
        return window.base

    def _window(self) -> tuple[int, dcd.Window]:
        """(registers of the host bridge above us, the fixed window that leads there alone)."""
        with open(f"{self._sysfs}/firmware/acpi/tables/CEDT", "rb") as file:
            bridges, windows = dcd.read_cedt(file.read(64 * 1024))
        root = f"{self._sysfs}/devices/{self._root_bus()}"
        uid = int(attribute(f"{root}/firmware_node", "uid") or -1)
        for window in windows:
            if window.targets == (uid,):
                return bridges.get(uid, 0), window
        raise NotFound(f"no fixed memory window leads to host bridge {uid} alone")

    def _commit_bridge(self, base: int, window: dcd.Window, size: int) -> None:
        """A bridge with one root port passes everything through, unless it was told not to.

        Its decoder is as long as the endpoint's: the kernel adopts only pairs that are alike. One
        that an earlier device left behind is taken back.
        """
        if not base:
            return
        with self._without_port():
            self._spaces["bridge"] = bridge = Mapped(self._mem, base, BRIDGE_BYTES)
            try:
                decoders = self.do(dcd.Decoders.find("bridge", 0, BRIDGE_BYTES))
                if decoders is None:
                    return
                if self.do(decoders.committed(0)) not in (None, (window.base, size)):
                    self.do(decoders.tear_down(0))
                port = self._root_port()
                self.do(decoders.program(0, window.base, size, targets=(port,)))
            finally:
                del self._spaces["bridge"]
                bridge.close()

    @contextmanager
    def _without_port(self) -> Iterator[None]:
        """The kernel's driver of the bridge, where there is one, lets go of its registers."""
        name = self._root_bus()
        drivers = f"{self._sysfs}/bus/cxl/drivers/cxl_port"
        ports = [
            os.path.basename(port)
            for port in glob.glob(f"{self._sysfs}/bus/cxl/devices/port*")
            if os.path.basename(os.path.realpath(f"{port}/uport")) == name and driver_of(port)
        ]
        for port in ports:
            write(f"{drivers}/unbind", port)
        try:
            yield
        finally:
            for port in ports:
                write(f"{drivers}/bind", port)

    def _root_bus(self) -> str:
        """Of the host bridge above us: pci0000:20."""
        devices = os.path.realpath(f"{self._sysfs}/devices")
        return os.path.relpath(self.folder, devices).split("/")[0]

    def _root_port(self) -> int:
        """The port number in the link capabilities of the port above us (PCIe, bits 31:24)."""
        with open(f"{os.path.dirname(self.folder)}/config", "rb") as file:
            config = file.read(256)
        at, seen = config[0x34] & ~3, set[int]()
        while at and at not in seen and at + 16 <= len(config):
            seen.add(at)
            if config[at] == 0x10:
                return config[at + 15]
            at = config[at + 1] & ~3
        return 0

    def _enable_memory(self) -> None:
        at = self._locator.dvsecs.get(0)
        if at is None:
            return
        fd = os.open(f"{self.folder}/config", os.O_RDWR | os.O_CLOEXEC)
        try:
            control = int.from_bytes(os.pread(fd, 2, at + 0xC), "little")
            os.pwrite(fd, (control | MEM_ENABLE).to_bytes(2, "little"), at + 0xC)
        finally:
            os.close(fd)


def _only(sysfs: str, address: str) -> str:
    found = [folder for folder in _devices(sysfs) if address in ("", os.path.basename(folder))]
    if len(found) != 1:
        names = ", ".join(map(os.path.basename, found)) or "none"
        raise NotFound(f"one CXL memory device is wanted ({address or 'any'}), found: {names}")
    return found[0]


def _devices(sysfs: str) -> list[str]:
    return [
        os.path.realpath(folder)
        for folder in sorted(glob.glob(f"{sysfs}/bus/pci/devices/*"))
        if attribute(folder, "class").startswith(CXL_MEMORY_CLASS)
    ]


def _enable(folder: str) -> None:
    if attribute(folder, "enable") == "0":
        write(f"{folder}/enable", "1")


def write(path: str, value: str) -> None:
    """Into an attribute. Raises OSError."""
    with open(path, "w", encoding="ascii") as file:
        file.write(value)


def serial_of(config: bytes) -> int:
    """The device serial number of PCIe, which needs no driver to be read; 0: it has none."""
    at, seen = 0x100, set[int]()
    while 0x100 <= at <= len(config) - 12 and at not in seen:
        seen.add(at)
        head = int.from_bytes(config[at : at + 4], "little")
        if head & 0xFFFF == SERIAL_CAPABILITY:
            return int.from_bytes(config[at + 4 : at + 12], "little")
        at = head >> 20 & ~3
    return 0


# ---- what is done with a device's offers


def asked(news: Sequence[dcd.Event]) -> list[Range]:
    """What the device wants back."""
    wanted = [event for event in news if isinstance(event, dcd.ReleaseAsked)]
    return [Range(*extent[:2]) for event in wanted for extent in event.extents]


def _answer(
    device: Device, news: Sequence[dcd.Event], ranges: Sequence[Range], *, accept: bool
) -> None:
    """Answer the offer of exactly these ranges, if it waits; those before it are refused, because
    they are answered in order. The host makes one offer at a time: what is before it is stale.
    """
    waiting = [event for event in news if isinstance(event, dcd.Offer)]
    matching = [
        sorted(extent[:2] for extent in offer.extents) == sorted(map(tuple, ranges))
        for offer in waiting
    ]
    if any(matching):
        first = matching.index(True)
        for offer in waiting[:first]:
            device.do(device.driver.answer(offer, accept=False))
        device.do(device.driver.answer(waiting[first], accept=accept))


def _held(device: Device, part: Range) -> dcd.Extent | None:
    held = device.driver.held.get(part.dpa)
    return held if held is not None and held.length == part.length else None


def take(device: Device, news: Sequence[dcd.Event], ranges: Sequence[Range]) -> None:
    """Accept the offer of these ranges, or find them accepted. Raises NotFound."""
    _answer(device, news, ranges, accept=True)
    for part in ranges:
        if _held(device, part) is None:
            raise NotFound(f"{part.dpa:#x}+{part.length:#x} was not offered, and is not held")


def give(device: Device, news: Sequence[dcd.Event], ranges: Sequence[Range]) -> None:
    """Release what is held of these ranges, refuse an offer of them that waits. Idempotent."""
    _answer(device, news, ranges, accept=False)
    held = [extent for part in ranges if (extent := _held(device, part)) is not None]
    if held:
        device.do(device.driver.release(held))


# ---- for the agent


class Cxl:
    """The CXL devices of one guest. Everything blocks, for seconds at worst, and may be called from
    any thread: one at a time is served. Raises OSError, TagmemError.
    """

    def __init__(
        self,
        roots: Roots,
        claim: Callable[[str, str], None],
        mem: str = "/dev/mem",
        region_seconds: float = REGION_SECONDS,
        kernel: DcdKernel | None = None,
    ) -> None:
        self._roots = roots
        self._claim = claim
        self._mem = mem
        self._region_seconds = region_seconds
        self._kernel = kernel or DcdKernel(roots.sysfs, write)
        self._lock = threading.Lock()

    def features(self) -> tuple[str, ...]:
        """`cxl-static`, `cxl`: what can be asked of this guest."""
        if os.geteuid() != 0:
            return ()
        static = os.path.exists(self._mem)
        dynamic = self._kernel.present() or (static and self._reserved())
        return (*(("cxl-static",) if static else ()), *(("cxl",) if dynamic else ()))

    def _reserved(self) -> bool:
        """Whether the command line marks (part of) a CXL window as specific-purpose memory."""
        try:
            with open(f"{self._roots.sysfs}/firmware/acpi/tables/CEDT", "rb") as file:
                _, windows = dcd.read_cedt(file.read(64 * 1024))
            with open(f"{self._roots.proc}/cmdline", encoding="utf-8") as file:
                words = file.read(65536)
        except (OSError, UnicodeDecodeError):
            return False
        places = re.findall(r"memmap=[0-9a-fxKMG]+%(0x[0-9a-f]+|\d+)\S*\+0xefffffff", words)
        return any(w.base <= int(at, 0) < w.base + w.size for w in windows for at in places)

    # ---- dynamic capacity

    def take(self, told: Told) -> int:
        """Accept an extent and make a DAX device of it; where that lies in physical memory."""
        with self._lock:
            if (driven := self._kernel.region(told.serial)) is not None:
                name, resource = self._kernel.take(driven, told)
                self._bind(name)
                return resource
            device = self._open(told, dynamic=True)
            try:
                part = Range(told.dpa, told.size_bytes)
                take(device, device.news(), [part])
                resource = device.commit() + part.dpa
            finally:
                device.close()
            with self._unclaimed():
                self._modprobe(WINDOW_MODULES)
                self._carve(resource, part.length)
            return resource

    def give(self, told: Told) -> None:
        """Release an extent, or refuse it. Raises Conflict while a DAX device lies over it."""
        with self._lock:
            if (driven := self._kernel.region(told.serial)) is not None:
                self._kernel.give(driven, told)
                return
            device = self._open(told, dynamic=True)
            try:
                news = device.news()
                base = device.commit()
                for name, start, size in self._dax():
                    if (
                        size
                        and start < base + told.dpa + told.size_bytes
                        and (base + told.dpa < start + size)
                    ):
                        raise Conflict(f"{name} lies over {told.dpa:#x}+{told.size_bytes:#x}")
                give(device, news, [Range(told.dpa, told.size_bytes)])
            finally:
                device.close()

    def _open(self, told: Told, *, dynamic: bool, seconds: float = 2.0) -> Device:
        """The device of that serial, when it is there; the kernel's driver is kept off it."""
        wanted = int(told.serial, 16) if told.serial else 0
        end = time.monotonic() + seconds
        while True:
            found = [f for f in _devices(self._roots.sysfs) if wanted and _serial(f) == wanted]
            if len(found) == 1:
                break
            if time.monotonic() >= end:
                count = len(found)
                raise NotFound(f"one CXL device of serial {told.serial} is wanted, found: {count}")
            time.sleep(_LOOK_SECONDS)
        folder, name = found[0], _name(found[0])
        write(f"{folder}/driver_override", OURS)
        while True:
            if driver := driver_of(folder):
                write(f"{self._roots.sysfs}/bus/pci/drivers/{driver}/unbind", name)
            try:
                return Device(name, self._roots.sysfs, self._mem, dynamic=dynamic)
            except Conflict:  # a driver that was just about to take it when we looked
                if time.monotonic() >= end:
                    raise

    def _dax(self) -> Iterator[tuple[str, int, int]]:
        """(name, resource, size) of each DAX device of specific-purpose memory. One of no size
        stands at the start of its region.
        """
        for folder in glob.glob(f"{self._roots.sysfs}/bus/dax/devices/*"):
            if "/hmem" in os.path.realpath(folder):
                resource, size = attribute(folder, "resource"), attribute(folder, "size")
                with suppress(ValueError):
                    yield _name(folder), int(resource, 0), int(size, 0)

    def _carve(self, start: int, length: int) -> None:
        """Make a DAX device of exactly this range, bound to device_dax. Idempotent."""
        bus = f"{self._roots.sysfs}/bus/dax"
        end = time.monotonic() + self._region_seconds
        while True:
            known = {name: (at, size) for name, at, size in self._dax()}
            for name, place in known.items():
                if place == (start, length):
                    self._bind(name)
                    return
            region = self._region(known, start, length)
            if region:
                break
            if time.monotonic() >= end:
                raise Unsupported(
                    f"no specific-purpose memory at {start:#x}: the kernel's command line needs "
                    "memmap=SIZE%BASE+0xefffffff over the CXL window"
                )
            time.sleep(_LOOK_SECONDS)
        write(f"{region}/create", "1")
        name = attribute(region, "seed")
        if not name or name in known:
            raise Unsupported(f"{region}: the kernel makes no DAX device")
        try:
            write(f"{bus}/devices/{name}/mapping", f"{start:x}-{start + length - 1:x}")
        except OSError:
            write(f"{region}/delete", name)
            raise
        self._bind(name)

    def _region(self, known: dict[str, tuple[int, int]], start: int, length: int) -> str:
        """The DAX region over a range, all of it free to be cut; empty: none has come yet."""
        for name, (at, size) in known.items():
            folder = os.path.realpath(f"{self._roots.sysfs}/bus/dax/devices/{name}")
            region = f"{os.path.dirname(folder)}/dax_region"
            whole = int(attribute(region, "size") or 0)
            if size not in (0, whole) or not at <= start or start + length > at + whole:
                continue
            if size and driver_of(folder):
                raise Unsupported(f"{name} was given to {driver_of(folder)} whole, at boot")
            if size:
                write(f"{folder}/size", "0")
            return region
        return ""

    def _bind(self, name: str) -> None:
        folder = f"{self._roots.sysfs}/bus/dax/devices/{name}"
        if driver_of(folder) != "device_dax":
            self._claim(name, "")
        if driver_of(folder) != "device_dax":
            raise Unsupported(f"{name}: device_dax does not take it")

    def drop(self, name: str) -> None:
        """Take the DAX device of an extent away, and with it every mapping."""
        with self._lock:
            folder = os.path.realpath(f"{self._roots.sysfs}/bus/dax/devices/{name}")
            if driver := driver_of(folder):
                write(f"{self._roots.sysfs}/bus/dax/drivers/{driver}/unbind", name)
            if "/hmem" not in folder:
                self._kernel.drop(folder)
                return
            write(f"{folder}/size", "0")
            write(f"{os.path.dirname(folder)}/dax_region/delete", name)

    # ---- static capacity

    def commit(self, told: Told, seconds: float) -> None:
        """Commit the decoders of a device that is coming, then let the kernel have it."""
        with self._lock:
            end = time.monotonic() + seconds
            if any(m.tag == told.tag for m in find(self._roots, [told])):
                return
            device = self._open(told, dynamic=False, seconds=seconds)
            try:
                device.commit(told.size_bytes)
            finally:
                device.close()
            with self._unclaimed():
                self._modprobe(STATIC_MODULES)
                write(f"{device.folder}/driver_override", "\n")
                with suppress(OSError):  # bound meanwhile
                    name = _name(device.folder)
                    write(f"{self._roots.sysfs}/bus/pci/drivers/cxl_pci/bind", name)
                while time.monotonic() < end:
                    if names := claimable(self._roots, told.tag, [told]):
                        self._claim(*names[0])
                    if any(m.tag == told.tag for m in find(self._roots, [told])):
                        return
                    time.sleep(_LOOK_SECONDS)
            raise OutcomeUnknown(f"the kernel made no DAX device of serial {told.serial} in time")

    def tear_down(self, memory: Memory) -> None:
        """Take a region apart, so that its device can leave and its addresses are free again."""
        with self._lock:
            sysfs = self._roots.sysfs
            parts = os.path.realpath(f"{sysfs}/bus/dax/devices/{memory.name}").split("/")
            if driver := driver_of("/".join(parts)):
                write(f"{sysfs}/bus/dax/drivers/{driver}/unbind", memory.name)
            for number, part in enumerate(parts):
                if re.fullmatch(r"region\d+", part):
                    root = "/".join(parts[:number])
                    with suppress(OSError):
                        write(f"{sysfs}/bus/cxl/drivers/cxl_region/unbind", part)
                    write(f"{root}/{part}/commit", "0")
                    write(f"{root}/delete_region", part)

    # ---- the kernel's drivers

    @contextmanager
    def _unclaimed(self) -> Iterator[None]:
        """DAX devices that come get no driver by themselves."""
        switch = f"{self._roots.sysfs}/bus/dax/drivers_autoprobe"
        if not os.path.exists(switch):
            self._modprobe(("device_dax",))
        before = attribute(f"{self._roots.sysfs}/bus/dax", "drivers_autoprobe") or "1"
        write(switch, "0")
        try:
            yield
        finally:
            write(switch, before)

    def _modprobe(self, modules: Sequence[str]) -> None:
        if shutil.which("modprobe"):
            command = ["modprobe", "-a", "-q", *modules]
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _name(folder: str) -> str:
    return os.path.basename(folder)


def _serial(folder: str) -> int:
    try:
        with open(f"{folder}/config", "rb") as file:
            return serial_of(file.read(4096))
    except OSError:
        return 0


def check(told: Told) -> None:
    """Raises InvalidInput for what cannot be an extent of a device."""
    if not told.serial:
        raise InvalidInput("told.serial", "the device's", "nothing")
    for name, value in (("dpa", told.dpa), ("size_bytes", told.size_bytes)):
        if value % dcd.ALIGN_BYTES:
            raise InvalidInput(f"told.{name}", f"a multiple of {dcd.ALIGN_BYTES}", value)
    if not told.size_bytes:
        raise InvalidInput("told.size_bytes", "what the extent or the device has", 0)
