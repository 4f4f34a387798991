-- Every statement that runs on a store, by name. Plain SQL: both SQLite and PostgreSQL take them.

-- name: put_record
INSERT INTO record (kind, key, doc) VALUES (?, ?, ?)
ON CONFLICT (kind, key) DO UPDATE SET doc = excluded.doc;

-- name: delete_record
DELETE FROM record WHERE kind = ? AND key = ?;

-- name: all_records
SELECT kind, key, doc FROM record;

-- name: put_effect
INSERT INTO outbox (id, doc) VALUES (?, ?);

-- name: delete_effect
DELETE FROM outbox WHERE id = ?;

-- name: all_effects
SELECT id, doc FROM outbox ORDER BY id;

-- name: put_history
INSERT INTO history (seq, at_ns, type, subject, data) VALUES (?, ?, ?, ?, ?);

-- name: history_after
SELECT seq, at_ns, type, subject, data FROM history WHERE seq > ? ORDER BY seq LIMIT ?;

-- name: history_span
SELECT (SELECT MIN(seq) FROM history), (SELECT MAX(seq) FROM history);

-- name: prune_history
DELETE FROM history WHERE seq <= ?;

-- name: get_meta
SELECT value FROM meta WHERE name = ?;

-- name: set_meta
UPDATE meta SET value = ? WHERE name = ?;
