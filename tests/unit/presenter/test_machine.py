"""The command line of a machine, what is read of one that runs, and what QEMU's process holds."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tagmem.base.errors import InvalidInput, OutcomeUnknown, RemoteError
from tagmem.base.units import GIB, MIB
from tagmem.presenter import survey
from tagmem.presenter.machine import VmSpec, argv
from tagmem.presenter.qemu import held_by, started_at

ANSWERS: dict[str, Any] = {
    "query-version": {"qemu": {"major": 11, "minor": 1, "micro": 3}},
    "query-status": {"status": "running"},
    "query-kvm": {"enabled": False},
    "query-memory-devices": [{"type": "dimm", "data": {"size": GIB}}],
    "query-memdev": [{"id": "ram0", "share": True}],
    "qom-list /machine/peripheral": [
        {"name": "type", "type": "string"},
        {"name": "rp2", "type": "child<pcie-root-port>"},
        {"name": "rp1", "type": "child<pcie-root-port>"},
    ],
    "qom-list /machine/peripheral/rp1/rp1": [{"name": "child[0]", "type": "link<x>"}],
    "qom-list /machine/peripheral/rp2/rp2": [],
    "qom-get /machine/peripheral/rp1/rp1 child[0]": "/machine/peripheral/tm-1",
    "qom-get /machine/peripheral/rp1 pref64-reserve": GIB,
    "qom-get /machine/peripheral/rp2 pref64-reserve": (1 << 64) - 1,
    "qom-get /machine memory": {"size": GIB, "max-size": 4 * GIB, "slots": 2},
    "qom-get /machine memory-backend": "/objects/ram0",
    "qom-get /machine type": "pc-q35-11.1-machine",
    "qom-get /machine nvdimm": False,
}


async def execute(command: str, arguments: Mapping[str, Any]) -> Any:
    key = " ".join([command, *map(str, arguments.values())])
    if key not in ANSWERS:
        raise RemoteError("QEMU", 1, f"no {key}")
    return ANSWERS[key]


def test_a_machine_is_read_over_qmp() -> None:
    facts = asyncio.run(survey.survey("vm1", execute, ("pc-dimm",)))
    assert facts.qemu == (11, 1, 3)
    assert facts.ram_shared
    assert facts.memory_free_bytes == 2 * GIB
    assert facts.memory_slots_free == 1
    assert [(s.bus, s.prefetch_bytes, s.taken_by) for s in facts.slots] == [
        ("rp1", GIB, "tm-1"),
        ("rp2", 0, ""),
    ]
    assert any("no guest agent" in line for line in survey.missing(facts))


def test_an_answer_that_makes_no_sense_is_unknown() -> None:
    async def garbage(command: str, arguments: Mapping[str, Any]) -> Any:
        return {"status": 5} if command == "query-status" else ["?"]

    with pytest.raises(OutcomeUnknown, match="makes no sense"):
        asyncio.run(survey.survey("vm1", garbage, ()))


def test_the_command_line_has_what_presenters_need() -> None:
    line = argv(VmSpec("vm1", "/run/vm1", memory_bytes=512 * MIB, ports=2, nvdimm=True))
    text = " ".join(line)
    assert "memory-backend-memfd,id=ram0,size=512M,share=on" in text
    assert text.index("id=ram0") < text.index("-machine")
    assert text.count("pcie-root-port") == 2
    assert "pref64-reserve=" in text
    assert "nvdimm=on" in text
    assert "name=org.tagmem.agent.0" in text


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (VmSpec("VM", "/run/vm"), "name"),
        (VmSpec("vm", "/run/vm", cpus=0), "cpus"),
        (VmSpec("vm", "/run/vm", memory_bytes=3), "memory_bytes"),
        (VmSpec("vm", "/run/vm", ports=99), "ports"),
        (VmSpec("vm", "/run/" + "x" * 120), "directory"),
        (VmSpec("vm", "/run/a,b"), "path"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(spec: VmSpec, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        argv(spec)
    assert caught.value.field == field


def test_what_a_process_holds_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(4096))
    assert held_by(os.getpid(), [str(path)]) == ()
    fd = os.open(path, os.O_RDWR)
    assert held_by(os.getpid(), [str(path)]) == (str(path),)
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    path.unlink()
    assert held_by(os.getpid(), [str(path)]) == (str(path),)
    mapped.close()
    assert held_by(os.getpid(), [str(path)]) == ()


def test_a_process_is_known_by_when_it_began() -> None:
    assert started_at(os.getpid()) > 0
    assert started_at(2**22 + 1) == 0
