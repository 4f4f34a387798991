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
from tagmem.presenter.contract import CxlWindow
from tagmem.presenter.machine import (
    CxlSpec,
    MemoryNode,
    VmSpec,
    argv,
    cxl_options,
    cxl_words,
    files,
)
from tagmem.presenter.qemu import held_by, started_at
from tagmem.wire.cdat import performance

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


# ---- CXL

POOL = CxlSpec(2, "/media/pool0", 1 * GIB)


def test_each_cxl_port_has_a_bridge_and_a_window_of_its_own() -> None:
    assert cxl_options(CxlSpec()) == ()
    assert cxl_options(CxlSpec(1)) == (
        "cxl=on",
        f"cxl-fmw.0.targets.0=tmcxl1,cxl-fmw.0.size={64 * GIB}",
    )
    options = cxl_options(POOL)
    assert options[1] == f"cxl-fmw.0.targets.0=tmcxl0,cxl-fmw.0.size={GIB}"
    assert [word.split(",")[0] for word in options[2:]] == [
        "cxl-fmw.1.targets.0=tmcxl1",
        "cxl-fmw.2.targets.0=tmcxl2",
    ]
    text = " ".join(argv(VmSpec("vm1", "/run/vm1", cxl=POOL)))
    assert text.count("pxb-cxl") == text.count("cxl-rp") == 3
    # One that passes all through needs no decoder; a device behind it never leaves.
    assert text.count("hdm_for_passthrough=on") == 2
    assert "id=tmcw0,bus=tmcp0" in text
    assert "interleave" not in text


@pytest.mark.parametrize(
    ("memory", "most", "slots", "base"),
    [
        # As read of the CEDT of guests that ran: registers of bridges, then the first window.
        (2 * GIB, 32 * GIB, 8, 0xA90000000),
        (512 * MIB, 32 * GIB, 8, 4 * GIB + 32 * GIB - 512 * MIB + 8 * GIB + 256 * MIB),
        (4 * GIB, 32 * GIB, 0, 6 * GIB + 28 * GIB + 256 * MIB),
    ],
)
def test_the_kernel_is_told_where_the_window_lies(
    memory: int, most: int, slots: int, base: int
) -> None:
    words = cxl_words(POOL, memory, most, slots)
    assert words[0] == f"memmap=1024M%{base:#x}+0xefffffff"
    assert words[1] == "modprobe.blacklist=dax_hmem,kmem"
    assert cxl_words(CxlSpec(2), memory, most, slots) == ()


