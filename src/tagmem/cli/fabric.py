"""`tagmem host` and `tagmem appliance`: the machines and devices; with `--config` they are the
daemons themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tagmem.base.errors import InvalidInput
from tagmem.cli.base import Group, Settings, api_options
from tagmem.cli.daemons import run_appliance, run_host
from tagmem.cli.render import (
    Column,
    joined,
    show_fields,
    show_json,
    show_table,
    size_writer,
    to_plain,
    yes,
)

if TYPE_CHECKING:
    from tagmem.wire.rest import ApplianceDocument, HostDocument

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Start the daemon with this configuration.",
)
required_config = click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="The daemon's configuration.",
)


def _be(ctx: click.Context, config: Path | None, daemon: Callable[[Path], None], what: str) -> None:
    """A noun with --config and no verb is the daemon itself."""
    if ctx.invoked_subcommand is None:
        if config is None:
            raise click.UsageError(f"--config FILE starts {what}; else name a command", ctx)
        daemon(config)
    elif config is not None:
        raise click.UsageError(f"--config belongs to `{ctx.command_path} run`", ctx)


# ---- hosts


@click.group(
    "host",
    cls=Group,
    short_help="Hosts: list, show; or be a host's agent.",
    invoke_without_command=True,
    example="tagmem host --config host.toml",
)
@config_option
@click.pass_context
def host(ctx: click.Context, config: Path | None) -> None:
    """List and show hosts; with --config, be a host's agent."""
    _be(ctx, config, run_host, "the agent")


@host.command("run", example="tagmem host run --config host.toml")
@required_config
def host_run(config: Path) -> None:
    """Be a host's agent: answer offers, surface DAX devices, run and stop workloads."""
    run_host(config)


@host.command("list", example="tagmem host list")
@api_options
def host_list(settings: Settings) -> None:
    """List the hosts."""
    with settings.client() as client:
        found = client.hosts()
    if settings.output == "json":
        show_json(to_plain(found, human=settings.human))
        return
    columns = [
        Column("HOST", lambda h: h.id),
        Column("CONNECTED", lambda h: yes(h.connected)),
        Column("TAGS", lambda h: str(len(h.tags))),
        Column("LINKS", lambda h: _links(h.links)),
        Column("BOOT", lambda h: h.boot_id or "-", wide=True),
        Column("HELD", lambda h: joined(h.tags), wide=True),
    ]
    show_table(found, columns, wide=settings.output == "wide")


@host.command("show", example="tagmem host show w1")
@click.argument("name")
@api_options
def host_show(settings: Settings, name: str) -> None:
    """Show one host and the tags on it."""
    with settings.client() as client:
        document = client.host(name)
    _show_host(document, settings)


@host.command("register", example="tagmem host register w1 --link a0=1")
@click.argument("name")
@click.option(
    "--link", multiple=True, metavar="APPLIANCE=LD", help="Its LD-ID on an appliance; repeatable."
)
@api_options
def host_register(settings: Settings, name: str, link: tuple[str, ...]) -> None:
    """Name a host, and the LD under which each appliance knows it."""
    links = dict(_link(item) for item in link)
    with settings.client() as client:
        document = client.register_host(name, links)
    _show_host(document, settings)


def _show_host(document: HostDocument, settings: Settings) -> None:
    if settings.output == "json":
        show_json(to_plain(document, human=settings.human))
        return
    show_fields(
        [
            ("host", document.id),
            ("connected", yes(document.connected)),
            ("boot", document.boot_id),
            ("links", _links(document.links)),
            ("tags", "\n".join(document.tags)),
        ]
    )


def _links(links: dict[str, int]) -> str:
    return joined(f"{appliance}={ld}" for appliance, ld in sorted(links.items()))


def _link(text: str) -> tuple[str, int]:
    name, _, ld = text.partition("=")
    if not name or not ld.isascii() or not ld.isdigit():
        raise InvalidInput("link", "APPLIANCE=LD, as a0=1", text)
    return name, int(ld)


# ---- appliances


@click.group(
    "appliance",
    cls=Group,
    short_help="Appliances: list, show with a map; or be one.",
    invoke_without_command=True,
    example="tagmem appliance --config appliance.toml",
)
@config_option
@click.pass_context
def appliance(ctx: click.Context, config: Path | None) -> None:
    """List and show appliances with their extent maps; with --config, be one (emulated)."""
    _be(ctx, config, run_appliance, "the appliance")


@appliance.command("run", example="tagmem appliance run --config appliance.toml")
@required_config
def appliance_run(config: Path) -> None:
    """Be an emulated memory appliance: a multi-headed DCD with real bytes."""
    run_appliance(config)


