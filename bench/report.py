"""Figures, and the page that they are written to.

RESULTS.md is made of one section per benchmark, so that a run of some keeps what the others said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Pair, Sample

_SECTION = re.compile(r"^## (\w+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a table. `aim` is what it should be, `met` whether it is; None where there is no
    aim.
    """

    name: str
    ours: str
    floor: str = ""
    ratio: str = ""
    aim: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's section: what is measured against what, the figures, remarks."""

    name: str
    about: str
    figures: tuple[Figure, ...]
    remarks: tuple[str, ...] = ()


def scaled(value: float, unit: str) -> str:
    """A value with three significant digits and a prefix: 0.00213 s is 2.13 ms."""
    if unit in ("s", "/s", "B", "B/s"):
        for factor, prefix in _UNITS:
            if abs(value) >= factor and not (unit == "s" and factor > 1):
                return f"{_digits(value / factor)} {prefix}{unit}".replace(" /s", "/s")
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def spread(sample: Sample, unit: str) -> str:
    """Median, and the quartiles behind it."""
    if len(sample.values) < 3:
        return scaled(sample.median, unit)
    return (
        f"{scaled(sample.median, unit)} ({scaled(sample.low, unit)} – {scaled(sample.high, unit)})"
    )


def compared(name: str, pair: Pair, unit: str, aim: str = "", met: bool | None = None) -> Figure:
    """A line from a pair."""
    ratio = pair.ratio
    text = f"**{_digits(ratio.median)}** ({_digits(ratio.low)} – {_digits(ratio.high)})"
    return Figure(name, spread(pair.ours, unit), spread(pair.floor, unit), text, aim, met)


def section(report: Report) -> str:
    """A report as Markdown, without its heading."""
    lines = [
        "",
        report.about,
        "",
        "| | ours | floor | ours / floor | aim |",
        "|---|---|---|---|---|",
    ]
    for figure in report.figures:
        verdict = {None: "", True: " ✓", False: " ✗"}[figure.met]
        cells = (figure.name, figure.ours, figure.floor, figure.ratio, figure.aim + verdict)
        lines.append("| " + " | ".join(cells) + " |")
    for remark in report.remarks:
        lines += ["", remark]
    return "\n".join([*lines, ""])


def read_sections(path: Path) -> dict[str, str]:
    """The sections of a page that an earlier run wrote; none when there is no page."""
    if not path.exists():
        return {}
    return {name: body.rstrip() + "\n" for name, body in _SECTION.findall(path.read_text("utf-8"))}


def page(head: str, sections: Mapping[str, str], order: Sequence[str]) -> str:
    """The whole page; sections in `order`, and none that is not in it."""
    parts = [f"## {name}\n{sections[name]}" for name in order if name in sections]
    return "\n".join([head.rstrip() + "\n", *parts])
