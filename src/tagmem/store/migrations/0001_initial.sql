-- The first schema. A released migration is never changed; a change is a file with the next number.

CREATE TABLE record (
    kind TEXT NOT NULL,
    key  TEXT NOT NULL,
    doc  TEXT NOT NULL,
    PRIMARY KEY (kind, key)
);

CREATE TABLE outbox (
    id  INTEGER NOT NULL PRIMARY KEY,
    doc TEXT NOT NULL
);

CREATE TABLE history (
    seq     INTEGER NOT NULL PRIMARY KEY,
    at_ns   INTEGER NOT NULL,
    type    TEXT NOT NULL,
    subject TEXT NOT NULL,
    data    TEXT NOT NULL
);

CREATE TABLE meta (
    name  TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
);

INSERT INTO meta (name, value) VALUES ('schema_version', 1);
INSERT INTO meta (name, value) VALUES ('writer_epoch', 0);
INSERT INTO meta (name, value) VALUES ('last_effect_id', 0);
