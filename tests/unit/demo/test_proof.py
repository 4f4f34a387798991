"""The demo's own eyes: what they find in files, what is zero, who holds a file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tagmem.demo.proof import (
    count_needles,
    find_items,
    first_nonzero,
    holders,
    media_files,
    nonzero_file,
)

CHUNK = 4 << 20


def test_items_are_found_with_offset_and_value(tmp_path: Path) -> None:
    file = tmp_path / "media"
    file.write_bytes(
        bytes(100)
        + b"sense:dog.noun.02084071\0a member of the genus Canis\r\n"
        + b"\xff" * 50
        + b"file:/usr/bin/env\0coreutils\r\n"
        + b"sense:torn.noun.1\0no line end"
    )
    found = find_items(file)
    assert found == {
        b"sense:dog.noun.02084071": (100, b"a member of the genus Canis"),
        b"file:/usr/bin/env": (203, b"coreutils"),
    }


def test_needles_are_counted_over_all_files(tmp_path: Path) -> None:
    for name, data in {"one": b"..first..", "two": b"..second.."}.items():
        (tmp_path / name).write_bytes(data)
    files = media_files(tmp_path)
    assert count_needles(files, [b"first", b"second", b"third", b"first"]) == 2
    assert count_needles([], [b"first"]) == 0


def test_media_are_listed_once_whatever_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    (tmp_path / "empty").touch()
    assert media_files(tmp_path) == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("size", "at", "expected"),
    [(0, -1, -1), (10, -1, -1), (10, 9, 0), (CHUNK + 10, CHUNK + 9, CHUNK), (CHUNK, 0, 0)],
)
def test_zero_means_every_byte(size: int, at: int, expected: int, tmp_path: Path) -> None:
    data = bytearray(size)
    if at >= 0:
        data[at] = 1
    assert first_nonzero(memoryview(data)) == expected
    if size:
        (tmp_path / "file").write_bytes(data)
        assert nonzero_file(tmp_path / "file") == expected


def test_holders_are_found_by_inode(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(bytes(4096))
    link.hardlink_to(file)
    assert holders(file) == []
    with file.open("rb") as opened:
        assert [pid for pid, _ in holders(link)] == [os.getpid()]
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    try:
        assert [pid for pid, _ in holders(link)] == [os.getpid()]
    finally:
        mapped.close()
    assert holders(link) == []
    assert holders(tmp_path / "absent") == []
