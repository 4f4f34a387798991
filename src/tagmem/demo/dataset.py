"""The demo's records: English senses with their definitions, and which Debian package owns a file.

A demo with random bytes proves little to a person who watches it. These come from files that
Debian ships: WordNet's dictionary (package wordnet-base: one record for each of its 206,941 senses)
and the package database of the machine itself. Both are read in a stable order.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tagmem.base.errors import NotFound

WORDNET = "/usr/share/wordnet"
PACKAGE_LISTS = "/var/lib/dpkg/info"
RECORDS_MIN = 200_000
RECORDS_MAX = 300_000
"""So that a machine with very many packages takes no longer."""

_KEY_BYTES_MAX = 250
"""memcached's limit."""
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def records(
    limit: int = RECORDS_MAX, *, wordnet: str = WORDNET, package_lists: str = PACKAGE_LISTS
) -> dict[bytes, bytes]:
    """Up to `limit` records in a stable order: `sense:dog.noun.02084071` to its definition, then
    `file:/usr/bin/env` to its package.

    Raises NotFound when this machine has fewer than the demo promises, and says what to install.
    """
    found: dict[bytes, bytes] = {}
    for key, value in chain(senses(wordnet), owned_files(package_lists)):
        found.setdefault(key, value)
        if len(found) == limit:
            break
    if len(found) < min(limit, RECORDS_MIN):
        raise NotFound(
            f"this machine has {len(found):,} records, {RECORDS_MIN:,} are needed; "
            "install Debian's dictionary: apt install wordnet-base"
        )
    return found


def senses(folder: str) -> Iterator[tuple[bytes, bytes]]:
    """Each word of each synset of WordNet's data files (format: wndb(5WN)), with the definition.

    A line is `offset lexicographer-file type word-count(hex) {word lex-id}... | gloss`.
    """
    for part in _PARTS_OF_SPEECH:
        try:
            file = Path(folder, f"data.{part}").open("rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            continue
        with file:
            for line in file:
                if line.startswith(b"  "):
                    continue  # the licence, at the head of each file
                data, _, gloss = line.partition(b" | ")
                fields = data.split(b" ")
                value = gloss.strip()
                for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
                    key = b"sense:%s.%s.%s" % (word, part.encode(), fields[0])
                    if len(key) <= _KEY_BYTES_MAX:
                        yield key, value


def owned_files(folder: str) -> Iterator[tuple[bytes, bytes]]:
    """Each file that a Debian package installed here, with the packages that did."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".list"))
    except FileNotFoundError:
        return
    for name in names:
        package = name.removesuffix(".list")
        with open(f"{folder}/{name}", "rb") as file:
            for number, line in enumerate(file):
                path = urllib.parse.quote_from_bytes(line.strip(), safe="/+-._~:=@,")
                key = f"file:{path}".encode()
                # Directories belong to many packages; the first one that lists it gets the record.
                if len(key) <= _KEY_BYTES_MAX:
                    yield key, f"{package}, file {number} of its list".encode()
