"""The demo's records are real, many, distinct, and fit what memcached takes as a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagmem.base.errors import NotFound
from tagmem.demo import dataset

DATA = b"""\
  1 This is the licence.
00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 002 * 0000 v 0000 | draw air; "she"
00002084 03 n 01 dog 0 000 | a member of the genus Canis
"""


def test_each_word_of_a_synset_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_bytes(DATA)
    found = dict(dataset.senses(str(tmp_path)))
    assert len(found) == 5
    assert found[b"sense:take_a_breath.noun.00001740"] == b'draw air; "she"'
    assert found[b"sense:dog.noun.00002084"] == b"a member of the genus Canis"


def test_package_lists_name_the_owner_of_each_file(tmp_path: Path) -> None:
    (tmp_path / "coreutils.list").write_bytes(b"/.\n/usr/bin/env\n/a name\n" + b"/x" * 200 + b"\n")
    (tmp_path / "coreutils.md5sums").write_bytes(b"/no/list\n")
    found = dict(dataset.owned_files(str(tmp_path)))
    assert found == {
        b"file:/.": b"coreutils, file 0 of its list",
        b"file:/usr/bin/env": b"coreutils, file 1 of its list",
        b"file:/a%20name": b"coreutils, file 2 of its list",
    }


def test_what_is_not_installed_has_no_records(tmp_path: Path) -> None:
    assert not list(dataset.senses(str(tmp_path / "absent")))
    assert not list(dataset.owned_files(str(tmp_path / "absent")))


def test_too_few_records_name_the_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_bytes(DATA)
    empty = str(tmp_path / "absent")
    with pytest.raises(NotFound, match="apt install wordnet-base"):
        dataset.records(wordnet=str(tmp_path), package_lists=empty)
    assert len(dataset.records(3, wordnet=str(tmp_path), package_lists=empty)) == 3


def test_this_machine_has_what_the_demo_promises() -> None:
    found = dataset.records()
    assert dataset.RECORDS_MIN <= len(found) <= dataset.RECORDS_MAX
    for key, value in found.items():
        assert len(key) <= 250
        assert value.isascii() or value.decode()
        assert not set(b" \r\n\0").intersection(key)
        assert b"\r" not in value
        assert b"\n" not in value
