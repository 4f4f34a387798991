"""Memory behind caches that nobody keeps coherent: each host has its own view, and the views lie
in every way that hardware may.

Apart from the judgement (`luck`), because a program should *meet* stale bytes, not only be told of
them: a test that reads a wrong value fails by itself. Nothing here is wrong about the hardware; it
only does, at random, all that the hardware is free to do (CXL r3.1 3.3: without back-invalidate a
host's caches know nothing of another host's stores):

- a store stays in the host's cache, until the line is written back or happens to be evicted;
- a line is evicted whole, with whatever the host believes of the bytes that it did not store;
- a written-back line is on its way until the fence, and may arrive at any moment before it;
- a load is served from the host's copy, however old; a copy may come by prefetch, and go by
  eviction, whenever.
"""

from __future__ import annotations

from typing import Protocol

from tagmem.base.errors import InvalidInput

LINE_BYTES = 64
_SHIFT = 6


class Chance(Protocol):
    """A seeded generator; `random.Random` is one."""

    def random(self) -> float:
        """From 0 up to, not including, 1."""
        ...

    def randrange(self, start: int, /) -> int:
        """From 0 up to, not including, the argument."""
        ...


class Habits:
    """How often caches act by themselves, as chances at each access. All zero: never."""

    __slots__ = ("arrive", "evict", "prefetch")

    def __init__(self, evict: float, prefetch: float, arrive: float) -> None:
        self.evict = evict
        self.prefetch = prefetch
        self.arrive = arrive


LAZY = Habits(0.0, 0.0, 0.0)
"""Keeps everything: who forgets a flush is never seen, who forgets to invalidate never sees."""
RESTLESS = Habits(0.15, 0.15, 0.15)
"""Lines come and go all the time: who counts on an order of arrival is wrong."""
ORDINARY = Habits(0.02, 0.05, 0.05)
HABITS = (LAZY, ORDINARY, RESTLESS)


class _Host:
    """The cache of one host."""

    __slots__ = ("dirty", "flight", "lines")

    def __init__(self) -> None:
        self.lines: dict[int, bytearray] = {}
        """What the host believes of a line."""
        self.dirty: set[int] = set()
        self.flight: dict[int, bytes] = {}
        """Written back, and not yet in memory."""


class Caches:
    """The memory and every host's cache. Ranges are the caller's to check."""

    def __init__(
        self,
        size_bytes: int,
        hosts: int,
        chance: Chance,
        habits: Habits = ORDINARY,
        *,
        lines_max: int = 0,
    ) -> None:
        """`lines_max` bounds the lines of each cache; 0 does not."""
        if size_bytes <= 0 or size_bytes % LINE_BYTES:
            raise InvalidInput("size", f"a positive multiple of {LINE_BYTES} (bytes)", size_bytes)
        self.memory = bytearray(size_bytes)
        self._hosts = [_Host() for _ in range(hosts)]
        self._chance = chance
        self._habits = habits
        self._lines_max = lines_max
        self._restless = bool(habits.evict or habits.prefetch or habits.arrive)
        self._recent: list[int] = []
        """Lines that were touched: what an eviction or a prefetch is most interesting for."""

    # ---- what a program does

    def load(self, host: int, offset: int, length: int) -> bytes:
        """The bytes as the host sees them."""
        self._stir(offset)
        cache = self._hosts[host]
        line, within = offset >> _SHIFT, offset & (LINE_BYTES - 1)
        if within + length <= LINE_BYTES:
            return bytes(self._line(cache, line)[within : within + length])
        parts = []
        end = offset + length
        while offset < end:
            line, within = offset >> _SHIFT, offset & (LINE_BYTES - 1)
            take = min(LINE_BYTES - within, end - offset)
            parts.append(self._line(cache, line)[within : within + take])
            offset += take
        return b"".join(parts)

    def store(self, host: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Into the host's own lines, which become dirty."""
        self._stir(offset)
        cache = self._hosts[host]
        at, size = 0, len(data)
        while at < size:
            line, within = offset + at >> _SHIFT, (offset + at) & (LINE_BYTES - 1)
            take = min(LINE_BYTES - within, size - at)
            self._line(cache, line)[within : within + take] = data[at : at + take]
            cache.dirty.add(line)
            at += take

    def write_back(self, host: int, offset: int, length: int) -> None:
        """Send the range's dirty lines on their way; copies stay, clean."""
        self._stir(offset)
        cache = self._hosts[host]
        for line in _lines(offset, length):
            if line in cache.dirty:
                self._land(cache, line)
                cache.dirty.discard(line)
                cache.flight[line] = bytes(cache.lines[line])

    def fence(self, host: int) -> None:
        """What is on its way has arrived."""
        cache = self._hosts[host]
        for line in tuple(cache.flight):
            self._land(cache, line)

    def invalidate(self, host: int, offset: int, length: int) -> None:
        """Drop the range's lines. A dirty one is lost or written back, as it happens."""
        cache = self._hosts[host]
        for line in _lines(offset, length):
            if line in cache.dirty and self._chance.random() < 0.5:
                self._write(cache, line)
            cache.dirty.discard(line)
            cache.lines.pop(line, None)
        self._stir(offset)

    def reset(self, host: int) -> None:
        """The host lost its power, and its cache with it."""
        self._hosts[host] = _Host()

    # ---- what caches do by themselves

    def _stir(self, offset: int) -> None:
        """Let any host's cache act on a line of late."""
        if not self._restless:
            return
        line = offset >> _SHIFT
        recent = self._recent
        if len(recent) < 32:
            recent.append(line)
        else:
            recent[self._chance.randrange(32)] = line
        habits, chance = self._habits, self._chance
        for cache in self._hosts:
            if habits.arrive and cache.flight and chance.random() < habits.arrive:
                flight = sorted(cache.flight)
                self._land(cache, flight[chance.randrange(len(flight))])
            if chance.random() < habits.evict:
                self._evict(cache, recent[chance.randrange(len(recent))])
            if chance.random() < habits.prefetch:
                near = recent[chance.randrange(len(recent))] + chance.randrange(2)
                if near << _SHIFT < len(self.memory):
                    self._line(cache, near)

    def _evict(self, cache: _Host, line: int) -> None:
        if line in cache.dirty:
            self._write(cache, line)
            cache.dirty.discard(line)
        cache.lines.pop(line, None)

    def _line(self, cache: _Host, line: int) -> bytearray:
        """The host's copy, fetched from memory if there is none."""
        found = cache.lines.get(line)
        if found is None:
            # A host's own line on its way is answered from where it is, as hardware does.
            flight = cache.flight.get(line)
            at = line << _SHIFT
            found = bytearray(self.memory[at : at + LINE_BYTES] if flight is None else flight)
            if self._lines_max and len(cache.lines) >= self._lines_max:
                held = sorted(cache.lines)
                self._evict(cache, held[self._chance.randrange(len(held))])
            cache.lines[line] = found
        return found

    def _write(self, cache: _Host, line: int) -> None:
        cache.flight.pop(line, None)
        at = line << _SHIFT
        self.memory[at : at + LINE_BYTES] = cache.lines[line]

    def _land(self, cache: _Host, line: int) -> None:
        data = cache.flight.pop(line, None)
        if data is not None:
            at = line << _SHIFT
            self.memory[at : at + LINE_BYTES] = data


def _lines(offset: int, length: int) -> range:
    if length <= 0:
        return range(0)
    return range(offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1)
