"""Objects of a shared tag by name: what `tagmem.shared.create` and `open` give.

It joins what lies apart for good reasons: the mapping of a tag (client), the coherence that its
hosts have, the catalogue, and the kinds of objects. Whoever uses it need not know any of them: each
`put` publishes and each `get` refreshes what it must.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tagmem.base.errors import Conflict, InvalidInput, Unsupported
from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import Bytes
from tagmem.client.mapping import Capacity
from tagmem.client.mapping import open as open_capacity
from tagmem.shared import kinds
from tagmem.shared.catalogue import Catalogue, Corrupt, Entry, declared, read_superblock
from tagmem.shared.coherence import Coherence, HardwareCoherent, KindName, SoftwareCoherent
from tagmem.shared.lines import CpuLines, cpu_lines, instructions
from tagmem.shared.memory import MappedMemory
from tagmem.shared.stale import StaleLines, lines_of

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Place = object
"""A tag (a UUID or its text), a `tagmem.Capacity`, or a buffer: mmap, bytearray, memoryview."""

_NAMED_MAX = 3
_X86 = ("x86_64", "AMD64")


def create(
    where: Place,
    *,
    coherence: KindName | Coherence | None = None,
    replace: bool = False,
    timeout: float | None = 10.0,
    run_dir: str | os.PathLike[str] | None = None,
) -> Shared:
    """Make a catalogue in the memory of a tag, and be its writer.

    `coherence` is what the hosts that share it have. None takes what the tag was created with, as
    its host knows it, and else software-coherent, which is right everywhere and costs a write-back
    where the hardware would do it. `replace` gives up what is there. `timeout`
    and `run_dir` are those of `tagmem.open`.

    Raises Conflict (something is there, or the attachment is read-only, or the hosts are less
    coherent than is said), Unsupported (no
    cache-line instructions for software-coherent memory), and what `tagmem.open` raises.
    """
    with ExitStack() as undo:
        place = _Place(where, writable=True, timeout=timeout, run_dir=run_dir)
        undo.push(place.undo)
        memory = place.memory(place.shared_as(coherence))
        owner = _new_owner()
        catalogue = Catalogue.create(memory, place.tag or NIL_TAG, owner=owner, replace=replace)
        undo.pop_all()
    return Shared(place, memory, catalogue)


def open(  # noqa: A001 - `shared.open` goes with `tagmem.open`
    where: Place,
    *,
    writable: bool = False,
    take_over: bool = False,
    coherence: KindName | Coherence | None = None,
    timeout: float | None = 10.0,
    run_dir: str | os.PathLike[str] | None = None,
) -> Shared:
    """The catalogue in the memory of a tag: to read, or to put more into it.

    `coherence`: None takes what its creator declared. `take_over` writes although another writer
    has not closed it, for who knows that it is gone and its host's caches with it.

    Raises NoCatalogue, OtherVersion, Initialising, Corrupt, Conflict (there is a writer),
    Unsupported (as `create`), and what `tagmem.open` raises.
    """
    with ExitStack() as undo:
        place = _Place(where, writable=writable, timeout=timeout, run_dir=run_dir)
        undo.push(place.undo)
        memory = place.memory(coherence or place.declared())
        owner = _new_owner() if writable else 0
        catalogue = Catalogue.open(memory, owner=owner, take_over=take_over)
        if place.tag is not None and catalogue.tag != place.tag:
            raise Corrupt(f"it was made for tag {catalogue.tag}, and lies in tag {place.tag}")
        undo.pop_all()
    return Shared(place, memory, catalogue)


class Shared:
    """Named, immutable objects in shared memory; a context manager. Threads take turns.

    Arrays, tables and views are the shared memory itself: they keep the mapping alive, and their
    content is what it was until the catalogue is initialised anew.
    """

    def __init__(self, place: _Place, memory: MappedMemory, catalogue: Catalogue) -> None:
        """For `create` and `open`."""
        self._place = place
        self._memory = memory
        self._catalogue = catalogue
        self._given: list[tuple[str, weakref.ref[Any]]] = []
        self._decoded: set[str] = set()
        self._closed = False
        self._process = os.getpid()
        self._turn = threading.RLock()

    # ---- what it is

    @property
    def tag(self) -> Tag:
        """The tag that it was created under; the nil tag for a plain buffer."""
        return self._catalogue.tag

    @property
    def generation(self) -> int:
        """How often the memory was initialised."""
        return self._catalogue.generation

    @property
    def coherence(self) -> KindName:
        """What this host does for others to see its stores."""
        return self._memory.kind

    @property
    def effective(self) -> bool:
        """Whether that is so; False over `NoLines`."""
        return self._memory.effective

    @property
    def writable(self) -> bool:
        """Whether this is the writer."""
        return self._catalogue.writer

    @property
    def free_bytes(self) -> Bytes:
        """Room for one more object, at most."""
        return self._catalogue.free_bytes

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is known of each object, by name, oldest first."""
        return self._catalogue.entries

    # ---- objects

    def put(self, name: str, value: object) -> Entry:
        """Store an object for every host: bytes, a NumPy array, an Arrow table (or what gives one).

        Others find it once this returns. Raises Conflict (the name is taken, or this is no writer),
        InvalidInput, Full, Overtaken.
        """
        return self._append(name, kinds.prepare(value))

    def put_array(
        self,
        name: str,
        shape: Sequence[int],
        dtype: DTypeLike,
        fill: Callable[[NDArray[Any]], object],
    ) -> Entry:
        """Have `fill` make an array in shared memory itself, without a copy of it elsewhere.

        The array is uninitialised when `fill` gets it, and is not to be kept. Raises as `put`.
        """
        return self._append(name, kinds.prepare_array(shape, dtype, fill))

    def get(self, name: str, *, verify: bool = True) -> Any:
        """The object of that name: bytes, or a read-only array or table on the shared memory.

        `verify` compares the object's checksum when it is first got, and looks at every value of a
        table, so that no offset in it leads outside. Raises NotFound, Corrupt, Reinitialised.
        """
        with self._turn:
            catalogue = self._usable()
            entry = catalogue.look(name)
            view = catalogue.view(entry, verify=verify)
            whole = verify and name not in self._decoded
            try:
                value = kinds.decode(entry.kind, view, whole=whole)
            finally:
                # Also of a copy, and of what could not be read: is it still what was verified?
                catalogue.check()
            if verify:
                self._decoded.add(name)
            self._note(name, value)
            return value

    def view(self, name: str, *, verify: bool = True) -> memoryview:
        """The bytes of an object of any kind, in place and read-only. Raises as `get`."""
        with self._turn:
            catalogue = self._usable()
            view = catalogue.view(catalogue.look(name), verify=verify)
            self._note(name, view)
            return view

    def refresh(self) -> tuple[str, ...]:
        """The names that are new since the last look. Raises Reinitialised, Corrupt."""
        with self._turn:
            return tuple(entry.name for entry in self._usable().refresh())

    def names(self) -> tuple[str, ...]:
        """Every name that is there now, oldest first. Raises Reinitialised, Corrupt."""
        with self._turn:
            self._usable().refresh()
            return tuple(self._catalogue.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue.entries or name in self.names()

    # ---- its end

    def close(self) -> None:
        """Let the next writer in, and unmap. Closing twice is harmless.

        Raises BufferError, naming them, while objects got from it are in use: then all is done but
        the unmapping, which their end does.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            try:
                # A process that was forked is not the writer, and takes nothing from it.
                if os.getpid() == self._process:
                    self._catalogue.close()
            finally:
                mapped = not self._place.leave()
        if mapped:
            alive = [name for name, given in self._given if given() is not None]
            named = ", ".join(repr(name) for name in alive[:_NAMED_MAX]) or "a view"
            more = f" and {len(alive) - _NAMED_MAX} more" if len(alive) > _NAMED_MAX else ""
            raise BufferError(
                f"tag {self.tag} stays mapped while objects of it are in use: {named}{more}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except BufferError:
            # What was got inside is often still in a variable; the mapping ends with it.
            return

    def __repr__(self) -> str:
        state = "closed" if self._closed else "writer" if self.writable else "reader"
        count = len(self.entries)
        return f"<tagmem.shared {self.tag} generation {self.generation} {count} objects {state}>"

    # ---- within

    def _append(self, name: str, prepared: kinds.Prepared) -> Entry:
        with self._turn:
            catalogue = self._usable()
            if os.getpid() != self._process:
                raise Conflict(f"tag {self.tag}: it was opened by the process that forked this one")
            return catalogue.append(name, prepared.kind, prepared.length_bytes, prepared.write)

    def _usable(self) -> Catalogue:
        if self._closed:
            raise Conflict(f"tag {self.tag}: its catalogue was closed here")
        return self._catalogue

    def _note(self, name: str, value: object) -> None:
        """Remember what was given out, without keeping it alive, so that `close` can name it."""
        self._given = [(name, given) for name, given in self._given if given() is not None]
        try:
            self._given.append((name, weakref.ref(value)))
        except TypeError:
            return  # bytes are a copy


class _Place:
    """Memory, and what is to be let go with it."""

    def __init__(
        self,
        where: Place,
        *,
        writable: bool,
        timeout: float | None,
        run_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.tag: Tag | None = None
        self._opened: Capacity | None = None
        self._lines: CpuLines | StaleLines | None = None
        self._capacity: Capacity | None = None
        self._memory: MappedMemory | None = None
        self._buffer: mmap.mmap | bytearray | memoryview
        if isinstance(where, mmap.mmap | bytearray | memoryview):
            self._buffer = where
            return
        if not isinstance(where, Capacity):
            where = self._opened = open_capacity(
                where, timeout=timeout, writable=writable, run_dir=run_dir
            )
        self.tag = Tag(where.tag)
        self._capacity = where
        self._buffer = where.map

    def memory(self, coherence: KindName | Coherence) -> MappedMemory:
        """The memory with that coherence. Raises Unsupported, InvalidInput."""
        self._memory = MappedMemory(self._buffer, self._coherence(coherence))
        return self._memory

    def shared_as(self, wanted: KindName | Coherence | None) -> KindName | Coherence:
        """The coherence of a new catalogue. Raises Conflict where the tag's hosts are known not to
        snoop each other, and `wanted` counts on it; an object says that its maker knows better.
        """
        sharing = "" if self._capacity is None else self._capacity.sharing
        if wanted is None:
            return "hardware-coherent" if sharing == "hardware-coherent" else "software-coherent"
        if wanted == "hardware-coherent" and sharing == "software-coherent":
            raise Conflict(f"tag {self.tag} is shared software-coherent, not hardware-coherent")
        return wanted

    def declared(self) -> KindName:
        """What the catalogue that is there says, read as carefully as this machine can."""
        kind: KindName = "software-coherent"
        try:
            instructions()
        except Unsupported:
            kind = "hardware-coherent"
        memory = self.memory(kind)
        try:
            return declared(read_superblock(memory))
        finally:
            memory.release()

    def leave(self) -> bool:
        """Let go of the memory, and unmap it if it was mapped here; False where views of it keep it
        mapped until they end.
        """
        if self._memory is not None:
            self._memory.release()
        if self._lines is not None:
            self._lines.release()
        self._buffer = memoryview(b"")
        opened, self._opened, self._capacity = self._opened, None, None
        if opened is not None:
            try:
                opened.close()
            except BufferError:
                return False
        return True

    def undo(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave after an error, which matters more than views in the frames that failed."""
        self.leave()

    def _coherence(self, wanted: str | Coherence) -> Coherence:
        if isinstance(wanted, HardwareCoherent | SoftwareCoherent):
            return wanted
        if wanted == "hardware-coherent":
            # Only the order of stores is left to keep, and x86-64 keeps it.
            return HardwareCoherent(None if platform.machine() in _X86 else instructions().fence)
        if wanted != "software-coherent":
            limit = "hardware-coherent, software-coherent, or an object of these classes"
            raise InvalidInput("coherence", limit, wanted)
        if self._lines is None:
            if self._capacity is not None:
                self._lines = lines_of(self._capacity)
            else:
                self._lines = cpu_lines(self._buffer)
        return SoftwareCoherent(self._lines)


def _new_owner() -> int:
    return secrets.randbits(63) + 1
