"""Two QEMUs side by side, run from the cache folder with the libraries of their own release.

10.0 is what Debian 12 has in its backports; the guarantee that a host takes memory back without the
guest's help needs what came with 11.1. A machine has at most one of them installed, and most have
none, so both are brought: a package's whole closure, C library included, started through its own
dynamic loader, so that nothing of the machine is mixed in.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tagmem.base.errors import InvalidInput
from tagmem.base.units import format_size
from tagmem.lab.errors import LabFailed
from tagmem.lab.packages import (
    Package,
    Report,
    World,
    cache_dir,
    locked,
    run,
    silent,
    tree_bytes,
    unpack,
    upstream_version,
)

PACKAGE = "qemu-system-x86"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
BINARY = "usr/bin/qemu-system-x86_64"
FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@dataclass(frozen=True)
class Choice:
    """Where a QEMU may come from, and which of its versions will do."""

    release: str
    suite: str
    at_least: tuple[int, int]
    below: tuple[int, int]


CHOICES: dict[str, tuple[Choice, ...]] = {
    "10.0": (
        Choice("bookworm", "bookworm-backports", (10, 0), (10, 1)),
        # Backports of an old release end up in an archive; the next release has the same version.
        Choice("trixie", "trixie", (10, 0), (10, 1)),
    ),
    "11.1": (Choice("trixie", "trixie-backports", (11, 1), (99, 0)),),
}
"""By the name that a guest asks for. `11.1` is that or the newest later one."""

NAMES = tuple(CHOICES)


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be started: `[*argv, …]` with `environment` added to one's own."""

    name: str
    """What it was asked for as: `10.0` or `11.1`."""
    version: str
    """The Debian version that is here."""
    root: Path
    download_bytes: int
    unpacked_bytes: int

    @property
    def argv(self) -> tuple[str, ...]:
        """The program and the arguments that make it find its own libraries and firmware."""
        libraries = self.root / LIBRARIES
        search = f"{libraries}:{libraries / 'pulseaudio'}"
        started = (str(self.root / LOADER), "--library-path", search, str(self.root / BINARY))
        return started + tuple(word for path in self.firmware for word in ("-L", str(path)))

    @property
    def environment(self) -> dict[str, str]:
        """Where its loadable modules are: without it, those of an installed QEMU are tried."""
        return {"QEMU_MODULE_DIR": str(self.modules)}

    @property
    def modules(self) -> Path:
        """The folder of its loadable modules."""
        return self.root / LIBRARIES / "qemu"

    @property
    def firmware(self) -> tuple[Path, ...]:
        """The folders where it looks for BIOS and option ROMs."""
        return tuple(self.root / folder for folder in FIRMWARE)

    @property
    def upstream(self) -> tuple[int, int]:
        """Its version as numbers, to compare."""
        return upstream_version(self.version)


def present(name: str, cache: Path | None = None) -> Qemu | None:
    """The QEMU of that name if the cache has it."""
    _check_name(name)
    folder = (cache or cache_dir()) / f"qemu-{name}"
    try:
        document = json.loads((folder / "manifest.json").read_text())
        return Qemu(
            name,
            document["version"],
            folder / "root",
            document["download_bytes"],
            document["unpacked_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def get(
    name: str, cache: Path | None = None, report: Report = silent, *, refresh: bool = False
) -> Qemu:
    """The QEMU of that name, brought into the cache if it is not there.

    `refresh` looks for a newer version. Raises InvalidInput for another name than `NAMES`,
    LabFailed when no suite within reach has it.
    """
    cache = cache or cache_dir()
    found = present(name, cache)
    if found is not None and not refresh:
        return found
    with locked(cache, report):
        found = present(name, cache)  # the process that we waited for may have brought it
        if found is not None and not refresh:
            return found
        world, choice, version = _choose(name, cache, report, refresh=refresh)
        if found is not None and found.version == version:
            world.clean()
            return found
        return _bring(name, cache, report, world.closure([PACKAGE], choice.suite), world)


def _check_name(name: str) -> None:
    if name not in CHOICES:
        raise InvalidInput("qemu", f"one of {', '.join(NAMES)}", name)


def _choose(name: str, cache: Path, report: Report, *, refresh: bool) -> tuple[World, Choice, str]:
    seen = []
    for choice in CHOICES[name]:
        world = World(choice.release, cache / "apt", report)
        try:
            if refresh:
                world.refresh(age_seconds_max=0)
            version = world.version(PACKAGE, choice.suite)
        except LabFailed as error:
            seen.append(f"{choice.suite}: {error}")
            continue
        if version and choice.at_least <= upstream_version(version) < choice.below:
            return world, choice, version
        seen.append(f"{choice.suite} has {version or 'none'}")
    raise LabFailed(f"no QEMU {name} within reach of this machine's apt: {'; '.join(seen)}")


def _bring(name: str, cache: Path, report: Report, packages: list[Package], world: World) -> Qemu:
    version = next(package.version for package in packages if package.name == PACKAGE)
    folder, partial = cache / f"qemu-{name}", cache / f"qemu-{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files = world.download(packages)
    report(f"unpacking QEMU {version}")
    unpack(files, partial / "root")
    download_bytes = sum(package.size_bytes for package in packages)
    made = Qemu(name, version, partial / "root", download_bytes, tree_bytes(partial))
    _check_starts(made)
    document = {
        "version": version,
        "download_bytes": made.download_bytes,
        "unpacked_bytes": made.unpacked_bytes,
        "packages": [f"{package.name}={package.version}" for package in packages],
    }
    (partial / "manifest.json").write_text(json.dumps(document, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    world.clean()
    report(f"QEMU {version} is ready, {format_size(made.unpacked_bytes)} in {folder}")
    return Qemu(name, version, folder / "root", download_bytes, made.unpacked_bytes)


def _check_starts(qemu: Qemu) -> None:
    said = run([*qemu.argv, "--version"], seconds=60, environment=qemu.environment)
    wanted = ".".join(map(str, qemu.upstream))
    if f"version {wanted}." not in said:
        raise LabFailed(f"the unpacked QEMU says {said[:80]!r}, where {wanted} was expected")
