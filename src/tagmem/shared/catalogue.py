"""What is in a shared memory, kept in that memory: a superblock and an append-only log of named,
immutable objects. One writer, any number of readers, and no network between them.

Theory of operation. Three words of the header are all that ever changes in place, each in a line of
its own (256 bytes apart, so that no cache's line covers two of them):

- the *superblock* (offset 0) is written once per generation;
- the *commit word* (256) says how many entries there are, in which generation, with a check of its
  own: one aligned 8-byte store;
- the *owner word* (512) is the writer's id, 0 when nobody writes.

The log grows up from 4096, objects grow down from the end, and the catalogue is full where they
meet. An append is, in this order and with nothing left out:

    object bytes;  write back, fence
    entry;         write back, fence
    commit word;   write back, fence

so that whoever sees the commit word finds the entry in memory, and whoever sees the entry finds the
object. What lies beyond the commit word is nothing, whatever its bytes: an append that a crash tore
is not there, and the next one takes its place. A reader invalidates the commit word and loads it,
then invalidates and loads the entries that are new to it, then, once per object, the object.
Entries and objects are never written again in their generation, so nothing is invalidated twice.

To *re-initialise* is to write commit word 0, publish it, and only then change anything else. A
reader compares the commit word after it has read an object, so what it returns is of one
generation; views that it gave out before show whatever is written there since.

Two writers. There is no compare-and-swap between hosts that are not hardware-coherent, so a second
writer cannot be prevented here; the orchestrator does that by who may write. It is detected: each
append first compares the owner and commit words with what this writer left, and each entry carries
the checksum of the one before, so that readers notice a history that was rewritten. Checksums find
damage and accidents; they are no proof against a writer that lies.

Everything read is checked before it is used, as from a stranger: bounds, order, overlap, names,
checksums. What is wrong is an error of this module, never an access outside of the memory.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable, Mapping
from types import MappingProxyType
from zlib import crc32

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    RemoteError,
    Retry,
    TagmemError,
    Unsupported,
)
from tagmem.base.ids import Tag, tag_from_bytes, tag_to_bytes
from tagmem.base.limits import SHARED_OBJECTS_MAX
from tagmem.base.units import Bytes, align_up
from tagmem.shared.coherence import KindName, Memory, publish
from tagmem.wire.catalogue import (
    CatalogueCoherence,
    CatalogueEntry,
    ObjectKind,
    Superblock,
)
from tagmem.wire.fields import DecodeError

MAGIC = b"tagmemSH"
VERSION = 1
COMMIT_AT = 256
OWNER_AT = 512
LOG_AT = 4096
ENTRY_BYTES = 256
ALIGN_BYTES = 256
"""Objects begin on multiples of this: 64 for vector instructions, 256 for the longest cache line.
"""
NAME_BYTES_MAX = 128
GENERATION_MAX = (1 << 32) - 1
_COUNT_MAX = (1 << 32) - 1
SIZE_BYTES_MIN = LOG_AT + ENTRY_BYTES
_SETTLE_TRIES_MAX = 3
_WORD_GENERATION_MAX = (1 << 16) - 1
_CHECK_SEED = 0xFFFF
_KINDS: dict[KindName, CatalogueCoherence] = {
    "hardware-coherent": CatalogueCoherence.HARDWARE,
    "software-coherent": CatalogueCoherence.SOFTWARE,
}

Write = Callable[[Memory, int], int]
"""Stores an object's bytes from an offset on, and returns their CRC-32."""


class NoCatalogue(NotFound):
    """There is no catalogue in this memory."""


class OtherVersion(Unsupported):
    """The catalogue is of another format version."""


class Initialising(Conflict):
    """The catalogue is being initialised: look again."""

    retry = Retry.LATER


class Reinitialised(Conflict):
    """The catalogue was initialised anew: what was got from it before is gone; open it again."""


class Overtaken(Conflict):
    """Another writer has taken the catalogue over: this one writes nothing any more."""


class Full(Conflict):
    """There is no room for the object."""


