"""Tagged memory of every kind, as sysfs shows it, whatever the VM presents it with.

A tag comes by one of two ways. In-band: the memory carries it, and the kernel shows it as a UUID
(`NVDIMM_DAX_INFO` headers on virtio-pmem, vhost-user pmem, NVDIMM and e820 pmem; DCD kernels).
Told: the memory has nowhere to put it (a BAR, a CXL device's 64-bit serial, soft-reserved ranges),
so the host says by what to know it. What is in-band is believed first: nothing told renames it.

Reads only, so that it can be asked at any time; `prepare` is what has to be done before mapping.
The roots are arguments: tests give recorded trees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_tag
from tagmem.wire.guest import MEMORIES_MAX, Memory, Told

PAGE_BYTES = 4096
DAX_ALIGN_BYTES = 2 << 20
IVSHMEM = ("0x1af4", "0x1110")
IVSHMEM_BAR = 2
_VIRTIO_PMEM_SHMEM_REGION = 0
"""Feature bit: the memory is in a shared memory region, so a vhost-user back-end has it."""
_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ATTRIBUTE_BYTES_MAX = 4096


class Roots(NamedTuple):
    """Where the kernel's file systems and our own run directory are."""

    sysfs: str = "/sys"
    dev: str = "/dev"
    run: str = "/run/tagmem"
    proc: str = "/proc"


def find(roots: Roots, told: Iterable[Told] = ()) -> list[Memory]:
    """All tagged memory that can be mapped now, in a stable order. A tag that two devices claim is
    given to the first.
    """
    told = tuple(told)
    slots = slots_by_address(roots)
    found: dict[str, Memory] = {}
    for memory in (*_dax_devices(roots, told, slots), *_bars(roots, told, slots)):
        if memory.tag and memory.tag not in found and len(found) < MEMORIES_MAX:
            found[memory.tag] = memory
    return list(found.values())


def claimable(roots: Roots, tag: str, told: Iterable[Told] = ()) -> list[tuple[str, str]]:
    """DAX devices of a tag that no application can map yet, as (name, driver): bound to nothing
    (after an eject without a slot) or made into RAM (`kmem`, what soft-reserved memory becomes).
    """
    told, slots = tuple(told), slots_by_address(roots)
    return [
        (memory.name, driver)
        for driver in ("", "kmem")
        for memory in _dax_devices(roots, told, slots, driver)
        if memory.tag == tag
    ]


def raw_namespaces(roots: Roots) -> list[str]:
    """Persistent-memory namespaces on which the kernel found no header: plain block devices.

    A header that is written a moment too late is found when such a one is bound anew.
    """
    root = f"{roots.sysfs}/bus/nd/devices"
    return [
        name
        for name in _names(root)
        if name.startswith("namespace")
        and driver_of(os.path.realpath(f"{root}/{name}")) == "nd_pmem"
        # One that is claimed by a header's device has no driver itself, and other modes.
        and attribute(f"{root}/{name}", "mode") in ("raw", "memory")
    ]


def slots_by_address(roots: Roots) -> dict[str, str]:
    """The names of hot-plug slots by the address (without function) of what is in them."""
    folder = f"{roots.sysfs}/bus/pci/slots"
    return {
        address: name
        for name in _names(folder)
        if (address := attribute(f"{folder}/{name}", "address"))
    }


def prepare(memory: Memory) -> None:
    """What the kernel wants before the memory can be mapped: a BAR's device is enabled.

    Raises OSError.
    """
    if memory.kind == "ivshmem":
        folder = os.path.dirname(memory.path)
        if attribute(folder, "enable") == "0":
            with open(f"{folder}/enable", "w", encoding="ascii") as file:
                file.write("1")


def is_there(roots: Roots, memory: Memory) -> bool:
    """Whether the device can still be mapped. A DAX device that is not ends its mappings too."""
    if memory.kind == "ivshmem":
        return os.path.exists(memory.path)
    return driver_of(os.path.realpath(f"{roots.sysfs}/bus/dax/devices/{memory.name}")) != ""


def aliases(memory: Memory) -> tuple[str, ...]:
    """Every path in sysfs or devtmpfs through which the memory can be mapped."""
    if memory.kind == "ivshmem":
        return (memory.path, f"{memory.path}_wc")
    return (memory.path,)


def attribute(folder: str, name: str) -> str:
    """The value of an attribute; empty when there is none, or the device has just gone."""
    try:
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, _ATTRIBUTE_BYTES_MAX).decode("ascii", "replace").strip()
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _number(text: str) -> int:
    try:
        return max(int(text, 0), 0)
    except ValueError:
        return 0


def _tag(text: str) -> str:
    if not text:
        return ""
    try:
        return parse_tag(text[:64])
    except InvalidInput:
        return ""  # nil: nothing was written there


# ---- DAX devices


def _dax_devices(
    roots: Roots, told: tuple[Told, ...], slots: dict[str, str], driver: str = "device_dax"
) -> Iterator[Memory]:
    root = f"{roots.sysfs}/bus/dax/devices"
    for name in _names(root):
        folder = os.path.realpath(f"{root}/{name}")
        path = f"{roots.dev}/{name}"
        if driver_of(folder) != driver or (driver == "device_dax" and not os.path.exists(path)):
            continue
        memory = _dax_device(roots, name, folder, path, slots)
        if memory is None:
            continue
        yield memory if memory.tag else _as_told(memory, told, roots)


def driver_of(folder: str) -> str:
    """The driver that a device is bound to; empty when it is not."""
    try:
        return os.path.basename(os.readlink(f"{folder}/driver"))
    except OSError:
        return ""


