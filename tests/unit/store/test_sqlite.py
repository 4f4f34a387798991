"""What is particular to the SQLite store: its file, its schema, and how it refuses to open."""

from __future__ import annotations

import re
from pathlib import Path

import apsw
import msgspec
import pytest

from tagmem.base.errors import Conflict, StorageFailed, Unsupported
from tagmem.base.ids import ApplianceId, Tag
from tagmem.base.units import MediaOffset
from tagmem.domain.effects import DurableEffect
from tagmem.domain.records import KINDS, CapacityRecord, CapacityState, Extent, Sharing
from tagmem.ports import Batch, Change, Note, Step
from tagmem.store import sqlite
from tagmem.store.sqlite import SqliteStore, migrations, named_queries

HERE = Path(sqlite.__file__).parent
TAG = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")


class Row(msgspec.Struct, frozen=True):
    text: str


ROWS: dict[str, type[msgspec.Struct]] = {"row": Row}


def put(text: str) -> Batch:
    return Batch([Step((Change("row", "k", Row(text)),))], 1)


def shape(connection: apsw.Connection) -> tuple[list[str], list[tuple[object, ...]]]:
    tables = connection.execute("SELECT sql FROM sqlite_master WHERE type <> 'view' ORDER BY name")
    normal = [re.sub(r"\s+", " ", sql or "") for (sql,) in tables]
    return normal, list(connection.execute("SELECT name, value FROM meta ORDER BY name"))


def test_schema_is_what_the_migrations_lead_to() -> None:
    read, migrated = apsw.Connection(":memory:"), apsw.Connection(":memory:")
    read.execute((HERE / "schema.sql").read_text("utf-8"))
    for _, statements in migrations():
        migrated.execute(statements)
    assert shape(read) == shape(migrated)


def test_migrations_are_numbered_without_gaps() -> None:
    numbers = [number for number, _ in migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_query_prepares() -> None:
    connection = apsw.Connection(":memory:")
    connection.execute((HERE / "schema.sql").read_text("utf-8"))
    queries = named_queries((HERE / "queries.sql").read_text("utf-8"))
    assert len(queries) >= 10
    for statement in queries.values():
        connection.execute(f"EXPLAIN {statement}", (1,) * statement.count("?"))


def test_people_see_records_as_columns(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db", KINDS, DurableEffect)
    capacity = CapacityRecord(
        tag=TAG,
        size_bytes=4096,
        tagged=True,
        sharing=Sharing.NONE,
        hosts=(),
        appliance=ApplianceId("z0"),
        region=0,
        extents=(Extent(MediaOffset(0), 4096),),
        state=CapacityState.RESERVED,
        revision=1,
    )
    store.commit(Batch([Step((Change("capacity", TAG, capacity),))], 1))
    shell = apsw.Connection(str(tmp_path / "state.db"), flags=apsw.SQLITE_OPEN_READONLY)
    rows = list(shell.execute("SELECT key, tag, state, size_bytes, extents FROM capacity"))
    assert rows == [(TAG, TAG, "reserved", 4096, "[[0,4096]]")]
    shell.close()
    store.close()


def test_views_follow_the_record_types(tmp_path: Path) -> None:
    class Wider(msgspec.Struct, frozen=True):
        text: str
        more: int = 7

    SqliteStore(tmp_path / "state.db", ROWS).close()
    SqliteStore(tmp_path / "state.db", {"row": Wider}).close()
    shell = apsw.Connection(str(tmp_path / "state.db"))
    shell.execute("SELECT key, text, more FROM row")
    shell.close()


def test_writing_is_durable_to_the_letter(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db", ROWS)
    assert store._writer is not None
    assert store._writer.pragma("journal_mode") == "wal"
    assert store._writer.pragma("synchronous") == 2
    store.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "state.db", ROWS).close()
    shell = apsw.Connection(str(tmp_path / "state.db"))
    shell.execute("UPDATE meta SET value = 999 WHERE name = 'schema_version'")
    shell.close()
    with pytest.raises(Unsupported, match=r"state\.db: has schema version 999, .* up to \d+"):
        SqliteStore(tmp_path / "state.db", ROWS)


def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    shell = apsw.Connection(str(tmp_path / "state.db"))
    shell.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StorageFailed, match="something else than tagmem"):
        SqliteStore(tmp_path / "state.db", ROWS)
    assert [name for (name,) in shell.execute("SELECT name FROM sqlite_master")] == ["theirs"]
    shell.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database at all" * 400)
    with pytest.raises(StorageFailed, match=r"state\.db cannot be opened: it is not a database"):
        SqliteStore(tmp_path / "state.db", ROWS)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"none/state\.db cannot be opened"):
        SqliteStore(tmp_path / "none" / "state.db", ROWS)


def test_a_locked_file_is_a_conflict(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "state.db", ROWS).close()
    other = apsw.Connection(str(tmp_path / "state.db"))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Conflict, match=r"state\.db: another process has locked it"):
        SqliteStore(tmp_path / "state.db", ROWS)
    other.close()


def test_an_older_writer_can_commit_no_more(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "state.db", ROWS)
    first.commit(put("one"))
    second = SqliteStore(tmp_path / "state.db", ROWS)
    with pytest.raises(StorageFailed, match="another process writes to it"):
        first.commit(put("lost"))
    second.commit(put("two"))
    assert [record.text for _, _, record in second.load().records] == ["two"]
    first.close()
    second.close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db", ROWS)
    store.close()
    store.close()
    for use in (store.load, lambda: store.commit(put("x")), lambda: store.history(0, 1)):
        with pytest.raises(StorageFailed, match="is closed"):
            use()


def test_history_can_be_read_while_a_commit_is_under_way(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db", ROWS)
    store.commit(Batch([Step(notes=(Note("a.b", "s"),))], 1))
    with store._lock:
        assert [entry.seq for entry in store.history(0, 5)] == [1]
    store.close()


def test_a_full_file_refuses_and_recovers(tmp_path: Path) -> None:
    """A real limit, not an injected one: SQLite's own ceiling on pages."""
    store = SqliteStore(tmp_path / "state.db", ROWS)
    store.commit(put("small"))
    assert store._writer is not None
    pages = store._writer.pragma("page_count")
    store._writer.pragma("max_page_count", pages)
    with pytest.raises(StorageFailed, match="the file system is full"):
        store.commit(put("x" * 100_000))
    assert [record.text for _, _, record in store.load().records] == ["small"]
    store._writer.pragma("max_page_count", 1_000_000)
    store.commit(put("x" * 100_000))
    store.close()
