"""What objects are as bytes in shared memory, so that another host's program can use them where
they lie: bytes, NumPy's `.npy` file, Arrow's IPC stream.

Formats that others read too, rather than one of ours: the bytes of an array are a whole `.npy` file
(NEP 1, version 1.0, data on a multiple of 64), those of a table a whole IPC stream. Neither NumPy
nor Arrow is loaded before an object of it is put or got.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from tokenize import TokenError
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.base.units import Bytes
from tagmem.shared.catalogue import Corrupt, Write
from tagmem.shared.coherence import Memory
from tagmem.wire.catalogue import ObjectKind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import DTypeLike, NDArray

_ARRAY_HEADER_BYTES_MAX = 16 << 10


class Prepared(msgspec.Struct, frozen=True):
    """An object that can be put: how long it is, and who stores it."""

    kind: ObjectKind
    length_bytes: Bytes
    write: Write


def prepare(value: object) -> Prepared:
    """Bytes, a NumPy array, an Arrow table, or whatever gives one (`__arrow_c_stream__`). Raises
    InvalidInput, Unsupported.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _array(value)
    arrow = sys.modules.get("pyarrow")
    if arrow is not None and isinstance(value, arrow.Table):
        return _table(value)
    if arrow is not None and isinstance(value, arrow.RecordBatch):
        return _table(arrow.Table.from_batches([value]))
    if hasattr(value, "__arrow_c_stream__"):
        return _table(_pyarrow().table(value))
    limit = "bytes, a NumPy array, a pyarrow.Table, or what has __arrow_c_stream__"
    raise InvalidInput("object", limit, type(value).__name__)


def prepare_array(
    shape: Sequence[int], dtype: DTypeLike, fill: Callable[[NDArray[Any]], object]
) -> Prepared:
    """An array that `fill` makes in shared memory itself. Raises InvalidInput."""
    import numpy as np

    try:
        model = np.broadcast_to(np.empty((), dtype), tuple(shape))
    except (TypeError, ValueError):
        raise InvalidInput("shape, dtype", "an array's", (shape, dtype)) from None
    header = _header(model.dtype, model.shape, fortran=False)
    length = len(header) + model.nbytes

    def write(memory: Memory, offset: int) -> int:
        memory.store(offset, header)
        view = memory.view(offset, length, writable=True)
        try:
            fill(_over(view, len(header), model.shape, model.dtype, fortran=False))
            return crc32(view)
        finally:
            del view

    return Prepared(ObjectKind.ARRAY, length, write)


def decode(kind: ObjectKind, view: memoryview, *, whole: bool = True) -> object:
    """The object over its bytes; arrays and tables are those bytes. `whole` looks at every value of
    a table, so that no offset in it leads outside. Raises Corrupt, Unsupported.
    """
    if kind is ObjectKind.BYTES:
        return bytes(view)
    return _read_array(view) if kind is ObjectKind.ARRAY else _read_table(view, whole=whole)


def _bytes(value: bytes | bytearray | memoryview) -> Prepared:
    try:
        data = memoryview(value).cast("B")
    except TypeError:
        raise InvalidInput("object", "a contiguous buffer", value) from None

    def write(memory: Memory, offset: int) -> int:
        memory.store(offset, data)
        return crc32(data)

    return Prepared(ObjectKind.BYTES, len(data), write)


# ---- arrays


def _array(value: NDArray[Any]) -> Prepared:
    import numpy as np

    fortran = bool(value.flags.f_contiguous and not value.flags.c_contiguous)
    header = _header(value.dtype, value.shape, fortran=fortran)
    flat = np.ascontiguousarray(value.T if fortran else value).reshape(-1)
    # Not every type of NumPy's has a buffer of its own; bytes have.
    payload = flat.view(np.uint8).data if value.nbytes else memoryview(b"")

    def write(memory: Memory, offset: int) -> int:
        memory.store(offset, header)
        memory.store(offset + len(header), payload)
        return crc32(payload, crc32(header))

    return Prepared(ObjectKind.ARRAY, len(header) + len(payload), write)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...], *, fortran: bool) -> bytes:
    import numpy as np

    if dtype.hasobject:
        raise InvalidInput("object", "an array of numbers, not of Python objects", str(dtype))
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": fortran,
        "shape": shape,
    }
    out = io.BytesIO()
    try:
        np.lib.format.write_array_header_1_0(out, described)
    except ValueError:
        raise InvalidInput("dtype", "one that fits into a .npy header", str(dtype)) from None
    return out.getvalue()


def _read_array(view: memoryview) -> NDArray[Any]:
    import numpy as np

    file = io.BytesIO(view[:_ARRAY_HEADER_BYTES_MAX])
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        # The data are on a multiple of 64, where the next one is after the header.
        return _over(view, file.tell(), shape, dtype, fortran=fortran, exact=True)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise Corrupt(f"an array's header: {error}") from None


def _over(
    view: memoryview,
    at: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    fortran: bool,
    exact: bool = False,
) -> NDArray[Any]:
    """An array on the bytes from `at` on. Raises ValueError where they are not as many."""
    import math

    import numpy as np

    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("it is none of numbers")
    if exact and at + math.prod(shape) * dtype.itemsize != len(view):
        raise ValueError(f"{shape} of {dtype} is not what {len(view) - at} B hold")
    count = math.prod(shape)
    if not count * dtype.itemsize:
        return np.empty(shape, dtype)
    # Not np.ndarray(buffer=…): that one does not hold the buffer, and it could be unmapped.
    flat = np.frombuffer(view, dtype, count, at)
    return flat.reshape(shape, order="F" if fortran else "C")


# ---- tables


def _table(table: pa.Table) -> Prepared:
    pa = _pyarrow()
    counted = pa.MockOutputStream()
    _write_stream(counted, table)
    length = counted.size()

    def write(memory: Memory, offset: int) -> int:
        view = memory.view(offset, length, writable=True)
        with pa.FixedSizeBufferWriter(pa.py_buffer(view)) as sink:
            _write_stream(sink, table)
        return crc32(view)

    return Prepared(ObjectKind.TABLE, length, write)


def _write_stream(sink: Any, table: pa.Table) -> None:
    with _pyarrow().ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _read_table(view: memoryview, *, whole: bool) -> pa.Table:
    pa = _pyarrow()
    try:
        with pa.ipc.open_stream(pa.py_buffer(view)) as reader:
            table = reader.read_all()
        table.validate(full=whole)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise Corrupt(f"an Arrow stream: {error}") from None
    return table


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError:
        raise Unsupported("tables need pyarrow: install tagmem[arrow]") from None
    return pa