class Corrupt(RemoteError):
    """What lies in the memory is damaged, or was written by something else."""

    def __init__(self, what: str) -> None:
        self.peer = "shared memory"
        self.code = 0
        self.retry = Retry.NEVER
        TagmemError.__init__(self, f"the catalogue is damaged: {what}")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One object: where it is, and what."""

    sequence: int
    """1 for the first object of a generation."""
    name: str
    kind: ObjectKind
    offset: Bytes
    length_bytes: Bytes
    checksum: int
    """CRC-32 of its bytes."""


class Catalogue:
    """The catalogue of one memory, as its writer or as a reader. Not for several threads at once.

    It owns nothing: the memory outlives it.
    """

    def __init__(self, memory: Memory, superblock: Superblock, owner: int) -> None:
        """For `create` and `open`, which have checked what they give."""
        self._memory = memory
        self._superblock = superblock
        self._owner = owner
        self._word = commit_word(superblock.generation, 0)
        self._chain = superblock.checksum
        self._low = superblock.size_bytes
        self._entries: dict[str, Entry] = {}
        self._verified: set[int] = set()

    # ---- its beginning and its end

    @classmethod
    def create(cls, memory: Memory, tag: Tag, *, owner: int, replace: bool = False) -> Catalogue:
        """Initialise the memory and be its writer. `owner` is a random number that nobody else has.

        `replace` gives up whatever is there, a catalogue or not: without it only memory whose
        header is all zero is taken, as capacity comes. Raises Conflict, InvalidInput (too small).
        """
        _check_owner(owner)
        _check_lines(memory)
        size = memory.size_bytes // ALIGN_BYTES * ALIGN_BYTES
        if size < SIZE_BYTES_MIN:
            raise InvalidInput("memory", f"at least {SIZE_BYTES_MIN} B", memory.size_bytes)
        memory.invalidate(0, LOG_AT)
        header = memory.load(0, LOG_AT)
        generation = 1
        if header != bytes(LOG_AT):
            if not replace:
                what = "a catalogue" if header.startswith(MAGIC) else "something, but no catalogue,"
                raise Conflict(f"there is {what} in this memory already; replace=True gives it up")
            generation = _generation_after(header, owner)
        draft = Superblock(
            magic=MAGIC,
            version=VERSION,
            coherence=_KINDS[memory.kind],
            tag=tag_to_bytes(tag),
            size_bytes=size,
            generation=generation,
            log_offset=LOG_AT,
            entry_bytes=ENTRY_BYTES,
            checksum=0,
        )
        superblock = msgspec.structs.replace(draft, checksum=_sum_before_last(draft.encode()))
        for at, value in ((COMMIT_AT, 0), (OWNER_AT, owner)):
            memory.store_word(at, value)
            publish(memory, at, 8)
        memory.store(0, superblock.encode())
        publish(memory, 0, Superblock.LAYOUT.size)
        memory.store_word(COMMIT_AT, commit_word(generation, 0))
        publish(memory, COMMIT_AT, 8)
        return cls(memory, superblock, owner)

    @classmethod
    def open(cls, memory: Memory, *, owner: int = 0, take_over: bool = False) -> Catalogue:
        """The catalogue that is there, with all that is committed: to read, or with an `owner` to
        write.

        `take_over`: write although another writer never closed it, for who knows that it is gone.
        Raises NoCatalogue, OtherVersion, Initialising, Corrupt, Conflict (there is a writer).
        """
        _check_lines(memory)
        superblock = _settled(memory)
        if owner:
            _claim(memory, owner, take_over=take_over)
        catalogue = cls(memory, superblock, owner)
        catalogue.refresh()
        return catalogue

    def close(self) -> None:
        """Let the next writer in. What was put stays. Twice, or as a reader, it does nothing."""
        owner, self._owner = self._owner, 0
        if owner and self._load_fresh(OWNER_AT) == owner:
            self._memory.store_word(OWNER_AT, 0)
            publish(self._memory, OWNER_AT, 8)

    # ---- what it is

    @property
    def tag(self) -> Tag:
        """The tag that it was created under."""
        return tag_from_bytes(self._superblock.tag)

    @property
    def generation(self) -> int:
        """How often this memory was initialised."""
        return self._superblock.generation

    @property
    def declared(self) -> KindName:
        """The coherence that its creator had."""
        return declared(self._superblock)

    @property
    def writer(self) -> bool:
        """Whether this is the writer."""
        return self._owner != 0

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is known of it, by name, oldest first; as of the last `refresh`, `look` or
        `append`.
        """
        return MappingProxyType(self._entries)

    @property
    def free_bytes(self) -> Bytes:
        """Room for one more object, at most."""
        log_end = LOG_AT + (len(self._entries) + 1) * ENTRY_BYTES
        return max(self._low - align_up(log_end, ALIGN_BYTES), 0)

    # ---- reading

    def refresh(self) -> tuple[Entry, ...]:
        """Learn what was committed since; returns the new entries. Raises Reinitialised, Corrupt.

        One cache line is loaded from memory when there is nothing new.
        """
        word = self._load_fresh(COMMIT_AT)
        if word == self._word:
            return ()
        count = self._count_in(word)
        known = len(self._entries)
        if count < known:
            raise Corrupt(f"{known} objects became {count}")
        log_end = LOG_AT + count * ENTRY_BYTES
        if count > SHARED_OBJECTS_MAX or log_end > self._superblock.size_bytes:
            raise Corrupt(f"{count} objects do not fit into {self._superblock.size_bytes} B")
        self._memory.invalidate(LOG_AT + known * ENTRY_BYTES, (count - known) * ENTRY_BYTES)
        try:
            new = self._read_entries(known, count)
        except Corrupt:
            # A writer that began anew meanwhile explains it.
            self.check()
            raise
        self._word = word
        return new

    def look(self, name: str) -> Entry:
        """The entry of a name, looking into memory for a new one. Raises NotFound, Reinitialised,
        Corrupt.
        """
        self.refresh()
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"tag {self.tag}: no object is called {name!r}; {self._known()}")
        return entry

    def view(self, entry: Entry, *, verify: bool = True) -> memoryview:
        """An object's bytes in place, read-only. `verify` compares their checksum, once per object.

        Raises Corrupt, Reinitialised.
        """
        memory = self._memory
        known = entry.sequence in self._verified
        if not known:
            memory.invalidate(entry.offset, entry.length_bytes)
        view = memory.view(entry.offset, entry.length_bytes)
        right = known or not verify or crc32(view) == entry.checksum
        # Also of what was verified: a writer that began anew may have written over it since.
        self.check()
        if not right:
            raise Corrupt(f"object {entry.name!r}: its bytes do not have the checksum that it had")
        if verify:
            self._verified.add(entry.sequence)
        return view

    def check(self) -> None:
        """Raises Reinitialised where what was got before is gone."""
        self._count_in(self._load_fresh(COMMIT_AT))

    # ---- writing

    def append(self, name: str, kind: ObjectKind, length_bytes: Bytes, write: Write) -> Entry:
        """Put one object: `write` stores its bytes where it is told. Others see it once this
        returns.

        Raises Conflict (a reader's catalogue, or the name is taken), InvalidInput (the name),
        Full, Overtaken. When `write` raises, nothing has happened.
        """
        encoded = _encode_name(name)
        if not self._owner:
            raise Conflict(f"tag {self.tag}: opened to read; open it with writable=True to put")
        if name in self._entries:
            raise Conflict(f"tag {self.tag}: there is an object {name!r} already, and objects stay")
        self._check_owner()
        count = len(self._entries)
        log_end = LOG_AT + (count + 1) * ENTRY_BYTES
        offset = (self._low - length_bytes) // ALIGN_BYTES * ALIGN_BYTES
        if count == SHARED_OBJECTS_MAX:
            raise Full(f"tag {self.tag}: a catalogue has at most {SHARED_OBJECTS_MAX} objects")
        if length_bytes < 0 or offset < log_end:
            raise Full(
                f"tag {self.tag}: {name!r} takes {length_bytes} B, and {self.free_bytes} B are free"
            )
        memory = self._memory
        try:
            checksum = write(memory, offset)
        finally:
            # Also when it failed: lines that stay behind dirty would go over a later writer's.
            publish(memory, offset, length_bytes)
        draft = CatalogueEntry(
            sequence=count + 1,
            generation=self.generation,
            kind=kind,
            name_bytes=len(encoded),
            object_checksum=checksum,
            offset=offset,
            length_bytes=length_bytes,
            previous=self._chain,
            name=encoded.ljust(NAME_BYTES_MAX, b"\0"),
            checksum=0,
        )
        chain = _sum_before_last(draft.encode())
        at = log_end - ENTRY_BYTES
        # Writing an object takes a while; a writer that came meanwhile is not written over.
        self._check_owner()
        memory.store(at, msgspec.structs.replace(draft, checksum=chain).encode())
        publish(memory, at, ENTRY_BYTES)
        self._word = commit_word(self.generation, count + 1)
        memory.store_word(COMMIT_AT, self._word)
        publish(memory, COMMIT_AT, 8)
        entry = Entry(count + 1, name, kind, offset, length_bytes, checksum)
        self._remember(entry, chain)
        self._verified.add(entry.sequence)
        return entry

    # ---- within

    def _remember(self, entry: Entry, chain: int) -> None:
        self._entries[entry.name] = entry
        self._chain = chain
        self._low = entry.offset

    def _read_entries(self, known: int, count: int) -> tuple[Entry, ...]:
        """The entries of a range, checked and remembered; all of them or none."""
        log_end = LOG_AT + count * ENTRY_BYTES
        found: dict[str, Entry] = {}
        low, chain = self._low, self._chain
        for index in range(count - known):
            data = self._memory.load(LOG_AT + (known + index) * ENTRY_BYTES, ENTRY_BYTES)
            entry, previous, chain_after = _read_entry(data, self.generation)
            where = f"entry {known + index + 1}"
            if entry.sequence != known + index + 1 or previous != chain:
                raise Corrupt(f"{where} does not follow the one before it")
            fits = log_end <= entry.offset and entry.offset + entry.length_bytes <= low
            if not fits or entry.offset % ALIGN_BYTES:
                raise Corrupt(f"{where} lies where no object can be")
            if entry.name in self._entries or entry.name in found:
                raise Corrupt(f"{where} has a name that is taken")
            found[entry.name] = entry
            low, chain = entry.offset, chain_after
        for entry in found.values():
            self._remember(entry, chain)
        return tuple(found.values())

    def _count_in(self, word: int) -> int:
        """Entries that a commit word tells of. Raises Reinitialised, Corrupt."""
        said = read_commit_word(word)
        if said is None or said[0] != self.generation & _WORD_GENERATION_MAX:
            now = "another" if said else "being initialised"
            raise Reinitialised(
                f"tag {self.tag}: the catalogue was generation {self.generation} and is {now}: "
                "what was got from it is gone; open it again"
            )
        return said[1]

    def _check_owner(self) -> None:
        owner = self._load_fresh(OWNER_AT)
        word = self._load_fresh(COMMIT_AT)
        if owner != self._owner or word != self._word:
            # Whoever came must not find its claim cleared when this one closes.
            self._owner = 0
            raise Overtaken(f"tag {self.tag}: another writer has taken the catalogue over")

    def _load_fresh(self, at: int) -> int:
        self._memory.invalidate(at, 8)
        return self._memory.load_word(at)

    def _known(self) -> str:
        names = list(self._entries)
        if not names:
            return "it is empty"
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return "there are " + ", ".join(names[:5]) + more


