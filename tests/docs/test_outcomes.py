"""docs/outcomes.md is what the code answers: number, HTTP status, exit code, whether to retry.

`--rewrite` writes it anew. The page is where the `type` of a problem document leads a reader.
"""

from __future__ import annotations

from pathlib import Path

from tagmem.domain.outcome import Outcome

PAGE = Path(__file__).parent.parent.parent / "docs" / "outcomes.md"
HEAD = """\
# Outcomes

Every answer of the system, generated from the code by `tests/docs/test_outcomes.py` (`--rewrite`).
Numbers and names are stable. A problem document (RFC 9457) has the number as `code`, and the name,
with dashes, in its `type`: `/problems/size-is-zero`. Where several apply the lowest number is
given. *Later* means that the same request may succeed later; clients of ours try again by
themselves.

| code | outcome | HTTP status | exit code | later |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = [
        f"| {outcome:d} | {outcome.title} | {outcome.facts.http_status} "
        f"| {outcome.facts.exit_code} | {'yes' if outcome.transient else ''} |\n"
        for outcome in Outcome
    ]
    return HEAD + "".join(rows)


def test_the_page_of_outcomes_is_current(*, rewrite: bool) -> None:
    if rewrite:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()
