"""Who depends on luck: the judgement over a run's loads, stores, flushes and invalidations.

It looks at no values and at no cache, only at what the program has *asked for*, and so finds a
mistake in a run in which every value happened to be right. The rule, for each byte that a host
loads and that another host stored last:

    store < write back < fence   (the writer's)   < invalidate < load   (the reader's)

A load for which this chain is not closed may return an older byte under another legal order of
evictions, prefetches and arrivals. A store is judged as a load of the rest of its lines, because a
line is written back whole, and as a race with whoever has unpublished stores in them.

Words that a program declares as racing (`Memory.load_word`, `store_word`) may be old or new by
design and are never judged. They say in what order things were published: who has seen a word must
find published, before that word, what was stored before it. So a flush after publish is found also
where the reader came late enough to be lucky.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

LINE_BYTES = 64
_SHIFT = 6
_MASK = LINE_BYTES - 1

Site = Hashable
"""Where in the program: whatever the caller can show later."""


class Missing(StrEnum):
    """What was not done."""

    FLUSH = "missing flush"
    FENCE = "missing fence"
    LATE = "flush after publish"
    INVALIDATE = "missing invalidate"
    ORDER = "read before publish"


class Store:
    """What one store left in one line."""

    __slots__ = ("at", "flushed", "host", "line", "published", "site", "word")

    def __init__(self, host: int, at: int, line: int, site: Site, *, word: bool) -> None:
        self.host = host
        self.at = at
        """When, in steps of the run; so are the others, and 0 is not yet."""
        self.line = line
        self.site = site
        self.word = word
        self.flushed = 0
        self.published = 0


@dataclass
class Finding:
    """The first access that depended on luck."""

    host: int
    at: int
    offset: int
    """The first byte of it."""
    length: int
    access: str
    """`load`, `store`, or `end` for a word that nobody is sure ever to see."""
    site: Site
    store: Store
    invalidated: int
    """When the host last invalidated the line; 0 never."""
    known: bool = False
    """Whether the host had seen a word that the writer stored afterwards."""
    word_at: int = 0
    _missing: Missing = field(default=Missing.FLUSH)

    @property
    def line(self) -> int:
        """Which line."""
        return self.store.line

    @property
    def missing(self) -> Missing:
        """What was not done. Final when the run has ended: a flush may still come too late."""
        store = self.store
        if self._missing is not Missing.FLUSH:
            return self._missing
        if store.flushed and store.flushed < self.at:
            return Missing.FENCE
        if store.flushed:
            return Missing.LATE if self.known else Missing.ORDER
        return Missing.FLUSH


class Luck:
    """The judgement of one run. Every host begins with caches that may hold anything of before."""

    def __init__(self, hosts: int) -> None:
        self.first: Finding | None = None
        self.now = 0
        self._slots: dict[int, list[Store | None]] = {}
        """Who stored each byte of a line last."""
        self._open: list[dict[int, list[Store]]] = [{} for _ in range(hosts)]
        """Stores that were not written back, by line."""
        self._flight: list[dict[Hashable, list[Store]]] = [{} for _ in range(hosts)]
        """Written back and not fenced, by who is to fence: a thread, a process."""
        self._invalidated: list[dict[int, int]] = [{} for _ in range(hosts)]
        self._seen: list[list[int]] = [[0] * hosts for _ in range(hosts)]
        """[reader][writer]: when the latest word was stored that the reader knows of."""
        self._words: dict[int, list[tuple[int, Store, tuple[int, ...]]]] = {}

    # ---- loads and stores

    def load(self, host: int, offset: int, length: int, site: Site = None) -> Finding | None:
        """A plain load."""
        self.now += 1
        for line, start, end in pieces(offset, length):
            slots = self._slots.get(line)
            if slots is None:
                continue
            found = self._judge(host, line, set(slots[start:end]))
            if found is not None:
                first = (line << _SHIFT) + next(
                    at for at in range(start, end) if slots[at] is found.store
                )
                return self._keep(found, "load", first, offset + length - first, site)
        return None

    def store(
        self, host: int, offset: int, length: int, site: Site = None, *, word: bool = False
    ) -> Finding | None:
        """A plain store."""
        self.now += 1
        first: Finding | None = None
        for line, start, end in pieces(offset, length):
            slots = self._slots.get(line)
            if slots is None:
                slots = self._slots[line] = [None] * LINE_BYTES
            else:
                found = self._judge_store(host, line, slots, start, end, word=word)
                if found is not None and first is None:
                    first = self._keep(found, "store", offset, length, site)
            new = Store(host, self.now, line, site, word=word)
            slots[start:end] = [new] * (end - start)
            self._open[host].setdefault(line, []).append(new)
        return first

    def load_word(self, host: int, offset: int, value: int) -> None:
        """A racing load that returned `value`."""
        self.now += 1
        for known, store, clock in reversed(self._words.get(offset, ())):
            if known == value:
                seen = self._seen[host]
                for writer, at in enumerate(clock):
                    seen[writer] = max(seen[writer], at)
                seen[store.host] = max(seen[store.host], store.at)
                return

    def store_word(self, host: int, offset: int, value: int, site: Site = None) -> Finding | None:
        """A racing store."""
        found = self.store(host, offset, 8, site, word=True)
        store = self._open[host][offset >> _SHIFT][-1]
        self._words.setdefault(offset, []).append((value, store, tuple(self._seen[host])))
        return found

    # ---- what makes them visible

    def write_back(self, host: int, offset: int, length: int, actor: Hashable = None) -> None:
        """`actor` is whose fence will complete it."""
        self.now += 1
        unwritten = self._open[host]
        if not unwritten:
            return
        flight = self._flight[host].setdefault(actor, [])
        for line in lines(offset, length):
            for store in unwritten.pop(line, ()):
                store.flushed = self.now
                flight.append(store)

    def fence(self, host: int, actor: Hashable = None) -> None:
        """Everything of `actor` on its way has arrived."""
        self.now += 1
        for store in self._flight[host].pop(actor, ()):
            store.published = self.now

    def invalidate(self, host: int, offset: int, length: int) -> None:
        """The range's lines left the host's caches."""
        self.now += 1
        mine, unwritten = self._invalidated[host], self._open[host]
        for line in lines(offset, length):
            mine[line] = self.now
            # Perhaps lost, perhaps evicted in time: no later write back can make up for it.
            unwritten.pop(line, None)

    def reset(self, host: int) -> None:
        """The host lost its power: what it had not published has arrived by now, or never will."""
        self.now += 1
        flight = [store for stores in self._flight[host].values() for store in stores]
        unwritten = [store for stores in self._open[host].values() for store in stores]
        for store in flight + unwritten:
            store.flushed = store.flushed or self.now
            store.published = self.now
        self._flight[host].clear()
        self._open[host].clear()

    def end(self) -> Finding | None:
        """The run is over: words that were never published are a mistake of their own."""
        self.now += 1
        for stores in self._words.values():
            store = stores[-1][1]
            if not store.published and self.first is None:
                # Whoever looks for the word may look for ever.
                found = Finding(store.host, self.now, 0, 8, "", None, store, 0)
                if store.flushed:
                    found._missing = Missing.FENCE  # noqa: SLF001 - its own module
                self._keep(found, "end", store.line << _SHIFT, 8, store.site)
        return self.first

    # ---- the rule

    def _judge(self, host: int, line: int, stores: Iterable[Store | None]) -> Finding | None:
        """A load of bytes that `stores` left, by `host`."""
        worst: Finding | None = None
        invalidated = self._invalidated[host].get(line, 0)
        for store in stores:
            if store is None:
                continue
            if store.host == host:
                # Its own: lost only if it dropped the line before sending the store on its way.
                if invalidated <= store.at or store.flushed:
                    continue
                known, missing = False, Missing.FLUSH
            else:
                seen = self._seen[host][store.host]
                known = store.at < seen
                if not store.published:
                    missing = Missing.FLUSH
                elif store.published > invalidated:
                    missing = Missing.INVALIDATE
                elif known and seen < store.published:
                    missing = Missing.FENCE if store.flushed < seen else Missing.LATE
                else:
                    continue
            found = Finding(host, self.now, 0, 0, "", None, store, invalidated, known)
            found._missing = missing  # noqa: SLF001 - its own module
            if worst is None or store.at < worst.store.at:
                worst = found
        return worst

    def _judge_store(
        self,
        host: int,
        line: int,
        slots: list[Store | None],
        start: int,
        end: int,
        *,
        word: bool,
    ) -> Finding | None:
        """The rest of the line is loaded with it; its own bytes race with unpublished ones."""
        rest = {*slots[:start], *slots[end:]} - {None}
        covered = {
            store
            for store in slots[start:end]
            if store is not None
            and store.host != host
            and not store.published
            and not (word and store.word)
        }
        if not rest and not covered:
            return None
        return self._judge(host, line, (s for s in rest | covered if s and s.host != host))

    def _keep(
        self, found: Finding, access: str, offset: int, length: int, site: Site
    ) -> Finding:
        found.access, found.offset, found.length, found.site = access, offset, length, site
        if self.first is None:
            self.first = found
        return found


def pieces(offset: int, length: int) -> Iterable[tuple[int, int, int]]:
    """A range as (line, first byte in it, byte after the last)."""
    end = offset + length
    while offset < end:
        line, start = offset >> _SHIFT, offset & _MASK
        take = min(LINE_BYTES - start, end - offset)
        yield line, start, start + take
        offset += take


def lines(offset: int, length: int) -> range:
    """The lines that a range covers a byte of."""
    if length <= 0:
        return range(0)
    return range(offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1)
