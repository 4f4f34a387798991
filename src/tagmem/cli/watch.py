"""`tagmem events` and `tagmem explain`: what has happened, and where a request would go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tagmem.base.errors import InvalidInput
from tagmem.cli.base import (
    EXIT_UNAVAILABLE,
    Command,
    Seconds,
    Settings,
    Size,
    api_options,
    host_option,
)
from tagmem.cli.render import Column, date, show_json, show_table, size_writer, to_plain

if TYPE_CHECKING:
    from tagmem.client.session import Client
    from tagmem.wire.rest import EventDocument


@click.command(
    "events",
    cls=Command,
    short_help="What has happened, and happens.",
    example="tagmem events -f --since 5m",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens; Ctrl-C ends it.")
@click.option(
    "--since",
    metavar="NUMBER|DURATION",
    help="After this event's number, or since 10s, 5m, 1h ago. [default: all; with -f: from now]",
)
@click.option("--subject", help="Only about this tag, host or appliance.")
@api_options
def events(settings: Settings, follow: bool, since: str | None, subject: str | None) -> None:
    """Show what has happened. JSON is one array, and with -f one document per line."""
    subjects = frozenset({subject}) if subject else frozenset()
    with settings.client() as client:
        after, not_before_ns = _since(client, since, follow)
        shown = _chosen(client, after, not_before_ns, subjects, follow)
        if settings.output == "json":
            if follow:
                for event in shown:
                    _show_line(event, settings)
            else:
                show_json(to_plain(list(shown), human=settings.human))
            return
        for event in shown:
            from tagmem.cli.progress import event_line

            click.echo(
                f"{date(event.time_ns)}  {event.id:>6}  {event.subject}  {event_line(event)}"
            )


def _show_line(event: EventDocument, settings: Settings) -> None:
    import msgspec

    click.echo(msgspec.json.encode(to_plain(event, human=settings.human)))


def _since(client: Client, since: str | None, follow: bool) -> tuple[int, int]:
    """(after this number, not before this time)."""
    if since is None:
        return (client.last_event() if follow else 0), 0
    if since.isascii() and since.isdigit():
        return int(since), 0
    if not since[-1:].isalpha():
        raise InvalidInput("since", "an event's number, or a duration such as 5m", since)
    seconds = Seconds().convert(since, None, None)
    return 0, time.time_ns() - int(seconds * 1_000_000_000)


def _chosen(
    client: Client, after: int, not_before_ns: int, subjects: frozenset[str], follow: bool
) -> Iterator[EventDocument]:
    from tagmem.client.session import concerns

    source = client.events(after) if follow else client.history(after)
    for event in source:
        if event.time_ns >= not_before_ns and (not subjects or concerns(event, subjects)):
            yield event


@click.command(
    "explain",
    cls=Command,
    short_help="Where a request would go, and why.",
    example="tagmem explain 2GiB --host w1",
)
@click.argument("size", type=Size())
@host_option(multiple=True, help="The host that is to hold it; may be repeated.")
@click.option("--share", default="none", show_default=True)
@click.option("--untagged", is_flag=True, help="Ordinary memory; its return is not guaranteed.")
@click.option("--appliance", default="", metavar="NAME", help="Only from this appliance.")
@click.option("--region", type=int, help="Only from this DC region.")
@click.option("--scatter", is_flag=True, help="Several extents will do where one does not fit.")
@api_options
def explain(
    settings: Settings,
    size: int,
    host: tuple[str, ...],
    share: str,
    untagged: bool,
    appliance: str,
    region: int | None,
    scatter: bool,
) -> None:
    """Say where SIZE bytes would be placed, and why not elsewhere; nothing is changed.

    Exits with 6 when they fit nowhere now.
    """
    from tagmem.cli.capacity import request_for

    request = request_for(size, host, share, untagged, "", appliance, region, scatter)
    with settings.client() as client:
        document = client.explain(request)
    if settings.output == "json":
        show_json(to_plain(document, human=settings.human))
    else:
        write = size_writer(settings.human)
        click.echo(document.sentence)
        click.echo()
        columns = [
            Column("APPLIANCE", lambda c: c.appliance),
            Column("REGION", lambda c: str(c.region)),
            Column("FREE", lambda c: write(c.free_bytes)),
            Column("LARGEST", lambda c: write(c.largest_free_bytes)),
            Column("VERDICT", lambda c: c.verdict),
        ]
        show_table(document.candidates, columns)
        for extent in document.extents:
            click.echo(f"extent {extent.sequence}: {extent.start:#x} {write(extent.length)}")
    if not document.fits:
        raise click.exceptions.Exit(EXIT_UNAVAILABLE)
