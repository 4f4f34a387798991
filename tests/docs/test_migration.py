"""docs/migration.md says of each presenter what the code does with it. `--rewrite` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from tagmem.presenter.choose import all_presenters
from tagmem.presenter.migrate import TABLE_HEAD, table

PAGE = Path(__file__).parent.parent.parent / "docs" / "migration.md"
ROWS = re.compile(re.escape(TABLE_HEAD) + r"(\|.*\n)*")


def test_the_table_of_forms_is_current(*, rewrite: bool) -> None:
    made = table(way.describe() for way in all_presenters().values())
    if rewrite:
        text = re.sub(r"^TABLE\n", lambda _: made + "\n", PAGE.read_text(), flags=re.MULTILINE)
        PAGE.write_text(ROWS.sub(lambda _: made, text), encoding="utf-8")
    found = ROWS.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == made