def declared(superblock: Superblock) -> KindName:
    """The coherence that a catalogue's creator had."""
    if superblock.coherence is CatalogueCoherence.HARDWARE:
        return "hardware-coherent"
    return "software-coherent"


def read_superblock(memory: Memory) -> Superblock:
    """The superblock as it is in memory now. Raises NoCatalogue, OtherVersion, Corrupt."""
    size = Superblock.LAYOUT.size
    if memory.size_bytes < SIZE_BYTES_MIN:
        raise NoCatalogue(f"there is no catalogue in {memory.size_bytes} B of memory")
    memory.invalidate(0, size)
    raw = memory.load(0, size)
    if not raw.startswith(MAGIC):
        what = "it is all zero" if raw == bytes(size) else "something else is there"
        raise NoCatalogue(f"there is no catalogue in this memory: {what}")
    version = int.from_bytes(raw[8:12], "little")
    if version != VERSION:
        raise OtherVersion(
            f"the catalogue has format version {version}, and this is for version {VERSION}"
        )
    if _sum_before_last(raw) != int.from_bytes(raw[-4:], "little"):
        raise Corrupt("the superblock's checksum is wrong")
    try:
        superblock = Superblock.decode(raw)
    except DecodeError as error:
        raise Corrupt(f"superblock: {error}") from None
    if not SIZE_BYTES_MIN <= superblock.size_bytes <= memory.size_bytes:
        raise Corrupt(
            f"it was made for {superblock.size_bytes} B, and {memory.size_bytes} B are mapped"
        )
    if superblock.size_bytes % ALIGN_BYTES or not 0 < superblock.generation <= GENERATION_MAX:
        raise Corrupt("the superblock's size or generation cannot be")
    if (superblock.log_offset, superblock.entry_bytes) != (LOG_AT, ENTRY_BYTES):
        raise Corrupt("the superblock's log is not where version 1 has it")
    return superblock


