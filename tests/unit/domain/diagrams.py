"""Draws docs/state-machines.md from the tables themselves, so that the page cannot say anything
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from tagmem.domain import attachment, capacity


def page() -> str:
    """The whole page, as Markdown with Mermaid diagrams."""
    parts = [
        "# State machines",
        "",
        "Written by `tests/unit/domain/diagrams.py` from the tables in `domain/capacity.py` and",
        "`domain/attachment.py`; a test fails when it is not current. The diagrams leave out what",
        "changes nothing; the tables have every pair, with a dash for what cannot happen.",
    ]
    for title, module, table in (
        ("A capacity", capacity, capacity.TABLE),
        ("An attachment", attachment, attachment.TABLE),
    ):
        parts += ["", f"## {title}", "", _theory(module.__doc__ or ""), "", "```mermaid"]
        parts += [_diagram(table), "```", "", _table(table)]
    return "\n".join(parts) + "\n"


def _theory(docstring: str) -> str:
    _, _, text = docstring.partition("\n\n")
    return text.removeprefix("Theory of operation. ").strip()


def _diagram(table: Mapping[Any, Enum]) -> str:
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, cause), following in table.items():
        if following.name != "ILLEGAL" and following is not state:
            target = "[*]" if following.name == "FREE" else following.name
            arrows.setdefault((state.name, target), []).append(cause.value)
    lines = ["stateDiagram-v2"]
    lines += [f"    {a} --> {b}: {', '.join(causes)}" for (a, b), causes in arrows.items()]
    return "\n".join(lines)


def _table(table: Mapping[Any, Enum]) -> str:
    states = list(dict.fromkeys(state for state, _ in table))
    causes = list(dict.fromkeys(cause for _, cause in table))
    lines = [
        "| | " + " | ".join(state.name for state in states) + " |",
        "|---" * (len(states) + 1) + "|",
    ]
    for cause in causes:
        cells = (_cell(table[state, cause]) for state in states)
        lines.append(f"| {cause.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(following: Enum) -> str:
    return "–" if following.name == "ILLEGAL" else following.name
