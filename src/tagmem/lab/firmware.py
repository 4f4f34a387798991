"""UEFI firmware for the guests that need one: edk2, newer than either QEMU brings.

Specific-purpose memory is told to a guest in its memory map, and both SeaBIOS and the edk2 of
Debian 13 drop the entry. Firmware is data alone, so that a later release's serves any QEMU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tagmem.lab.errors import LabFailed
from tagmem.lab.packages import Report, World, cache_dir, locked, silent, unpack, upstream_version

PACKAGE = "ovmf"
RELEASES = ("forky", "sid")
AT_LEAST = (2026, 8)
"""The first that passes type 0xefffffff on."""
CODE = "usr/share/OVMF/OVMF_CODE_4M.fd"
VARIABLES = "usr/share/OVMF/OVMF_VARS_4M.fd"


def present(cache: Path | None = None) -> tuple[str, Path] | None:
    """The version and the unpacked tree, if the cache has it."""
    folder = (cache or cache_dir()) / "firmware"
    try:
        version = json.loads((folder / "manifest.json").read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(version), folder / "root"


def get(cache: Path | None = None, report: Report = silent) -> Path:
    """The unpacked tree, brought if it is missing. Raises LabFailed when no release has it."""
    cache = cache or cache_dir()
    found = present(cache)
    if found is None:
        with locked(cache, report):
            found = present(cache) or _bring(cache, report)
    return found[1]


def place(targets: tuple[Path, Path], cache: Path, report: Report = silent) -> None:
    """Put the code, and variables of its own, into a guest's folder."""
    root = get(cache, report)
    code, variables = targets
    if not code.exists():
        code.symlink_to(root / CODE)
    shutil.copyfile(root / VARIABLES, variables)


def _bring(cache: Path, report: Report) -> tuple[str, Path]:
    seen = []
    for release in RELEASES:
        world = World(release, cache / "apt", report, pockets=())
        try:
            version = world.version(PACKAGE, release)
        except LabFailed as error:
            seen.append(f"{release}: {error}")
            continue
        if not version or upstream_version(version) < AT_LEAST:
            seen.append(f"{release} has {version or 'none'}")
            continue
        partial, folder = cache / "firmware.partial", cache / "firmware"
        shutil.rmtree(partial, ignore_errors=True)
        unpack(world.download(world.closure([PACKAGE], release)), partial / "root")
        if not (partial / "root" / CODE).is_file():
            raise LabFailed(f"{PACKAGE} {version} has no {CODE}")
        (partial / "manifest.json").write_text(json.dumps({"version": version}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        world.clean()
        report(f"UEFI firmware {version} is ready")
        return version, folder / "root"
    wanted = ".".join(map(str, AT_LEAST))
    raise LabFailed(f"no {PACKAGE} of {wanted} or later within reach: {'; '.join(seen)}")
