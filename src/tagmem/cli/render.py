"""One object to JSON or to a table: the only place that writes results.

JSON follows the ndctl family: arrays of objects, snake_case, integers in bytes. Tables use rich on
a terminal (and only then is it loaded), plain columns elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import click

from tagmem.base.errors import InvalidInput, TagmemError
from tagmem.base.units import format_size


class Column(NamedTuple):
    """A heading, how to make the cell, and whether it needs `-o wide`."""

    name: str
    cell: Callable[[Any], str]
    wide: bool = False


def human_size(size_bytes: int) -> str:
    """As `cxl list -u` writes it: `256.00 MiB (268.44 MB)`."""
    for power, (binary, decimal) in enumerate(
        (("TiB", "TB"), ("GiB", "GB"), ("MiB", "MB"), ("KiB", "KB"))
    ):
        if size_bytes >= 1024 ** (4 - power):
            exponent = 4 - power
            return (
                f"{size_bytes / 1024**exponent:.2f} {binary} "
                f"({size_bytes / 1000**exponent:.2f} {decimal})"
            )
    return f"{size_bytes} B"


def size_writer(human: bool) -> Callable[[int], str]:
    """How a table shows sizes."""
    return human_size if human else format_size


def date(time_ns: int) -> str:
    """A moment (ns since 1970) in local time, to the millisecond."""
    import time

    if not time_ns:
        return "-"
    seconds, rest = divmod(time_ns, 1_000_000_000)
    local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f"{local}.{rest // 1_000_000:03d}"


def to_plain(document: Any, *, human: bool = False) -> Any:
    """A document as dictionaries and lists; `human` writes sizes and times for people."""
    import msgspec

    plain = msgspec.to_builtins(document)
    return _humanise(plain) if human else plain


_SIZES = frozenset({"length", "align"})
_ADDRESSES = frozenset({"start", "offset"})


def _humanise(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _humanise(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if key in ("dpas", "extents") and len(value) == 2 and all(type(v) is int for v in value):
            return [hex(value[0]), human_size(value[1])]
        return [_humanise(item, key) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        if key.endswith("_bytes") or key in _SIZES:
            return human_size(value)
        if key in _ADDRESSES:
            return hex(value)
        if key.endswith("_ns"):
            return date(value)
    return value


def show_json(plain: Any) -> None:
    """Indented on a terminal, where somebody reads it; on one line elsewhere."""
    import msgspec

    data = msgspec.json.encode(plain)
    if sys.stdout.isatty():
        data = msgspec.json.format(data, indent=2)
    click.echo(data)


def show_table(rows: Iterable[Any], columns: Sequence[Column], *, wide: bool = False) -> None:
    """One line per row. On a terminal with colours where they are wanted (NO_COLOR is honoured)."""
    shown = [column for column in columns if wide or not column.wide]
    cells = [[column.cell(row) for column in shown] for row in rows]
    heads = [column.name for column in shown]
    if sys.stdout.isatty():
        _show_rich(heads, cells)
        return
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in [heads, *cells]:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _show_rich(heads: list[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in heads:
        # A tag that is cut short cannot be copied.
        table.add_column(head, no_wrap=head == "TAG", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    Console(highlight=False).print(table)


_STYLES = {
    "active": "green",
    "accepted": "green",
    "attached": "green",
    "ready": "green",
    "yes": "green",
    "doubt": "yellow",
    "releasing": "yellow",
    "sanitising": "yellow",
    "unknown": "yellow",
    "lost": "red",
    "quarantined": "red",
    "refused": "red",
    "no": "red",
}


def _style(cell: str) -> str:
    return _STYLES.get(cell, "")


def show_fields(pairs: Iterable[tuple[str, str]]) -> None:
    """One thing, a field per line; empty ones are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        head, *rest = value.split("\n")
        click.echo(f"{name.ljust(width)}  {head}")
        for line in rest:
            click.echo(f"{' ' * width}  {line}")


def problem_document(error: TagmemError, exit_code: int) -> dict[str, Any]:
    """The orchestrator's problem document, or one of the same form for an error of ours."""
    problem = getattr(error, "problem", None)
    if problem is not None:
        return {**to_plain(problem), "exit_code": exit_code}
    document = {
        "type": "about:blank",
        "title": type(error).__name__,
        "detail": str(error),
        "exit_code": exit_code,
    }
    if isinstance(error, InvalidInput):
        document.update(field=error.field, limit=error.limit, value=str(error.value))
    return document


def joined(items: Iterable[str], empty: str = "-") -> str:
    """`a, b`, or a dash."""
    return ", ".join(items) or empty


def yes(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"
