"""famfs on a host: what is there is found, what is not is named, and nothing is claimed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.client.tags import MIB, TAG, kernel_device, surface

from tagmem.base.errors import Conflict, RemoteError, Unsupported
from tagmem.shared.famfs import Answer, prepare, probe


class Machine:
    """A host's sysfs, devices and programs, as files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.sysfs, self.dev = root / "sys", root / "dev"
        kernel_device(self.sysfs, self.dev, "dax0.1", tag=TAG, size=2 * MIB)
        self.drivers = self.sysfs / "bus/dax/drivers"
        self.programs = root / "bin"
        self.programs.mkdir()
        self.filesystems = root / "filesystems"
        self.filesystems.write_text("nodev\tproc\n\text4\n")
        monkeypatch.setenv("PATH", str(self.programs))

    def program(self, name: str, script: str = "exit 0") -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def everything(self) -> None:
        (self.drivers / "fsdev_dax").mkdir(parents=True)
        self.filesystems.write_text("nodev\tfamfs\n")
        for name in ("daxctl", "mkfs.famfs", "famfs"):
            self.program(name)

    def places(self) -> dict[str, str]:
        return {
            "run_dir": str(self.root / "run"),
            "sysfs": str(self.sysfs),
            "dev": str(self.dev),
            "filesystems": str(self.filesystems),
        }

    def probe(self) -> Answer:
        return probe(TAG, **self.places())

    def prepare(self) -> Answer:
        return prepare(TAG, **self.places())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_what_is_missing_is_named(machine: Machine) -> None:
    answer = machine.probe()
    assert (answer.device, answer.prepared) == ("dax0.1", False)
    told = " ".join(answer.missing)
    for what in ("fsdev_dax", "modprobe famfs", "daxctl", "mkfs.famfs"):
        assert what in told
    with pytest.raises(Unsupported, match="fsdev_dax"):
        machine.prepare()


def test_an_emulated_tag_has_no_device_for_it(machine: Machine) -> None:
    machine.everything()
    surface(machine.root / "run")
    assert machine.probe().missing == (
        "a DAX device of the kernel's: an emulated appliance's tag is a file",
    )


def test_a_host_that_has_all_of_it_gets_its_device_bound(machine: Machine) -> None:
    machine.everything()
    assert machine.probe().missing == ()
    bound = machine.drivers / "fsdev_dax" / "dax0.1"
    script = f'[ "$*" = "reconfigure-device --mode=famfs dax0.1" ] && : > {bound}'
    machine.program("daxctl", script)
    answer = machine.prepare()
    assert answer.prepared
    assert answer.commands[1:] == (
        f"mkfs.famfs {machine.dev}/dax0.1",
        f"famfs mount {machine.dev}/dax0.1 /mnt/famfs",
    )
    machine.program("daxctl", "exit 1")
    assert machine.prepare().prepared


def test_what_daxctl_says_is_not_taken_for_what_is(machine: Machine) -> None:
    machine.everything()
    with pytest.raises(RemoteError, match="not bound"):
        machine.prepare()
    machine.program("daxctl", "echo 'device is busy' >&2; exit 3")
    with pytest.raises(Conflict, match="device is busy"):
        machine.prepare()
