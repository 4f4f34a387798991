"""What every store promises, asked of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tagmem.base.errors import StorageFailed
from tagmem.base.limits import HISTORY_PRUNE_ROWS
from tagmem.ports import Batch, Change, Effect, Note, Step, Store
from tagmem.store.memory import MemoryStore
from tagmem.store.sqlite import SqliteStore


class Thing(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    size_bytes: int = 0
    parts: tuple[tuple[int, int], ...] = ()


class Other(msgspec.Struct, frozen=True):
    value: bytes


class Push(Effect, frozen=True):
    what: str


class Pull(Effect, frozen=True):
    much: int


class Tell(Effect, frozen=True):
    durable = False
    who: str


KINDS: dict[str, type[msgspec.Struct]] = {"thing": Thing, "other": Other}
Reopen = Callable[[], Store]


class Shelf:
    """One store that can be closed and opened again, as a restart does."""

    def __init__(self, kind: str, directory: Path, retention: int) -> None:
        self._retention = retention
        self._path = directory / "state.db"
        self._kind = kind
        self.store: Store = self._make()

    def _make(self) -> Store:
        if self._kind == "memory":
            return MemoryStore(KINDS, Push | Pull, retention=self._retention)
        return SqliteStore(self._path, KINDS, Push | Pull, retention=self._retention)

    def reopen(self) -> Store:
        self.store.close()
        if self._kind != "memory":
            self.store = self._make()
        return self.store


@pytest.fixture(params=["memory", "sqlite"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(request.param, tmp_path, 2_000)
    yield made
    made.store.close()


def commit(store: Store, *steps: Step, at_ns: int = 7) -> int:
    return store.commit(Batch(steps, at_ns))


def rows(store: Store) -> dict[tuple[str, str], object]:
    return {(kind, key): record for kind, key, record in store.load().records}


def test_an_empty_store_loads_as_nothing(shelf: Shelf) -> None:
    loaded = shelf.store.load()
    assert (list(loaded.records), list(loaded.outbox), loaded.last_effect_id) == ([], [], 0)
    assert shelf.store.last_history() == 0
    assert list(shelf.store.history(0, 10)) == []


def test_what_was_committed_is_there_after_reopening(shelf: Shelf) -> None:
    thing = Thing("a", 4096, ((0, 1), (2, 3)))
    other = Other(b"\x00\xff")
    changes = (Change("thing", "k1", thing), Change("other", "k1", other))
    commit(shelf.store, Step(changes))
    assert rows(shelf.reopen()) == {("thing", "k1"): thing, ("other", "k1"): other}


def test_what_was_begun_is_kept_only_when_it_is_finished(shelf: Shelf) -> None:
    batch = Batch((Step((Change("thing", "a", Thing("1")),)),), 7)
    shelf.store.begin(batch)
    assert rows(shelf.reopen()) == {}
    shelf.store.begin(batch)()
    assert rows(shelf.reopen()) == {("thing", "a"): Thing("1")}


def test_a_put_replaces_and_none_deletes(shelf: Shelf) -> None:
    commit(shelf.store, Step((Change("thing", "a", Thing("1")), Change("thing", "b", Thing("1")))))
    commit(shelf.store, Step((Change("thing", "a", Thing("2")), Change("thing", "b", None))))
    assert rows(shelf.reopen()) == {("thing", "a"): Thing("2")}


def test_deleting_what_is_not_there_is_harmless(shelf: Shelf) -> None:
    commit(shelf.store, Step((Change("thing", "a", None),)))
    assert rows(shelf.store) == {}


def test_the_last_change_of_a_row_in_a_batch_is_kept(shelf: Shelf) -> None:
    first = Step((Change("thing", "a", Thing("1")), Change("thing", "b", None)))
    last = Step((Change("thing", "a", None), Change("thing", "b", Thing("2"))))
    commit(shelf.store, first, last)
    assert rows(shelf.reopen()) == {("thing", "b"): Thing("2")}


def test_durable_effects_stay_until_done_in_the_order_of_their_ids(shelf: Shelf) -> None:
    commit(shelf.store, Step(effects=(Push(2, "b"), Tell(0, "h"), Pull(1, 5))))
    commit(shelf.store, Step(effects=(Push(3, "c"),)))
    commit(shelf.store, Step(done=(2,)))
    loaded = shelf.reopen().load()
    assert list(loaded.outbox) == [Pull(1, 5), Push(3, "c")]
    assert loaded.last_effect_id == 3


def test_an_effect_done_in_its_own_batch_leaves_only_its_number(shelf: Shelf) -> None:
    commit(shelf.store, Step(effects=(Push(9, "x"),)), Step(done=(9,)))
    loaded = shelf.reopen().load()
    assert list(loaded.outbox) == []
    assert loaded.last_effect_id == 9


def test_done_of_an_unknown_effect_is_harmless(shelf: Shelf) -> None:
    commit(shelf.store, Step(done=(77,)))
    assert list(shelf.store.load().outbox) == []


def test_history_is_numbered_without_gaps_and_read_in_pages(shelf: Shelf) -> None:
    assert commit(shelf.store, Step(notes=(Note("a.b", "s", {"n": 1}), Note("a.c", "t")))) == 2
    assert commit(shelf.store, Step(notes=(Note("a.d", "u"),)), at_ns=8) == 3
    store = shelf.reopen()
    assert store.last_history() == 3
    entries = store.history(0, 2)
    assert [(e.seq, e.at_ns, e.type, e.subject, e.data) for e in entries] == [
        (1, 7, "a.b", "s", {"n": 1}),
        (2, 7, "a.c", "t", {}),
    ]
    assert [e.seq for e in store.history(2, 10)] == [3]
    assert commit(store, Step(notes=(Note("a.e", "v"),))) == 4


def test_a_commit_without_notes_tells_the_last_number(shelf: Shelf) -> None:
    commit(shelf.store, Step(notes=(Note("a.b", "s"),)))
    assert commit(shelf.store, Step((Change("thing", "a", Thing("1")),))) == 1


def test_history_is_pruned_in_bites_and_numbers_are_never_given_twice(shelf: Shelf) -> None:
    note = Note("a.b", "s")
    for _ in range(8):
        last = commit(shelf.store, Step(notes=(note,) * 500))
        kept = shelf.store.history(0, 10_000)
        assert min(last, 2_000) <= len(kept) < 2_000 + HISTORY_PRUNE_ROWS + 500
        assert kept[-1].seq == last
    store = shelf.reopen()
    assert store.last_history() == 4_000
    assert store.history(0, 1)[0].seq == 4_000 - len(store.history(0, 10_000)) + 1
    assert commit(store, Step(notes=(note,))) == 4_001


def test_what_could_not_be_read_back_is_not_taken(shelf: Shelf) -> None:
    commit(shelf.store, Step((Change("thing", "a", Thing("1")),)))
    for step in (
        Step((Change("unknown", "a", Thing("1")),)),
        Step((Change("thing", "a", Other(b"")),)),
        Step((Change("thing", "b", Thing("2")),), effects=(Effect(5),)),
        Step((Change("thing", "b", Thing("2")),), effects=(Push(0, "no id"),)),
    ):
        with pytest.raises(TypeError):
            commit(shelf.store, step)
    assert rows(shelf.store) == {("thing", "a"): Thing("1")}
    commit(shelf.store, Step((Change("thing", "a", Thing("2")),)))
    assert rows(shelf.reopen()) == {("thing", "a"): Thing("2")}


def test_a_store_of_other_kinds_is_refused_by_name(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db", KINDS, Push | Pull)
    commit(store, Step((Change("other", "k", Other(b"1")),), effects=(Push(1, "x"),)))
    store.close()
    narrow = SqliteStore(tmp_path / "state.db", {"thing": Thing}, Push)
    with pytest.raises(StorageFailed, match="other k is of a kind"):
        narrow.load()
    narrow.close()
