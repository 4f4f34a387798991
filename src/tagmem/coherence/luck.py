"""Who depends on luck: the judgement over a run's loads, stores, flushes and invalidations.

It looks at no values and at no cache, only at what the program has *asked for*, and so finds a
mistake in a run in which every value happened to be right. The rule, for each byte that a host
loads and that another host stored last:

    store < write back < fence   (the writer's)   < invalidate < load   (the reader's)

A load for which this chain is not closed may return an older byte under another legal order of
evictions, prefetches and arrivals.

A line is written back whole. So a store also brings along what its host believes of the rest of the
line, and a line with unpublished stores of another host may go over it later. Bytes of which one
cannot tell are *spoilt*, until they are stored again: nothing is said before somebody loads them.

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
FINDINGS_MAX = 16
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


class Spoilt:
    """In place of a store: a byte that a store to its line left in doubt."""

    __slots__ = ("cause",)

    def __init__(self, cause: Finding) -> None:
        self.cause = cause


class Store:
    """What one store left in one line."""

    __slots__ = ("at", "dropped", "flushed", "host", "line", "published", "site", "word")

    def __init__(self, host: int, at: int, line: int, site: Site, *, word: bool) -> None:
        self.host = host
        self.at = at
        """When, in steps of the run; so are the others, and 0 is not yet."""
        self.line = line
        self.site = site
        self.word = word
        self.flushed = 0
        self.published = 0
        self.dropped = False
        """Invalidated before it was written back."""


@dataclass
class Finding:
    """The first access that depended on luck."""

    host: int
    at: int
    offset: int
    """The first byte of it."""
    length: int
    access: str
    """`load`; `store` where that put bytes in doubt which somebody loaded later; `end` for a word
    that nobody is sure ever to see.
    """
    site: Site
    store: Store
    invalidated: int
    """When the host last invalidated the line; 0 never."""
    known: bool = False
    """Whether the host had seen a word that the writer stored afterwards."""
    loaded_by: int = -1
    loaded_at: int = 0
    loaded_site: Site = None
    """Of a store: who noticed."""
    _missing: Missing = field(default=Missing.FLUSH)

    @property
    def line(self) -> int:
        """Which line."""
        return self.store.line

    def judge(self, missing: Missing) -> None:
        """Say what was missing; a missing flush is looked at once more in the end."""
        self._missing = missing

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

    def __init__(self, hosts: int, racing: Iterable[range] = ()) -> None:
        """`racing` are bytes that a program checks after it has loaded them, by a checksum or by a
        word: like words, they may be old or new.
        """
        self.findings: list[Finding] = []
        """In the order in which they were found, up to a bound."""
        self.now = 0
        self._racing = tuple(racing)
        self._slots: dict[int, list[Store | Spoilt | None]] = {}
        """Who stored each byte of a line last."""
        self._unsettled: dict[int, list[Store]] = {}
        """Stores that some cache may still write to memory, by line; also some that are settled."""
        self._open: list[dict[int, list[Store]]] = [{} for _ in range(hosts)]
        """Stores that were not written back, by line."""
        self._flight: list[dict[Hashable, list[Store]]] = [{} for _ in range(hosts)]
        """Written back and not fenced, by who is to fence: a thread, a process."""
        self._invalidated: list[dict[int, int]] = [{} for _ in range(hosts)]
        self._seen: list[list[int]] = [[0] * hosts for _ in range(hosts)]
        """[reader][writer]: when the latest word was stored that the reader knows of."""
        self._words: dict[int, list[tuple[int, Store, tuple[int, ...]]]] = {}

    @property
    def first(self) -> Finding | None:
        """The first access that depended on luck, if any did."""
        return self.findings[0] if self.findings else None

    def forgive(self, host: int, since: int) -> None:
        """What `host` did after `since` came to nothing: it noticed, and gave an error."""
        self.findings = [
            found
            for found in self.findings
            if host not in (found.host, found.loaded_by) or max(found.at, found.loaded_at) <= since
        ]

    # ---- loads and stores

    def load(self, host: int, offset: int, length: int, site: Site = None) -> Finding | None:
        """A plain load."""
        self.now += 1
        for race in self._racing:
            if race.start <= offset and offset + length <= race.stop:
                return None
        for line, start, end in pieces(offset, length):
            slots = self._slots.get(line)
            if slots is None:
                continue
            found = self._judge(host, line, set(slots[start:end]))
            if found is None:
                continue
            if found.access == "store":
                found.loaded_by, found.loaded_at, found.loaded_site = host, self.now, site
            else:
                at = next(at for at in range(start, end) if slots[at] is found.store)
                found.access, found.offset = "load", (line << _SHIFT) + at
                found.length, found.site = offset + length - found.offset, site
            return self._keep(found)
        return None

    def store(
        self, host: int, offset: int, length: int, site: Site = None, *, word: bool = False
    ) -> None:
        """A plain store."""
        self.now += 1
        for line, start, end in pieces(offset, length):
            slots = self._slots.get(line)
            new = Store(host, self.now, line, site, word=word)
            if slots is None:
                slots = self._slots[line] = [None] * LINE_BYTES
                slots[start:end] = [new] * (end - start)
                self._unsettled[line] = [new]
            else:
                self._overwrite(slots, new, start, end)
            self._open[host].setdefault(line, []).append(new)

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

    def store_word(self, host: int, offset: int, value: int, site: Site = None) -> None:
        """A racing store."""
        self.store(host, offset, 8, site, word=True)
        store = self._open[host][offset >> _SHIFT][-1]
        self._words.setdefault(offset, []).append((value, store, tuple(self._seen[host])))

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
            for store in unwritten.pop(line, ()):
                store.dropped = True

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
        for offset, stores in self._words.items():
            store = stores[-1][1]
            if not store.published and self.first is None:
                # Whoever looks for the word may look for ever.
                found = Finding(store.host, self.now, offset, 8, "end", store.site, store, 0)
                if store.flushed:
                    found.judge(Missing.FENCE)
                self._keep(found)
        return self.first

    # ---- the rule

    def _judge(
        self, host: int, line: int, stores: Iterable[Store | Spoilt | None]
    ) -> Finding | None:
        """A load of bytes that `stores` left, by `host`: the oldest that may be missed."""
        worst: Finding | None = None
        invalidated = self._invalidated[host].get(line, 0)
        for store in stores:
            if store is None:
                continue
            if isinstance(store, Spoilt):
                return store.cause
            missing = self._missing(host, store, invalidated)
            if missing is not None and (worst is None or store.at < worst.store.at):
                known = store.at < self._seen[host][store.host]
                worst = Finding(host, self.now, 0, 0, "", None, store, invalidated, known)
                worst.judge(missing)
        return worst

    def _missing(self, host: int, store: Store, invalidated: int) -> Missing | None:
        """What keeps `host` from being sure to load what `store` left; None if it is sure."""
        if store.host == host:
            # Its own: lost only if it dropped the line before sending the store on its way.
            return Missing.FLUSH if store.dropped else None
        if not store.published:
            return Missing.FLUSH
        seen = self._seen[host][store.host]
        if store.at < seen < store.published:
            return Missing.FENCE if store.flushed < seen else Missing.LATE
        return Missing.INVALIDATE if store.published > invalidated else None

    def _overwrite(
        self, slots: list[Store | Spoilt | None], new: Store, start: int, end: int
    ) -> None:
        """Put a store in, and what it leaves in doubt."""
        line, host = new.line, new.host
        unsettled = [
            store for store in self._unsettled[line] if not store.published and not store.dropped
        ]
        others = [store for store in unsettled if store.host != host]
        unsettled.append(new)
        self._unsettled[line] = unsettled
        doubt: dict[Store, Spoilt] = {}
        if end - start < LINE_BYTES:
            invalidated = self._invalidated[host].get(line, 0)
            for at in (*range(start), *range(end, LINE_BYTES)):
                store = slots[at]
                if not isinstance(store, Store) or store.host == host:
                    continue
                if store not in doubt:
                    missing = self._missing(host, store, invalidated)
                    if missing is None:
                        continue
                    doubt[store] = self._spoil(new, start, end, store, missing)
                slots[at] = doubt[store]
        if others:
            victim = others[0]
            spoilt = doubt.get(victim) or self._spoil(new, start, end, victim, Missing.FLUSH)
            slots[start:end] = [spoilt] * (end - start)
        else:
            slots[start:end] = [new] * (end - start)

    def _spoil(self, new: Store, start: int, end: int, victim: Store, missing: Missing) -> Spoilt:
        at = (new.line << _SHIFT) + start
        invalidated = self._invalidated[new.host].get(new.line, 0)
        known = victim.at < self._seen[new.host][victim.host]
        cause = Finding(
            new.host, self.now, at, end - start, "store", new.site, victim, invalidated, known
        )
        cause.judge(missing)
        return Spoilt(cause)

    def _keep(self, found: Finding) -> Finding:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(found)
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
