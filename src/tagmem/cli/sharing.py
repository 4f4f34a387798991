"""`tagmem capacity hand-over`, `publish` and `retain`: what shared capacity can do beyond others.

Apart from `capacity`, which every start of `tagmem` loads, as few users share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from tagmem.cli.base import Command, Settings, api_options, host_option, tag_argument
from tagmem.cli.capacity import (
    ladder_options,
    rung_deadlines,
    show_one,
    split_names,
    wait_options,
)

if TYPE_CHECKING:
    from tagmem.client.session import Client
    from tagmem.wire.rest import CapacityDocument


@click.command("hand-over", cls=Command, example="tagmem capacity hand-over $TAG --from w1 --to w2")
@tag_argument
@host_option("--from", "source", required=True, help="The host that has it, and lets go of it.")
@host_option("--to", "target", required=True, help="The host that takes it.")
@ladder_options[0]
@ladder_options[1]
@wait_options[0]
@wait_options[1]
@wait_options[2]
@api_options
def hand_over(
    settings: Settings,
    tag: str,
    source: str,
    target: str,
    up_to: str | None,
    rung_timeout: tuple[str, ...],
    wait: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """Hand shared capacity with its contents from one host to another; no byte is copied.

    The next host accepts it before the last one lets go. When the next one refuses, the last one
    keeps it. What ends the access of the last host is the same ladder as in a release.
    """
    deadlines = rung_deadlines(rung_timeout)

    def begin(client: Client) -> CapacityDocument:
        return client.hand_over(tag, source, target, up_to=up_to or "", deadlines=deadlines)

    _move(settings, tag, begin, (target,), wait=wait, timeout=timeout, quiet=quiet)


@click.command("publish", cls=Command, example="tagmem capacity publish $TAG --to w2,w3")
@tag_argument
@host_option(
    "--to",
    "hosts",
    multiple=True,
    required=True,
    help="Who is to read it, beside the host that loaded it: w2,w3, or repeated.",
)
@ladder_options[0]
@ladder_options[1]
@wait_options[0]
@wait_options[1]
@wait_options[2]
@api_options
def publish(
    settings: Settings,
    tag: str,
    hosts: tuple[str, ...],
    up_to: str | None,
    rung_timeout: tuple[str, ...],
    wait: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """End the writing of read-only capacity; then everybody reads it, and nobody writes.

    The host that loaded it lets go first, which ends what runs there on the tag; it reads with the
    others afterwards. Of what is published already, more hosts may be let to read.
    """
    deadlines = rung_deadlines(rung_timeout)
    named = tuple(split_names(hosts))

    def begin(client: Client) -> CapacityDocument:
        return client.publish(tag, named, up_to=up_to or "", deadlines=deadlines)

    _move(settings, tag, begin, named, wait=wait, timeout=timeout, quiet=quiet)


def _move(
    settings: Settings,
    tag: str,
    begin: Callable[[Client], CapacityDocument],
    hosts: tuple[str, ...],
    *,
    wait: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """Begin a move, wait for its end, and show what came of it."""
    from tagmem.cli.progress import Progress, moved, pending

    with settings.client() as client:
        if not wait:
            show_one(begin(client), settings)
            return
        progress = Progress(client, tag, quiet=quiet, timeout=timeout)
        document = begin(client)

        def look() -> CapacityDocument | None:
            nonlocal document
            document = client.capacity(tag)
            return moved(document, hosts)

        done = progress.until(look, lambda: f"not done in {timeout:g} s: {pending(document)}")
        show_one(done, settings)


@click.command("retain", cls=Command, example="tagmem capacity retain $TAG")
@tag_argument
@click.option("--off", is_flag=True, help="No longer: what no host has is wiped now.")
@api_options
def retain(settings: Settings, tag: str, off: bool) -> None:
    """Keep the bytes of shared capacity when no host has it, until it is released or --off."""
    with settings.client() as client:
        show_one(client.retain(tag, not off), settings)
