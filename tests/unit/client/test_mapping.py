"""Mapping a tag: real files, real mappings; their bytes, place, views and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.client.tags import MIB, TAG, kernel_device, surface

import tagmem
from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown, Unsupported

HUGE = 2 * MIB


def test_what_is_written_is_in_the_media_and_the_other_way_round(tmp_path: Path) -> None:
    path = surface(tmp_path, content=b"from the media")
    with tagmem.open(TAG, run_dir=tmp_path) as capacity:
        assert bytes(capacity.view[:14]) == b"from the media"
        assert bytes(memoryview(capacity.map)[:4]) == b"from"
        capacity.view[0:4] = b"back"
        assert path.read_bytes()[:4] == b"back"
        assert (capacity.tag, capacity.size, len(capacity)) == (TAG, 2 * MIB, 2 * MIB)
        assert capacity.path == str(path)
        capacity.flush()
    assert capacity.closed


@pytest.mark.parametrize("size", [HUGE, 3 * MIB, 8 * MIB, 2 * MIB + 4096])
def test_mappings_lie_on_huge_page_boundaries(tmp_path: Path, size: int) -> None:
    surface(tmp_path, size)
    several = [tagmem.open(TAG, run_dir=tmp_path) for _ in range(5)]
    assert [capacity.address % HUGE for capacity in several] == [0] * 5
    for capacity in several:
        assert len(capacity.map) == size
        capacity.close()


def test_a_small_capacity_is_mapped_too(tmp_path: Path) -> None:
    surface(tmp_path, 4096)
    with tagmem.open(TAG, run_dir=tmp_path) as capacity:
        assert len(capacity.view) == 4096


def test_closing_leaves_nothing_mapped(tmp_path: Path) -> None:
    path = str(surface(tmp_path, 3 * MIB))
    with tagmem.open(TAG, run_dir=tmp_path):
        assert path in Path("/proc/self/maps").read_text()
    assert path not in Path("/proc/self/maps").read_text()
    assert path not in {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


def test_a_read_only_attachment_gives_read_only_views(tmp_path: Path) -> None:
    surface(tmp_path, read_only=True, content=b"abcd")
    with tagmem.open(TAG, run_dir=tmp_path) as capacity:
        assert not capacity.writable
        assert capacity.view.readonly
        array = capacity.numpy()
        assert not array.flags.writeable
        assert not capacity.arrow().is_mutable
        assert bytes(array[:4]) == b"abcd"
        with pytest.raises(TypeError):
            capacity.view[0] = 1
        del array
    with pytest.raises(Conflict, match="attached read-only"):
        tagmem.open(TAG, run_dir=tmp_path, writable=True)


def test_a_store_into_a_read_only_mapping_faults_in_c_too(tmp_path: Path) -> None:
    surface(tmp_path)
    code = (
        "import ctypes, sys, tagmem\n"
        "capacity = tagmem.open(sys.argv[1], run_dir=sys.argv[2], writable=False)\n"
        "ctypes.memset(capacity.address, 1, 1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, TAG, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGSEGV


def test_numpy_and_arrow_share_the_bytes(tmp_path: Path) -> None:
    surface(tmp_path)
    with tagmem.open(TAG, run_dir=tmp_path) as capacity:
        numbers = capacity.numpy("<u4", offset=16, count=4)
        numbers[:] = [1, 2, 3, 4]
        assert capacity.view[16] == 1
        assert numbers.ctypes.data == capacity.address + 16
        buffer = capacity.arrow(16, 16)
        assert (buffer.address, buffer.size) == (capacity.address + 16, 16)
        assert np.frombuffer(buffer, "<u4").tolist() == [1, 2, 3, 4]
        assert capacity.numpy(np.dtype("u1,<u8")).shape == (2 * MIB // 9,)
        del numbers, buffer


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"offset": -1}, "offset"),
        ({"offset": 2 * MIB + 1}, "offset"),
        ({"count": 2 * MIB + 1}, "count"),
        ({"count": -1}, "count"),
        ({"dtype": "u8", "offset": 2 * MIB, "count": 1}, "count"),
    ],
)
def test_views_outside_the_capacity_are_refused(
    tmp_path: Path, arguments: dict[str, Any], field: str
) -> None:
    surface(tmp_path)
    with (
        tagmem.open(TAG, run_dir=tmp_path) as capacity,
        pytest.raises(InvalidInput, match=f"^{field}: "),
    ):
        capacity.numpy(**arguments)


def test_arrow_beyond_the_end_is_refused(tmp_path: Path) -> None:
    surface(tmp_path)
    with (
        tagmem.open(TAG, run_dir=tmp_path) as capacity,
        pytest.raises(InvalidInput, match=r"^length: must be 0 to 1 \(bytes\), got 2"),
    ):
        capacity.arrow(2 * MIB - 1, 2)


def test_closing_under_a_view_names_it_and_changes_nothing(tmp_path: Path) -> None:
    surface(tmp_path)
    capacity = tagmem.open(TAG, run_dir=tmp_path)
    array = capacity.numpy("u8")
    part = capacity.view[:10]
    with pytest.raises(BufferError, match=r"numpy uint64\[262144\]"):
        capacity.close()
    assert not capacity.closed
    array[0] = 7
    assert capacity.view[0] == 7
    del array
    with pytest.raises(BufferError, match="a memoryview"):
        capacity.close()
    part.release()
    capacity.close()
    capacity.close()
    assert repr(capacity) == f"<tagmem.Capacity {TAG} {2 * MIB} B closed>"


def test_an_error_within_is_not_hidden_by_its_views(tmp_path: Path) -> None:
    surface(tmp_path)
    kept = []

    def work() -> None:
        with tagmem.open(TAG, run_dir=tmp_path) as capacity:
            kept.append(capacity.numpy())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    kept[0][0] = 1


def test_a_device_that_shrank_is_not_mapped(tmp_path: Path) -> None:
    path = surface(tmp_path)
    os.truncate(path, MIB)
    with pytest.raises(OutcomeUnknown, match="is it being released"):
        tagmem.open(TAG, run_dir=tmp_path)


def test_a_kernel_device_is_mapped_by_its_sysfs_size(tmp_path: Path) -> None:
    path = kernel_device(tmp_path / "sys", tmp_path / "dev", "dax0.0", tag=TAG, size=4 * MIB)
    sysfs, dev = str(tmp_path / "sys"), str(tmp_path / "dev")
    with tagmem.open(TAG, timeout=0, run_dir=tmp_path, sysfs=sysfs, dev=dev) as capacity:
        capacity.view[:2] = b"hi"
        capacity.flush()
    assert path.read_bytes()[:2] == b"hi"


def test_media_by_dpa_are_not_for_applications(tmp_path: Path) -> None:
    surface(tmp_path, pieces=[(0, HUGE)])
    with pytest.raises(Unsupported, match="by-tag"):
        tagmem.open(TAG, run_dir=tmp_path)


def test_importing_tagmem_loads_nothing_of_it() -> None:
    code = (
        "import sys, tagmem\n"
        "loaded = [name for name in sys.modules if name.startswith('tagmem.')]\n"
        "heavy = {'msgspec', 'numpy', 'asyncio', 'http', 'typing', 'pyarrow'} & set(sys.modules)\n"
        "assert not loaded and not heavy, (loaded, heavy)\n"
        "tagmem.open\n"
        "heavy = {'msgspec', 'numpy', 'asyncio', 'http', 'pyarrow', 'json'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_public_names_are_listed_and_others_are_not_there() -> None:
    assert {"open", "Capacity", "Client", "TagAbsent", "OfferRefused"} <= set(dir(tagmem))
    name = "not_there"
    with pytest.raises(AttributeError, match="not_there"):
        getattr(tagmem, name)
