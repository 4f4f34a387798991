"""What the load generator reads, and how commits are counted."""

from __future__ import annotations

from pathlib import Path

import apsw
from bench.load import parse, request
from bench.wal import commits


def test_an_answer_is_read_when_it_is_whole() -> None:
    data = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}"
    for size in range(len(data)):
        assert parse(data[:size]) is None
    found = parse(data + b"HTTP/1.1 204")
    assert found is not None
    answer, size = found
    assert (answer.status, answer.body, size) == (201, b"{}", len(data))


def test_an_answer_without_a_body_ends_with_its_head() -> None:
    found = parse(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert found is not None
    assert (found[0].status, found[0].body) == (204, b"")


def test_a_request_says_its_length() -> None:
    text = request("PUT", "/x", b"{}", "prefer: wait=1\r\n").decode()
    assert text.startswith("PUT /x HTTP/1.1\r\n")
    assert "content-length: 2\r\n" in text
    assert "\r\nprefer: wait=1\r\n" in text
    assert text.endswith("\r\n\r\n{}")


def test_commits_are_counted_in_the_log(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    assert commits(database) == []
    connection = apsw.Connection(str(database))
    connection.pragma("journal_mode", "WAL")
    connection.pragma("wal_autocheckpoint", 0)
    connection.execute("CREATE TABLE t (x)")
    before = len(commits(database))
    for number in range(3):
        connection.execute("INSERT INTO t VALUES (?)", (number,))
    sizes = commits(database)[before:]
    connection.close()
    assert sizes == [4096 + 24] * 3
