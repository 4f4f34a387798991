"""The device against a model with a set of blocks per owner, and no rows, pieces or DPAs."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import MIB, Dpa
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_check import check_device
from tagmem.domain.device_records import (
    DC_LOG,
    FM_PORT,
    KINDS,
    Add,
    AddReference,
    Adopt,
    Answer,
    AskedExtent,
    ClearEvents,
    Code,
    DeviceSpec,
    DurableEffect,
    HeadReset,
    HostRelease,
    LdSpec,
    Policy,
    Query,
    Range,
    RegionSpec,
    Release,
    Removal,
    RemoveReference,
    Respond,
    Sanitise,
    SanitiseDone,
    SanitiseMethod,
)
from tagmem.ports import Batch, Event
from tagmem.store.memory import MemoryStore

B = 2 * MIB
BLOCKS = 12
SPEC = DeviceSpec(
    regions=(
        RegionSpec(0, BLOCKS * B, B),
        RegionSpec(1, BLOCKS * B, B, sharable=True),
        RegionSpec(1, BLOCKS * B, B, sharable=True, read_only=True),
    ),
    lds=(LdSpec("a", log_records=16), LdSpec("b", mirrored=True, log_records=16), LdSpec("c")),
    fm_log_records=8,
)
TAGS = [Tag(f"00000000-0000-4000-8000-00000000000{n}") for n in range(1, 5)]
LDS = st.integers(0, 2)
TAG = st.sampled_from(TAGS)
SHARABLE = {0: False, 1: True, 2: True}
Blocks = frozenset[int]


class DeviceModel(RuleBasedStateMachine):
    """Owners as sets of (pool, block)."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(KINDS, DurableEffect)
        self.device = DeviceMachine(SPEC)
        self.device.restore(self.store.load())
        self.blocks: dict[Tag, Blocks] = {}
        self.pool: dict[Tag, int] = {}
        self.offers: list[list[tuple[Tag, bool]]] = [[], [], []]
        """Per LD, oldest first: a tag, and whether the offer is dead."""
        self.added: list[set[Tag]] = [set(), set(), set()]
        self.referenced: set[Tag] = set()
        self.touched: set[Tag] = set()
        self.wiping: dict[Tag, Blocks] = {}
        self.generations = [0, 0, 0]

    @initialize()
    def adopt(self) -> None:
        assert self.do(Adopt("m")) == Code.SUCCESS

    def do(self, event: Event) -> Code:
        step = self.device.step(event, 1)
        self.store.commit(Batch([step], 1))
        assert isinstance(step.reply, Answer)
        if step.reply.code not in (Code.SUCCESS, Code.RETRY_REQUIRED):
            assert step.changes == ()
        return step.reply.code

    # ---- what the model knows

    def taken(self, pool: int) -> set[int]:
        found: set[int] = set()
        for tag, blocks in (*self.blocks.items(), *self.wiping.items()):
            if self.pool[tag] == pool:
                found |= blocks
        return found

    def pending(self, ld: int) -> set[Tag]:
        return {tag for tag, dead in self.offers[ld] if not dead}

    def holders(self, tag: Tag) -> list[int]:
        return [ld for ld in range(3) if tag in self.added[ld] | self.pending(ld)]

    def left(self, tag: Tag) -> None:
        if self.holders(tag) or tag in self.referenced:
            return
        blocks = self.blocks.pop(tag)
        if tag in self.touched:
            self.touched.discard(tag)
            self.wiping[tag] = blocks

    def dpas(self, ld: int, tag: Tag, region: int) -> list[tuple[Dpa, int]]:
        row = self.device.state.live(tag)
        assert row is not None
        to_dpa = self.device.state.to_dpa
        return [(to_dpa(ld, region, p.start, p.length), p.length) for p in row.pieces]

    def room(self, ld: int) -> int:
        return self.device.state.ports[ld].room

    # ---- what the fabric manager does

    @rule(ld=LDS, tag=TAG, region=st.integers(0, 2), blocks=st.integers(1, 5), free=st.booleans())
    def place(self, ld: int, tag: Tag, region: int, blocks: int, free: bool) -> None:
        pool = SPEC.regions[region].pool
        taken = self.taken(pool)
        policy = Policy.FREE if free else Policy.CONTIGUOUS
        code = self.do(Add(ld, policy, region, blocks * B, tag))
        if tag in self.blocks:
            assert code == Code.INVALID_INPUT
            return
        if code != Code.SUCCESS:
            short = BLOCKS - len(taken) < blocks or not free or bool(self.wiping)
            assert short or self.room(ld) < blocks
            return
        row = self.device.state.live(tag)
        assert row is not None
        got = {n for p in row.pieces for n in range(p.start // B, p.end // B)}
        assert len(got) == blocks
        assert not got & taken
        self.start(ld, tag, pool, frozenset(got))

    def start(self, ld: int, tag: Tag, pool: int, blocks: Blocks) -> None:
        self.blocks[tag] = blocks
        self.pool[tag] = pool
        self.offers[ld].append((tag, False))

    @rule(
        ld=LDS,
        tag=TAG,
        region=st.integers(0, 2),
        chosen=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=4),
    )
    def prescribe(self, ld: int, tag: Tag, region: int, chosen: list[int]) -> None:
        base = self.device.state.bases[region]
        extents = tuple(AskedExtent(Dpa(base + n * B), B, tag) for n in chosen)
        pool = SPEC.regions[region].pool
        blocks = frozenset(BLOCKS - 1 - n if SPEC.lds[ld].mirrored else n for n in chosen)
        taken = self.taken(pool)
        room = self.room(ld)
        code = self.do(Add(ld, Policy.PRESCRIPTIVE, extents=extents))
        legal = tag not in self.blocks and tag not in self.wiping and not blocks & taken
        legal = legal and len(blocks) == len(chosen) and len(chosen) <= room
        assert (code == Code.SUCCESS) == legal
        if legal:
            self.start(ld, tag, pool, blocks)

    @rule(ld=LDS, tag=TAG, region=st.integers(0, 2))
    def share(self, ld: int, tag: Tag, region: int) -> None:
        row = self.device.state.live(tag)
        room = self.room(ld)
        code = self.do(Add(ld, Policy.ENABLE_SHARED, region, 0, tag))
        legal = (
            tag in self.blocks
            and self.pool[tag] == 1
            and SHARABLE[region]
            and ld not in self.holders(tag)
        )
        if not legal:
            assert code == Code.INVALID_INPUT
        elif row is not None and room < len(row.pieces):
            assert code == Code.RETRY_REQUIRED
        else:
            assert code == Code.SUCCESS
            self.offers[ld].append((tag, False))

    @rule(ld=LDS, tag=TAG, forced=st.booleans())
    def release(self, ld: int, tag: Tag, forced: bool) -> None:
        length = len(self.blocks.get(tag, (0,))) * B
        room = self.room(ld)
        row = self.device.state.live(tag)
        code = self.do(Release(ld, Removal.TAG_BASED, forced, tag=tag, length=length))
        if tag not in self.blocks or ld not in self.holders(tag):
            assert code == Code.INVALID_INPUT
        elif not forced:
            assert row is not None
            if tag in self.pending(ld):
                assert code == Code.INVALID_PHYSICAL_ADDRESS
            else:
                fits = len(row.pieces) <= room
                assert code == (Code.SUCCESS if fits else Code.RETRY_REQUIRED)
        else:
            assert code == Code.SUCCESS
            self.lose(ld, tag)

    def lose(self, ld: int, tag: Tag) -> None:
        self.added[ld].discard(tag)
        self.offers[ld] = [(t, dead or t == tag) for t, dead in self.offers[ld]]
        self.left(tag)

    @rule(tag=TAG, add=st.booleans())
    def refer(self, tag: Tag, add: bool) -> None:
        code = self.do(AddReference(tag) if add else RemoveReference(tag))
        if add:
            legal = tag in self.blocks and self.pool[tag] == 1
            if legal:
                self.referenced.add(tag)
        else:
            legal = tag in self.referenced
            if legal:
                self.referenced.discard(tag)
                self.left(tag)
        assert code == (Code.SUCCESS if legal else Code.INVALID_INPUT)

    # ---- what hosts do

    @precondition(lambda self: any(self.offers))
    @rule(ld=LDS, accept=st.booleans())
    def respond(self, ld: int, accept: bool) -> None:
        if not self.offers[ld]:
            assert self.do(Respond(ld, ())) == Code.INVALID_INPUT
            return
        group = self.device.state.groups[ld][0]
        (item,) = group.items
        to_dpa = self.device.state.to_dpa
        ranges = tuple(
            Range(to_dpa(ld, item.region, p.start, p.length), p.length) for p in item.pieces
        )
        assert self.do(Respond(ld, ranges if accept else ())) == Code.SUCCESS
        tag, dead = self.offers[ld].pop(0)
        if dead:
            return
        if accept:
            self.added[ld].add(tag)
            self.touched.add(tag)
        else:
            self.left(tag)

    @rule(ld=LDS, tag=TAG)
    def give_back(self, ld: int, tag: Tag) -> None:
        if tag not in self.added[ld]:
            return
        region = self.device.state.members[ld]
        row = self.device.state.live(tag)
        assert row is not None
        ranges = tuple(Range(*e) for e in self.dpas(ld, tag, region[row.id]))
        assert self.do(HostRelease(ld, ranges)) == Code.SUCCESS
        self.lose(ld, tag)

    @rule(ld=LDS, start=st.integers(0, BLOCKS * 3), length=st.integers(0, 2))
    def babble(self, ld: int, start: int, length: int) -> None:
        """Ranges that mostly are nobody's business: no more than the codes that the table has."""
        before = self.device.state.groups[ld].copy()
        step = self.device.step(HostRelease(ld, (Range(Dpa(start * B // 2 + 1), length * B),)), 1)
        assert step.reply.code in (Code.INVALID_PHYSICAL_ADDRESS, Code.INVALID_EXTENT_LIST)
        assert self.device.state.groups[ld] == before

    @rule(port=st.sampled_from([0, 1, 2, FM_PORT]), count=st.integers(1, 16))
    def drain(self, port: int, count: int) -> None:
        answer = self.device.query(Query("events", (port, DC_LOG, count)))
        page: Any = answer.value
        handles = tuple(record.handle for record in page.records)
        assert self.do(ClearEvents(port, DC_LOG, handles)) == Code.SUCCESS

    # ---- what the world does

    @rule()
    def wiped(self) -> None:
        for effect in self.store.load().outbox:
            assert isinstance(effect, Sanitise)
            done = SanitiseDone(effect.id, effect.allocation, SanitiseMethod.PUNCH, B, B)
            assert self.do(done) == Code.SUCCESS
        self.wiping.clear()

    @rule()
    def restart(self) -> None:
        self.device = DeviceMachine(SPEC)
        self.device.restore(self.store.load())

    @rule(ld=LDS)
    def reset(self, ld: int) -> None:
        assert self.do(HeadReset(ld)) == Code.SUCCESS
        refused = [tag for tag, dead in self.offers[ld] if not dead]
        self.offers[ld].clear()
        for tag in refused:
            self.left(tag)
        for tag in [t for t in self.added[ld] if self.pool[t] == 1]:
            for other in self.holders(tag):
                self.added[other].discard(tag)
                self.offers[other] = [(t, dead or t == tag) for t, dead in self.offers[other]]
            self.left(tag)

    # ---- what must hold

    @invariant()
    def as_the_model_says(self) -> None:
        check_device(self.device.state)
        state = self.device.state
        assert set(state.tags) == set(self.blocks) | set(self.wiping)
        for pool, space in state.pools.items():
            assert space.free.free_bytes == (BLOCKS - len(self.taken(pool))) * B
        for ld in range(3):
            held = {tag for _, _, tag, _ in state.extent_list(ld)}
            assert held == self.added[ld]
            assert len(state.groups[ld]) == len(self.offers[ld])
        page: Any = self.device.query(Query("tags", (0, 99))).value
        for entry in page.entries:
            assert set(entry.added) == {ld for ld in range(3) if entry.tag in self.added[ld]}
            assert set(entry.pending) == {ld for ld in range(3) if entry.tag in self.pending(ld)}
            assert entry.referenced == (entry.tag in self.referenced)

    @invariant()
    def nothing_is_untagged(self) -> None:
        assert NIL_TAG not in self.device.state.tags


TestDevice = DeviceModel.TestCase
TestDevice.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
