"""`tagmem capacity`: what users ask for and hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tagmem.base.errors import InvalidInput
from tagmem.cli.base import (
    Group,
    Seconds,
    Settings,
    Size,
    api_options,
    host_option,
    tag_argument,
)
from tagmem.cli.render import (
    Column,
    date,
    joined,
    show_fields,
    show_json,
    show_table,
    size_writer,
    to_plain,
    yes,
)

if TYPE_CHECKING:
    from tagmem.cli.progress import Progress
    from tagmem.client.session import Client
    from tagmem.wire.rest import (
        AttachmentDocument,
        CapacityDocument,
        CapacityRequest,
        MoveDocument,
    )

SHARING = ("none", "read-only", "hardware-coherent", "software-coherent")
RUNGS = ("ask", "stop", "detach", "restart", "fence", "force")
"""As in domain/records.py; a test compares them."""
STATES = ("reserved", "active", "retained", "releasing", "sanitising", "quarantined")

wait_options = (
    click.option("--wait/--no-wait", default=True, help="Wait until it is done. [default: wait]"),
    click.option(
        "--timeout",
        type=Seconds(),
        default="60s",
        show_default=True,
        help="How long to wait: 10, 500ms, 10s, 2m. It then still may happen.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
)


ladder_options = (
    click.option(
        "--up-to",
        type=click.Choice(RUNGS),
        help="How far the release may go: ask the workload, stop it, detach from guests, restart "
        "the host, fence it, forced release. [default: the orchestrator's]",
    ),
    click.option(
        "--rung-timeout",
        multiple=True,
        metavar="RUNG=DURATION",
        help="How long a rung may take, as stop=2s; may be repeated.",
    ),
)


@click.group(
    "capacity",
    cls=Group,
    short_help="Memory under a tag: create, list, show, release.",
    example="tagmem capacity list --host w1",
)
def capacity() -> None:
    """Create, list, show, share and release capacities: memory under a tag."""


@capacity.command("create", example="tagmem capacity create --size 2GiB --host w1")
@click.argument("bytes_", type=Size(), required=False, metavar="[SIZE]")
@click.option("--size", type=Size(), help="4096, 64M, 2G, 2GiB; all powers of 1024.")
@host_option(multiple=True, help="Offer it to this host; may be repeated. None: only reserve it.")
@click.option("--tag", help="Its UUID. A repeat of the same request is harmless. [default: new]")
@click.option("--share", type=click.Choice(SHARING), default="none", show_default=True)
@click.option("--untagged", is_flag=True, help="Ordinary memory; its return is not guaranteed.")
@click.option("--owner", default="", help="Whose it is.")
@click.option("--appliance", default="", metavar="NAME", help="Only from this appliance.")
@click.option("--region", type=int, help="Only from this DC region.")
@click.option("--retain", is_flag=True, help="Shared only: keep the bytes when no host has it.")
@click.option("--scatter", is_flag=True, help="Several extents will do where one does not fit.")
@click.option("--wait/--no-wait", default=True, help="Wait until it can be opened. [default: wait]")
@wait_options[1]
@wait_options[2]
@api_options
def create(
    settings: Settings,
    bytes_: int | None,
    size: int | None,
    host: tuple[str, ...],
    tag: str | None,
    share: str,
    untagged: bool,
    owner: str,
    appliance: str,
    region: int | None,
    retain: bool,
    scatter: bool,
    wait: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """Set memory aside under a tag, and offer it to hosts. SIZE may be given as --size too."""
    from tagmem.base.ids import parse_tag
    from tagmem.cli.progress import Progress, pending, ready

    named = parse_tag(tag) if tag else new_tag()
    wanted = bytes_ if size is None else size
    if wanted is None or None not in (bytes_, size):
        raise click.UsageError("say the size once: as SIZE, or with --size")
    request = request_for(
        wanted, host, share, untagged, owner, appliance, region, scatter, retain=retain
    )
    with settings.client() as client:
        if not wait or not request.hosts:
            show_one(client.create(request, named), settings)
            return
        progress = Progress(client, named, quiet=quiet, timeout=timeout)
        document = client.create(request, named)

        def look() -> CapacityDocument | None:
            nonlocal document
            document = client.capacity(named)
            return ready(document)

        done = progress.until(look, lambda: f"not ready in {timeout:g} s: {pending(document)}")
        for attachment in done.attachments:
            progress.ready(attachment)
        show_one(done, settings)


def new_tag() -> str:
    """A tag that nobody has."""
    import uuid

    return str(uuid.uuid4())


def request_for(
    size: int,
    hosts: tuple[str, ...],
    share: str,
    untagged: bool,
    owner: str,
    appliance: str,
    region: int | None,
    scatter: bool,
    *,
    retain: bool = False,
) -> CapacityRequest:
    """The API's request; hosts may be given as `w1,w2` too."""
    import msgspec

    from tagmem.wire.rest import CapacityRequest

    fields = {
        "size_bytes": size,
        "hosts": split_names(hosts),
        "tagged": not untagged,
        "sharing": share,
        "owner": owner,
        "appliance": appliance,
        "region": region,
        "contiguous": not scatter,
        "retain": retain,
    }
    try:
        return msgspec.convert(fields, CapacityRequest)
    except msgspec.ValidationError as error:
        raise InvalidInput("request", "within the API's limits", str(error)) from None


