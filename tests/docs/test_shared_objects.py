"""The tables of docs/shared-objects.md are the structures: others write readers from them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tagmem.shared import catalogue
from tagmem.wire.catalogue import (
    CatalogueCoherence,
    CatalogueEntry,
    ObjectKind,
    Superblock,
)
from tagmem.wire.layout import WireStruct

PAGE = Path(__file__).parents[2] / "docs" / "shared-objects.md"
ROW = re.compile(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", re.MULTILINE)

SUPERBLOCK = Superblock(bytes(8), 0, CatalogueCoherence.HARDWARE, bytes(16), 0, 0, 0, 0, 0)
ENTRY = CatalogueEntry(0, 0, ObjectKind.BYTES, 0, 0, 0, 0, 0, bytes(128), 0)


def rows(heading: str) -> list[tuple[int, int, str]]:
    text = PAGE.read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n#")[0]
    return [(int(at), int(size), name) for at, size, name in ROW.findall(text)]


@pytest.mark.parametrize(
    ("heading", "blank"), [("Superblock", SUPERBLOCK), ("Entry", ENTRY)], ids=str
)
def test_fields_lie_where_the_page_says(heading: str, blank: WireStruct) -> None:
    found = rows(heading)
    assert [name for _, _, name in found] == list(blank.__struct_fields__)
    for at, size, name in found:
        value: object = getattr(blank, name)
        full: object = b"\xff" * size if isinstance(value, bytes) else (1 << 8 * size) - 1
        covered = range(at, at + size)
        if isinstance(value, CatalogueCoherence | ObjectKind):
            full, covered = type(value)(2), range(at, at + 1)
        changed = msgspec.structs.replace(blank, **{name: full}).encode()
        pairs = enumerate(zip(blank.encode(), changed, strict=True))
        assert [place for place, (old, new) in pairs if old != new] == list(covered), name


def test_the_page_s_places_are_the_catalogue_s() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for row in (
        f"| 0 | {Superblock.LAYOUT.size} | superblock",
        f"| {catalogue.COMMIT_AT} | 8 | commit word",
        f"| {catalogue.OWNER_AT} | 8 | owner word",
        f"| {catalogue.LOG_AT} | {catalogue.ENTRY_BYTES} each | the log",
    ):
        assert row in text, row
    assert f"a multiple of {catalogue.ALIGN_BYTES}" in text