NODE = MemoryNode(1, "m1", "t", "/media/tag", 0, 256 * MIB, 100, GIB, specific_purpose=True)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(9)), "cxl.ports"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(0, "/pool", 3 * MIB)), "cxl.window_bytes"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(0, "/pool", 0)), "cxl.window_bytes"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(0, "/po,ol", GIB)), "path"),
        (VmSpec("vm", "/run/vm", cxl=POOL, nodes=(NODE,)), "cxl.window"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(1, latency_ns=300)), "cxl.latency_ns"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(0, "/pool", GIB, -1, GIB)), "latency_ns"),
        (VmSpec("vm", "/run/vm", cxl=CxlSpec(0, "/pool", GIB, 300, 1)), "bandwidth_bytes"),
    ],
)
def test_cxl_that_cannot_be_is_refused(spec: VmSpec, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        argv(spec)
    assert caught.value.field == field


def cxl_machine(**changes: Any) -> dict[str, Any]:
    """Three ports: one with a dynamic device, one with a static one, one free."""
    path = "/machine/peripheral"
    answers = ANSWERS | {
        f"qom-list {path}": [{"name": f"tmcp{n}", "type": "child<cxl-rp>"} for n in range(3)],
        "qom-get /machine cxl-fmw": [{"targets": [f"tmcxl{n}"], "size": GIB} for n in range(3)],
        f"qom-get {path}/dcd num-dc-regions": 2,
        f"qom-get {path}/dcd volatile-dc-memdev": "/objects/pool",
        f"qom-get {path}/dcd sn": 0xABC,
        "qom-get /objects/pool mem-path": "/media/pool0",
        "qom-get /objects/pool offset": 2 * MIB,
        "qom-get /objects/pool size": GIB,
        f"qom-get {path}/static num-dc-regions": 0,
    }
    for n, device in enumerate(("dcd", "static", "")):
        answers[f"qom-get {path}/tmcp{n} parent_bus"] = f"/machine/tmcxl{n}/tmcxl{n}"
        child = [{"name": "child[0]", "type": "link<x>"}] if device else []
        answers[f"qom-list {path}/tmcp{n}/tmcp{n}"] = child
        answers[f"qom-get {path}/tmcp{n}/tmcp{n} child[0]"] = f"{path}/{device}"
    return answers | changes


def cxl_of(answers: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[CxlWindow, ...]]:
    async def answer(command: str, arguments: Mapping[str, Any]) -> Any:
        key = " ".join([command, *map(str, arguments.values())])
        if key not in answers:
            raise RemoteError("QEMU", 1, f"no {key}")
        return answers[key]

    facts = asyncio.run(survey.survey("vm1", answer, ()))
    return facts.cxl_ports, facts.cxl_windows


def test_cxl_ports_and_windows_are_read_over_qmp() -> None:
    window = CxlWindow("dcd", "0xabc", "/media/pool0", 2 * MIB, GIB, 2)
    assert cxl_of(cxl_machine()) == (("tmcp2",), (window,))


@pytest.mark.parametrize(
    ("changes", "ports", "windows"),
    [
        # No fixed memory window leads to any of them, or one is interleaved over all.
        ({"qom-get /machine cxl-fmw": []}, 0, 0),
        ({"qom-get /machine cxl-fmw": [{"targets": ["tmcxl0", "tmcxl1", "tmcxl2"]}]}, 0, 0),
        # Two root ports below one bridge.
        ({"qom-get /machine/peripheral/tmcp2 parent_bus": "/machine/tmcxl0/tmcxl0"}, 0, 0),
        # A device that has static memory too: DPA 0 is not dynamic.
        ({"qom-get /machine/peripheral/dcd volatile-memdev": "/objects/more"}, 1, 0),
        ({"qom-get /machine/peripheral/dcd persistent-memdev": "/objects/more"}, 1, 0),
    ],
)
def test_what_is_not_one_device_below_one_window_is_left_alone(
    changes: dict[str, Any], ports: int, windows: int
) -> None:
    found = cxl_of(cxl_machine(**changes))
    assert (len(found[0]), len(found[1])) == (ports, windows)


def test_garbage_about_cxl_is_unknown() -> None:
    with pytest.raises(OutcomeUnknown, match="makes no sense"):
        cxl_of(cxl_machine(**{"qom-get /machine cxl-fmw": [{"size": 1}]}))


FAST = CxlSpec(1, "/media/pool0", GIB, 350, 20 * GIB)


def test_a_window_with_figures_has_its_own_table_and_the_way_to_it_a_node() -> None:
    spec = VmSpec("vm1", "/run/vm1", memory_bytes=GIB, cxl=FAST)
    assert files(spec) == {"/run/vm1/cxl.cdat": performance([GIB], 350, 20 * GIB)}
    text = " ".join(argv(spec))
    assert "cdat=/run/vm1/cxl.cdat" in text
    assert "hmat=on" in text
    assert "memory-backend=ram0" not in text, "node 0 has it"
    for bridge, node in ((0, 1), (1, 2)):
        assert f"node,nodeid={node} " in text
        assert f"acpi-generic-port,id=tmgp{bridge},pci-bus=tmcxl{bridge},node={node}" in text
        assert f"target={node},hierarchy=memory,data-type=access-latency" in text
    assert text.rindex("node,nodeid=") < text.index("hmat-lb"), "QEMU's order"


def test_the_way_to_a_bridge_is_numbered_after_memory_in_tags() -> None:
    node = MemoryNode(1, "m1", "t", "/media/tag", 0, 256 * MIB, 100, GIB)
    text = " ".join(argv(VmSpec("vm1", "/run/vm1", nodes=(node,), cxl=FAST)))
    assert "pci-bus=tmcxl0,node=2" in text
    assert text.count("nodeid=1,") == 1


def test_without_figures_nothing_is_told() -> None:
    spec = VmSpec("vm1", "/run/vm1", cxl=POOL)
    assert files(spec) == {}
    assert "cdat=" not in " ".join(argv(spec))
    assert "-numa" not in argv(spec)
