"""Makes the comparison readable: tables, a page, a plot. Pure, so that a recorded run can be
rendered again, and a test can hold the words to the figures.

A cell says what was seen. One that could not be filled says why in its place; nothing is filled in
from what somebody remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

import msgspec

Status = Literal["measured", "impossible", "not-measured", "not-tried", "not-built"]


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer for one option."""

    text: str
    """What the table shows."""
    evidence: str = ""
    """What was seen."""
    status: Status = "measured"
    value: float | None = None
    """The figure, where there is one, in the unit of its column."""


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One option on one QEMU."""

    option: str
    summary: str
    qemu: str = ""
    accel: str = ""
    kernel: str = ""
    cells: dict[str, Cell] = {}
    load: tuple[float, ...] = ()
    """The machine's one-minute load before and after its experiments."""
    at: str = ""
    """When (UTC)."""


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """A whole run."""

    machine: dict[str, str]
    rows: tuple[Row, ...]


class Heading(NamedTuple):
    """A column: the key of its cells, and how it is called."""

    key: str
    title: str
    meaning: str


SPEED = (
    Heading("attach", "attach to first byte", "from the call to the first byte read in the guest"),
    Heading("bare", "bare QMP", "the same commands to QEMU alone, to the first byte in the guest"),
    Heading("detach", "detach", "idle: from the call to QEMU's process seen without the bytes"),
    Heading("bandwidth", "copy / own RAM", "a copy out of the tag against one out of guest RAM"),
    Heading("traps", "exits per access", "what the guest's address is in QEMU's memory map"),
)
NATURE = (
    Heading("granularity", "granularity", "of the sizes tried"),
    Heading("minimum", "minimum", "the smallest size that was attached"),
    Heading("tag", "tag in band", "the tag found in the guest's sysfs, no agent asked"),
    Heading("dax", "real DAX", "a device of the kernel's dax class with page structures"),
    Heading("stock", "stock kernel", "the guest's kernel as Debian ships it, untainted"),
    Heading("code", "guest code of ours", "what had to run in the guest"),
    Heading("lines", "configuration lines", "words of QEMU's command line, and QMP commands seen"),
)
REMOVAL = (
    Heading("holder", "holder", "a process has it, the guest is asked and nothing is forced"),
    Heading("silent", "silent guest with a holder", "by force while the guest never answers"),
    Heading("paused", "paused guest", "by force while its processors stand"),
    Heading("panicked", "panicked guest", "by force after its kernel panicked"),
    Heading("guaranteed", "guaranteed", "taken back in all of those, shown by QEMU's own maps"),
    Heading("migration", "migration", "QEMU asked to migrate with the tag attached"),
    Heading("forms", "migration forms", "what `vm migrate` does with it ([how](migration.md))"),
)
GROUPS = (("Speed", SPEED), ("What it is", NATURE), ("Taking it back", REMOVAL))
HEADINGS = tuple(heading for _, headings in GROUPS for heading in headings)

_MISSING = Cell("not measured: its experiment did not run", status="not-measured")
_UNBUILT = Cell("not built yet", status="not-built")


def cell(row: Row, key: str) -> Cell:
    """A row's cell; one that is missing says so."""
    return row.cells.get(key, _MISSING if row.cells else _UNBUILT)


def teller(key: str) -> Callable[[Row], str]:
    """Makes a row's text for a column."""
    return lambda row: cell(row, key).text


def label(row: Row) -> str:
    """How a row is called where there are several QEMUs."""
    return f"{row.option} ({row.qemu})" if row.qemu else row.option


# ---- the page


_IN_SHORT = ("attach", "detach", "bandwidth", "dax", "tag", "guaranteed", "forms")


def in_short(comparison: Comparison) -> str:
    """The table of the README: each option once, on the newest QEMU that it was run on."""
    newest: dict[str, Row] = {}
    for row in comparison.rows:
        if row.option not in newest or row.qemu > newest[row.option].qemu:
            newest[row.option] = row
    headings = [heading for heading in HEADINGS if heading.key in _IN_SHORT]
    return _table(list(newest.values()), headings)


def page(comparison: Comparison) -> str:
    """docs/comparison.md."""
    parts = [
        "# Ways to present tagged memory to a VM, compared by running them",
        "Written by `tagmem lab compare`; what was seen for each cell is in `comparison.json`. "
        + _circumstances(comparison),
        "![Attach, detach and copy](comparison.svg)",
    ]
    for title, headings in GROUPS:
        parts += [f"## {title}", _table(comparison.rows, headings), _meanings(headings)]
    parts += ["## Recommendation", recommendation(comparison)]
    parts += ["## Upstream", _UPSTREAM]
    return "\n\n".join(parts) + "\n"


def _circumstances(comparison: Comparison) -> str:
    facts = "; ".join(f"{name}: {text}" for name, text in comparison.machine.items())
    loads = [load for row in comparison.rows for load in row.load]
    load = f" The machine's load was {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    slow = ""
    if any(row.accel == "tcg" for row in comparison.rows):
        slow = " Guests ran under emulation (TCG): compare figures with each other, not with metal."
    return f"{facts}.{load}{slow}"


