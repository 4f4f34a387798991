"""A file is replaced whole, or left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagmem.base.errors import StorageFailed
from tagmem.io.atomicfile import write_atomic


def test_content_and_mode_are_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two", mode=0o644)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    # A directory of the same name cannot be replaced by a file: the last step fails.
    (tmp_path / "config.json").mkdir()
    with pytest.raises(StorageFailed, match=r"config\.json cannot be written"):
        write_atomic(tmp_path / "config.json", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="No such file"):
        write_atomic(tmp_path / "none" / "x", b"")
