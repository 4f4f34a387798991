"""A QEMU and a guest image to be put into a guest, so that it can be a host itself.

Nested guests run under emulation within emulation where there is no KVM, so what goes in is little:
the emulator, its libraries and firmware, and the same kernel and image that the outer guest has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tagmem.lab.errors import LabFailed
from tagmem.lab.image import Image
from tagmem.lab.packages import run
from tagmem.lab.qemus import BINARY, LIBRARIES, LOADER, Qemu

PLACE = "opt/qemu"
"""Where QEMU is in the outer guest."""
START = f"{PLACE}/start"
"""Runs it there, with its libraries and firmware."""
KERNEL, INITRD = "boot/vmlinuz", "boot/initrd"

_FIRMWARE = (
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "linuxboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
)
_MODULES = ("accel-tcg-x86_64.so", "accel-qtest-x86_64.so")


def files(qemu: Qemu, image: Image, initrd: Path) -> Mapping[str, bytes]:
    """For `GuestSpec.files`: QEMU in /opt/qemu, and a kernel with its initramfs in /boot.

    `initrd` is what `image.initrd` wrote. Raises LabFailed when QEMU's libraries are not found.
    """
    found = {
        f"{PLACE}/qemu": (qemu.root / BINARY).read_bytes(),
        f"{PLACE}/ld.so": (qemu.root / LOADER).read_bytes(),
        START: _start().encode(),
        KERNEL: image.kernel.read_bytes(),
        INITRD: initrd.read_bytes(),
    }
    modules = [qemu.modules / name for name in _MODULES if (qemu.modules / name).is_file()]
    for module in modules:
        found[f"{PLACE}/modules/{module.name}"] = module.read_bytes()
    for library in _libraries(qemu, modules):
        found[f"{PLACE}/lib/{library.name}"] = library.read_bytes()
    for name in _FIRMWARE:
        for folder in qemu.firmware:
            if (folder / name).is_file():
                found.setdefault(f"{PLACE}/firmware/{name}", (folder / name).read_bytes())
    return found


def _start() -> str:
    return (
        "#!/bin/sh\n"
        f"export QEMU_MODULE_DIR=/{PLACE}/modules\n"
        f"chmod +x /{PLACE}/ld.so\n"
        f"exec /{PLACE}/ld.so --library-path /{PLACE}/lib /{PLACE}/qemu"
        f' -L /{PLACE}/firmware "$@"\n'
    )


def _libraries(qemu: Qemu, modules: list[Path]) -> list[Path]:
    search = str(qemu.root / LIBRARIES)
    found: set[Path] = set()
    for program in (qemu.root / BINARY, *modules):
        listed = run(
            [str(qemu.root / LOADER), "--library-path", search, "--list", str(program)], seconds=30
        )
        if "not found" in listed:
            raise LabFailed(f"{program.name} of QEMU {qemu.version} lacks a library: {listed:.400}")
        found.update(Path(path) for path in re.findall(r"=> (\S+) \(0x", listed))
    return sorted(found)
