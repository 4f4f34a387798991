-- What a store looks like after all migrations, for its reader; a test holds the two equal.
--
-- Documents are JSON. For each kind of record a view of that name shows the fields as columns, so
--     sqlite3 state.db "SELECT tag, state, size_bytes FROM capacity"
-- works; the views are derived from the record types when a store is opened, not written here.
-- PostgreSQL reads INTEGER as BIGINT and doc as JSONB; nothing else differs.

-- One row per thing that a daemon remembers. Rows lie in the order in which they were made, so
-- changes to young things share pages; the key is an index beside them.
CREATE TABLE record (
    kind TEXT NOT NULL,
    key  TEXT NOT NULL,
    doc  TEXT NOT NULL,
    PRIMARY KEY (kind, key)
);

-- Effects committed and not yet known to be done.
CREATE TABLE outbox (
    id  INTEGER NOT NULL PRIMARY KEY,
    doc TEXT NOT NULL
);

-- What happened, for people and watchers; pruned from its old end.
CREATE TABLE history (
    seq     INTEGER NOT NULL PRIMARY KEY,
    at_ns   INTEGER NOT NULL,
    type    TEXT NOT NULL,
    subject TEXT NOT NULL,
    data    TEXT NOT NULL
);

-- schema_version; last_effect_id; writer_epoch, which grows at each open: a commit of an older
-- writer is refused.
CREATE TABLE meta (
    name  TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
);

INSERT INTO meta (name, value) VALUES ('schema_version', 1);
INSERT INTO meta (name, value) VALUES ('writer_epoch', 0);
INSERT INTO meta (name, value) VALUES ('last_effect_id', 0);
