"""The store that forgets when its process ends: for simulation and tests, under the same contract.

Rows are kept encoded, so what cannot be written or read back fails here as it would in a file.
`refusal` makes it fail as a full disk does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from tagmem.base.errors import StorageFailed
from tagmem.base.limits import HISTORY_RETENTION
from tagmem.base.units import Nanoseconds
from tagmem.ports import Batch, Finish, HistoryEntry, Loaded
from tagmem.store.codec import Codec, Rows, prune_before


class MemoryStore:
    """A `Store` in dictionaries. Not safe for several threads at once."""

    def __init__(
        self,
        kinds: Mapping[str, type[msgspec.Struct]],
        effects: Any = None,
        *,
        retention: int = HISTORY_RETENTION,
    ) -> None:
        self.refusal: str | None = None
        """While set, each commit raises StorageFailed with this cause."""
        self.commits = 0
        self._codec = Codec(kinds, effects)
        self._retention = retention
        self._records: dict[tuple[str, str], str] = {}
        self._outbox: dict[int, str] = {}
        self._history: dict[int, HistoryEntry] = {}
        self._oldest = 1
        self._last = 0
        self._last_effect_id = 0

    def load(self) -> Loaded:
        """Everything that was committed."""
        records = ((kind, key, doc) for (kind, key), doc in self._records.items())
        outbox = self._codec.effects(sorted(self._outbox.items()))
        return Loaded(self._codec.records(records), outbox, self._last_effect_id)

    def commit(self, batch: Batch) -> int:
        """Keep a batch whole, or raise StorageFailed."""
        return self.begin(batch)()

    def begin(self, batch: Batch) -> Finish:
        """Encode a batch, or raise StorageFailed; what is returned keeps it."""
        rows = self._codec.rows(batch)
        if self.refusal is not None:
            raise StorageFailed(self.refusal)
        return partial(self._finish, rows, batch.at_ns)

    def _finish(self, rows: Rows, at_ns: Nanoseconds) -> int:
        for kind, key, doc in rows.puts:
            self._records[kind, key] = doc
        for kind, key in rows.deletes:
            self._records.pop((kind, key), None)
        for (effect_id,) in rows.done:
            self._outbox.pop(effect_id, None)
        self._outbox.update(rows.ordered)
        self._last_effect_id = max(self._last_effect_id, rows.last_effect_id)
        for type_, subject, data in rows.notes:
            self._last += 1
            decoded = self._codec.data(data)
            entry = HistoryEntry(self._last, at_ns, type_, subject, decoded)
            self._history[self._last] = entry
        upto = prune_before(self._oldest, self._last, self._retention)
        while self._oldest <= upto:
            del self._history[self._oldest]
            self._oldest += 1
        self.commits += 1
        return self._last

    def history(self, after: int, limit: int) -> Sequence[HistoryEntry]:
        """Up to `limit` entries with numbers above `after`, oldest first."""
        first = max(after + 1, self._oldest)
        return [self._history[seq] for seq in range(first, min(first + limit, self._last + 1))]

    def last_history(self) -> int:
        """The number of the newest entry; 0 when there was never one."""
        return self._last

    def close(self) -> None:
        """Nothing to give up: a store that is loaded again after this still has everything."""