def _table(rows: Sequence[Row], headings: Sequence[Heading]) -> str:
    lines = [["option", "QEMU", "accel", *(heading.title for heading in headings)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        texts = [cell(row, heading.key).text for heading in headings]
        lines.append([row.option, row.qemu or "-", row.accel or "-", *texts])
    return "\n".join("| " + " | ".join(map(_safe, line)) + " |" for line in lines)


def _meanings(headings: Sequence[Heading]) -> str:
    return "; ".join(f"*{heading.title}*: {heading.meaning}" for heading in headings) + "."


def _safe(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "-"


# ---- what follows from the figures


def recommendation(comparison: Comparison) -> str:
    """Argued from the cells of this run, whatever they are."""
    sure = [row for row in comparison.rows if cell(row, "guaranteed").text.startswith("yes")]
    whole = [r for r in sure if _yes(r, "tag") and _yes(r, "dax")]
    said = []
    if whole:
        said.append(_praise(min(whole, key=lambda row: _figure(row, "attach"))))
    elif sure:
        said.append(f"Only {_names(sure)} gave the bytes back every time, with the gaps above.")
    else:
        said.append("No option of this run gave the bytes back in every experiment.")
    others = [
        row
        for row in comparison.rows
        if _no(row, "guaranteed") and _yes(row, "tag") and _yes(row, "dax") and _leaves(row)
    ]
    if others:
        said.append(
            f"Where that is not to be had, {_names(others)}: the guest finds the tag and maps it "
            "as DAX in the same way, and an idle one leaves, but a guest that does not answer "
            "keeps the bytes until its VM ends; whoever attaches it is told so."
        )
    unsure = [row for row in comparison.rows if _no(row, "guaranteed")]
    rest = [row for row in unsure if row not in others]
    if rest:
        said.append(
            "Not for capacity that must come back: "
            + "; ".join(f"{label(row)} ({_fault(row)})" for row in rest)
            + "."
        )
    never = [row for row in comparison.rows if cell(row, "attach").status == "impossible"]
    if never:
        why = "; ".join(f"{label(row)} ({cell(row, 'attach').evidence})" for row in never)
        said.append(f"Impossible: {why}.")
    known = (*sure, *unsure, *never)
    open_ = [row for row in comparison.rows if row.cells and row not in known]
    if open_:
        why = "; ".join(f"{label(row)} ({cell(row, 'guaranteed').text})" for row in open_)
        said.append(f"Left open, because an experiment has no result: {why}.")
    blank = [row.option for row in comparison.rows if not row.cells]
    if blank:
        said.append(f"Nothing is said of {', '.join(blank)}: not built yet.")
    return "\n\n".join(said)


def _praise(row: Row) -> str:
    extra = ""
    attach, bare = cell(row, "attach").value, cell(row, "bare").value
    if attach is not None and bare is not None:
        extra = f", {attach - bare:+.0f} ms against the bare commands"
    return (
        f"Take **{label(row)}**. It was the quickest of those that gave the bytes back from a "
        f"holder, a silent, a paused and a panicked guest: first byte after "
        f"{cell(row, 'attach').text}{extra}; detach {cell(row, 'detach').text}; "
        f"copying at {cell(row, 'bandwidth').text}. The tag stands in the guest's own sysfs, the "
        f"kernel is Debian's. Its price is migration: {cell(row, 'migration').text}."
    )


def _fault(row: Row) -> str:
    for key in ("paused", "panicked", "silent", "holder"):
        found = cell(row, key)
        if _no(row, key):
            title = next(heading.title for heading in HEADINGS if heading.key == key)
            return f"{title}: {found.text}"
    return cell(row, "guaranteed").text


def _yes(row: Row, key: str) -> bool:
    return cell(row, key).text.startswith("yes")


def _no(row: Row, key: str) -> bool:
    return cell(row, key).text.startswith(("no:", "no ("))


def _leaves(row: Row) -> bool:
    return cell(row, "detach").value is not None


def _names(rows: Sequence[Row]) -> str:
    return " or ".join(label(row) for row in rows)


def _figure(row: Row, key: str) -> float:
    value = cell(row, key).value
    return float("inf") if value is None else value


_UPSTREAM = """What would make the best option better, the most useful first. What is said of CXL,
of NVDIMM identities and of crashes comes from QEMU's source and from single trials, not from the
run above.

- **A named `vhost-user-pmem` in QEMU.** It works through the generic *test* device today, whose
  configuration a user must know by number. A named one can say that it owns its memory, and be
  migrated by handing the window over instead of being refused.
- **Checks where QEMU dereferences.** Mapping or unmapping a shared-memory region before the device
  is started or after it was stopped must be an error to the back-end, not a crash: only then can
  bytes be taken from a *paused* guest without letting it run for a moment.
- **Memory slots beside a vhost-user device.** While a window was attached, QEMU refused to plug in
  any other memory ("a used vhost backend has no free memory slots left"). A window's back-end that
  needs none of the guest's other memory should not count, and may offer more slots than it needs.
- **A signal to the guest.** A window whose memory was taken back reads as scrap. A virtio-pmem
  notification (or the region's removal) would let the guest's kernel send SIGBUS.
- **A tag in virtio-pmem's configuration space**, so that no header in front of the bytes is needed,
  and `unplug_request_check` for it, so that the host may ask.
- **A tag in QEMU's dynamic capacity** (`cxl-add-dynamic-capacity` takes one and drops it), forced
  removal, freeing the backing at unplug, refusing migration instead of losing the device, and a
  direct path for dynamic capacity, which traps on every access.
- **An ACPI tag for hot-plugged ranges.** An NVDIMM's `uuid` does not reach an x86 guest, a DIMM has
  none, and specific-purpose memory cannot be hot-plugged.
- **Extents and tags for virtio-mem**, with a plug that does not discard what is there, and regions
  that the guest surfaces as DAX and never as RAM: [a proposal](virtio-mem-tags.md), with the gap
  measured."""


# ---- the plot

BAR_HEIGHT, GAP, LEFT, WIDTH, TOP = 16, 6, 150, 760, 34
_COLOURS = {"measured": "#3b6ea5", "reference": "#b9c7d6"}


class Bar(NamedTuple):
    """A bar: its name, its figure, the figure that it is held against, what is written at it."""

    name: str
    value: float | None
    reference: float | None
    note: str


def plot(comparison: Comparison) -> str:
    """docs/comparison.svg: three bar charts, one under another."""
    rows = [row for row in comparison.rows if row.cells]
    charts: tuple[tuple[str, Callable[[Row], Bar]], ...] = (
        (
            "Attach to first byte, ms (pale: the bare QMP commands)",
            lambda r: _bar(r, "attach", "bare"),
        ),
        ("Detach of an idle tag, ms", lambda r: _bar(r, "detach")),
        ("Copy out of the tag, % of the guest's own RAM", lambda r: _bar(r, "bandwidth")),
    )
    drawn, y = [], 8
    for title, make in charts:
        bars = [make(row) for row in rows]
        drawn.append(_chart(title, bars, y))
        y += TOP + len(bars) * (BAR_HEIGHT + GAP) + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">'
    )
    ground = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, ground, *drawn, "</svg>"]) + "\n"


