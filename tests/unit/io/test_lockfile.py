"""A state directory has one user, and tells the next one why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.io.lockfile import StateDirectory


def test_it_is_made_and_private(tmp_path: Path) -> None:
    with StateDirectory(tmp_path / "a" / "b") as state:
        assert state.path.stat().st_mode & 0o777 == 0o700
        assert (state.path / "lock").read_text().strip() == str(os.getpid())


def test_the_second_user_is_told_who_has_it(tmp_path: Path) -> None:
    first = StateDirectory(tmp_path)
    with pytest.raises(Conflict, match=f"in use by process {os.getpid()}"):
        StateDirectory(tmp_path)
    first.release()
    first.release()
    StateDirectory(tmp_path).release()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="state directory: must be a directory, got"):
            StateDirectory(path)


def test_where_nobody_may_write_says_so() -> None:
    # Not even root makes directories in sysfs; a read-only one says that instead.
    with pytest.raises(InvalidInput, match=r"this user may write to|not read-only"):
        StateDirectory("/sys/kernel/tagmem")


def test_a_full_file_system_says_so(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(InvalidInput, match="with room left"):
        StateDirectory(tmp_path)
