"""Objects by name over real mappings: what is put is got, in place, and what is wrong is said."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.client.tags import MIB, TAG, surface

import tagmem
from tagmem import shared
from tagmem.base.errors import Conflict, InvalidInput, NotFound
from tagmem.client.mapping import address_of
from tagmem.shared import kinds
from tagmem.shared.coherence import HardwareCoherent, SoftwareCoherent
from tagmem.shared.lines import NoLines
from tagmem.wire.catalogue import ObjectKind

TABLE = pa.table(
    {
        "id": pa.array(range(1000), pa.int64()),
        "customer": pa.array([f"customer {n % 7}" for n in range(1000)]).dictionary_encode(),
        "amount": pa.array([None if n % 10 == 0 else n / 4 for n in range(1000)]),
        "tags": pa.array([["a"] * (n % 3) for n in range(1000)]),
    }
)


def inside(outer: mmap.mmap, address: int, size: int) -> bool:
    begin = address_of(outer)
    return begin <= address and address + size <= begin + len(outer)


def buffers(table: pa.Table) -> list[pa.Buffer]:
    return [
        buffer
        for column in table.columns
        for chunk in column.chunks
        for buffer in chunk.buffers()
        if buffer is not None and buffer.size
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    surface(tmp_path, 4 * MIB)
    return tmp_path


def test_every_kind_comes_back_as_it_was(run_dir: Path) -> None:
    arrays = {
        "matrix": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "strided": np.arange(20)[::2],
        "empty": np.zeros((0, 3)),
        "scalar": np.array(7),
        "times": np.array(["2026-11-23"], "datetime64[s]"),
        "records": np.array([(1, 2.5)], [("id", "<u4"), ("x", "<f8")]),
    }
    with shared.create(TAG, run_dir=run_dir) as writer:
        assert (writer.tag, writer.generation, writer.coherence) == (TAG, 1, "software-coherent")
        writer.put("bytes", b"some bytes")
        writer.put("orders", TABLE)
        for name, array in arrays.items():
            writer.put(name, array)
    with shared.open(TAG, run_dir=run_dir) as reader:
        assert reader.names() == ("bytes", "orders", *arrays)
        assert list(reader) == list(reader.names())
        assert len(reader) == 2 + len(arrays)
        assert "orders" in reader
        assert "absent" not in reader
        assert reader.get("bytes") == b"some bytes"
        assert reader.get("orders").equals(TABLE)
        for name, array in arrays.items():
            found = reader.get(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert np.array_equal(found, array)
            del found


def test_tables_and_arrays_are_the_shared_memory_itself(run_dir: Path) -> None:
    with tagmem.open(TAG, run_dir=run_dir, timeout=0) as capacity:
        with shared.create(capacity) as writer:
            writer.put("orders", TABLE)
            writer.put("matrix", np.arange(100.0))
        with shared.open(capacity) as reader:
            table = reader.get("orders")
            found = buffers(table)
            assert len(found) >= 6
            assert all(inside(capacity.map, b.address, b.size) for b in found)
            array = reader.get("matrix")
            at = array.__array_interface__["data"][0]
            assert inside(capacity.map, at, array.nbytes)
            assert at % 64 == 0
            assert not array.flags.writeable
            whole = reader.view("orders")
            assert address_of(whole) == address_of(capacity.map) + reader.entries["orders"].offset
        assert table.equals(TABLE)
        del table, found, array, whole


def test_arrow_allocates_next_to_nothing_to_put_and_to_get(run_dir: Path) -> None:
    large = pa.table({"x": np.arange(250_000, dtype=np.int64)})
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    with shared.create(TAG, run_dir=run_dir) as writer:
        writer.put("large", large)
        table = writer.get("large")
        assert pa.total_allocated_bytes() - before < 64 << 10
        assert table.column("x")[249_999].as_py() == 249_999
        del table
    assert pool.bytes_allocated() - before < 64 << 10


def test_an_array_can_be_made_in_place(run_dir: Path) -> None:
    seen: list[int] = []

    def fill(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
        seen.append(array.__array_interface__["data"][0])
        np.multiply(np.arange(6.0).reshape(2, 3), 2, out=array)

    with (
        tagmem.open(TAG, run_dir=run_dir, timeout=0) as capacity,
        shared.create(capacity) as writer,
    ):
        writer.put_array("made", (2, 3), "f8", fill)
        assert inside(capacity.map, seen[0], 48)
        assert writer.get("made").tolist() == [[0, 2, 4], [6, 8, 10]]
        with pytest.raises(InvalidInput):
            writer.put_array("bad", (-1,), "f8", fill)


def test_record_batches_and_what_gives_a_stream_are_tables() -> None:
    class Stream:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return TABLE.__arrow_c_stream__(requested_schema)

    memory = bytearray(MIB)
    with shared.create(memory, coherence="hardware-coherent") as writer:
        writer.put("stream", Stream())
        writer.put("batch", TABLE.to_batches()[0])
        assert writer.get("stream").equals(TABLE)
        assert writer.get("batch").num_rows == 1000


@pytest.mark.parametrize("value", [1, "text", None, object(), np.array([object()]), [1, 2]])
def test_what_is_no_object_is_refused(value: object) -> None:
    with shared.create(bytearray(MIB), coherence="hardware-coherent") as writer:
        with pytest.raises(InvalidInput):
            writer.put("x", value)
        assert len(writer) == 0


def test_the_reader_takes_the_coherence_that_was_declared() -> None:
    memory = bytearray(MIB)
    shared.create(memory, coherence="hardware-coherent").close()
    assert shared.open(memory).coherence == "hardware-coherent"
    shared.create(memory, replace=True).close()
    reader = shared.open(memory)
    assert (reader.coherence, reader.effective, reader.generation) == ("software-coherent", True, 2)
    told = shared.open(memory, coherence=SoftwareCoherent(NoLines()))
    assert not told.effective
    assert shared.open(memory, coherence=HardwareCoherent()).coherence == "hardware-coherent"
    with pytest.raises(InvalidInput, match="coherence"):
        shared.create(memory, coherence="none", replace=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sharing", "coherence"),
    [
        ("", "software-coherent"),
        ("none", "software-coherent"),
        ("read-only", "software-coherent"),
        ("software-coherent", "software-coherent"),
        ("hardware-coherent", "hardware-coherent"),
        ("something new", "software-coherent"),
    ],
)
def test_a_new_catalogue_is_as_coherent_as_the_tag_is_shared(
    tmp_path: Path, sharing: str, coherence: str
) -> None:
    surface(tmp_path, MIB * 2, sharing=sharing)
    with shared.create(TAG, run_dir=tmp_path, timeout=0) as writer:
        assert writer.coherence == coherence
    with shared.open(TAG, run_dir=tmp_path, timeout=0) as reader:
        assert reader.coherence == coherence


def test_nobody_counts_on_hardware_that_is_not_there(tmp_path: Path) -> None:
    surface(tmp_path, MIB * 2, sharing="software-coherent")
    with pytest.raises(Conflict, match="shared software-coherent, not hardware-coherent"):
        shared.create(TAG, coherence="hardware-coherent", run_dir=tmp_path, timeout=0)
    shared.create(TAG, coherence=HardwareCoherent(), run_dir=tmp_path, timeout=0).close()


def test_read_only_mappings_are_for_readers(tmp_path: Path) -> None:
    media = surface(tmp_path, 2 * MIB)
    with shared.create(TAG, run_dir=tmp_path) as writer:
        writer.put("x", b"1")
    (media.parent / "read_only").write_text("1\n")
    with shared.open(TAG, run_dir=tmp_path) as reader:
        assert reader.get("x") == b"1"
        with pytest.raises(Conflict):
            reader.put("y", b"2")
    with pytest.raises(Conflict, match="read-only"):
        shared.create(TAG, run_dir=tmp_path)
    with pytest.raises(Conflict, match="read-only"):
        shared.open(TAG, run_dir=tmp_path, writable=True)


def test_a_catalogue_of_another_tag_is_not_taken_for_this_one(run_dir: Path) -> None:
    with tagmem.open(TAG, run_dir=run_dir, timeout=0) as capacity:
        shared.create(capacity.map).close()
    with pytest.raises(shared.Corrupt, match="lies in tag"):
        shared.open(TAG, run_dir=run_dir)


def test_a_failed_open_leaves_nothing_mapped(run_dir: Path) -> None:
    with (
        tagmem.open(TAG, run_dir=run_dir, timeout=0) as capacity,
        pytest.raises(shared.NoCatalogue),
    ):
        shared.open(capacity)
    assert str(run_dir) not in Path("/proc/self/maps").read_text()
    with pytest.raises(shared.NoCatalogue):
        shared.open(TAG, run_dir=run_dir)
    assert str(run_dir) not in Path("/proc/self/maps").read_text()


def test_close_names_what_is_in_use_and_the_mapping_ends_with_it(run_dir: Path) -> None:
    writer = shared.create(TAG, run_dir=run_dir)
    writer.put("matrix", np.arange(10.0))
    array = writer.get("matrix")
    with pytest.raises(BufferError, match="'matrix'"):
        writer.close()
    assert array[9] == 9
    writer.close()
    # The claim is given back all the same.
    shared.open(TAG, run_dir=run_dir, writable=True).close()
    del array
    assert str(run_dir) not in Path("/proc/self/maps").read_text()


def test_an_absent_name_says_what_is_there() -> None:
    with shared.create(bytearray(MIB)) as writer:
        with pytest.raises(NotFound, match="empty"):
            writer.get("orders")
        writer.put("order", b"")
        with pytest.raises(NotFound, match="order"):
            writer.get("orders")


def test_refresh_sees_another_writer_s_new_names() -> None:
    memory = bytearray(MIB)
    writer = shared.create(memory)
    reader = shared.open(memory)
    assert reader.refresh() == ()
    writer.put("a", b"1")
    assert reader.refresh() == ("a",)
    assert "1 objects reader" in repr(reader)


def test_threads_of_the_writer_take_turns() -> None:
    memory = bytearray(4 * MIB)
    with shared.create(memory) as writer, ThreadPoolExecutor(4) as threads:

        def work(number: int) -> bool:
            writer.put(f"object {number}", bytes([number]) * 1000)
            return bool(writer.get(f"object {number}") == bytes([number]) * 1000)

        assert all(threads.map(work, range(100)))
    with shared.open(memory) as reader:
        assert len(reader) == 100
        assert all(reader.get(f"object {n}") == bytes([n]) * 1000 for n in range(100))


def test_a_closed_catalogue_says_so() -> None:
    memory = bytearray(MIB)
    writer = shared.create(memory)
    writer.put("x", b"1")
    writer.close()
    for use in (writer.names, writer.refresh, lambda: writer.get("x"), lambda: writer.view("x")):
        with pytest.raises(Conflict, match="closed"):
            use()
    with pytest.raises(Conflict, match="closed"):
        writer.put("y", b"2")
    assert "closed" in repr(writer)


def test_a_forked_process_does_not_end_its_parent_s_claim(run_dir: Path) -> None:
    script = """