def _bar(row: Row, key: str, reference: str = "") -> Bar:
    found = cell(row, key)
    other = cell(row, reference).value if reference else None
    return Bar(label(row), found.value, other, found.text)


def _chart(title: str, bars: Sequence[Bar], y: int) -> str:
    figures = [f for bar in bars for f in (bar.value, bar.reference) if f is not None]
    most = max(figures, default=1.0) or 1.0
    room = WIDTH - LEFT - 190
    lines = [f'<text x="8" y="{y + 18}" font-weight="bold">{escape(title)}</text>']
    at = y + TOP
    for bar in bars:
        middle = at + BAR_HEIGHT - 4
        lines.append(f'<text x="8" y="{middle}">{escape(bar.name)}</text>')
        end = 0.0
        for value, colour, height in (
            (bar.reference, _COLOURS["reference"], BAR_HEIGHT),
            (bar.value, _COLOURS["measured"], BAR_HEIGHT - 6),
        ):
            if value is None:
                continue
            length = max(room * max(value, 0.0) / most, 1.0)
            end = max(end, length)
            lines.append(
                f'<rect x="{LEFT}" y="{at + (BAR_HEIGHT - height) // 2}" '
                f'width="{length:.1f}" height="{height}" fill="{colour}"/>'
            )
        note = bar.note if len(bar.note) <= 34 or bar.value is None else bar.note[:33] + "…"
        fill = "#333333" if bar.value is not None else "#888888"
        lines.append(
            f'<text x="{LEFT + end + 6:.1f}" y="{middle}" fill="{fill}">{escape(note[:90])}</text>'
        )
        at += BAR_HEIGHT + GAP
    return "\n".join(lines)


def merged(
    before: Comparison | None,
    machine: Mapping[str, str],
    fresh: Sequence[Row],
    order: Sequence[str],
) -> Comparison:
    """A run, and the rows of an earlier one that it did not measure anew."""
    rows = {(row.option, row.qemu): row for row in (before.rows if before else ())}
    for row in fresh:
        if row.cells:
            rows.pop((row.option, ""), None)
        rows[row.option, row.qemu] = row
    place = {name: number for number, name in enumerate(order)}

    def key(row: Row) -> tuple[bool, float, int]:
        version = tuple(int(part) for part in row.qemu.split(".")) if row.qemu else (0,)
        return (not row.cells, -version[0], place.get(row.option, len(place)))

    return Comparison(dict(machine), tuple(sorted(rows.values(), key=key)))
