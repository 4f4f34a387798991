"""The durable store: one SQLite file in WAL mode, synchronous=FULL, one writer.

A commit is one transaction and one fsync. A refused commit leaves the file as it was. One
exception: when the fsync itself failed and the process ends before its next commit, all of the
refused commit may be found afterwards; never a part.

Each opening takes the next writer epoch, and each commit checks that its epoch is still the latest.
So two processes that have one file open cannot both write to it, even if they evaded the state
directory's lock.

People may read the file with the sqlite3 shell while a daemon runs: each kind of record is a view.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec

from tagmem.base.errors import Conflict, StorageFailed, TagmemError, Unsupported
from tagmem.base.limits import HISTORY_RETENTION
from tagmem.ports import Batch, Finish, HistoryEntry, Loaded
from tagmem.store.codec import Codec, Rows, prune_before

_HERE = Path(__file__).parent
_BUSY_MS = 100
CHECKPOINT_PAGES = 2_000
"""Pages (4 KiB) that the log may have before a commit folds it into the file."""
_CAUSES: tuple[tuple[type[apsw.Error], str], ...] = (
    (apsw.FullError, "the file system is full"),
    (apsw.ReadOnlyError, "it is read-only"),
    (apsw.IOError, "input/output error"),
    (apsw.CantOpenError, "it cannot be opened"),
    (apsw.BusyError, "another process has locked it"),
    (apsw.LockedError, "another process has locked it"),
    (apsw.CorruptError, "it is damaged"),
    (apsw.NotADBError, "it is not a database"),
    (apsw.PermissionsError, "access is denied"),
    (apsw.NoMemError, "out of memory"),
)


def named_queries(text: str) -> dict[str, str]:
    """The statements of a file in which `-- name: x` precedes each."""
    queries: dict[str, str] = {}
    for part in text.split("-- name: ")[1:]:
        name, _, statement = part.partition("\n")
        queries[name.strip()] = statement.strip().rstrip(";")
    return queries


def migrations() -> list[tuple[int, str]]:
    """(version, statements) of each migration, in order."""
    files = sorted((_HERE / "migrations").glob("[0-9]*.sql"))
    return [(int(file.name.partition("_")[0]), file.read_text("utf-8")) for file in files]


class SqliteStore:
    """A `Store` in the file `path`, which is made if there is none.

    `kinds` are the daemon's record types by kind, `effects` the union of its durable effects.
    `commit` may run in another thread than the rest. Opening raises Conflict when another process
    has the file locked, Unsupported when a newer tagmem wrote it, StorageFailed when it cannot be
    read or written.
    """

    def __init__(
        self,
        path: Path | str,
        kinds: Mapping[str, type[msgspec.Struct]],
        effects: Any = None,
        *,
        retention: int = HISTORY_RETENTION,
        checkpoint_pages: int = CHECKPOINT_PAGES,
        vfs: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._codec = Codec(kinds, effects)
        self._retention = retention
        self._vfs = vfs
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._log_pages = 0
        self._checkpoint_pages = checkpoint_pages
        self._queries = named_queries((_HERE / "queries.sql").read_text("utf-8"))
        self._writer: apsw.Connection | None = None
        self._reader: apsw.Connection | None = None
        try:
            self._writer = self._connect()
            self._migrate(self._writer)
            self._epoch = self._take_epoch(self._writer)
            self._last_effect_id = self._meta(self._writer, "last_effect_id")
            self._oldest, self._last = self._span(self._writer)
            self._reader = self._connect(read=True)
        except (apsw.BusyError, apsw.LockedError) as error:
            raise Conflict(f"{self.path}: another process has locked it") from error
        except apsw.Error as error:
            raise self._failure("cannot be opened", error) from error
        finally:
            if self._reader is None:
                self.close()

    # ---- opening

    def _connect(self, *, read: bool = False) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READONLY if read else apsw.SQLITE_OPEN_READWRITE
        if not read:
            flags |= apsw.SQLITE_OPEN_CREATE
        connection = apsw.Connection(str(self.path), flags=flags, vfs=self._vfs)
        connection.set_busy_timeout(_BUSY_MS)
        if not read:
            mode = connection.pragma("journal_mode", "WAL")
            if mode != "wal":
                connection.close()
                raise StorageFailed(f"{self.path}: write-ahead logging is not possible there")
            connection.pragma("synchronous", "FULL")
            # Folding the log in is done apart from the commit: its failure must not look like one.
            connection.pragma("wal_autocheckpoint", 0)
            connection.set_wal_hook(self._note_log_pages)
        return connection

    def _note_log_pages(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _migrate(self, writer: apsw.Connection) -> None:
        known = migrations()
        newest = known[-1][0]
        version = self._version(writer)
        if version > newest:
            raise Unsupported(
                f"{self.path}: has schema version {version}, and this tagmem knows up to {newest}"
            )
        with writer:
            for number, statements in known:
                if number > version:
                    writer.execute(statements)
            self._show_views(writer)

    def _version(self, writer: apsw.Connection) -> int:
        tables = {name for (name,) in writer.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return 0
        if not {"meta", "record", "outbox", "history"} <= tables:
            raise StorageFailed(f"{self.path}: is a database of something else than tagmem")
        return self._meta(writer, "schema_version")

    def _show_views(self, writer: apsw.Connection) -> None:
        """A view per kind, for people: its definition follows the record type."""
        sql = "SELECT name, sql FROM sqlite_master WHERE type = 'view'"
        present: dict[str, str] = dict(writer.execute(sql))
        for kind, record in self._codec.kinds.items():
            columns = "".join(
                f", doc ->> '{field.encode_name}' AS \"{field.encode_name}\""
                for field in msgspec.structs.fields(record)
                if field.encode_name != "key"
            )
            # The names are those of our own types, never input.
            rows = f"SELECT key{columns} FROM record WHERE kind = '{kind}'"  # noqa: S608
            view = f'CREATE VIEW "{kind}" AS {rows}'
            if present.get(kind) == view:
                continue
            writer.execute(f'DROP VIEW IF EXISTS "{kind}"')
            writer.execute(view)

    def _take_epoch(self, writer: apsw.Connection) -> int:
        with writer:
            epoch = self._meta(writer, "writer_epoch") + 1
            writer.execute(self._queries["set_meta"], (epoch, "writer_epoch"))
        return epoch

    def _meta(self, connection: apsw.Connection, name: str) -> int:
        value: Any = connection.execute(self._queries["get_meta"], (name,)).get
        if value is None:
            raise StorageFailed(f"{self.path}: its meta table has no {name}")
        return int(value)

    def _span(self, connection: apsw.Connection) -> tuple[int, int]:
        span: Any = connection.execute(self._queries["history_span"]).get
        oldest, last = span
        return (1, 0) if last is None else (oldest, last)

    # ---- the contract

    def load(self) -> Loaded:
        """Everything that was committed."""
        with self._lock:
            writer = self._open()
            try:
                with writer:
                    records = self._codec.records(writer.execute(self._queries["all_records"]))
                    outbox = self._codec.effects(writer.execute(self._queries["all_effects"]))
                    last = self._meta(writer, "last_effect_id")
            except apsw.Error as error:
                raise self._failure("cannot be read", error) from error
            return Loaded(records, outbox, last)

    def commit(self, batch: Batch) -> int:
        """Make a batch durable, or raise StorageFailed with nothing of it kept."""
        return self.begin(batch)()

    def begin(self, batch: Batch) -> Finish:
        """All of a commit but the waiting for the disk; see `ports.Store`."""
        rows = self._codec.rows(batch)
        begun = False
        with self._lock:
            writer = self._open()
            last = self._last + len(rows.notes)
            upto = prune_before(self._oldest, last, self._retention)
            try:
                writer.execute("BEGIN IMMEDIATE")
                self._check_epoch(writer)
                self._write(writer, rows, batch.at_ns, upto)
                begun = True
            except apsw.Error as error:
                raise self._failure("refused a commit", error) from error
            finally:
                if not begun:
                    self._roll_back(writer)
        return partial(self._finish, last, upto, rows.last_effect_id)

    def _finish(self, last: int, upto: int, last_effect_id: int) -> int:
        with self._lock:
            writer = self._open()
            try:
                writer.execute("COMMIT")
            except apsw.Error as error:
                raise self._failure("refused a commit", error) from error
            finally:
                self._roll_back(writer)
            self._last = last
            self._oldest = max(self._oldest, upto + 1)
            self._last_effect_id = max(self._last_effect_id, last_effect_id)
            if self._log_pages >= self._checkpoint_pages:
                # Everything is in the log still; if this goes on failing, so will the commits.
                with suppress(apsw.Error):
                    writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            return last

    def _write(self, writer: apsw.Connection, rows: Rows, at_ns: int, upto: int) -> None:
        queries = self._queries
        if rows.puts:
            writer.executemany(queries["put_record"], rows.puts)
        if rows.deletes:
            writer.executemany(queries["delete_record"], rows.deletes)
        if rows.done:
            writer.executemany(queries["delete_effect"], rows.done)
        if rows.ordered:
            writer.executemany(queries["put_effect"], rows.ordered)
        if rows.last_effect_id > self._last_effect_id:
            writer.execute(queries["set_meta"], (rows.last_effect_id, "last_effect_id"))
        if rows.notes:
            numbered = enumerate(rows.notes, self._last + 1)
            entries = ((seq, at_ns, *note) for seq, note in numbered)
            writer.executemany(queries["put_history"], entries)
        if upto:
            writer.execute(queries["prune_history"], (upto,))

    def _check_epoch(self, writer: apsw.Connection) -> None:
        epoch = self._meta(writer, "writer_epoch")
        if epoch != self._epoch:
            raise StorageFailed(
                f"{self.path}: another process writes to it (epoch {epoch}, ours {self._epoch})"
            )

    def _roll_back(self, writer: apsw.Connection) -> None:
        """What a failure left open; nothing after a commit."""
        if writer.in_transaction:
            # After some errors SQLite has rolled back by itself, or reports the same error again.
            with suppress(apsw.Error):
                writer.execute("ROLLBACK")

    def history(self, after: int, limit: int) -> Sequence[HistoryEntry]:
        """Up to `limit` entries with numbers above `after`, oldest first. Waits for no commit."""
        reader = self._reader
        if reader is None:
            raise StorageFailed(f"{self.path}: is closed")
        try:
            with self._reading:
                rows: list[Any] = reader.execute(
                    self._queries["history_after"], (after, limit)
                ).fetchall()
        except apsw.Error as error:
            raise self._failure("cannot be read", error) from error
        data = self._codec.data
        return [
            HistoryEntry(seq, at_ns, type_, subject, data(doc))
            for seq, at_ns, type_, subject, doc in rows
        ]

    def last_history(self) -> int:
        """The number of the newest entry; 0 when there was never one."""
        return self._last

    def close(self) -> None:
        """Give the file up; the log is folded into it. A second close does nothing."""
        with self._lock:
            reader, self._reader = self._reader, None
            writer, self._writer = self._writer, None
            for connection in (reader, writer):
                if connection is not None:
                    # What is committed is in the log; failing to tidy up loses nothing.
                    with suppress(apsw.Error):
                        connection.close()

    def _open(self) -> apsw.Connection:
        if self._writer is None:
            raise StorageFailed(f"{self.path}: is closed")
        return self._writer

    def _failure(self, what: str, error: apsw.Error) -> TagmemError:
        cause = next((text for kind, text in _CAUSES if isinstance(error, kind)), "SQLite failed")
        return StorageFailed(f"{self.path} {what}: {cause} ({error})")
