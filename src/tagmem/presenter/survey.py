"""Asks a QEMU what it is and what fits into it, whoever started it.

All that presenters judge by is read from QMP: no command line, no configuration of libvirt. What
QEMU says is checked for shape, because an adopted one is somebody else's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from tagmem.base.errors import OutcomeUnknown, RemoteError
from tagmem.base.units import GIB, Bytes
from tagmem.presenter.contract import CxlWindow, GuestFacts, Lent, Slot, Version, VmFacts

PERIPHERAL = "/machine/peripheral"
PORTS_MAX = 64
"""Root ports that are looked at."""
LOW_RAM_BYTES = 2 * GIB
"""Of a q35 machine, more RAM than this may lie on both sides of 4 GiB."""
RESERVE_UNSET = (1 << 64) - 1
DRIVERS = (
    "vhost-user-test-device-pci",
    "virtio-pmem-pci",
    "nvdimm",
    "pc-dimm",
    "virtio-mem-pci",
    "ivshmem-plain",
    "cxl-type3",
    "sp-mem",
)

Execute = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


def names(listed: Any) -> tuple[str, ...]:
    """Of the children in a qom-list."""
    return tuple(name for name, _ in children(listed))


def children(listed: Any) -> tuple[tuple[str, str], ...]:
    """(name, type) of each child in a qom-list."""
    found = []
    for entry in listed if isinstance(listed, list) else ():
        name, kind = entry.get("name"), entry.get("type")
        if isinstance(name, str) and isinstance(kind, str) and kind.startswith("child<"):
            found.append((name, kind[6:-1]))
    return tuple(found)


async def drivers(execute: Execute) -> tuple[str, ...]:
    """Which of our device types this QEMU has and can create."""
    found = []
    for driver in DRIVERS:
        try:
            await execute("device-list-properties", {"typename": driver})
        except RemoteError:
            continue
        found.append(driver)
    return tuple(found)


async def survey(name: str, execute: Execute, known_drivers: tuple[str, ...]) -> VmFacts:
    """Everything but the guest and the broker. Raises OutcomeUnknown when QEMU is silent or says
    what makes no sense.
    """
    try:
        version = _version(await execute("query-version", {}))
        status = await execute("query-status", {})
        devices = children(await execute("qom-list", {"path": PERIPHERAL}))
        memory = await _property(execute, "/machine", "memory", {})
        plugged = await execute("query-memory-devices", {})
        kvm = await execute("query-kvm", {})
        free, slots_free = _room(memory, plugged)
        ports, windows = await _cxl(execute, devices)
        return VmFacts(
            name,
            version,
            str(status["status"]),
            "kvm" if kvm.get("enabled") else "tcg",
            str(await _property(execute, "/machine", "type", "")),
            bool(await _property(execute, "/machine", "nvdimm", default=False)),
            await _ram_shared(execute),
            slots=await _slots(execute, devices),
            memory_slots_free=slots_free,
            memory_free_bytes=free,
            regions_taken=_regions(memory, plugged, devices),
            drivers=known_drivers,
            cxl_ports=ports,
            cxl_windows=windows,
            devices=tuple(device for device, _ in devices),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutcomeUnknown(f"VM {name}: an answer of QEMU's makes no sense: {error!r}") from error


def completed(
    found: VmFacts, *, broker: bool, guest: GuestFacts | None, window_regions: int = 0
) -> VmFacts:
    """With what QEMU does not say. (It has a command that would tell its vhost back-ends' memory;
    on this device x-query-virtio-status kills QEMU 11.1.)
    """
    return msgspec.structs.replace(
        found,
        broker=broker,
        guest=guest,
        regions_taken=found.regions_taken + window_regions,
        window_regions=window_regions,
    )


def with_lent(found: VmFacts, lent: Iterable[Lent]) -> VmFacts:
    """With what was offered of its CXL windows, which QEMU does not tell."""
    known = tuple(lent)
    windows = tuple(
        msgspec.structs.replace(w, lent=tuple(one for one in known if one.window == w.device))
        for w in found.cxl_windows
    )
    return msgspec.structs.replace(found, cxl_windows=windows)


def missing(vm: VmFacts) -> tuple[str, ...]:
    """What a machine that somebody else started lacks, each with what it costs."""
    lacks = []
    if not vm.slots:
        lacks.append("no pcie-root-port: nothing on PCI can be plugged (-device pcie-root-port)")
    elif not any(slot.prefetch_bytes for slot in vm.slots):
        lacks.append("no root port with pref64-reserve: no vhost-pmem, no ivshmem")
    if not vm.ram_shared:
        lacks.append("RAM is not shared (memory-backend-memfd,share=on): no vhost-pmem")
    if not vm.memory_free_bytes:
        lacks.append("no room for device memory (-m maxmem=): no pmem, nvdimm, dimm, virtio-mem")
    if not vm.memory_slots_free:
        lacks.append("no free memory slot (-m slots=): no nvdimm, no dimm")
    if not vm.nvdimm:
        lacks.append("the machine has no nvdimm=on: no nvdimm")
    if "vhost-user-test-device-pci" not in vm.drivers:
        lacks.append("QEMU is older than 11.1: no vhost-pmem, so nothing is guaranteed")
    if not vm.broker:
        lacks.append("no broker runs on this host: no vhost-pmem")
    if vm.guest is None:
        lacks.append("no guest agent: nobody in the guest can prove a release, or be asked for one")
    return tuple(lacks)


def _version(answer: Any) -> Version:
    number = answer["qemu"]
    return int(number["major"]), int(number["minor"]), int(number["micro"])


async def _property(execute: Execute, path: str, name: str, default: Any) -> Any:
    try:
        return await execute("qom-get", {"path": path, "property": name})
    except RemoteError:
        return default


def _room(memory: Mapping[str, Any], plugged: Sequence[Mapping[str, Any]]) -> tuple[Bytes, int]:
    """Device memory that still fits, and free memory slots. QEMU aligns, so a little less may."""
    sizes = [(entry["type"], int(entry["data"]["size"])) for entry in plugged]
    slots = int(memory.get("slots", 0))
    room = int(memory.get("max-size", 0)) - int(memory.get("size", 0))
    taken = sum(1 for kind, _ in sizes if kind in ("dimm", "nvdimm"))
    return max(0, room - sum(size for _, size in sizes)), max(0, slots - taken)


def _regions(
    memory: Mapping[str, Any],
    plugged: Sequence[Mapping[str, Any]],
    devices: Sequence[tuple[str, str]],
) -> int:
    """What QEMU tells vhost back-ends of but windows: RAM, in two where it goes around the hole
    below 4 GiB; each memory device; each BAR of shared memory.
    """
    ram = 1 if int(memory.get("size", 0)) <= LOW_RAM_BYTES else 2
    return ram + len(plugged) + sum(kind == "ivshmem-plain" for _, kind in devices)


async def _ram_shared(execute: Execute) -> bool:
    backend = str(await _property(execute, "/machine", "memory-backend", ""))
    memory = await execute("query-memdev", {})
    if not backend:  # Its RAM is that of its NUMA nodes.
        return bool(memory) and all(entry.get("share") is True for entry in memory)
    ident = backend.rpartition("/")[2]
    return any(entry.get("id") == ident and entry.get("share") is True for entry in memory)


async def _slots(execute: Execute, devices: Sequence[tuple[str, str]]) -> tuple[Slot, ...]:
    ports = sorted(name for name, kind in devices if kind == "pcie-root-port")[:PORTS_MAX]
    found = []
    for port in ports:
        path = f"{PERIPHERAL}/{port}"
        reserve = int(await _property(execute, path, "pref64-reserve", 0))
        taken = await _taken_by(execute, f"{path}/{port}")
        found.append(Slot(port, 0 if reserve >= RESERVE_UNSET else reserve, taken))
    return tuple(found)


async def _taken_by(execute: Execute, bus: str) -> str:
    """The name of the device on a port's bus; `?` where it has none."""
    try:
        listed = await execute("qom-list", {"path": bus})
    except RemoteError:
        return ""
    for entry in listed:
        if str(entry["name"]).startswith("child["):
            where = {"path": bus, "property": entry["name"]}
            return str(await execute("qom-get", where)).rpartition("/")[2] or "?"
    return ""


