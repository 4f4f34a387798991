"""A tag as memory: one mapping, its views, and its end.

The mapping is a plain `mmap.mmap` over exactly the capacity's bytes, so that reading and writing
cost what they cost anywhere, and so that Python itself knows which views are still in use. What is
added is where it lies: on a 2 MiB boundary, so that huge pages can serve it, and contiguous where
the media lie in several pieces.

`mmap.mmap` cannot be told an address. So a range of the right size and alignment is reserved first,
as an anonymous mapping that Python owns, and the media are mapped over it (MAP_FIXED); closing the
object unmaps them all.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown
from tagmem.client.locate import DEV, SYSFS, Device, descriptor, wait_for

TYPE_CHECKING = (
    False  # typing is not loaded: this module's import time is an application's start-up time
)
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    import numpy as np
    import pyarrow as pa
    from numpy.typing import DTypeLike, NDArray

HUGE_BYTES = 2 << 20
"""Huge pages on x86-64 and arm64 (4 KiB granule); device-DAX maps in these units."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_RESERVE_TRIES_MAX = 8
_VIEWS_NAMED_MAX = 3


def open(  # noqa: A001 - `tagmem.open` is the name that people expect
    tag: object,
    *,
    timeout: float | None = 10.0,
    writable: bool | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    sysfs: str = SYSFS,
    dev: str = DEV,
) -> Capacity:
    """Map the capacity that this host holds under `tag` (a UUID or its text), waiting for it to
    come.

    `timeout` is in seconds; 0 looks once, None waits for ever. `writable`: None takes what the
    attachment allows, False maps it read-only in any case, True insists. `run_dir` is the host
    agent's run directory (default: TAGMEM_RUN_DIR, else /run/tagmem).

    Raises TagAbsent when it does not come, saying what is there instead; OfferRefused with the
    agent's reason; Conflict when a read-only attachment is to be written; InvalidInput when `tag`
    is not one.
    """
    device = wait_for(
        tag,
        timeout=timeout,
        run_dir=None if run_dir is None else os.fspath(run_dir),
        sysfs=sysfs,
        dev=dev,
    )
    if writable and device.read_only:
        raise Conflict(f"tag {device.tag} is attached read-only here: open it with writable=False")
    return Capacity(device, writable=not device.read_only if writable is None else writable)


class Capacity:
    """A mapped tag; a context manager. Byte 0 is the same byte on every host that holds it."""

    def __init__(self, device: Device, *, writable: bool) -> None:
        self._device = device
        self._writable = writable
        self._views: list[tuple[str, Any]] = []
        try:
            fd = descriptor(device, writable=writable)
        except PermissionError as error:
            hint = "; writable=False asks for less" if writable else ""
            raise Conflict(
                f"tag {device.tag}: {device.path}: {error.strerror} for this user{hint}"
            ) from None
        try:
            self._map = _map(fd, device, writable=writable)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # advice only: device-DAX and kernels without huge pages do not take it

    # ---- what it is

    @property
    def tag(self) -> str:
        """The tag in canonical form."""
        return self._device.tag

    @property
    def size(self) -> int:
        """Bytes."""
        return self._device.size_bytes

    @property
    def path(self) -> str:
        """The DAX device or file. May not exist where the bytes came as a descriptor; `map` is what
        counts.
        """
        return self._device.path

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """(offset, length) in the file or device, in the order of the tag's bytes."""
        return self._device.pieces

    @property
    def stale_caches(self) -> bool:
        """Whether an appliance emulates caches that lie: `tagmem.shared.lines_of` moves lines."""
        return self._device.stale_caches

    @property
    def sharing(self) -> str:
        """How the hosts that may have the tag share it, as it was created: none, read-only,
        hardware-coherent or software-coherent; empty where nobody says, as in a guest.
        """
        return self._device.sharing

    @property
    def writable(self) -> bool:
        """Whether stores are allowed; otherwise they fault, in C as well."""
        return self._writable

    @property
    def closed(self) -> bool:
        """Whether the mapping is gone."""
        return self._map.closed

    @property
    def address(self) -> int:
        """Where the mapping lies in this process; a multiple of 2 MiB when the capacity is that
        large.
        """
        return address_of(self._map)

    # ---- its bytes

    @property
    def map(self) -> mmap.mmap:
        """The mapping itself; its buffer is exactly the capacity's bytes."""
        return self._map

    @property
    def view(self) -> memoryview:
        """All bytes, without copying; read-only where the mapping is. `close` ends this one view
        itself.
        """
        return self._view

    def __buffer__(self, flags: int) -> memoryview:
        """The buffer protocol, which classes can have from Python 3.12 on; before, use `view`."""
        return self._view

    def __len__(self) -> int:
        return self._device.size_bytes

    def numpy(
        self, dtype: DTypeLike = "u1", offset: int = 0, count: int | None = None
    ) -> NDArray[Any]:
        """`count` items of `dtype` from byte `offset` as an array on the same memory (None: as many
        as fit).
        """
        import numpy as np

        itemsize = np.dtype(dtype).itemsize
        room = self._room(offset, 0) // itemsize
        if count is None:
            count = room
        elif not 0 <= count <= room:
            raise InvalidInput("count", f"0 to {room} items of {itemsize} B from {offset}", count)
        array: np.ndarray[Any, Any] = np.frombuffer(
            self._map, dtype=dtype, count=count, offset=offset
        )
        self._note(f"numpy {array.dtype.name}[{count}]", array)
        return array

    def arrow(self, offset: int = 0, length: int | None = None) -> pa.Buffer:
        """`length` bytes from byte `offset` as a `pyarrow.Buffer` on the same memory (None: up to
        the end).
        """
        import pyarrow as pa

        if length is None:
            length = self._room(offset, 0)
        self._room(offset, length)
        buffer = pa.py_buffer(self._view[offset : offset + length])
        self._note(f"arrow buffer of {length} B", buffer)
        return buffer

    def flush(self) -> None:
        """Write files back (msync). Memory has nothing to write back, so on a DAX device this does
        nothing.
        """
        if self._device.emulated and self._writable:
            self._map.flush()

    # ---- its end

    def close(self) -> None:
        """Unmap. Raises BufferError, naming them, while views made from it are in use. Closing
        twice is harmless.
        """
        if self._map.closed:
            return
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            self._view = memoryview(self._map)
            raise BufferError(self._held_by()) from None
        self._views.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except BufferError:
            # The failing frames may hold views; their error matters more. The mapping ends with
            # its last view.
            return

    def __repr__(self) -> str:
        state = "closed" if self.closed else "read-write" if self._writable else "read-only"
        return f"<tagmem.Capacity {self.tag} {self.size} B {state}>"

    def _room(self, offset: int, length: int) -> int:
        if not 0 <= offset <= self.size:
            raise InvalidInput("offset", f"0 to {self.size} (bytes)", offset)
        if not 0 <= length <= self.size - offset:
            raise InvalidInput("length", f"0 to {self.size - offset} (bytes)", length)
        return self.size - offset

    def _note(self, what: str, view: object) -> None:
        """Remember a view by name, without keeping it alive, so that `close` can say who is in the
        way.
        """
        import weakref

        self._views = [(name, ref) for name, ref in self._views if ref() is not None]
        try:
            self._views.append((what, weakref.ref(view)))
        except TypeError:
            return

    def _held_by(self) -> str:
        alive = [name for name, ref in self._views if ref() is not None]
        named = ", ".join(alive[:_VIEWS_NAMED_MAX]) or "a memoryview or an object made from one"
        if len(alive) > _VIEWS_NAMED_MAX:
            named += f" and {len(alive) - _VIEWS_NAMED_MAX} more"
        return (
            f"tag {self.tag} cannot be unmapped while views of it are in use ({named}): "
            "delete them, or let them go out of scope, before close() or the end of `with`"
        )


