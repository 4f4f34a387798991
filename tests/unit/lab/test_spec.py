"""A guest's command line, read as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tagmem.base.errors import InvalidInput
from tagmem.base.units import GIB, MIB
from tagmem.lab.qemus import Qemu
from tagmem.lab.spec import Accel, GuestSpec, Places, command_line, kernel_line

QEMU = Qemu("11.1", "1:11.1.3+ds-1", Path("/cache/q/root"), 0, 0)


def line(spec: GuestSpec, accel: Accel = "tcg") -> list[str]:
    return command_line(spec, QEMU, accel, Path("k"), Path("i"), Places(Path("/tmp/g,1")))


def values(words: list[str], option: str) -> list[str]:
    return [words[n + 1] for n, word in enumerate(words) if word == option]


def test_it_starts_through_the_loader_of_its_own_libraries() -> None:
    words = line(GuestSpec())
    assert words[0].endswith("/ld-linux-x86-64.so.2")
    assert words[1] == "--library-path"
    assert words[3] == "/cache/q/root/usr/bin/qemu-system-x86_64"
    assert values(words, "-L") == [str(path) for path in QEMU.firmware]
    assert QEMU.environment == {"QEMU_MODULE_DIR": f"{QEMU.root}/usr/lib/x86_64-linux-gnu/qemu"}
    assert QEMU.upstream == (11, 1)


def test_main_memory_is_shared_and_made_before_everything_else() -> None:
    spec = GuestSpec(memory_bytes=768 * MIB, objects=("memory-backend-ram,id=m1,size=1M",))
    objects = values(line(spec), "-object")
    assert objects[0] == f"memory-backend-memfd,id=ram0,size={768 * MIB},share=on"
    assert objects[1:] == ["memory-backend-ram,id=m1,size=1M"]
    assert values(line(spec), "-machine") == ["q35,memory-backend=ram0"]
    assert values(line(spec), "-m") == ["768M,slots=8,maxmem=32768M"]


def test_with_numa_nodes_main_memory_is_the_first_ones() -> None:
    words = line(GuestSpec(numa=("node,nodeid=1,memdev=m1",), machine=("cxl=on",)))
    assert values(words, "-machine") == ["q35,cxl=on"]
    assert values(words, "-numa") == [
        "node,nodeid=0,cpus=0-1,memdev=ram0",
        "node,nodeid=1,memdev=m1",
    ]


def test_every_root_port_has_room_for_a_window() -> None:
    devices = values(line(GuestSpec(root_ports=2, port_reserve_bytes=GIB)), "-device")
    assert f"pcie-root-port,id=rp2,bus=pcie.0,chassis=2,slot=2,pref64-reserve={GIB}" in devices
    assert "virtserialport,chardev=agent,name=org.tagmem.agent.0" in devices


def test_addresses_are_wide_under_tcg_and_the_machines_own_under_kvm() -> None:
    assert values(line(GuestSpec(cpu="max,hypervisor=off")), "-cpu") == [
        "max,hypervisor=off,phys-bits=46"
    ]
    assert values(line(GuestSpec(), "kvm"), "-cpu") == ["max,host-phys-bits=on"]
    assert values(line(GuestSpec(), "kvm"), "-accel") == ["kvm"]


def test_uefi_firmware_is_two_flashes_and_only_the_second_is_written() -> None:
    code, variables = values(line(GuestSpec(firmware="edk2")), "-drive")
    assert "readonly=on" in code
    assert "readonly=off" in variables
    assert values(line(GuestSpec()), "-drive") == []


def test_commas_in_paths_are_doubled() -> None:
    chardevs = values(line(GuestSpec()), "-chardev")
    assert "socket,id=qmp,path=/tmp/g,,1/qmp.sock,server=on,wait=off" in chardevs


def test_what_was_asked_for_comes_last() -> None:
    spec = GuestSpec(incoming=True, arguments=("-S",), devices=("sp-mem,memdev=m1",))
    assert line(spec)[-4:] == ["sp-mem,memdev=m1", "-incoming", "defer", "-S"]


def test_the_kernel_is_told_which_modules_to_load_and_more() -> None:
    spec = GuestSpec(modules=("a", "b"), kernel_arguments=("memmap=1G!4G",), agent=False)
    words = kernel_line(spec).split()
    assert "tagmem.modules=a,b" in words
    assert "tagmem.agent=off" in words
    assert words[-1] == "memmap=1G!4G"
    words = kernel_line(GuestSpec(modules=("a",), nested=True)).split()
    assert "tagmem.modules=a,kvm_amd,kvm_intel" in words


@pytest.mark.parametrize(
    "field",
    [
        {"name": "Über"},
        {"name": ""},
        {"qemu": "9.0"},
        {"memory_bytes": 16 * MIB},
        {"memory_bytes": GIB + 4096},
        {"memory_bytes": 64 * GIB},
        {"cpus": 0},
        {"root_ports": 17},
    ],
)
def test_a_field_outside_its_limit_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        GuestSpec(**field)
    assert caught.value.field == next(iter(field)).removesuffix("_bytes")


def test_a_folder_too_deep_for_a_socket_is_refused() -> None:
    with pytest.raises(InvalidInput, match="sockets"):
        Places(Path("/tmp") / ("d" * 100))
