"""`tagmem run` and `tagmem stop`: a command on a tag, through the orchestrator or here.

Through the orchestrator the host's agent starts it, in its own cgroup, and stops it when the tag is
to be given back. `--local` replaces this process by the command and tells nobody: for trying
things, and for schedulers that start processes themselves.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

import click

from tagmem.base.errors import Conflict, InvalidInput, TagmemError
from tagmem.cli.base import (
    EXIT_FAILED,
    Command,
    Seconds,
    Settings,
    api_options,
    configured_url,
    fail,
    host_option,
    tag_argument,
)
from tagmem.cli.render import show_json, to_plain

if TYPE_CHECKING:
    from tagmem.cli.progress import Progress
    from tagmem.client.session import Client
    from tagmem.wire.rest import AttachmentDocument, CapacityDocument, WorkloadDocument

EXIT_CANNOT_RUN, EXIT_NO_COMMAND, EXIT_INTERRUPTED = 126, 127, 130
_RELAY_BYTES = 64 * 1024
_RELAY_SECONDS = 0.05


class Run(Command):
    """Ends its own options at `--`; without one, at the first word of the command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, knowing where the command begins."""
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@click.command(
    "run",
    cls=Run,
    short_help="Run a command on a tag.",
    example="tagmem run $TAG -- memcached -u nobody -e {dax} -m 1024",
)
@tag_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@host_option(help="Where, when several hosts hold the tag.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Set in its environment.")
@click.option("--as-file", is_flag=True, help="Let it take its DAX device for a file.")
@click.option("-d", "--detach", is_flag=True, help="Return when it runs; `tagmem stop` ends it.")
@click.option("--local", is_flag=True, help="Run it here, in place of tagmem.")
@click.option(
    "--timeout",
    type=Seconds(),
    default="60s",
    show_default=True,
    help="How long to wait for the tag and for the start, not for the end.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@api_options
def run(
    settings: Settings,
    tag: str,
    command: tuple[str, ...],
    host: str | None,
    env: tuple[str, ...],
    as_file: bool,
    detach: bool,
    local: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """Run COMMAND on TAG, and exit with its exit code.

    `{dax}`, `{tag}` and `{size}` in arguments and environment are filled in; TAGMEM_DAX, TAGMEM_TAG
    and TAGMEM_SIZE are set. Without an orchestrator, a tag that is on this host is run here. 126:
    it cannot be run; 127: no such command.

    A DAX device refuses ftruncate, fsync and msync, which programs with a memory file call:
    `--as-file` answers these for it.
    """
    environment = dict(_variable(item) for item in env)
    if as_file:
        from tagmem.client.launch import AS_FILE

        environment |= [AS_FILE]
    if local or not (settings.url or configured_url(settings.state_dir)):
        _run_here(tag, command, environment, timeout, insist=local, settings=settings)
    from tagmem.cli.progress import Progress

    with settings.client() as client:
        progress = Progress(client, tag, quiet=quiet, timeout=timeout)
        attachment = _attachment(client, progress, tag, host, timeout)
        launched = _launch(client, progress, tag, attachment.host, command, environment, timeout)
        if detach:
            if settings.output == "json":
                show_json(to_plain(launched, human=settings.human))
            else:
                click.echo(f"running as pid {launched.pid} on {attachment.host}")
            return
        progress.say(f"running as pid {launched.pid} on {attachment.host}")
        ended = _follow(client, tag, attachment.host, launched, quiet)
    if ended.state == "failed":
        fail(
            f"it ended badly on {attachment.host}: {ended.reason or 'no reason given'}", EXIT_FAILED
        )
    raise click.exceptions.Exit(shell_code(ended.exit_code))


@click.command(
    "stop", cls=Command, short_help="Stop what runs on a tag.", example="tagmem stop $TAG"
)
@tag_argument
@host_option(help="Where, when several hosts run something on the tag.")
@click.option("--wait/--no-wait", default=True, help="Wait until it has ended. [default: wait]")
@click.option("--timeout", type=Seconds(), default="60s", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@api_options
def stop(
    settings: Settings, tag: str, host: str | None, wait: bool, timeout: float, quiet: bool
) -> None:
    """Stop the command that runs on TAG; the capacity stays attached."""
    from tagmem.cli.progress import Progress

    with settings.client() as client:
        progress = Progress(client, tag, quiet=quiet, timeout=timeout)
        attachment = _only(client.capacity(tag), host, running=True)
        workload = attachment.workload
        if workload is None:
            raise Conflict(f"nothing runs on tag {tag} on {attachment.host}")
        client.stop(tag, attachment.host)
        if wait:
            workload = progress.until(
                lambda: _ended(client, tag, attachment.host, workload.id),
                lambda: f"still running after {timeout:g} s",
            )
    if settings.output == "json":
        show_json(to_plain(workload, human=settings.human))
    elif wait:
        code = "" if workload.exit_code is None else f" with {workload.exit_code}"
        click.echo(f"{workload.state}{code}: {tag} on {attachment.host}")


# ---- through the orchestrator


def _attachment(
    client: Client, progress: Progress, tag: str, host: str | None, timeout: float
) -> AttachmentDocument:
    """The attachment to run on, once it is ready there."""
    from tagmem.cli.progress import pending, ready

    chosen = _only(client.capacity(tag), host, running=False).host
    last: CapacityDocument | None = None

    def look() -> AttachmentDocument | None:
        nonlocal last
        last = client.capacity(tag)
        done = ready(last, (chosen,))
        return _only(done, chosen, running=False) if done else None

    return progress.until(look, lambda: f"not ready in {timeout:g} s: {pending(last)}")


def _only(document: CapacityDocument, host: str | None, *, running: bool) -> AttachmentDocument:
    """The attachment on `host`, or the only one there is. Raises InvalidInput or Conflict."""
    there = [a for a in document.attachments if a.state not in ("released", "refused")]
    if host is None and running and len(there) > 1:
        there = [a for a in there if a.workload and a.workload.state in ("pending", "running")]
    found = [a for a in there if host is None or a.host == host]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(a.host for a in found)
        raise InvalidInput("host", f"one of {names}, which all hold the tag", host)
    holders = ", ".join(a.host for a in there) or "no host"
    raise Conflict(
        f"tag {document.tag} is held by {holders}" + (f", not by {host}" if host else "")
    )


def _launch(
    client: Client,
    progress: Progress,
    tag: str,
    host: str,
    command: tuple[str, ...],
    environment: dict[str, str],
    timeout: float,
) -> WorkloadDocument:
    """Start it, and wait until it runs or has ended."""
    import uuid

    from tagmem.wire.rest import WorkloadRequest

    name = f"run-{uuid.uuid4().hex[:12]}"
    client.launch(tag, host, WorkloadRequest(command, environment, name))

    def look() -> WorkloadDocument | None:
        workload = _workload(client, tag, host, name)
        return workload if workload and workload.state != "pending" else None

    return progress.until(look, lambda: f"host {host} has not started it in {timeout:g} s")


def _workload(client: Client, tag: str, host: str, name: str) -> WorkloadDocument | None:
    document = client.capacity(tag)
    for attachment in document.attachments:
        workload = attachment.workload
        if attachment.host == host and workload is not None and workload.id == name:
            return workload
    return None


def _ended(client: Client, tag: str, host: str, name: str) -> WorkloadDocument | None:
    workload = _workload(client, tag, host, name)
    if workload is None:
        raise Conflict(f"the workload is gone: tag {tag} was taken from {host}")
    return workload if workload.state in ("exited", "failed") else None


def _follow(
    client: Client, tag: str, host: str, launched: WorkloadDocument, quiet: bool
) -> WorkloadDocument:
    """Relay its output where the log can be read, until it ends. Ctrl-C stops it, a second one
    leaves it.
    """
    from tagmem.cli.progress import Progress

    relay = _Relay(launched.log_path) if launched.log_path else None
    progress = Progress(client, tag, quiet=quiet, timeout=None)
    if relay is not None and relay.readable:
        relay.start()
    elif launched.log_path:
        progress.say(f"its output is on {host}: {launched.log_path}")
    try:
        while True:
            try:
                return progress.until(
                    lambda: _ended(client, tag, host, launched.id), lambda: "still running"
                )
            except KeyboardInterrupt:
                client.close()
                progress.say("stopping it; Ctrl-C again leaves it running")
                client.stop(tag, host)
    finally:
        if relay is not None:
            relay.finish()


class _Relay(threading.Thread):
    """Copies a growing log file to stdout, byte for byte."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True, name="relay")
        self._path = path
        self._ended = threading.Event()

    @property
    def readable(self) -> bool:
        """Whether the log is on this machine, and may be read."""
        return os.access(self._path, os.R_OK)

    def run(self) -> None:
        """Copy until told that nothing more comes, then what is left."""
        with open(self._path, "rb") as log:
            last = False
            while True:
                data = log.read(_RELAY_BYTES)
                if data:
                    click.echo(data, nl=False)
                elif last:
                    return
                else:
                    last = self._ended.wait(_RELAY_SECONDS)

    def finish(self) -> None:
        """The workload has ended: copy the rest and stop."""
        self._ended.set()
        if self.is_alive():
            self.join(5.0)


def shell_code(code: int | None) -> int:
    """An exit code as shells have it: a signal N is 128 + N."""
    if code is None:
        return EXIT_FAILED
    return code if code >= 0 else 128 - code


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidInput("env", "NAME=VALUE", text)
    return name, value


# ---- here


def _run_here(
    tag: str,
    command: tuple[str, ...],
    environment: dict[str, str],
    timeout: float,
    *,
    insist: bool,
    settings: Settings,
) -> NoReturn:
    """Become the command. Without `insist`, only when the tag is here; else say what is missing."""
    from tagmem.base.ids import parse_tag
    from tagmem.client.launch import become
    from tagmem.client.locate import find

    if not insist and find(parse_tag(tag)) is None:
        settings.client()  # raises: no orchestrator, and no such tag here
    sys.stdout.flush()
    try:
        become(tag, command, environment, timeout=timeout if insist else 0)
    except TagmemError:
        raise  # some are OSErrors too
    except FileNotFoundError:
        fail(f"no such command: {command[0]}", EXIT_NO_COMMAND)
    except OSError as error:
        fail(f"cannot run {command[0]}: {error.strerror}", EXIT_CANNOT_RUN)