def _map(fd: int, device: Device, *, writable: bool) -> mmap.mmap:
    """The device's pieces as one mapping. Raises OutcomeUnknown when the media are not there any
    more.
    """
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    size = device.size_bytes
    try:
        if device.pieces == ((0, size),):
            direct = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot)
            # hugetlbfs and device-DAX align by themselves; so do files with huge pages.
            if size < HUGE_BYTES or address_of(direct) % HUGE_BYTES == 0:
                return direct
            try:
                aligned = _reserve(size, prot)
            except OSError:
                return direct  # strict overcommit; serves as well, with smaller pages
            direct.close()
        else:
            aligned = _reserve(size, prot)
        _overlay(aligned, fd, device.pieces, prot)
    except ValueError:
        raise OutcomeUnknown(
            f"tag {device.tag}: {device.path} is shorter than its size attribute ({size} B): "
            "is it being released?"
        ) from None
    except OSError as error:
        raise Conflict(f"tag {device.tag}: cannot map {device.path}: {error.strerror}") from None
    return aligned


def _overlay(reserved: mmap.mmap, fd: int, pieces: tuple[tuple[int, int], ...], prot: int) -> None:
    """Map the media over a reserved range, piece after piece. On failure the range is given up
    whole.
    """
    at = address_of(reserved)
    media_size = os.fstat(fd).st_size
    try:
        for offset, length in pieces:
            if media_size and offset + length > media_size:
                raise ValueError("piece beyond the end of the media")
            _libc_mmap(at, length, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)
            at += length
    except (OSError, ValueError):
        reserved.close()
        raise


def _reserve(size: int, prot: int) -> mmap.mmap:
    """An anonymous mapping of `size` bytes on a huge-page boundary, if the address space gives one.

    The kernel puts a mapping into the highest gap that holds it. So a gap of exactly the size is
    made at an aligned address; a higher gap that happened to fit is filled first, and let go at the
    end.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    taken = mmap.mmap(-1, size, flags=flags, prot=prot)
    if address_of(taken) % HUGE_BYTES == 0 or size < HUGE_BYTES:
        return taken
    span = size + HUGE_BYTES
    base = _libc_mmap(0, span, 0, flags, -1, 0)
    start = -(-base // HUGE_BYTES) * HUGE_BYTES
    _libc.munmap(start, size)
    fillers = [taken]
    try:
        for _ in range(_RESERVE_TRIES_MAX):
            taken = mmap.mmap(-1, size, flags=flags, prot=prot)
            if address_of(taken) % HUGE_BYTES == 0:
                return taken
            fillers.append(taken)
        return fillers.pop()
    finally:
        for filler in fillers:
            filler.close()
        _unmap_rest(base, start, size, span)


def _unmap_rest(base: int, start: int, size: int, span: int) -> None:
    """The two ends of the carved range; its middle is somebody's mapping by now."""
    if start > base:
        _libc.munmap(base, start - base)
    if base + span > start + size:
        _libc.munmap(start + size, base + span - start - size)


class _Buffer(ctypes.Structure):
    """Py_buffer, of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_release_buffer.restype = None

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def address_of(mapping: mmap.mmap | bytearray | memoryview) -> int:
    """Where a buffer lies; works for read-only ones too, which `from_buffer` does not."""
    buffer = _Buffer()
    _get_buffer(mapping, ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf or 0)
    finally:
        _release_buffer(ctypes.byref(buffer))


def _libc_mmap(at: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(at, length, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