import os, sys, tagmem
from tagmem import shared
with shared.create(sys.argv[1]) as writer:
    child = os.fork()
    if not child:
        try:
            writer.put("child", b"")
        except tagmem.TagmemError:
            writer.close()
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    writer.put("parent", b"")
    print(*writer)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, TAG],
        env={**os.environ, "TAGMEM_RUN_DIR": str(run_dir)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "parent\n"), ended.stderr


class RacingLines(NoLines):
    """Lines whose `when`th invalidation from now on is a moment too late."""

    def __init__(self, when: int, event: Callable[[], object]) -> None:
        self._left = when
        self._event = event

    def invalidate(self, offset: int, length: int) -> None:
        self._left -= 1
        if self._left == 0:
            self._event()


@pytest.mark.parametrize("when", range(1, 10))
def test_a_writer_that_begins_anew_at_any_moment_never_gives_its_reader_a_mixture(
    when: int,
) -> None:
    memory = bytearray(MIB)
    shared.create(memory).put("x", b"old")

    def begin_anew() -> None:
        shared.create(memory, replace=True).put("x", b"new")

    lines = RacingLines(when, begin_anew)
    try:
        reader = shared.open(memory, coherence=SoftwareCoherent(lines))
        value = reader.get("x")
    except shared.Reinitialised:
        return
    assert value == {1: b"old", 2: b"new"}[reader.generation]
    assert shared.open(memory).generation == reader.generation, "it was gone when it was returned"


