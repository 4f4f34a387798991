"""`tagmem shared`: what lies in a shared tag, told on a host that has it.

It asks no orchestrator: the catalogue is in the memory itself.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from tagmem.cli.base import Command, Group, tag_argument


@click.group(
    "shared",
    cls=Group,
    short_help="Objects in shared memory, on a host that has it.",
    example="tagmem run $TAG --host w2 -- tagmem shared list $TAG",
)
def shared() -> None:
    """What lies in a shared tag. These commands run on a host that has it, or in a workload."""


def _local_options(function: Any) -> Any:
    output = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "wide"]),
        help="Table on a terminal, JSON elsewhere, unless said.",
    )
    run_dir = click.option(
        "--run-dir", metavar="DIR", help="The host's run directory. [$TAGMEM_RUN_DIR; /run/tagmem]"
    )
    return output(run_dir(function))


@shared.command("list", cls=Command, example="tagmem shared list $TAG")
@tag_argument
@_local_options
def list_objects(tag: str, run_dir: str | None, output: str | None) -> None:
    """List the objects of a tag's catalogue, oldest first.

    Nothing is loaded but the catalogue: objects are not verified.
    """
    from tagmem.base.units import format_size
    from tagmem.cli.render import Column, show_json, show_table
    from tagmem.shared import objects

    with objects.open(tag, run_dir=run_dir, timeout=0) as found:
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind.name.lower(),
                "length_bytes": entry.length_bytes,
                "offset": entry.offset,
                "checksum": f"{entry.checksum:08x}",
            }
            for entry in found.entries.values()
        ]
        plain = {
            "tag": found.tag,
            "generation": found.generation,
            "coherence": found.coherence,
            "free_bytes": found.free_bytes,
            "objects": rows,
        }
    if _output(output) == "json":
        show_json(plain)
        return
    columns = [
        Column("NAME", lambda row: row["name"]),
        Column("KIND", lambda row: row["kind"]),
        Column("SIZE", lambda row: format_size(row["length_bytes"])),
        Column("OFFSET", lambda row: hex(row["offset"]), wide=True),
        Column("CRC-32", lambda row: row["checksum"], wide=True),
    ]
    show_table(rows, columns, wide=output == "wide")


@shared.command("famfs", cls=Command, example="tagmem shared famfs $TAG")
@tag_argument
@click.option("--prepare", is_flag=True, help="Put the DAX device into famfs mode (as root).")
@_local_options
def famfs(tag: str, prepare: bool, run_dir: str | None, output: str | None) -> None:
    """Say whether famfs can have a tag's DAX device on this host, and what is missing if not.

    `--prepare` binds the device to the kernel's fsdev_dax driver with daxctl; what the device holds
    is lost to a new file system. Without that driver nothing is done.
    """
    from tagmem.cli.render import joined, show_fields, show_json, to_plain, yes
    from tagmem.shared import famfs as way

    answer = (way.prepare if prepare else way.probe)(tag, run_dir=run_dir)
    if _output(output) == "json":
        show_json(to_plain(answer))
        return
    show_fields(
        [
            ("device", answer.device),
            ("famfs mode", yes(answer.prepared)),
            ("missing", joined(answer.missing[:1])),
            *(("", each) for each in answer.missing[1:]),
            *(("then", each) for each in answer.commands),
        ]
    )


def _output(given: str | None) -> str:
    return given or ("table" if sys.stdout.isatty() else "json")