def commit_word(generation: int, count: int) -> int:
    """`count` in bits 0 to 31, the generation's low 16 bits above, CRC-16 of both on top."""
    low = (generation & _WORD_GENERATION_MAX) << 32 | count
    return crc_hqx(low.to_bytes(6, "little"), _CHECK_SEED) << 48 | low


def read_commit_word(word: int) -> tuple[int, int] | None:
    """The low bits of the generation, and the count; None for 0, while one is being made. Raises
    Corrupt.
    """
    if word == 0:
        return None
    generation, count = word >> 32 & _WORD_GENERATION_MAX, word & _COUNT_MAX
    if commit_word(generation, count) != word:
        raise Corrupt("the commit word's check is wrong")
    return generation, count


def _settled(memory: Memory) -> Superblock:
    """A superblock whose generation is that of the commit word."""
    superblock = read_superblock(memory)
    for _ in range(_SETTLE_TRIES_MAX):
        memory.invalidate(COMMIT_AT, 8)
        said = read_commit_word(memory.load_word(COMMIT_AT))
        if said is not None and said[0] == superblock.generation & _WORD_GENERATION_MAX:
            return superblock
        superblock = read_superblock(memory)
    raise Initialising(
        f"the catalogue of tag {tag_from_bytes(superblock.tag)} is being initialised, "
        "or its writer stopped in the middle of that"
    )


