"""Archives that Linux unpacks as a root file system, written without being root."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import pytest

from tagmem.base.errors import InvalidInput
from tagmem.lab.cpio import BLOCK_BYTES, Archive


class Member(NamedTuple):
    mode: int
    device: tuple[int, int]
    data: bytes


def members(data: bytes) -> dict[str, Member]:
    """A reader of the format, of our own: what the kernel would make of it."""
    found: dict[str, Member] = {}
    place = 0
    while True:
        assert place % 4 == 0
        assert data[place : place + 6] == b"070701"
        fields = [int(data[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = data[place + 110 : place + 110 + length - 1].decode()
        assert data[place + 110 + length - 1] == 0
        start = -(-(place + 110 + length) // 4) * 4
        place = -(-(start + size) // 4) * 4
        if name == "TRAILER!!!":
            assert not data[place:].strip(b"\0")
            return found
        assert name not in found
        assert fields[2:4] == [0, 0]  # root's
        found[name] = Member(fields[1], (fields[9], fields[10]), data[start : start + size])


def written(fill: Path | None = None) -> bytes:
    stream = io.BytesIO()
    archive = Archive(stream)
    archive.file("a/b/c", b"12345", 0o600)
    archive.file("/a/b/run", b"#!/bin/sh\n", 0o755)
    archive.link("a/link", "b/c")
    archive.character_device("dev/console", 5, 1)
    if fill is not None:
        archive.tree(fill)
    archive.close()
    return stream.getvalue()


def test_members_are_what_was_put_in_and_their_directories_come_first() -> None:
    data = written()
    assert len(data) % BLOCK_BYTES == 0
    found = members(data)
    assert list(found) == ["a", "a/b", "a/b/c", "a/b/run", "a/link", "dev", "dev/console"]
    assert found["a/b/c"] == (0o100600, (0, 0), b"12345")
    assert found["a/b/run"].mode == 0o100755
    assert found["a/link"] == (0o120777, (0, 0), b"b/c")
    assert found["dev/console"] == (0o020600, (5, 1), b"")
    assert found["a"].mode == 0o040755


def test_a_tree_is_taken_as_it_is_and_gives_the_same_archive_each_time(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir(mode=0o700)
    (tmp_path / "sub" / "tool").write_bytes(b"x")
    (tmp_path / "sub" / "tool").chmod(0o700)
    (tmp_path / "plain").write_bytes(b"yy")
    (tmp_path / "way").symlink_to("sub/tool")
    found = members(written(tmp_path))
    assert found["sub/tool"].mode == 0o100755
    assert found["sub"].mode == 0o040755
    assert found["plain"] == (0o100644, (0, 0), b"yy")
    assert found["way"].data == b"sub/tool"
    (tmp_path / "plain").touch()
    assert written(tmp_path) == written(tmp_path)


@pytest.mark.parametrize("name", ["", "/", "../up", "a/../../b"])
def test_a_name_outside_the_archive_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        Archive(io.BytesIO()).file(name, b"")
