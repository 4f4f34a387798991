"""Whether famfs can have a tag's DAX device on this host, and what is missing where it cannot.

The catalogue is for objects; famfs (https://famfs.org) is the file system for memory that several
hosts share. Putting a device into famfs mode binds it to the kernel's fsdev_dax driver
(drivers/dax/fsdev.c), which `daxctl reconfigure-device --mode=famfs` does from ndctl 85 on; making
and mounting the file system is famfs's own (mkfs.famfs, famfs mount). Nothing is emulated here: a
host without the driver gets the list of what it lacks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from tagmem.base.errors import Conflict, RemoteError, Unsupported
from tagmem.client.locate import DEV, SYSFS, wait_for

_DRIVER = "fsdev_dax"
_DAXCTL_SECONDS = 60


class Answer(msgspec.Struct, frozen=True):
    """What was looked for, and what there is."""

    device: str
    """The DAX device's name, such as dax0.1."""
    prepared: bool
    """Whether it is in famfs mode."""
    missing: tuple[str, ...]
    """What this host lacks, each with what would bring it; empty when famfs can have the device."""
    commands: tuple[str, ...]
    """What is to be run, as root, on the host that makes the file system; others mount only."""


def probe(
    tag: str,
    *,
    run_dir: str | None = None,
    sysfs: str = SYSFS,
    dev: str = DEV,
    filesystems: str = "/proc/filesystems",
) -> Answer:
    """Look, and change nothing. Raises TagAbsent."""
    device = wait_for(tag, timeout=0, run_dir=run_dir, sysfs=sysfs, dev=dev)
    name = os.path.basename(os.path.realpath(device.path))
    missing = []
    if device.emulated:
        missing.append("a DAX device of the kernel's: an emulated appliance's tag is a file")
    drivers = Path(sysfs) / "bus/dax/drivers"
    if not (drivers / _DRIVER).is_dir():
        missing.append(f"the driver {_DRIVER}: `modprobe {_DRIVER}`, on a kernel that has it")
    kinds = {line.split()[-1] for line in Path(filesystems).read_text("ascii").splitlines() if line}
    if "famfs" not in kinds:
        missing.append("the file system: `modprobe famfs`, on a kernel that has it")
    missing += [
        f"the program {program}: {package}"
        for program, package in (
            ("daxctl", "Debian's ndctl, 85 or later"),
            ("mkfs.famfs", "famfs's user space"),
            ("famfs", "famfs's user space"),
        )
        if shutil.which(program) is None
    ]
    commands = (
        f"daxctl reconfigure-device --mode=famfs {name}",
        f"mkfs.famfs {dev}/{name}",
        f"famfs mount {dev}/{name} /mnt/famfs",
    )
    return Answer(name, (drivers / _DRIVER / name).exists(), tuple(missing), commands)


def prepare(
    tag: str,
    *,
    run_dir: str | None = None,
    sysfs: str = SYSFS,
    dev: str = DEV,
    filesystems: str = "/proc/filesystems",
) -> Answer:
    """Put the tag's device into famfs mode, and look again. Whatever uses the device must have let
    go of it; what it holds is lost to a new file system.

    Raises Unsupported (naming what is missing), Conflict (daxctl refused), RemoteError (it said
    that it did, and it did not), TagAbsent.
    """
    found = probe(tag, run_dir=run_dir, sysfs=sysfs, dev=dev, filesystems=filesystems)
    if found.prepared:
        return found
    if found.missing:
        raise Unsupported(f"famfs cannot have {found.device} here; missing: {missing_text(found)}")
    done = subprocess.run(
        ["daxctl", "reconfigure-device", "--mode=famfs", found.device],
        capture_output=True,
        text=True,
        timeout=_DAXCTL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise Conflict(f"daxctl: {done.stderr.strip() or f'exit code {done.returncode}'}")
    found = probe(tag, run_dir=run_dir, sysfs=sysfs, dev=dev, filesystems=filesystems)
    if not found.prepared:
        raise RemoteError("daxctl", 0, f"{found.device} is not bound to {_DRIVER} all the same")
    return found


def missing_text(answer: Answer) -> str:
    """What is missing, in one line."""
    return "; ".join(answer.missing) or "nothing"
