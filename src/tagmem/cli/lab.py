"""`tagmem lab`: guests from Debian packages, for the tests, the comparison, and people who want to
look inside one. Everything is unpacked into a cache folder; nothing is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tagmem.cli.base import Group, Size
from tagmem.cli.render import Column, show_json, show_table, size_writer

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    help="Table on a terminal, JSON elsewhere, unless said.",
)
qemu_choice = click.Choice(["10.0", "11.1"])


def _tell(line: str) -> None:
    click.echo(f"lab: {line}", err=True)


@click.group(
    "lab",
    cls=Group,
    short_help="Guests made from Debian packages.",
    example="tagmem lab guest run -- uname -r",
)
def lab() -> None:
    """Guests and QEMUs made from Debian packages, in a cache folder ($TAGMEM_CACHE).

    Mirrors are taken from this machine's apt configuration. Needs no root.
    """


@lab.group(
    "guest",
    cls=Group,
    short_help="Bring what guests need, see it, boot one.",
    example="tagmem lab guest prepare",
)
def guest() -> None:
    """Bring both QEMUs and the guest image, see what is there, boot a guest."""


@guest.command(
    "prepare",
    short_help="Bring both QEMUs and make the guest image.",
    example="tagmem lab guest prepare --refresh",
)
@click.option(
    "--qemu", "names", type=qemu_choice, multiple=True, help="Only this one; may be repeated."
)
@click.option("--edk2", is_flag=True, help="UEFI firmware too: specific-purpose memory needs it.")
@click.option("--refresh", is_flag=True, help="Look for newer packages.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@output_option
def prepare(
    names: tuple[str, ...], edk2: bool, refresh: bool, quiet: bool, output: str | None
) -> None:
    """Bring what guests need into the cache folder. Quick when it is there."""
    from tagmem.lab import firmware, image, packages, qemus

    report = packages.silent if quiet else _tell
    for name in names or qemus.NAMES:
        qemus.get(name, report=report, refresh=refresh)
    image.get(report=report, refresh=refresh)
    if edk2:
        firmware.get(report=report)
    _show(output)


@guest.command(
    "list", short_help="What is in the cache folder.", example="tagmem lab guest list -o json"
)
@output_option
def list_(output: str | None) -> None:
    """Show which QEMUs and which guest image are there, and how large. Downloads nothing."""
    _show(output)


@guest.command(
    "run",
    short_help="Boot a guest, run a command in it, end it.",
    example="tagmem lab guest run --qemu 10.0 -- ndctl list",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--qemu", type=qemu_choice, default="11.1", show_default=True)
@click.option("--memory", type=Size(), default="1GiB", metavar="SIZE", show_default=True)
@click.option("--cpus", type=int, default=2, show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.argument("command", nargs=-1, required=True)
def run(qemu: str, memory: int, cpus: int, quiet: bool, command: tuple[str, ...]) -> None:
    """Boot a guest and run COMMAND in it; exits as the command did. The guest ends with it."""
    import asyncio

    from tagmem.lab.boot import Lab
    from tagmem.lab.channel import Ran
    from tagmem.lab.packages import silent
    from tagmem.lab.spec import GuestSpec

    report = silent if quiet else _tell

    async def whole() -> Ran:
        spec = GuestSpec(qemu=qemu, memory_bytes=memory, cpus=cpus)
        async with Lab(report=report).guest(spec) as booted:
            report(f"booted under {booted.accel.upper()} in {booted.boot_seconds:.1f} s")
            return await (await booted.agent()).run(command)

    ran = asyncio.run(whole())
    for data, stream in ((ran.output, sys.stdout), (ran.errors, sys.stderr)):
        stream.buffer.write(data)
        stream.flush()
    if ran.code:
        raise click.exceptions.Exit(ran.code)


@lab.command(
    "compare",
    short_help="Measure every way of presenting a tag to a VM.",
    example="tagmem lab compare --only pmem --qemu 10.0",
)
@click.option("--only", multiple=True, metavar="NAME", help="Only this option; may be repeated.")
@click.option(
    "--qemu", "names", type=qemu_choice, multiple=True, help="Only on this one; may be repeated."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KEY",
    help="Only this column of the rows, as the JSON calls it; may be repeated.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs"),
    show_default=True,
    help="Where comparison.md, .json and .svg are written.",
)
@click.option("--render", is_flag=True, help="Measure nothing; write the recorded run again.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@output_option
def compare(
    only: tuple[str, ...],
    names: tuple[str, ...],
    columns: tuple[str, ...],
    docs: Path,
    render: bool,
    quiet: bool,
    output: str | None,
) -> None:
    """Measure every way of presenting a tag to a VM, on real guests, and write the comparison.

    Takes about ten minutes under emulation, one guest at a time. With --only, --qemu
    and --column, what an earlier run measured and this one does not stays.
    """
    import asyncio

    from tagmem.base.errors import InvalidInput
    from tagmem.lab import compare as comparing
    from tagmem.lab import report as reporting
    from tagmem.lab.packages import silent

    for name in only:
        if name not in comparing.ORDER:
            raise InvalidInput("only", f"one of {', '.join(comparing.ORDER)}", name)
    for key in columns:
        known = [heading.key for heading in reporting.HEADINGS]
        if key not in known:
            raise InvalidInput("column", f"one of {', '.join(known)}", key)
    before = _recorded(docs)
    if render and before is None:
        raise InvalidInput("docs", "a folder with comparison.json", str(docs))
    made = before
    if not render:
        made = asyncio.run(
            comparing.compare(
                only or comparing.ORDER,
                names or comparing.QEMUS,
                columns,
                before if only or names or columns else None,
                lambda grown: _write(docs, grown),
                silent if quiet else _tell,
            )
        )
    assert made is not None
    _write(docs, made)
    _show_comparison(made, output)


@lab.command(
    "gap",
    short_help="Measure what virtio-mem lacks for tagged memory.",
    example="tagmem lab gap --qemu 10.0",
)
@click.option("--qemu", "name", type=qemu_choice, default="11.1", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@output_option
def gap(name: str, quiet: bool, output: str | None) -> None:
    """Measure what docs/virtio-mem-tags.md argues from: content, identity, removal."""
    import asyncio

    from tagmem.cli.render import to_plain
    from tagmem.lab import virtiomem
    from tagmem.lab.boot import Lab
    from tagmem.lab.packages import silent

    report = silent if quiet else _tell
    found = asyncio.run(virtiomem.gap(Lab(report=report), name, report))
    if (output or ("table" if sys.stdout.isatty() else "json")) == "json":
        show_json(to_plain(found))
        return
    columns = [Column("WHAT", lambda row: row.what), Column("SEEN", lambda row: row.seen)]
    show_table(found, columns)


def _recorded(docs: Path) -> Any:
    import msgspec

    from tagmem.lab.report import Comparison

    path = docs / "comparison.json"
    return msgspec.json.decode(path.read_bytes(), type=Comparison) if path.exists() else None


def _write(docs: Path, made: Any) -> None:
    import msgspec

    from tagmem.lab import report

    docs.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
    texts = {"md": report.page(made).encode(), "svg": report.plot(made).encode(), "json": data}
    for end, text in texts.items():
        (docs / f"comparison.{end}").write_bytes(text)


def _show_comparison(made: Any, output: str | None) -> None:
    from tagmem.cli.render import to_plain
    from tagmem.lab import report

    if (output or ("table" if sys.stdout.isatty() else "json")) == "json":
        show_json(to_plain(made))
        return
    for title, headings in report.GROUPS:
        click.echo(title)
        columns = [Column("OPTION", report.label)]
        for heading in headings:
            columns.append(Column(heading.title.upper(), report.teller(heading.key)))
        show_table(made.rows, columns)
    click.echo(report.recommendation(made))


def _show(output: str | None) -> None:
    rows = _inventory()
    if (output or ("table" if sys.stdout.isatty() else "json")) == "json":
        show_json(rows)
        return
    size = size_writer(human=False)
    show_table(
        rows,
        [
            Column("WHAT", lambda row: str(row["what"])),
            Column("VERSION", lambda row: str(row["version"] or "-")),
            Column("DOWNLOAD", lambda row: size(row["download_bytes"])),
            Column("UNPACKED", lambda row: size(row["unpacked_bytes"])),
            Column("WHERE", lambda row: str(row["path"] or "not here")),
        ],
    )


def _inventory() -> list[dict[str, Any]]:
    from tagmem.lab import image, qemus

    rows = []
    for name in qemus.NAMES:
        qemu = qemus.present(name)
        rows.append(
            _row(f"qemu {name}", qemu.version, qemu, qemu.root)
            if qemu
            else _row(f"qemu {name}", "", None, None)
        )
    made = image.present()
    rows.append(
        _row("guest", made.release, made, made.archive) if made else _row("guest", "", None, None)
    )
    return rows


def _row(what: str, version: str, found: Any, path: Path | None) -> dict[str, Any]:
    return {
        "what": what,
        "version": version,
        "download_bytes": found.download_bytes if found else 0,
        "unpacked_bytes": found.unpacked_bytes if found else 0,
        "path": str(path) if path else "",
    }