def split_names(items: tuple[str, ...]) -> list[str]:
    """Names given one by one, or several in one word: `w1,w2`."""
    return [name for item in items for name in item.split(",") if name]


@capacity.command("list", example="tagmem capacity list --state active -o wide")
@host_option(help="Only what is on this host.")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@click.option("--owner", help="Only this owner's.")
@click.option("--appliance", metavar="NAME", help="Only what lies on this appliance.")
@api_options
def list_capacities(
    settings: Settings,
    host: str | None,
    state: str | None,
    owner: str | None,
    appliance: str | None,
) -> None:
    """List capacities, in the order of their tags."""
    given = {"host": host, "state": state, "owner": owner, "appliance": appliance}
    with settings.client() as client:
        found = list(client.capacities(**{name: value for name, value in given.items() if value}))
    if settings.output == "json":
        show_json(to_plain(found, human=settings.human))
        return
    show_table(found, _columns(settings.human), wide=settings.output == "wide")


def _columns(human: bool) -> list[Column]:
    size = size_writer(human)
    return [
        Column("TAG", lambda c: c.tag),
        Column("SIZE", lambda c: size(c.size_bytes)),
        Column("STATE", lambda c: c.state),
        Column("HOSTS", lambda c: joined(_host_state(a) for a in c.attachments)),
        Column("SHARING", _sharing),
        Column("GUARANTEED", lambda c: yes(c.guaranteed)),
        Column("APPLIANCE", lambda c: c.appliance),
        Column("OWNER", lambda c: c.owner or "-"),
        Column("REGION", lambda c: str(c.region), wide=True),
        Column("EXTENTS", lambda c: str(len(c.extents)), wide=True),
        Column("WORKLOAD", lambda c: joined(_workload(a) for a in c.attachments), wide=True),
        Column("CREATED", lambda c: date(c.created_ns), wide=True),
        Column("REVISION", lambda c: str(c.revision), wide=True),
        Column("FAULT", lambda c: c.fault or "-", wide=True),
    ]


def _sharing(document: CapacityDocument) -> str:
    return document.sharing + (", published" if document.published else "")


def _host_state(attachment: AttachmentDocument) -> str:
    """`w1` when it is ready there, else `w1 (offered)`."""
    return attachment.host if attachment.ready else f"{attachment.host} ({attachment.state})"


def _workload(attachment: AttachmentDocument) -> str:
    workload = attachment.workload
    return f"{workload.state}: {workload.command[0]}" if workload and workload.command else "-"


@capacity.command("show", example="tagmem capacity show $TAG")
@tag_argument
@api_options
def show(settings: Settings, tag: str) -> None:
    """Show one capacity: its extents, its hosts, what runs on it, what holds it."""
    with settings.client() as client:
        show_one(client.capacity(tag), settings)


@capacity.command("attach", example="tagmem capacity attach $TAG --host w2")
@tag_argument
@host_option(required=True, help="The host to offer it to.")
@wait_options[0]
@wait_options[1]
@wait_options[2]
@api_options
def attach(
    settings: Settings, tag: str, host: str, wait: bool, timeout: float, quiet: bool
) -> None:
    """Offer a reserved or shared capacity to one more host."""
    from tagmem.cli.progress import Progress, pending, ready

    with settings.client() as client:
        if not wait:
            show_one(client.attach(tag, host), settings)
            return
        progress = Progress(client, tag, quiet=quiet, timeout=timeout)
        document = client.attach(tag, host)

        def look() -> CapacityDocument | None:
            nonlocal document
            document = client.capacity(tag)
            return ready(document, (host,))

        done = progress.until(look, lambda: f"not ready in {timeout:g} s: {pending(document)}")
        for attachment in done.attachments:
            if attachment.host == host:
                progress.ready(attachment)
        show_one(done, settings)


