"""A QEMU and a guest image to be put into a guest, so that it can be a host itself.

Nested guests run under emulation within emulation where there is no KVM, so what goes in is little:
the emulator, its libraries and firmware, the same kernel and image that the outer guest has, and
what the host's half of our own code needs of Debian's Python packages.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tagmem.lab.errors import LabFailed
from tagmem.lab.image import CODE_PLACE, RELEASE, Image
from tagmem.lab.packages import Report, World, locked, run, silent, unpack
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


PYTHON_PACKAGES = ("python3-msgspec", "python3-qemu-qmp", "python3-typing-extensions")
"""What the presenters import beside Python's own library."""
_TLS = ("ssl.py", "lib-dynload/_ssl.*.so")
"""Of Python's library: QEMU's QMP module names TLS, and nothing else in a guest does."""
_TLS_LIBRARIES = ("libssl.so.3", "libcrypto.so.3")


def python_modules(cache: Path, report: Report = silent) -> Path:
    """The folder of those packages, unpacked; brought if the cache does not have it.

    Raises LabFailed when they are not within reach.
    """
    folder = cache / "host-python"
    if (folder / "manifest.json").is_file():
        return folder / "root"
    with locked(cache, report):
        if not (folder / "manifest.json").is_file():
            world = World(RELEASE, cache / "apt", report)
            packages = world.exactly(PYTHON_PACKAGES, world.backports)
            partial = cache / "host-python.partial"
            shutil.rmtree(partial, ignore_errors=True)
            unpack(world.download(packages), partial / "root")
            names = [f"{package.name}={package.version}" for package in packages]
            (partial / "manifest.json").write_text(json.dumps(names))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            world.clean()
    return folder / "root"


def files(qemu: Qemu, image: Image, initrd: Path, modules: Path) -> Mapping[str, bytes]:
    """For `GuestSpec.files`: QEMU in /opt/qemu, a kernel with its initramfs in /boot, and Python
    modules where Python looks for them.

    `initrd` is what `image.initrd` wrote, `modules` what `python_modules` brought. Raises LabFailed
    when QEMU's libraries are not found.
    """
    return {**_emulator(qemu, image, initrd), **_python(image, modules)}


def _python(image: Image, modules: Path) -> Mapping[str, bytes]:
    top = modules / CODE_PLACE
    found = {
        f"{CODE_PLACE}/{path.relative_to(top)}": path.read_bytes()
        for path in sorted(top.rglob("*"))
        if path.is_file() and path.suffix in (".py", ".so")
    }
    for library in sorted(image.packages.glob("usr/lib/python3.*/")):
        for pattern in _TLS:
            for path in library.glob(pattern):
                found[str(path.relative_to(image.packages))] = path.read_bytes()
    for name in _TLS_LIBRARIES:
        found[f"{LIBRARIES}/{name}"] = (image.packages / LIBRARIES / name).read_bytes()
    return found


def _emulator(qemu: Qemu, image: Image, initrd: Path) -> dict[str, bytes]:
    found = {
        f"{PLACE}/qemu": (qemu.root / BINARY).read_bytes(),
        f"{PLACE}/ld.so": (qemu.root / LOADER).read_bytes(),
        START: _start().encode(),
        KERNEL: image.kernel.read_bytes(),
        INITRD: initrd.read_bytes(),
    }
    loadable = [qemu.modules / name for name in _MODULES if (qemu.modules / name).is_file()]
    for module in loadable:
        found[f"{PLACE}/modules/{module.name}"] = module.read_bytes()
    for library in _libraries(qemu, loadable):
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