def _dax_device(
    roots: Roots, name: str, folder: str, path: str, slots: dict[str, str]
) -> Memory | None:
    size = _number(attribute(folder, "size"))
    if not size:
        return None
    kind, serial, address = _origin(roots, folder)
    tag = _tag(attribute(folder, "uuid"))
    if kind == "cxl" and (tag or is_dynamic(os.path.dirname(folder))):
        kind = "cxl-dcd"
    if not tag and "/ndbus" in folder:
        tag = _tag(attribute(os.path.dirname(folder), "uuid"))
    return Memory(
        tag,
        kind,
        name,
        path,
        size,
        _number(attribute(folder, "align")) or DAX_ALIGN_BYTES,
        _number(attribute(folder, "resource")),
        address,
        slots.get(address.partition(".")[0], "") if address else "",
        serial,
    )


def is_dynamic(dax_region: str) -> bool:
    """Whether a kernel with dynamic capacity support shows extents in this DAX region."""
    return any(name.startswith("extent") for name in _names(dax_region))


def _origin(roots: Roots, folder: str) -> tuple[str, str, str]:
    """(kind, CXL serial, PCI address) of a DAX device, from where it hangs in the device tree."""
    parts = folder.split("/")
    address = _pci_address(parts)
    if any(part.startswith("ndbus") for part in parts):
        virtio = [n for n, part in enumerate(parts) if re.fullmatch(r"virtio\d+", part)]
        if virtio:
            features = attribute("/".join(parts[: virtio[-1] + 1]), "features")
            shared = features[_VIRTIO_PMEM_SHMEM_REGION : _VIRTIO_PMEM_SHMEM_REGION + 1] == "1"
            return ("vhost-pmem" if shared else "pmem"), "", address
        return ("e820" if "e820_pmem" in parts else "nvdimm"), "", address
    if any(part.startswith("dax_region") for part in parts):
        return _cxl_origin(roots, parts)
    if any(part.startswith("hmem") for part in parts):
        return "hmem", "", ""
    return "dax", "", address


def _cxl_origin(roots: Roots, parts: list[str]) -> tuple[str, str, str]:
    """Through the region's only target to the memory device behind it: its serial and address."""
    above = next(n for n, part in enumerate(parts) if part.startswith("dax_region"))
    region = "/".join(parts[:above])
    decoder = attribute(region, "target0")
    if not re.fullmatch(r"decoder\d+\.\d+", decoder) or attribute(region, "target1"):
        return "cxl", "", ""
    endpoint = os.path.dirname(os.path.realpath(f"{roots.sysfs}/bus/cxl/devices/{decoder}"))
    memdev = os.path.realpath(f"{endpoint}/uport")
    return "cxl", attribute(memdev, "serial"), _pci_address(memdev.split("/"))


def _pci_address(parts: list[str]) -> str:
    """The innermost PCI function on a device path."""
    return next((part for part in reversed(parts) if _PCI.fullmatch(part)), "")


def _as_told(memory: Memory, told: tuple[Told, ...], roots: Roots) -> Memory:
    for entry in told:
        if not _fits(memory, entry, roots):
            continue
        size = entry.size_bytes or memory.size_bytes
        if size > memory.size_bytes or size % memory.align_bytes:
            continue
        made = {"cxl": "cxl-static", "hmem": "cxl-dcd" if entry.kind == "cxl" else "hmem"}
        kind = made.get(memory.kind, memory.kind)
        return memory._replace(tag=entry.tag, kind=kind, size_bytes=size, read_only=entry.read_only)
    return memory


def _fits(memory: Memory, entry: Told, roots: Roots) -> bool:
    """Whether everything that was told of a device is so; nothing told fits nothing."""
    if entry.kind == "cxl" and not entry.resource:
        return False  # The serial is that of a whole window: any extent in it would fit.
    index = 0
    if entry.acpi_index and memory.address:
        folder = f"{roots.sysfs}/bus/pci/devices/{memory.address}"
        index = _number(attribute(folder, "acpi_index"))
    pairs = (
        (entry.serial and _number(entry.serial), _number(memory.serial)),
        (entry.address, memory.address),
        (entry.slot, memory.slot),
        (entry.acpi_index, index),
        (entry.resource, memory.resource),
    )
    given = [pair for pair in pairs if pair[0]]
    return bool(given) and all(said == seen for said, seen in given)


# ---- BARs


def _bars(roots: Roots, told: tuple[Told, ...], slots: dict[str, str]) -> Iterator[Memory]:
    """ivshmem: only what was told, for nothing of it says that it is tagged memory."""
    if not told:
        return
    root = f"{roots.sysfs}/bus/pci/devices"
    for address in _names(root):
        folder = os.path.realpath(f"{root}/{address}")
        if (attribute(folder, "vendor"), attribute(folder, "device")) != IVSHMEM:
            continue
        lines = attribute(folder, "resource").splitlines()
        path = f"{folder}/resource{IVSHMEM_BAR}"
        if len(lines) <= IVSHMEM_BAR or not os.path.exists(path):
            continue
        start, end = ([_number(text) for text in lines[IVSHMEM_BAR].split()] + [0, 0])[:2]
        if not start or end < start:
            continue
        slot = slots.get(address.partition(".")[0], "")
        name = f"bar-{address}"
        memory = Memory(
            "", "ivshmem", name, path, end - start + 1, PAGE_BYTES, start, address, slot
        )
        yield _as_told(memory, told, roots)