@capacity.command("release", example="tagmem capacity release $TAG --up-to stop")
@tag_argument
@host_option(default="", help="Only from this host. [default: from all, then to the pool]")
@ladder_options[0]
@ladder_options[1]
@wait_options[0]
@wait_options[1]
@wait_options[2]
@api_options
def release(
    settings: Settings,
    tag: str,
    host: str,
    up_to: str | None,
    rung_timeout: tuple[str, ...],
    wait: bool,
    timeout: float,
    quiet: bool,
) -> None:
    """Give a capacity back, and wait until its media are wiped and free.

    Nothing is freed because time has passed: a release that is stuck stays, and says who holds it.
    """
    from tagmem.cli.progress import Progress

    deadlines = rung_deadlines(rung_timeout)
    with settings.client() as client:
        progress = Progress(client, tag, quiet=quiet, timeout=timeout) if wait else None
        document = client.release(tag, host, up_to=up_to or "", deadlines=deadlines)
        if progress is not None and document is not None:
            document = _wait_released(client, progress, document, host, timeout)
        if document is not None:
            show_one(document, settings)
        elif settings.output == "json":
            show_json({"tag": tag, "host": host or None, "state": "released"})
        else:
            click.echo(f"released {tag}" + (f" on {host}" if host else ""))


def _wait_released(
    client: Client, progress: Progress, document: CapacityDocument, host: str, timeout: float
) -> CapacityDocument | None:
    """None when nothing is left of the capacity; else how it stands without `host`."""
    from tagmem.base.errors import Conflict, NotFound
    from tagmem.cli.progress import pending

    last = document

    def look() -> tuple[CapacityDocument | None] | None:
        nonlocal last
        try:
            last = client.capacity(document.tag)
        except NotFound:
            return (None,)
        if last.state == "quarantined":
            raise Conflict(f"tag {last.tag} is quarantined: {last.fault or 'see the events'}")
        over = [a for a in last.attachments if a.host == host and a.state != "released"]
        return (last,) if host and not over else None

    return progress.until(look, lambda: f"not released in {timeout:g} s: {pending(last)}")[0]


def rung_deadlines(items: tuple[str, ...]) -> dict[str, float]:
    """Seconds by rung, from `--rung-timeout`. Raises InvalidInput."""
    found: dict[str, float] = {}
    for text in items:
        rung, equals, duration = text.partition("=")
        if rung not in RUNGS or not equals:
            limit = f"RUNG=DURATION with one of {', '.join(RUNGS)}"
            raise InvalidInput("rung-timeout", limit, text)
        try:
            found[rung] = Seconds().convert(duration, None, None)
        except click.BadParameter:
            limit = "RUNG=DURATION with a duration such as 10, 500ms, 10s or 2m"
            raise InvalidInput("rung-timeout", limit, text) from None
    return found


def show_one(document: CapacityDocument, settings: Settings) -> None:
    """One capacity, in full."""
    if settings.output == "json":
        show_json(to_plain(document, human=settings.human))
        return
    size = size_writer(settings.human)
    pairs = [
        ("tag", document.tag),
        ("size", size(document.size_bytes)),
        ("state", document.state),
        ("guaranteed", yes(document.guaranteed)),
        ("sharing", _sharing(document)),
        ("retained", _retained(document)),
        ("move", _move_text(document.move)),
        ("owner", document.owner),
        ("place", f"{document.appliance} region {document.region}"),
        (
            "extents",
            "\n".join(f"{e.sequence}: {e.start:#x} {size(e.length)}" for e in document.extents),
        ),
        ("created", date(document.created_ns)),
        ("revision", str(document.revision)),
        ("fault", document.fault),
    ]
    for attachment in document.attachments:
        pairs.append(("host", _attachment_text(attachment)))
    show_fields(pairs)


def _retained(document: CapacityDocument) -> str:
    """Whether it outlives its hosts; empty for what never can."""
    if document.sharing == "none":
        return ""
    reference = "" if document.reference == "none" else f" (reference {document.reference})"
    return yes(document.retain) + reference


def _move_text(move: MoveDocument | None) -> str:
    """`hand-over w1 to w2: ending`, and why it failed."""
    if move is None:
        return ""
    source = f" {move.source}" if move.source else ""
    reason = f" ({move.reason})" if move.reason else ""
    return f"{move.kind}{source} to {', '.join(move.targets)}: {move.step}{reason}"


def _attachment_text(attachment: AttachmentDocument) -> str:
    lines = [
        f"{attachment.host}: {attachment.state}"
        + (", ready" if attachment.ready else "")
        + (", read-only" if attachment.read_only else "")
        + (f", rung {attachment.rung}" if attachment.rung else "")
    ]
    if attachment.dax_path:
        lines.append(f"dax {attachment.dax_path}")
    if attachment.reason:
        lines.append(f"reason {attachment.reason}")
    lines += [f"held by pid {h.pid} {h.name} ({h.how})" for h in attachment.holders]
    workload = attachment.workload
    if workload is not None:
        import shlex

        ended = "" if workload.exit_code is None else f" with {workload.exit_code}"
        lines.append(f"workload {workload.state}{ended}: {shlex.join(workload.command)}")
        if workload.reason:
            lines.append(f"workload reason {workload.reason}")
        if workload.log_path:
            lines.append(f"workload output {workload.log_path}")
    return "\n".join(lines)
