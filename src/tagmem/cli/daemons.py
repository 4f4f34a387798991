"""Starts what runs on: the daemons, and the system of `up`, `down` and `demo`. Loaded only when
asked for.

The daemons are put together in `tagmem/programs.py`, the one place where real clocks, sockets and
stores meet.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from tagmem.cli.base import Command, Size, state_dir, state_dir_option


def _start(module: str, function: str, *arguments: Any, **options: Any) -> None:
    """Call one of the programs; what it returns is the exit code (None: 0)."""
    code = getattr(import_module(module), function)(*arguments, **options)
    if code:
        raise click.exceptions.Exit(code)


def run_host(config: Path) -> None:
    """Be a host's agent until told to stop."""
    _start("tagmem.programs", "host", config)


def run_appliance(config: Path) -> None:
    """Be an appliance until told to stop."""
    _start("tagmem.programs", "appliance", config)


@click.command(
    "orchestrator",
    cls=Command,
    short_help="Be the orchestrator.",
    example="tagmem orchestrator --config orchestrator.toml",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Its configuration; the options below win over it.",
)
@click.option("--listen", metavar="URL", help="http://HOST:PORT or unix:/PATH for the API.")
@click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Where its database is."
)
def orchestrator(config: Path | None, listen: str | None, state_dir: Path | None) -> None:
    """Be the orchestrator: who may hold what, kept durably, over an HTTP API."""
    given = {"listen": listen, "state_dir": str(state_dir) if state_dir else None}
    overrides = {name: value for name, value in given.items() if value is not None}
    _start("tagmem.programs", "orchestrator", config, overrides)


@click.command(
    "up",
    cls=Command,
    short_help="Start a whole system here.",
    example="tagmem up --state-dir ./state",
)
@click.option(
    "--head-room",
    type=Size(),
    help="Leave so much in front of each tag, for VMs: 2MiB (see docs/migration.md).",
)
@state_dir_option
def up(head_room: int | None, **options: Path | None) -> None:
    """Start a whole system here and leave it running: appliance, orchestrator, three hosts."""
    _start("tagmem.demo.main", "up", state_dir(options["state_dir"]), head_room)


@click.command("down", cls=Command, short_help="End it.", example="tagmem down --state-dir ./state")
@click.option(
    "--purge", is_flag=True, help="Remove the folder too: configuration, logs, databases."
)
@state_dir_option
def down(purge: bool, **options: Path | None) -> None:
    """End what `tagmem up` started: what is held is given back, the media are removed."""
    _start("tagmem.demo.main", "down", state_dir(options["state_dir"]), purge)


@click.command(
    "demo", cls=Command, short_help="The seven steps, with a real memcached.", example="tagmem demo"
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep its state here. [default: a folder that is removed at the end]",
)
@click.option("--vm", is_flag=True, help="With memcached inside a virtual machine.")
@click.option("--chaos", type=int, metavar="SEED", hidden=True)
def demo(state_dir: Path | None, vm: bool, chaos: int | None) -> None:
    """Run the seven steps with a real memcached, telling what happens."""
    # --chaos: `kill -9` of daemons while it runs; which ones and when follows from the seed.
    _start("tagmem.demo.main", "demo", state_dir, chaos, vm=vm)