def _claim(memory: Memory, owner: int, *, take_over: bool) -> None:
    """Be the writer. Raises Conflict where another one is."""
    _check_owner(owner)
    memory.invalidate(OWNER_AT, 8)
    present = memory.load_word(OWNER_AT)
    if present and not take_over:
        raise Conflict(
            f"another writer ({present:#018x}) has not closed the catalogue; "
            "take_over=True if you know that it is gone"
        )
    memory.store_word(OWNER_AT, owner)
    publish(memory, OWNER_AT, 8)


def _generation_after(header: bytes, owner: int) -> int:
    """A generation that no reader of what was there has."""
    raw = header[: Superblock.LAYOUT.size]
    if raw.startswith(MAGIC) and _sum_before_last(raw) == int.from_bytes(raw[-4:], "little"):
        known = int.from_bytes(raw[0x28:0x30], "little")
    else:
        known = owner  # nothing is known of it; random does
    return known % GENERATION_MAX + 1


def _sum_before_last(raw: bytes) -> int:
    return crc32(raw[:-4])


def _read_entry(data: bytes, generation: int) -> tuple[Entry, int, int]:
    """An entry, the checksum that it follows, and its own. Raises Corrupt."""
    checksum = _sum_before_last(data)
    if checksum != int.from_bytes(data[-4:], "little"):
        raise Corrupt("an entry's checksum is wrong")
    try:
        raw = CatalogueEntry.decode(data)
    except DecodeError as error:
        raise Corrupt(f"entry: {error}") from None
    if raw.generation != generation:
        raise Corrupt(f"an entry is of generation {raw.generation}, and not of {generation}")
    encoded, rest = raw.name[: raw.name_bytes], raw.name[raw.name_bytes :]
    try:
        name = encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise Corrupt("an entry's name is not text") from None
    if raw.name_bytes > NAME_BYTES_MAX or not name or not name.isprintable() or rest.strip(b"\0"):
        raise Corrupt("an entry's name is none")
    entry = Entry(raw.sequence, name, raw.kind, raw.offset, raw.length_bytes, raw.object_checksum)
    return entry, raw.previous, checksum


def _encode_name(name: str) -> bytes:
    limit = f"1 to {NAME_BYTES_MAX} bytes of printable text"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInput("name", limit, name) from None
    if not 0 < len(encoded) <= NAME_BYTES_MAX or not name.isprintable():
        raise InvalidInput("name", limit, name)
    return encoded


def _check_owner(owner: int) -> None:
    if not 0 < owner < 1 << 64:
        raise InvalidInput("owner", "1 to 2**64 - 1", owner)


def _check_lines(memory: Memory) -> None:
    if memory.line_bytes > ALIGN_BYTES:
        raise Unsupported(
            f"this machine's cache lines of {memory.line_bytes} B are longer than {ALIGN_BYTES} B"
        )
