"""The disk fails at each write of a commit in turn: the store is as before or as after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tagmem.base.errors import StorageFailed
from tagmem.ports import Batch, Change, Effect, Note, Step
from tagmem.store.sqlite import CHECKPOINT_PAGES, SqliteStore
from tagmem.testing.vfs import Failure, Fault, FaultyVfs


class Row(msgspec.Struct, frozen=True):
    text: str


class Act(Effect, frozen=True):
    what: str


KINDS: dict[str, type[msgspec.Struct]] = {"row": Row}
FILLER = "x" * 1_500
BEFORE = Batch(
    [
        Step(
            tuple(Change("row", f"k{i}", Row(FILLER)) for i in range(12)),
            (Act(1, "first"), Act(2, "second")),
            notes=(Note("was.before", "s"),),
        )
    ],
    1,
)
AFTER = Batch(
    [
        Step(
            (
                *(Change("row", f"k{i}", None) for i in range(0, 12, 3)),
                *(Change("row", f"k{i}", Row("new" + FILLER)) for i in range(1, 24, 3)),
            ),
            (Act(3, "third"),),
            done=(1,),
            notes=(Note("is.after", "s"), Note("is.after", "t")),
        )
    ],
    2,
)

Picture = tuple[dict[str, str], list[int], int, list[str]]


def picture(store: SqliteStore) -> Picture:
    loaded = store.load()
    rows = {key: record.text for _, key, record in loaded.records}
    outbox = [effect.id for effect in loaded.outbox]
    return rows, outbox, loaded.last_effect_id, [entry.type for entry in store.history(0, 99)]


def open_store(
    path: Path, vfs: str | None = None, *, checkpoint_pages: int = CHECKPOINT_PAGES
) -> SqliteStore:
    return SqliteStore(path, KINDS, Act, vfs=vfs, checkpoint_pages=checkpoint_pages)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Picture, Picture]:
    store = open_store(tmp_path_factory.mktemp("plain") / "state.db")
    store.commit(BEFORE)
    before = picture(store)
    store.commit(AFTER)
    after = picture(store)
    store.close()
    assert before != after
    return before, after


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    made = Fault()
    vfs = FaultyVfs("faulty", made)
    yield made
    vfs.unregister()


def crashed_copy(directory: Path, to: Path) -> SqliteStore:
    """What a process would find that starts after this one died just now."""
    to.mkdir()
    for name in ("state.db", "state.db-wal"):
        if (directory / name).exists():
            shutil.copy(directory / name, to / name)
    return open_store(to / "state.db")


def commit_with_fault(
    base: Path, fault: Fault, at: int, failure: Failure, *, lasting: bool
) -> tuple[SqliteStore, str | None]:
    base.mkdir()
    store = open_store(base / "state.db", "faulty")
    store.commit(BEFORE)
    fault.arm(at, failure, lasting=lasting)
    try:
        store.commit(AFTER)
    except StorageFailed as error:
        return store, str(error)
    return store, None


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("failure", list(Failure), ids=[failure.name for failure in Failure])
def test_each_write_of_a_commit_may_be_its_last(
    tmp_path: Path,
    fault: Fault,
    pictures: tuple[Picture, Picture],
    failure: Failure,
    lasting: bool,
) -> None:
    before, after = pictures
    refused = 0
    for at in range(1_000):
        base = tmp_path / str(at)
        store, message = commit_with_fault(base, fault, at, failure, lasting=lasting)
        struck = fault.failed
        survivor = crashed_copy(base, tmp_path / f"{at}-copy")
        found = picture(survivor)
        survivor.close()
        assert found in ((after,) if message is None else (before, after)), (at, message)
        if message is not None:
            refused += 1
            assert str(base / "state.db") in message
            assert "is full" in message or "input/output error" in message
            # This process goes on with what it was, and can commit when the disk is well again.
            assert picture(store) == before
            fault.arm(-1, failure, lasting=False)
            store.commit(AFTER)
        assert picture(store) == after
        fault.arm(-1, failure, lasting=False)
        store.close()
        if not struck:
            break
    else:
        pytest.fail("a commit has no end of writes")
    assert refused >= 10


def test_folding_the_log_in_may_fail_without_failing_a_commit(tmp_path: Path, fault: Fault) -> None:
    for at in range(1_000):
        base = tmp_path / str(at)
        base.mkdir()
        store = open_store(base / "state.db", "faulty", checkpoint_pages=1)
        fault.arm(at, Failure.ERROR, lasting=True)
        committed = True
        try:
            store.commit(BEFORE)
        except StorageFailed:
            committed = False
        struck = fault.failed
        fault.arm(-1, Failure.ERROR, lasting=False)
        rows = picture(store)[0]
        assert len(rows) == (12 if committed else 0)
        survivor = crashed_copy(base, tmp_path / f"{at}-copy")
        assert len(picture(survivor)[0]) in ((12,) if committed else (0, 12))
        survivor.close()
        store.close()
        if not struck:
            break
    else:
        pytest.fail("folding the log in has no end of writes")


def test_a_store_can_be_opened_or_not_but_never_half(tmp_path: Path, fault: Fault) -> None:
    for at in range(1_000):
        base = tmp_path / str(at)
        base.mkdir()
        fault.arm(at, Failure.FULL, lasting=True)
        message = "state.db"
        try:
            open_store(base / "state.db", "faulty").close()
        except StorageFailed as error:
            message = str(error)
        assert "state.db" in message
        struck = fault.failed
        fault.arm(-1, Failure.FULL, lasting=False)
        store = open_store(base / "state.db")
        assert picture(store) == ({}, [], 0, [])
        store.commit(BEFORE)
        store.close()
        if not struck:
            break
    else:
        pytest.fail("opening has no end of writes")