@appliance.command("list", example="tagmem appliance list --human")
@api_options
def appliance_list(settings: Settings) -> None:
    """List the appliances."""
    with settings.client() as client:
        found = client.appliances()
    if settings.output == "json":
        show_json(to_plain(found, human=settings.human))
        return
    size = size_writer(settings.human)
    columns = [
        Column("APPLIANCE", lambda a: a.id),
        Column("STATE", lambda a: a.state),
        Column("SIZE", lambda a: size(a.size_bytes)),
        Column("FREE", lambda a: size(a.free_bytes)),
        Column(
            "LARGEST", lambda a: size(max((r.largest_free_bytes for r in a.regions), default=0))
        ),
        Column("HOSTS", lambda a: joined(sorted(a.hosts))),
        Column("REGIONS", lambda a: str(len(a.regions)), wide=True),
        Column("ADDRESS", lambda a: a.address, wide=True),
        Column("FAULT", lambda a: a.fault or "-", wide=True),
    ]
    show_table(found, columns, wide=settings.output == "wide")


@appliance.command("show", example="tagmem appliance show a0 -o wide")
@click.argument("name")
@api_options
def appliance_show(settings: Settings, name: str) -> None:
    """Show one appliance, its regions, and a map of what lies where.

    On the map capital letters are held, small ones offered or reserved; `.` is free, `~` being
    sanitised, `?` unknown, `!` quarantined. In JSON the map is the key `pools`.
    """
    with settings.client() as client:
        document = client.appliance(name)
        extent_map = client.appliance_map(name)
    if settings.output == "json":
        plain = to_plain(document, human=settings.human)
        plain["pools"] = to_plain(extent_map.pools, human=settings.human)
        show_json(plain)
        return
    _show_appliance(document, settings)
    import shutil

    from tagmem.cli.extents import draw

    width = shutil.get_terminal_size((100, 24)).columns
    click.echo()
    for line in draw(extent_map, width):
        click.echo(line)


@appliance.command(
    "register", example="tagmem appliance register a0 --address unix:/run/tagmem/a0/fm.sock"
)
@click.argument("name")
@click.option("--address", required=True, help="Its fabric-manager port.")
@api_options
def appliance_register(settings: Settings, name: str, address: str) -> None:
    """Name an appliance, and where its fabric-manager port is."""
    with settings.client() as client:
        document = client.register_appliance(name, address)
    _show_appliance(document, settings)


@appliance.command("refresh", example="tagmem appliance refresh a0")
@click.argument("name")
@api_options
def appliance_refresh(settings: Settings, name: str) -> None:
    """Compare with the appliance's own lists now."""
    with settings.client() as client:
        document = client.refresh_appliance(name)
    _show_appliance(document, settings)


@appliance.command("quarantine", example="tagmem appliance quarantine")
@api_options
def appliance_quarantine(settings: Settings) -> None:
    """List what lies on appliances and was not put there by this orchestrator."""
    with settings.client() as client:
        found = client.quarantine()
    if settings.output == "json":
        show_json(to_plain(found, human=settings.human))
        return
    size = size_writer(settings.human)
    columns = [
        Column("TAG", lambda q: q.tag),
        Column("APPLIANCE", lambda q: q.appliance),
        Column("REGION", lambda q: str(q.region)),
        Column("LD", lambda q: "-" if q.ld is None else str(q.ld)),
        Column("SIZE", lambda q: size(sum(length for _, length in q.extents))),
        Column("REASON", lambda q: q.reason),
    ]
    show_table(found, columns, wide=settings.output == "wide")


def _show_appliance(document: ApplianceDocument, settings: Settings) -> None:
    if settings.output == "json":
        show_json(to_plain(document, human=settings.human))
        return
    size = size_writer(settings.human)
    regions = []
    for region in document.regions:
        facts = [
            word
            for word, told in (
                ("sharable", region.sharable),
                ("hardware-coherent", region.hardware_coherent),
                ("read-only", region.read_only),
                ("sanitised on release", region.sanitise),
            )
            if told
        ]
        regions.append(
            f"{region.index}: {size(region.size_bytes)}, {size(region.free_bytes)} free "
            f"({size(region.largest_free_bytes)} in one piece), "
            f"block {size(region.block_bytes)}, pool {region.pool}"
            + (f", {', '.join(facts)}" if facts else "")
        )
    show_fields(
        [
            ("appliance", document.id),
            ("state", document.state),
            ("address", document.address),
            ("size", size(document.size_bytes)),
            ("free", size(document.free_bytes)),
            ("regions", "\n".join(regions)),
            ("hosts", _links(document.hosts)),
            ("fault", document.fault),
        ]
    )