# ---- CXL


async def _cxl(
    execute: Execute, devices: Sequence[tuple[str, str]]
) -> tuple[tuple[str, ...], tuple[CxlWindow, ...]]:
    """(free CXL root ports, devices with dynamic capacity), as far as each is the only one of its
    host bridge, to which a fixed memory window leads.
    """
    ports = sorted(name for name, kind in devices if kind == "cxl-rp")[:PORTS_MAX]
    if not ports:
        return (), ()
    windows = await _property(execute, "/machine", "cxl-fmw", [])
    targets = {str(w["targets"][0]) for w in windows if len(w["targets"]) == 1}
    parents = {
        port: str(await _property(execute, f"{PERIPHERAL}/{port}", "parent_bus", "")).split("/")[-1]
        for port in ports
    }
    free: list[str] = []
    dynamic: list[CxlWindow] = []
    for port, bridge in parents.items():
        if bridge not in targets or [*parents.values()].count(bridge) > 1:
            continue
        taken = await _taken_by(execute, f"{PERIPHERAL}/{port}/{port}")
        if not taken:
            free.append(port)
        elif (window := await _window(execute, taken)) is not None:
            dynamic.append(window)
    return tuple(free), tuple(dynamic)


async def _window(execute: Execute, device: str) -> CxlWindow | None:
    """A device that has dynamic capacity and no other, from one file."""
    path = f"{PERIPHERAL}/{device}"
    regions = int(await _property(execute, path, "num-dc-regions", 0))
    memory = str(await _property(execute, path, "volatile-dc-memdev", ""))
    if not regions or not memory:
        return None
    for other in ("volatile-memdev", "persistent-memdev", "memdev"):
        if await _property(execute, path, other, ""):
            return None
    file = str(await _property(execute, memory, "mem-path", ""))
    offset = int(await _property(execute, memory, "offset", 0))
    size = int(await _property(execute, memory, "size", 0))
    serial = int(await _property(execute, path, "sn", 0))
    return CxlWindow(device, f"{serial:#x}", file, offset, size, regions)
