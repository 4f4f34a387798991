"""The README's table of ways into a VM is docs/comparison.json in short. `--rewrite` writes it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from tagmem.lab.report import Comparison, in_short, page

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
TABLE = re.compile(r"^\| option \| QEMU .*\n(\|.*\n)+", re.MULTILINE)


def recorded() -> Comparison:
    return msgspec.json.decode((ROOT / "docs/comparison.json").read_bytes(), type=Comparison)


def test_the_readme_has_the_comparison_in_short(*, rewrite: bool) -> None:
    made = in_short(recorded()) + "\n"
    if rewrite:
        README.write_text(TABLE.sub(lambda _: made, README.read_text("utf-8")), encoding="utf-8")
    found = TABLE.search(README.read_text("utf-8"))
    assert found is not None
    assert found[0] == made


def test_the_page_is_the_record() -> None:
    assert (ROOT / "docs/comparison.md").read_text("utf-8") == page(recorded())
