"""Tagged memory of every kind is found in the trees that kernels show, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.guest.trees import PMEM, VHOST, plug, roots_in

from tagmem.guest.find import find, prepare
from tagmem.wire.guest import Told

T = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"


@pytest.mark.parametrize(
    ("tree", "kind", "tag", "name", "slot", "address"),
    [
        ("pmem", "pmem", PMEM, "dax0.0", "0-2", "0000:01:00.0"),
        ("vhost-pmem", "vhost-pmem", VHOST, "dax1.0", "0-3", "0000:02:00.0"),
        ("nvdimm", "nvdimm", "0badcafe-0000-4000-8000-00000000d1f7", "dax2.0", "", ""),
        ("e820", "e820", "11111111-2222-4333-8444-555555555555", "dax3.0", "", ""),
        (
            "cxl-dcd",
            "cxl-dcd",
            "77777777-8888-4999-8aaa-bbbbbbbbbbbb",
            "dax6.1",
            "",
            "0000:0e:00.0",
        ),
    ],
)
def test_a_tag_in_band_needs_nobody(
    tmp_path: Path, tree: str, kind: str, tag: str, name: str, slot: str, address: str
) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, tree)
    [memory] = find(roots)
    assert (memory.kind, memory.tag, memory.name) == (kind, tag, name)
    assert (memory.slot, memory.address) == (slot, address)
    assert memory.path == f"{roots.dev}/{name}"
    assert memory.align_bytes == 2 << 20


@pytest.mark.parametrize(
    ("tree", "told", "kind"),
    [
        ("cxl-static", Told(T, serial="0xabc"), "cxl-static"),
        ("cxl-static", Told(T, serial="0xABC".lower(), slot="2"), "cxl-static"),
        ("hmem", Told(T, resource=0x100000000), "hmem"),
        ("ivshmem", Told(T, slot="7"), "ivshmem"),
        ("ivshmem", Told(T, acpi_index=101, size_bytes=1 << 20), "ivshmem"),
        ("ivshmem", Told(T, address="0000:03:00.0", read_only=True), "ivshmem"),
    ],
)
def test_what_cannot_carry_a_tag_is_known_by_what_was_told(
    tmp_path: Path, tree: str, told: Told, kind: str
) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, tree)
    assert find(roots) == []
    [memory] = find(roots, [told])
    assert (memory.tag, memory.kind, memory.read_only) == (T, kind, told.read_only)
    assert memory.size_bytes == told.size_bytes or not told.size_bytes


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ("cxl-static", Told(T, serial="0xabd")),
        ("cxl-static", Told(T, serial="0xabc", slot="3")),
        ("hmem", Told(T)),
        ("hmem", Told(T, resource=0x100000000, size_bytes=2 << 30)),
        ("hmem", Told(T, resource=0x100000000, size_bytes=4096)),
        ("ivshmem", Told(T, acpi_index=102)),
        ("pmem", Told(T, slot="0-2")),
    ],
)
def test_what_does_not_fit_is_not_given_a_tag(tmp_path: Path, tree: str, told: Told) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, tree)
    assert T not in {memory.tag for memory in find(roots, [told])}


def test_a_tag_in_band_is_not_renamed(tmp_path: Path) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, "pmem")
    assert [memory.tag for memory in find(roots, [Told(T, address="0000:01:00.0")])] == [PMEM]


def test_what_is_no_tagged_memory_is_left_alone(tmp_path: Path) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, "untagged")
    assert find(roots, [Told(T, resource=0x200000000)]) == []


def test_all_kinds_at_once(tmp_path: Path) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, "pmem", "vhost-pmem", "nvdimm", "e820", "hmem", "cxl-static", "cxl-dcd")
    plug(tmp_path, "ivshmem", "untagged")
    told = [Told(T, serial="0xabc"), Told(T.replace("a", "b"), acpi_index=101)]
    assert len(find(roots, told)) == 7


def test_a_bar_is_enabled_before_it_is_mapped(tmp_path: Path) -> None:
    roots = roots_in(tmp_path)
    plug(tmp_path, "ivshmem")
    [memory] = find(roots, [Told(T, slot="7")])
    assert (memory.size_bytes, memory.resource) == (4 << 20, 0x381000000000)
    prepare(memory)
    enable = tmp_path / "sys/devices/pci0000:00/0000:00:04.0/0000:03:00.0/enable"
    assert enable.read_text() == "1"


def test_a_guest_without_any_bus_has_nothing(tmp_path: Path) -> None:
    roots = roots_in(tmp_path)._replace(sysfs=str(tmp_path / "nothing"))
    assert find(roots, [Told(T, slot="7")]) == []
