"""`tagmem guest`: the agent of a VM, for guests that have the whole package; a bare python3 starts
it as `python3 -m tagmem.guest`, with the same options.
"""

from __future__ import annotations

import click

from tagmem.cli.base import Command


@click.command(
    "guest",
    cls=Command,
    short_help="Be a guest's agent.",
    example="tagmem guest --channel /dev/virtio-ports/org.tagmem.agent.0",
)
@click.argument("action", required=False, type=click.Choice(["down"]))
@click.option(
    "--channel",
    metavar="PATH",
    help="Where the host is: a virtio-serial device, unix:PATH or vsock[:PORT]. "
    "[default: /dev/virtio-ports/org.tagmem.agent.0]",
)
@click.option("--run-dir", metavar="DIR", help="Where names are made. [default: /run/tagmem]")
@click.option("--no-exec", is_flag=True, help="Run no commands for the host.")
@click.option("--modules", is_flag=True, help="Load the modules of DAX devices, as udev would.")
def guest(
    action: str | None, channel: str | None, run_dir: str | None, no_exec: bool, modules: bool
) -> None:
    """Be the agent of this VM: find tagged memory, name it, run commands on it, prove its release.

    SIGTERM gives every tag back in order and ends; SIGINT ends the agent, and tags keep their
    names. `tagmem guest down` sends SIGTERM to the agent of this guest and waits for its end, as is
    to be done before `kexec -e`; it fails and names the tags that somebody still holds.
    """
    from tagmem.guest.__main__ import main

    given = [
        *([action] if action else []),
        *(["--channel", channel] if channel else []),
        *(["--run-dir", run_dir] if run_dir else []),
    ]
    given += [*(["--no-exec"] if no_exec else []), *(["--modules"] if modules else [])]
    code = main(given)
    if code:
        raise click.exceptions.Exit(code)
