"""Everything the orchestrator knows: the records, and the indexes that make each question about
them quick.

Only `apply` changes records, and only with what a commit also writes, so that a restored state is
the same state. Indexes, free maps and timers are derived from the records; `connected` is the one
thing that is not kept, because after a restart nobody is connected.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

from tagmem.base.ids import ApplianceId, HostId, Tag
from tagmem.base.units import MILLISECOND, Nanoseconds
from tagmem.domain import placement
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.placement import Request, Tiers, Window
from tagmem.domain.records import (
    ApplianceRecord,
    AttachmentRecord,
    CapacityRecord,
    Extent,
    HostRecord,
    IdempotencyRecord,
    LdRecord,
    QuarantineRecord,
    RegionRecord,
)
from tagmem.domain.region import LengthIndex, Pool
from tagmem.ports import Effect, Loaded

PoolKey = tuple[ApplianceId, int]
Timer = tuple[Nanoseconds, str, str]
"""(deadline, tag, host); the host is empty for a capacity's own deadline."""

TIERS_KEPT_MAX = 4096


class State:
    """The records and their indexes."""

    def __init__(self) -> None:
        self.appliances: dict[str, ApplianceRecord] = {}
        self.hosts: dict[str, HostRecord] = {}
        self.capacities: dict[str, CapacityRecord] = {}
        self.attachments: dict[str, dict[str, AttachmentRecord]] = {}
        """By tag, then by host."""
        self.quarantines: dict[str, QuarantineRecord] = {}
        self.idempotency: dict[str, IdempotencyRecord] = {}
        """Oldest first."""
        self.outbox: dict[int, Effect] = {}
        self.last_effect_id = 0
        self.last_revision = 0
        self.connected: set[str] = set()
        self.by_host: dict[str, dict[str, None]] = {}
        """The tags of each host's attachments."""
        self.by_appliance: dict[str, dict[str, None]] = {}
        """The tags of each appliance's capacities."""
        self.pools: dict[PoolKey, Pool] = {}
        self.lengths = LengthIndex()
        self.ld_hosts: dict[tuple[str, int], HostId] = {}
        self.quarantined_tags: set[str] = set()
        self._pending: dict[tuple[type[Effect], str, str], int] = {}
        self._timers: list[Timer] = []
        self._stale_pools: set[PoolKey] = set()
        self._tags_stale = False
        self._regions: dict[tuple[str, int], RegionRecord] = {}
        self._lds: dict[tuple[str, int], LdRecord] = {}
        self._windows: tuple[Window, ...] | None = None
        self._tiers: dict[tuple[Any, ...], Tiers] = {}

    # ---- reading

    def region(self, appliance: str, index: int) -> RegionRecord:
        """A region's record. Raises KeyError for one that the appliance never had."""
        return self._regions[appliance, index]

    def has_region(self, appliance: str, index: int) -> bool:
        """Whether the appliance has shown such a region."""
        return (appliance, index) in self._regions

    def ld(self, appliance: str, ld: int) -> LdRecord | None:
        """How one LD of an appliance addresses its pools; None until the appliance has said so."""
        return self._lds.get((appliance, ld))

    def pool(self, appliance: str, region: int) -> Pool:
        """The pool that a region shows."""
        return self.pools[ApplianceId(appliance), self._regions[appliance, region].pool]

    def attachment(self, tag: str, host: str) -> AttachmentRecord | None:
        """One capacity on one host."""
        return self.attachments.get(tag, {}).get(host)

    def effect_for(self, kind: type[Effect], tag: str, host: str) -> int | None:
        """The id of the effect of that kind that is still to be done (or to be heard of) for an
        attachment.
        """
        return self._pending.get((kind, tag, host))

    def reachable(self, hosts: Iterable[str]) -> frozenset[str]:
        """The appliances that every one of these hosts has a link to."""
        common: set[str] | None = None
        for host in hosts:
            links: set[str] = {
                a for a, ld in self.hosts[host].links.items() if self._knows_ld(a, ld)
            }
            common = links if common is None else common & links
        return frozenset(self.appliances if common is None else common)

    def _knows_ld(self, appliance: str, ld: int) -> bool:
        record = self.appliances.get(appliance)
        return record is not None and (not record.lds or (appliance, ld) in self._lds)

    def windows(self) -> tuple[Window, ...]:
        """Every region with its pool, by appliance name and region index."""
        if self._windows is None:
            self._windows = tuple(
                self._window(record, region)
                for _, record in sorted(self.appliances.items())
                for region in record.regions
            )
        return self._windows

    def _window(self, record: ApplianceRecord, region: RegionRecord) -> Window:
        pool = self.pools[record.id, region.pool]
        view = any(
            r.pool == region.pool
            and r.read_only
            and r.sharable
            and r.size_bytes >= region.size_bytes
            for r in record.regions
        )
        whole = region.size_bytes >= pool.free.size_bytes
        return Window(record.id, record.state, region, pool, view, whole)

    def tiers(self, request: Request) -> Tiers:
        """The windows that may take such a request, in order of preference; worked out once, then
        kept.
        """
        key = (request.hosts, request.sharing, request.tagged, request.appliance, request.region)
        found = self._tiers.get(key)
        if found is None:
            reach = self.reachable(request.hosts)
            found = placement.tiers(
                [
                    window
                    for window in self.windows()
                    if window.appliance in reach
                    and request.appliance in ("", window.appliance)
                    and request.region in (None, window.region.index)
                ],
                request,
            )
            if len(self._tiers) >= TIERS_KEPT_MAX:
                self._tiers.clear()
            self._tiers[key] = found
        return found

    def next_deadline(self) -> Nanoseconds | None:
        """The earliest deadline that still stands."""
        timers = self._timers
        while timers and not self._stands(timers[0]):
            heappop(timers)
        return timers[0][0] if timers else None

    def due(self, now: Nanoseconds) -> list[Timer]:
        """The deadlines that have come, taken off the list."""
        found: list[Timer] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(heappop(self._timers))
        return list(dict.fromkeys(found))

    def _stands(self, timer: Timer) -> bool:
        deadline, tag, host = timer
        if host:
            attachment = self.attachment(tag, host)
            return attachment is not None and attachment.rung_deadline_ns == deadline
        capacity = self.capacities.get(tag)
        return capacity is not None and capacity.sanitise_deadline_ns == deadline

    def owner_of(self, appliance: str, extent: Extent, region: int | None) -> list[CapacityRecord]:
        """The capacities that have a byte of an extent; without a region, in any of the appliance's
        pools.
        """
        record = self.appliances.get(appliance)
        if record is None:
            return []
        indexes = [r for r in record.regions if region is None or r.index == region]
        pools = {r.pool: self.pools[record.id, r.pool] for r in indexes}
        tags = [tag for pool in pools.values() for tag in pool.owners_in(extent)]
        return [self.capacities[tag] for tag in tags]

    # ---- numbers

    def new_revision(self, now: Nanoseconds) -> int:
        """Larger than any given before, also before a restart and for a tag's earlier life: it
        follows the clock.
        """
        self.last_revision = max(self.last_revision + 1, now // MILLISECOND)
        return self.last_revision

    def new_effect_id(self) -> int:
        """The next id of the outbox."""
        self.last_effect_id += 1
        return self.last_effect_id

    # ---- changing

    def add_effect(self, effect: Effect) -> None:
        """A durable effect is to be done."""
        self.outbox[effect.id] = effect
        self._pending[type(effect), *tag_and_host(effect)] = effect.id

    def end_effect(self, effect_id: int) -> Effect | None:
        """It is done with; None when it was already."""
        effect = self.outbox.pop(effect_id, None)
        if effect is not None:
            key = (type(effect), *tag_and_host(effect))
            if self._pending.get(key) == effect_id:
                del self._pending[key]
        return effect

    def apply(self, kind: str, key: str, record: Any) -> None:
        """Put or delete (None) one record, with everything that is derived from it."""
        if kind == "attachment":
            self._apply_attachment(key, record)
        elif kind == "capacity":
            self._apply_capacity(key, record)
        elif kind == "idempotency":
            self._put(self.idempotency, key, record)
        elif kind == "appliance":
            self._apply_appliance(key, record)
        elif kind == "host":
            self._apply_host(key, record)
        elif kind == "quarantine":
            old = self.quarantines.get(key)
            self._put(self.quarantines, key, record)
            for one in (old, record):
                if one is not None:
                    self._mark_stale(one)
            self._tags_stale = True
        else:
            raise InvariantViolated(f"there is no kind {kind!r} of record")

    @staticmethod
    def _put(table: dict[str, Any], key: str, record: Any) -> None:
        if record is None:
            table.pop(key, None)
        else:
            table[key] = record

    def _apply_attachment(self, key: str, record: AttachmentRecord | None) -> None:
        if record is None:
            tag, _, host = key.partition("/")
            self.attachments[tag].pop(host, None)
            if not self.attachments[tag]:
                del self.attachments[tag]
            self.by_host[host].pop(tag, None)
            return
        self.attachments.setdefault(record.tag, {})[record.host] = record
        self.by_host.setdefault(record.host, {})[record.tag] = None
        self.last_revision = max(self.last_revision, record.revision)
        if record.rung_deadline_ns:
            heappush(self._timers, (record.rung_deadline_ns, record.tag, record.host))

    def _apply_capacity(self, key: str, record: CapacityRecord | None) -> None:
        old = self.capacities.get(key)
        if record is None:
            if old is None:
                return
            del self.capacities[key]
            self.by_appliance[old.appliance].pop(key, None)
            self.pool(old.appliance, old.region).release(old.extents, key)
            return
        if old is None:
            self.pool(record.appliance, record.region).reserve(record.extents, key)
        self._index_capacity(record)

    def _index_capacity(self, record: CapacityRecord) -> None:
        self.capacities[record.tag] = record
        self.by_appliance.setdefault(record.appliance, {})[record.tag] = None
        self.last_revision = max(self.last_revision, record.revision)
        if record.sanitise_deadline_ns:
            heappush(self._timers, (record.sanitise_deadline_ns, record.tag, ""))

    def _apply_appliance(self, key: str, record: ApplianceRecord | None) -> None:
        old = self.appliances.get(key)
        self._put(self.appliances, key, record)
        self._forget_windows()
        if old is not None and record is not None and old.regions == record.regions:
            if old.lds != record.lds:
                self._index_lds(record)
            return
        if record is not None:
            self._index_lds(record)
            self._make_pools(record)
            self.fill_pools()
            self._index_lengths()

    def _index_lds(self, record: ApplianceRecord) -> None:
        self._lds = {k: v for k, v in self._lds.items() if k[0] != record.id}
        self._lds.update({(record.id, ld.ld): ld for ld in record.lds})

    def _make_pools(self, record: ApplianceRecord) -> None:
        self._regions = {k: v for k, v in self._regions.items() if k[0] != record.id}
        for gone in [key for key in self.pools if key[0] == record.id]:
            del self.pools[gone]
        for pool in {region.pool for region in record.regions}:
            shown = [region for region in record.regions if region.pool == pool]
            self.pools[record.id, pool] = Pool(
                max(region.size_bytes for region in shown),
                max(region.block_bytes for region in shown),
            )
            self._stale_pools.add((record.id, pool))
        self._regions.update({(record.id, r.index): r for r in record.regions})

    def _index_lengths(self) -> None:
        """Give each pool its bit, in the order of appliance name and region, so that ties are
        broken alike after a restart.
        """
        self.lengths = LengthIndex()
        ordered = dict.fromkeys(
            (record.id, region.pool)
            for _, record in sorted(self.appliances.items())
            for region in sorted(record.regions, key=lambda region: region.index)
        )
        for pool in self.pools.values():
            pool.join(None, 0)
        for place, key in enumerate(ordered):
            self.pools[key].join(self.lengths, 1 << place)

    def _apply_host(self, key: str, record: HostRecord | None) -> None:
        old = self.hosts.get(key)
        self._put(self.hosts, key, record)
        if old is not None and record is not None and old.links == record.links:
            return
        for appliance, ld in old.links.items() if old else ():
            self.ld_hosts.pop((appliance, ld), None)
        for appliance, ld in record.links.items() if record else ():
            self.ld_hosts[appliance, ld] = HostId(key)
        self._forget_windows()

    def _forget_windows(self) -> None:
        self._windows = None
        self._tiers.clear()

    def _mark_stale(self, record: QuarantineRecord) -> None:
        if self.has_region(record.appliance, record.region):
            pool = self._regions[record.appliance, record.region].pool
            self._stale_pools.add((record.appliance, pool))

    def fill_pools(self) -> None:
        """Work out the pools whose quarantined extents or size have changed; to be called after
        such changes.
        """
        if self._tags_stale:
            self.quarantined_tags = {q.tag for q in self.quarantines.values()}
            self._tags_stale = False
        stale, self._stale_pools = self._stale_pools, set()
        for key in stale:
            appliance, index = key
            owned = [
                (extent, tag)
                for tag in self.by_appliance.get(appliance, ())
                for extent in self._extents_in(tag, index)
            ]
            foreign = [
                extent
                for record in self.quarantines.values()
                if record.appliance == appliance
                and self.has_region(appliance, record.region)
                and self._regions[appliance, record.region].pool == index
                for extent in record.extents
            ]
            self.pools[key].fill(owned, foreign)

    def _extents_in(self, tag: str, pool: int) -> tuple[Extent, ...]:
        record = self.capacities[tag]
        inside = self._regions[record.appliance, record.region].pool == pool
        return record.extents if inside else ()

    @classmethod
    def restored(cls, loaded: Loaded) -> State:
        """The state that a store's records make. Raises InvariantViolated when they contradict each
        other.
        """
        state = cls()
        for kind, key, record in loaded.records:
            if kind == "capacity":
                state._index_capacity(record)
            elif kind == "appliance":
                state.appliances[key] = record
            elif kind == "quarantine":
                state.quarantines[key] = record
            else:
                state.apply(kind, key, record)
        for record in state.appliances.values():
            state._index_lds(record)
            state._make_pools(record)
        state.quarantined_tags = {q.tag for q in state.quarantines.values()}
        state.idempotency = dict(sorted(state.idempotency.items(), key=lambda i: i[1].at_ns))
        state.fill_pools()
        state._index_lengths()
        for effect in loaded.outbox:
            state.add_effect(effect)
        state.last_effect_id = loaded.last_effect_id
        return state


def tag_and_host(effect: Effect) -> tuple[Tag, HostId]:
    """Whose effect it is. Raises InvariantViolated for an effect that is not an attachment's."""
    tag, host = getattr(effect, "tag", None), getattr(effect, "host", None)
    if tag is None or host is None:
        raise InvariantViolated(f"{type(effect).__name__} belongs to no attachment")
    return tag, host
