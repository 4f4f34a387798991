"""The catalogue of `tagmem.shared` under schedules: a writer, readers, power that fails, a writer
that begins anew; and the same with one thing forgotten, which must be noticed.

What an object holds follows from its name and generation, so that any reader can tell whether what
it got is right. An honest error is right as well: a catalogue that is not there yet, or any more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from random import Random
from zlib import crc32

from tagmem.base.ids import Tag
from tagmem.shared.catalogue import (
    LOG_AT,
    Catalogue,
    Entry,
    Full,
    Initialising,
    NoCatalogue,
    Overtaken,
    Reinitialised,
)
from tagmem.shared.coherence import KindName, Memory
from tagmem.testing.schedules import Outcome, Program, Schedule, Wrap
from tagmem.wire.catalogue import ObjectKind

TAG = Tag("6f1c2f0e-5a8b-4c11-9d43-0a1b2c3d4e5f")
SIZE_BYTES = 16 << 10
RACING = (range(64),)
"""The superblock: told from a half one by its checksum, from an old one by the commit word."""
HOSTS_MAX = 5
"""Of a schedule: four, and the one that comes last."""
_LOOKS = 6
_OBJECTS_MAX = 6
_OBJECT_BYTES_MAX = 400


class WrongValue(AssertionError):
    """A reader was given what no writer put."""


def content(generation: int, name: str) -> bytes:
    """What an object of this name holds in this generation."""
    chance = Random(f"{generation} {name}")
    return chance.randbytes(chance.randrange(_OBJECT_BYTES_MAX))


def put(catalogue: Catalogue, name: str) -> None:
    """Put what `content` says."""
    data = content(catalogue.generation, name)

    def write(memory: Memory, offset: int) -> int:
        memory.store(offset, data)
        return crc32(data)

    catalogue.append(name, ObjectKind.BYTES, len(data), write)


class World:
    """What the programs of one schedule share, beside the memory."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._chance = Random(schedule.seed ^ 0x5EED)
        self.appended: set[tuple[int, str]] = set()
        """(generation, name) of each append that returned."""
        self._replaced = False

    def writer(self, owner: int, *, first: bool, replace: bool = False) -> Program:
        """Creates, or takes over what a writer without power left; puts objects; closes."""

        def program(memory: Memory, _host: int) -> None:
            if first:
                catalogue = Catalogue.create(memory, TAG, owner=owner)
            else:
                catalogue = self._follow(memory, owner, replace=replace)
            try:
                for number in range(self._chance.randrange(1, _OBJECTS_MAX)):
                    name = f"{owner}-{number}"
                    put(catalogue, name)
                    self.appended.add((catalogue.generation, name))
            except (Full, Overtaken):
                return
            if self._chance.random() < 0.5:
                catalogue.close()

        return program

    def _follow(self, memory: Memory, owner: int, *, replace: bool) -> Catalogue:
        if not replace:
            try:
                return Catalogue.open(memory, owner=owner, take_over=True)
            except (NoCatalogue, Initialising):
                pass
        self._replaced = True
        return Catalogue.create(memory, TAG, owner=owner, replace=True)

    def reader(self, memory: Memory, host: int) -> None:
        """Opens, and looks again and again."""
        catalogue: Catalogue | None = None
        for _ in range(_LOOKS):
            since = self._schedule.luck.now
            try:
                if catalogue is None:
                    catalogue = Catalogue.open(memory)
                self._look(catalogue)
            except (NoCatalogue, Initialising, Reinitialised):
                # It looked while that was being made, noticed, and gave nothing out.
                catalogue = None
                self._schedule.luck.forgive(host, since)

    def _look(self, catalogue: Catalogue) -> None:
        if self._chance.random() < 0.7:
            catalogue.refresh()
        for name, entry in list(catalogue.entries.items()):
            if self._chance.random() < 0.4:
                self._check(catalogue, name, entry)

    def _check(self, catalogue: Catalogue, name: str, entry: Entry) -> None:
        if bytes(catalogue.view(entry)) != content(catalogue.generation, name):
            raise WrongValue(f"{name} of generation {catalogue.generation}")

    def last(self, memory: Memory, _host: int) -> None:
        """Who comes when all is over finds everything that was put, of the last generation."""
        catalogue = Catalogue.open(memory)
        latest = {name for generation, name in self.appended if generation == catalogue.generation}
        missing = latest - set(catalogue.entries)
        if missing:
            raise WrongValue(f"put, and not there: {sorted(missing)}")
        for name, entry in catalogue.entries.items():
            self._check(catalogue, name, entry)


def run(seed: int, pool: ThreadPoolExecutor, wrap: Wrap | None = None) -> Outcome:
    """One schedule of two to four hosts, and one that comes last."""
    schedule = Schedule(seed, SIZE_BYTES, pool)
    chance = Random(seed ^ 0xCA7A)
    world = World(schedule)
    programs: list[Program] = [world.writer(1, first=True)]
    if chance.random() < 0.5:
        # A second writer, when the first has ended, or lost its power at any moment.
        programs.append(world.writer(2, first=False, replace=chance.random() < 0.3))
        schedule.after(1, [0])
        if chance.random() < 0.7:
            schedule.doom(0, chance.randrange(120))
    programs += [world.reader] * chance.randrange(1, 5 - len(programs))
    schedule.after(len(programs), range(len(programs)))
    programs.append(world.last)
    return schedule.run(programs, wrap, RACING)


class Mistake(StrEnum):
    """One thing forgotten."""

    FLUSH = "missing flush"
    FENCE = "missing fence"
    LATE = "flush after publish"
    INVALIDATE = "missing invalidate"


class Forgetful:
    """`Memory` that forgets one thing about what lies behind the words: a planted mistake."""

    def __init__(self, memory: Memory, mistake: Mistake) -> None:
        self._memory = memory
        self._mistake = mistake
        self._late: list[tuple[int, int]] = []
        self._in_flight = False
        self.kind: KindName = memory.kind
        self.line_bytes = memory.line_bytes
        self.effective = memory.effective
        self.size_bytes = memory.size_bytes
        self.writable = memory.writable
        self.load = memory.load
        self.store = memory.store
        self.view = memory.view
        self.load_word = memory.load_word
        self.store_word = memory.store_word

    def write_back(self, offset: int, length: int) -> None:
        """Of objects: never, or only after the next word."""
        if offset >= LOG_AT:
            self._in_flight = True
            if self._mistake is Mistake.FLUSH:
                return
            if self._mistake is Mistake.LATE:
                self._late.append((offset, length))
                return
        self._memory.write_back(offset, length)

    def fence(self) -> None:
        """After objects: not."""
        behind, self._in_flight = self._in_flight, False
        if behind and self._mistake is Mistake.FENCE:
            return
        self._memory.fence()
        if not behind and self._late:
            for offset, length in self._late:
                self._memory.write_back(offset, length)
            self._late.clear()
            self._memory.fence()

    def invalidate(self, offset: int, length: int) -> None:
        """Of objects: never."""
        if offset >= LOG_AT and self._mistake is Mistake.INVALIDATE:
            return
        self._memory.invalidate(offset, length)


def forgetting(mistake: Mistake) -> Wrap:
    """Hosts that all make the same mistake."""
    return lambda memory: Forgetful(memory, mistake)