FORGED = (
    st.binary(max_size=300)
    | st.binary(max_size=200).map(lambda tail: b"\x93NUMPY\x01\x00v\x00" + tail)
    | st.text(alphabet="{}()[]',: \n0123456789descrfotan_hpFalsTue<>iu|OV", max_size=120).map(
        lambda text: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"x"
    )
)


@given(FORGED)
@pytest.mark.filterwarnings("ignore:Reading .*npy")
def test_forged_arrays_end_in_an_error_or_lie_inside(data: bytes) -> None:
    try:
        array = kinds.decode(ObjectKind.ARRAY, memoryview(data))
    except shared.Corrupt:
        return
    assert isinstance(array, np.ndarray)
    assert array.nbytes <= len(data)


@given(st.data())
def test_forged_tables_end_in_an_error_or_a_table(data: st.DataObject) -> None:
    backing = bytearray(64 << 10)
    small = pa.table({"x": [1, 2, 3], "y": ["a", None, "b"]})
    with shared.create(backing, coherence="hardware-coherent") as writer:
        writer.put("t", small)
        stream = bytearray(writer.view("t"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] = data.draw(st.integers(0, 255))
    cut = stream[: data.draw(st.integers(0, len(stream)))]
    try:
        table = kinds.decode(ObjectKind.TABLE, memoryview(bytes(cut)))
    except shared.Corrupt:
        return
    assert isinstance(table, pa.Table)
    table.to_pylist()


def test_an_array_s_bytes_are_a_npy_file_and_a_table_s_an_ipc_stream(tmp_path: Path) -> None:
    with shared.create(bytearray(MIB)) as writer:
        writer.put("a", np.arange(3))
        writer.put("t", TABLE)
        path = tmp_path / "a.npy"
        path.write_bytes(writer.view("a"))
        assert np.load(path).tolist() == [0, 1, 2]
        assert pa.ipc.open_stream(bytes(writer.view("t"))).read_all().equals(TABLE)
        assert writer.entries["a"].checksum == crc32(writer.view("a"))
