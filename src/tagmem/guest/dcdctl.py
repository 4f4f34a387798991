"""Runs the userspace DCD driver on the device of this guest: one operation per start, JSON out.

    python3 -m tagmem.guest.dcdctl list
    python3 -m tagmem.guest.dcdctl take --dpa 0x10000000 --length 0x10000000 [--window 0]
    python3 -m tagmem.guest.dcdctl give --dpa 0x10000000 --length 0x10000000
    python3 -m tagmem.guest.dcdctl commit --length 0x10000000

The host has it run (Exec) where the kernel knows no dynamic capacity. It keeps nothing: what waits
is in the device's log, what is held in its extent list, and which tag lies where the host knows.
`take` accepts the offer of exactly this range and refuses those before it, commits the decoders
(host bridge first, if it has any, then the endpoint) over the whole window, and says where in guest
physical memory the range lies now; what makes a DAX device of that (nd_e820 or dax_hmem on a range
that the command line reserved) is loaded by `--modules`. `give` wants the range unused: the host
detaches the tag first, which proves it. `commit` is for devices with static capacity alone: stock
kernels refuse to commit decoders inside a VM, and adopt what is committed before they come.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tagmem.base.errors import Conflict, InvalidInput, NotFound, TagmemError, Unsupported
from tagmem.guest import dcd
from tagmem.guest.find import attribute, driver_of
from tagmem.guest.mmio import Mapped, Registers, perform
from tagmem.guest.system import say

CXL_MEMORY_CLASS = "0x0502"
BRIDGE_BYTES = 64 * 1024
MEM_ENABLE = 1 << 2


class Device:
    """One DCD, its registers mapped. Raises OSError, TagmemError."""

    def __init__(self, address: str = "", sysfs: str = "/sys", mem: str = "/dev/mem") -> None:
        self._sysfs = sysfs
        self._mem = mem
        self._folder = self._find(address)
        if driver_of(self._folder):
            raise Conflict(
                f"{self._folder} is bound to {driver_of(self._folder)}: its mailbox is the kernel's"
            )
        self._enable()
        with open(f"{self._folder}/config", "rb") as file:
            self._config = file.read(4096)
        self._locator = dcd.locate(self._config)
        bar, offset = self._locator.blocks[dcd.DEVICE_BLOCK]
        device = Mapped(f"{self._folder}/resource{bar}")
        self._spaces: dict[str, Registers] = {"device": device}
        self.driver = dcd.Driver(self.do(dcd.Mailbox.find(offset, device.span)))

    def _find(self, address: str) -> str:
        found = [
            os.path.realpath(folder)
            for folder in sorted(glob.glob(f"{self._sysfs}/bus/pci/devices/*"))
            if attribute(folder, "class").startswith(CXL_MEMORY_CLASS)
            and address in ("", os.path.basename(folder))
        ]
        if len(found) != 1:
            names = ", ".join(map(os.path.basename, found)) or "none"
            raise NotFound(f"one CXL memory device is wanted ({address or 'any'}), found: {names}")
        return found[0]

    def _enable(self) -> None:
        if attribute(self._folder, "enable") == "0":
            with open(f"{self._folder}/enable", "w", encoding="ascii") as file:
                file.write("1")

    def do(self, steps: dcd.Steps[Any]) -> Any:
        """Carry an operation out."""
        return perform(steps, self._spaces)

    def offers(self) -> list[dcd.Event]:
        """Start, and what waits."""
        events: list[dcd.Event] = self.do(self.driver.start())
        return events

    def commit(self, window: int, length: int = 0) -> int:
        """Commit the decoders from the window's base, over all regions or `length`; that base.

        DPA 0 lies at the base, so a range's place is the base plus its DPA.
        """
        with open(f"{self._sysfs}/firmware/acpi/tables/CEDT", "rb") as file:
            bridges, windows = dcd.read_cedt(file.read(64 * 1024))
        if window >= len(windows):
            raise NotFound(f"window {window}: the firmware tells of {len(windows)}")
        chosen = windows[window]
        ends = (region.base + region.decode_length for region in self.driver.regions)
        end = length or max(ends)
        unit = dcd.DECODER_UNIT_BYTES
        size = min(-(-end // unit) * unit, chosen.size)
        self._commit_bridge(bridges, chosen, size)
        bar, offset = self._locator.blocks[dcd.COMPONENT_BLOCK]
        component = Mapped(f"{self._folder}/resource{bar}")
        self._spaces["component"] = component
        decoders = self.do(dcd.Decoders.find("component", offset, component.span))
        if decoders is None:
            raise Unsupported("the device has no HDM decoders")
        self.do(decoders.program(0, chosen.base, size))
        self._enable_memory()
        return chosen.base

    def _commit_bridge(self, bridges: dict[int, int], window: dcd.Window, size: int) -> None:
        """A bridge with one root port passes everything through, unless it was told not to.

        Its decoder is as long as the endpoint's: the kernel adopts only pairs that are alike.
        """
        base = bridges.get(window.targets[0], 0)
        if not base or not os.path.exists(self._mem):
            return
        self._spaces["bridge"] = Mapped(self._mem, base, BRIDGE_BYTES)
        decoders = self.do(dcd.Decoders.find("bridge", 0, BRIDGE_BYTES))
        if decoders is not None:
            port = self._root_port()
            self.do(decoders.program(0, window.base, size, targets=(port,)))

    def _root_port(self) -> int:
        """The port number in the link capabilities of the port above us (PCIe, bits 31:24)."""
        with open(f"{os.path.dirname(self._folder)}/config", "rb") as file:
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
        fd = os.open(f"{self._folder}/config", os.O_RDWR | os.O_CLOEXEC)
        try:
            control = int.from_bytes(os.pread(fd, 2, at + 0xC), "little")
            os.pwrite(fd, (control | MEM_ENABLE).to_bytes(2, "little"), at + 0xC)
        finally:
            os.close(fd)


def take(device: Device, dpa: int, length: int, window: int) -> dict[str, Any]:
    """Accept the offer of this range (or find it accepted), commit the decoders."""
    waiting = [event for event in device.offers() if isinstance(event, dcd.Offer)]
    matching = [[extent[:2] for extent in offer.extents] == [(dpa, length)] for offer in waiting]
    if any(matching):
        first = matching.index(True)
        for offer in waiting[:first]:
            device.do(device.driver.answer(offer, accept=False))
        device.do(device.driver.answer(waiting[first], accept=True))
    held = device.driver.held.get(dpa)
    if held is None or held.length != length:
        raise NotFound(f"{dpa:#x}+{length:#x} was not offered, and is not held")
    return {"dpa": dpa, "length": length, "resource": device.commit(window) + dpa}


def give(device: Device, dpa: int, length: int) -> dict[str, Any]:
    """Release this range; events that asked for it are drained."""
    device.offers()
    held = device.driver.held.get(dpa)
    if held is None or held.length != length:
        return {"dpa": dpa, "length": length, "held": False}
    device.do(device.driver.release([held]))
    return {"dpa": dpa, "length": length, "held": False}


def show(device: Device) -> dict[str, Any]:
    """What is held and what waits."""
    waiting = device.offers()
    return {
        "regions": [region._asdict() for region in device.driver.regions],
        "held": [extent._asdict() for extent in device.driver.held.values()],
        "waiting": [{"kind": type(event).__name__, **event._asdict()} for event in waiting],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options, do it, and write one line of JSON."""
    parser = argparse.ArgumentParser("tagmem.guest.dcdctl")
    parser.add_argument("operation", choices=["list", "take", "give", "commit"])
    parser.add_argument("--device", default="", help="PCI address; needed when there are several")
    parser.add_argument("--dpa", type=lambda text: int(text, 0), default=0)
    parser.add_argument("--length", type=lambda text: int(text, 0), default=0)
    parser.add_argument("--window", type=int, default=0, help="number in the firmware's table")
    parser.add_argument("--modules", default="", help="kernel modules to load afterwards: a,b")
    given = parser.parse_args(arguments)
    try:
        device = Device(given.device)
        if given.operation == "take":
            answer = take(device, given.dpa, given.length, given.window)
        elif given.operation == "give":
            answer = give(device, given.dpa, given.length)
        elif given.operation == "commit":
            if given.length <= 0:
                raise InvalidInput("length", "the device's capacity in bytes", given.length)
            answer = {"length": given.length, "resource": device.commit(given.window, given.length)}
        else:
            answer = show(device)
        if given.modules:
            modules = given.modules.split(",")
            subprocess.run(["modprobe", "-a", *modules], check=True)
    except (TagmemError, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    sys.stdout.writelines([json.dumps(answer), "\n"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
