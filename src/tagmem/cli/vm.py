"""`tagmem vm`: virtual machines on this host, and tags in them, through this host's agent.

The agent is asked over `<run>/agent.sock` (agent/local.py): a VM is this host's affair, and only
who may become the agent may start one. What the agent refuses ends with the same exit codes as
everywhere else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    Retry,
    TagmemError,
    of_kind,
)
from tagmem.cli.base import (
    Forward,
    Group,
    Seconds,
    Settings,
    Size,
    api_options,
    state_dir,
    state_dir_option,
)
from tagmem.cli.render import Column, joined, show_fields, show_json, show_table, size_writer

LINE_BYTES_MAX = 1 << 20
WAYS = (
    *("auto", "vhost-pmem", "pmem", "ivshmem", "nvdimm", "cxl-static", "cxl"),
    *("dimm", "virtio-mem"),
)
NEEDS = ("guaranteed", "dax", "ram", "live_migration", "discoverable")


class AgentUnreachable(TagmemError):
    """No host agent answers here."""

    retry = Retry.LATER


def ask(run_dir: str, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The agent's lines, the last one with `done`. Raises what the agent answered, and
    AgentUnreachable.
    """
    import json
    import socket

    path = os.path.join(run_dir, "agent.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(path)
        except OSError as error:
            how = "`tagmem up` starts a whole system, `tagmem host` the agent of this machine"
            raise AgentUnreachable(f"no host agent at {path} ({error.strerror}); {how}") from None
        link.sendall(json.dumps(request).encode() + b"\n")
        with link.makefile("rb") as lines:
            while line := lines.readline(LINE_BYTES_MAX):
                answer = json.loads(line)
                if "error" in answer:
                    raise of_kind(str(answer.get("kind", "")), str(answer["error"]))
                yield answer
                if answer.get("done"):
                    return
    raise OutcomeUnknown(f"the host agent at {path} hung up before it answered")


def run_dirs(given: str | None, host: str | None, state: Path | None) -> dict[str, str]:
    """The host agents of this machine that a command may mean: names and run directories.

    The one that was named, else the machine's own, else all that `tagmem up` has started here,
    whose hosts are processes side by side. Raises InvalidInput for a host that is none of those.
    """
    from tagmem.client.locate import RUN_DIR
    from tagmem.demo.layout import HOSTS, Layout

    started = {name: str(Layout.of(state_dir(state)).run_dir(name)) for name in HOSTS}
    if host is not None:
        if host not in started:
            limit = f"one of {', '.join(started)}, which `tagmem up` starts"
            raise InvalidInput("host", limit, host)
        return {host: started[host]}
    if given is not None:
        return {"": given}
    own = _listens(RUN_DIR)
    here = {name: where for name, where in started.items() if not own and _listens(where)}
    return here or {"": RUN_DIR}


def _listens(run_dir: str) -> bool:
    return os.path.exists(os.path.join(run_dir, "agent.sock"))


def _run_dir(ctx: click.Context, vm: str, *, new: bool = False) -> str:
    """Of the agent that has a VM; a new one starts on the first."""
    found = run_dirs(**ctx.obj)
    if len(found) == 1 or new:
        return next(iter(found.values()))
    having = {host: where for host, where in found.items() if _has(where, vm)}
    if len(having) > 1:
        raise Conflict(f"{' and '.join(having)} have a VM {vm} each: say which (vm --host NAME)")
    return next(iter((having or found).values()))


def _has(run_dir: str, vm: str) -> bool:
    try:
        list(ask(run_dir, {"vm": "show", "name": vm}))
    except (NotFound, AgentUnreachable):
        return False
    return True


def _one(ctx: click.Context, verb: str, /, name: str, **request: Any) -> dict[str, Any]:
    where = _run_dir(ctx, name, new=verb in ("start", "adopt"))
    *_, last = ask(where, {"vm": verb, "name": name, **request})
    return {key: value for key, value in last.items() if key != "done"}


def _is_json(output: str | None) -> bool:
    return (output or ("table" if sys.stdout.isatty() else "json")) == "json"


output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    help="Table on a terminal, JSON elsewhere, unless said.",
)


@click.group(
    "vm",
    cls=Group,
    short_help="Virtual machines of this host, and tags in them.",
    example="tagmem vm start db1 --memory 1G --cpus 2",
)
@click.option(
    "--run-dir",
    envvar="TAGMEM_RUN_DIR",
    metavar="DIR",
    help="The run directory of this host's agent. [$TAGMEM_RUN_DIR; /run/tagmem]",
)
@click.option(
    "--host",
    metavar="NAME",
    help="One that `tagmem up` started. [default: the one that has the VM; w1 for a new one]",
)
@state_dir_option
@click.pass_context
def vm(ctx: click.Context, /, run_dir: str | None, host: str | None, **folder: Path | None) -> None:
    """Start or adopt VMs on this host, put tags into them, and take them back."""
    ctx.obj = {"given": run_dir, "host": host, "state": folder["state_dir"]}


@vm.command("start", short_help="Start a VM.", example="tagmem vm start db1 --memory 1G --cpus 2")
@click.argument("name")
@click.option("--memory", type=Size(), default="1G", show_default=True, help="The guest's RAM.")
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--qemu", default="11.1", show_default=True, help="`10.0`, `11.1` or a program.")
@click.option("--kernel", default="", help="Instead of the lab's; needs --initrd too.")
@click.option("--initrd", default="", help="It has to bring the guest agent along.")
@click.option("--append", default="", help="More words of the kernel's command line.")
@click.option("--nvdimm", is_flag=True, help="Allow NVDIMMs to be plugged in.")
@click.option(
    "--cxl-ports", type=click.IntRange(0, 8), default=0, help="CXL root ports (cxl-static)."
)
@click.option("--cxl-window", default="", help="A pool's file for dynamic capacity (cxl).")
@click.option(
    "--cxl-latency-ns",
    type=click.IntRange(1, 60_000),
    help="Of that window's memory, as its device tells it.",
)
@click.option("--cxl-bandwidth", type=Size(), help="The same, in a second.  [default: 32G]")
@click.option(
    "--forward",
    "forwards",
    type=Forward(),
    multiple=True,
    metavar="PORT:PORT",
    help="A TCP port of this machine's loopback, and the guest's that it leads to.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="For the guest's agent.")
@click.option(
    "--memory-from",
    "tags",
    metavar="TAG",
    multiple=True,
    help="Beside --memory, RAM in this tag, as a NUMA node of its own. May be repeated.",
)
@click.option(
    "--latency-ns", type=click.IntRange(1, 60_000), help="Of that node, as the guest is told."
)
@click.option("--bandwidth", type=Size(), help="Of that node, in a second.")
@click.option("--overwrite", is_flag=True, help="What the tag has may be lost.")
@click.option(
    "--specific-purpose",
    is_flag=True,
    help="Not RAM but a DAX device of the guest's (QEMU 11.1, UEFI firmware).",
)
@output_option
@click.pass_context
def start(ctx: click.Context, /, memory: int, output: str | None, **given: Any) -> None:
    """Start a VM with the guest agent in it; it outlives the host agent.

    With --memory-from the VM itself holds the tag: releasing it asks the guest to shut down, then
    ends QEMU.
    """
    latency, bandwidth = given.pop("latency_ns"), given.pop("bandwidth")
    options = {name: given.pop(name) for name in ("overwrite", "specific_purpose")}
    given |= _window_figures(given.pop("cxl_latency_ns"), given.pop("cxl_bandwidth"))
    if latency is not None:
        options["latency_ns"] = latency
    if bandwidth is not None:
        options["bandwidth_bytes"] = bandwidth
    tags = given.pop("tags")
    if not tags and any(options.values()):
        raise click.UsageError(
            "--latency-ns, --bandwidth, --overwrite and --specific-purpose"
            " say something of --memory-from"
        )
    memory_from = [{"tag": tag, **options} for tag in tags]
    _show(_one(ctx, "start", memory_bytes=memory, memory_from=memory_from, **given), output)


def _window_figures(latency_ns: int | None, bandwidth: int | None) -> dict[str, int]:
    """As far as they are given. One has no meaning without the other, and latency no default."""
    if latency_ns is None:
        if bandwidth is not None:
            raise click.UsageError("--cxl-bandwidth wants --cxl-latency-ns beside it")
        return {}
    figures = {"cxl_latency_ns": latency_ns}
    return figures | ({} if bandwidth is None else {"cxl_bandwidth_bytes": bandwidth})


@vm.command(
    "adopt",
    short_help="Take up a VM that somebody else started.",
    example="tagmem vm adopt db1 --qmp /run/db1.qmp",
)
@click.argument("name")
@click.option("--qmp", required=True, help="The Unix socket of its QMP.")
@click.option("--agent", default="", help="The Unix socket of its guest agent's port.")
@click.option("--pid", type=int, default=0, help="QEMU's, where its socket was made by another.")
@output_option
@click.pass_context
def adopt(ctx: click.Context, /, output: str | None, **given: Any) -> None:
    """Present tags to a QEMU that runs, as far as its machine allows; says what is missing."""
    told = _one(ctx, "adopt", **given)
    _show(told, output)
    for line in told.get("missing", ()):
        click.echo(f"missing: {line}", err=True)


@vm.command("list", short_help="The VMs of this host.", example="tagmem vm list")
@output_option
@click.pass_context
def list_vms(ctx: click.Context, output: str | None) -> None:
    """List VMs."""
    found = []
    for host, where in run_dirs(**ctx.obj).items():
        *_, told = ask(where, {"vm": "list"})
        found += [row | ({"host": host} if host else {}) for row in told["vms"]]
    if _is_json(output):
        show_json(found)
        return
    columns = [
        Column("VM", lambda row: row["name"]),
        *([Column("HOST", lambda row: row["host"])] if any("host" in r for r in found) else ()),
        Column("STATE", lambda row: row["state"]),
        Column("QEMU", lambda row: row.get("qemu", "-")),
        Column("PID", lambda row: str(row["pid"] or "-")),
        Column("TAGS", lambda row: joined(shown["tag"] for shown in row["tags"])),
    ]
    show_table(found, columns)


@vm.command("show", short_help="One VM.", example="tagmem vm show db1")
@click.argument("name")
@output_option
@click.pass_context
def show(ctx: click.Context, name: str, output: str | None) -> None:
    """Show a VM: its slots, what it lacks, the tags in it."""
    _show(_one(ctx, "show", name=name), output)


@vm.command(
    "attach", short_help="Put a tag into a VM.", example="tagmem vm attach db1 $TAG --as auto"
)
@click.argument("name")
@click.argument("tag")
@click.option("--as", "way", type=click.Choice(WAYS), default="auto", show_default=True)
@click.option("--need", type=click.Choice(NEEDS), multiple=True, help="May be repeated.")
@click.option("--overwrite", is_flag=True, help="What the tag has may be lost (dimm, virtio-mem).")
@output_option
@click.pass_context
def attach(ctx: click.Context, /, need: tuple[str, ...], output: str | None, **given: Any) -> None:
    """Present a tag of this host to a VM, while it runs."""
    told = _one(ctx, "attach", need=dict.fromkeys(need, True), **given)
    if told.get("warning"):
        click.echo(f"tagmem: note: {told['warning']}", err=True)
    _show(told, output)


@vm.command("detach", short_help="Take a tag back.", example="tagmem vm detach db1 $TAG")
@click.argument("name")
@click.argument("tag")
@click.option("--timeout", type=Seconds(), default="10s", show_default=True)
@click.option("--force", is_flag=True, help="End its holders; take the bytes where that can be.")
@click.option("--stop-vm", is_flag=True, help="If nothing else helps, end the VM.")
@output_option
@click.pass_context
def detach(
    ctx: click.Context,
    name: str,
    tag: str,
    timeout: float,
    force: bool,
    stop_vm: bool,
    output: str | None,
) -> None:
    """Take a tag out of a VM, proved; or say who holds it in the guest."""
    told = _one(
        ctx,
        "detach",
        name=name,
        tag=tag,
        deadline_ns=int(timeout * 1e9),
        force=force or stop_vm,
        may_stop_vm=stop_vm,
    )
    _show(told, output)


@vm.command(
    "migrate",
    short_help="Move a VM to another host, tags and all.",
    example="tagmem vm migrate db1 --to-host w2",
)
@click.argument("name")
@click.option("--to-host", required=True, metavar="HOST", help="Where it is to run.")
@click.option(
    "--form",
    type=click.Choice(["auto", "stays", "switch", "remove-all"]),
    default="auto",
    show_default=True,
    help="What happens to its tags on the way.",
)
@click.option("--force", is_flag=True, help="End guest processes that hold a tag to be taken out.")
@click.option("--back/--no-back", default=True, help="Switch back what was switched. [default]")
@click.option("--deadline", type=Seconds(), default="10m", show_default=True, help="Of the copy.")
@click.option("--dry-run", is_flag=True, help="Judge, and change nothing.")
@click.option(
    "--keep-source-attachment", is_flag=True, help="Leave the tags attached to this host too."
)
@click.option(
    "--timeout",
    type=Seconds(),
    default="60s",
    show_default=True,
    help="For a tag to be attached there, and to be released here.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@api_options
@click.pass_context
def migrate(
    ctx: click.Context,
    /,
    settings: Settings,
    name: str,
    to_host: str,
    dry_run: bool,
    keep_source_attachment: bool,
    timeout: float,
    quiet: bool,
    deadline: float,
    **wish: Any,
) -> None:
    """Judge each tag, attach it on the target, move the VM, release the tags here.

    Tagged memory is not copied: both hosts have it for the handover, so it must be sharable.
    """
    from tagmem.cli.migrate import Journey, sentences

    wish["deadline_ns"] = int(deadline * 1e9)
    run_dir = _run_dir(ctx, name)
    with settings.client() as client:
        journey = Journey(
            client, lambda what: ask(run_dir, what), name, to_host, wish, timeout, quiet
        )
        judged = journey.judge()
        for line in sentences(journey.moves):
            journey.say(line)
        if dry_run:
            _show(judged, settings.output)
            return
        journey.attach()
        told = journey.move()
        kept = [move["tag"] for move in journey.moves]
        told["on_source"] = kept if keep_source_attachment else journey.release()
        _show(told, settings.output)


@vm.command(
    "migrate-cancel",
    short_help="Have a VM that is moving stay.",
    example="tagmem vm migrate-cancel db1",
)
@click.argument("name")
@output_option
@click.pass_context
def migrate_cancel(ctx: click.Context, name: str, output: str | None) -> None:
    """End a migration that has not been handed over yet; `vm migrate` itself says how it ended."""
    _show(_one(ctx, "migrate-cancel", name=name), output)


@vm.command("stop", short_help="End a VM.", example="tagmem vm stop db1")
@click.argument("name")
@output_option
@click.pass_context
def stop_vm(ctx: click.Context, name: str, output: str | None) -> None:
    """End a VM as a pulled plug would; the tags in it are free of it then."""
    _show(_one(ctx, "stop", name=name), output)


@vm.command(
    "exec",
    short_help="Run a command in a guest.",
    example="tagmem vm exec db1 --tag $TAG -- ./app {dax}",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--tag", default="", help="Fills in {dax}, {tag} and {size}, and sets TAGMEM_*.")
@click.pass_context
def execute(ctx: click.Context, name: str, command: tuple[str, ...], tag: str) -> NoReturn:
    """Run a command in a guest; its output and exit code are this command's."""
    import base64

    code = 1
    request = {"vm": "exec", "name": name, "argv": command, "tag": tag}
    for told in ask(_run_dir(ctx, name), request):
        if "data" in told:
            data = base64.b64decode(told["data"])
            click.echo(data, nl=False, err=told.get("stream") == 2)
        elif told.get("done"):
            code = int(told["exit_code"])
    raise click.exceptions.Exit(code)


@vm.command(
    "within",
    short_help="In a guest: start a VM on a tag that this guest has.",
    example="tagmem vm within $TAG --kernel vmlinuz --initrd initrd -- ./app {dax}",
)
@click.argument("tag")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--as", "way", default="auto", show_default=True, type=click.Choice(WAYS))
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, metavar="PROGRAM")
@click.option("--kernel", required=True, metavar="FILE")
@click.option("--initrd", default="", metavar="FILE")
@click.option("--append", default="", metavar="WORDS", help="The kernel's command line.")
@click.option("--memory", type=Size(), default="256M", show_default=True)
@click.option("--accel", default="auto", show_default=True, help="auto: kvm if it opens.")
@click.option("--cpu", default="", metavar="MODEL", help="As QEMU names it.")
@click.option(
    "--timeout", type=Seconds(), default="4s", show_default=True, help="Then it is ended."
)
@click.pass_context
def within(
    ctx: click.Context,
    /,
    tag: str,
    command: tuple[str, ...],
    memory: int,
    timeout: float,
    **given: str,
) -> None:
    """Be the host of one VM: present TAG, which this machine has by name, to a VM of its own, and
    run COMMAND in it. Tells what it does as JSON lines; SIGTERM takes the tag back, ends the VM,
    and ends this. A bare python3 has it as `python3 -m tagmem.presenter.within`.
    """
    from tagmem.presenter.within import main

    given["as"] = given.pop("way")
    run_dir = next(iter(run_dirs(**ctx.obj).values()))
    words = [tag, "--run-dir", run_dir, "--memory", str(memory >> 20)]
    words += ["--timeout", str(timeout)]
    for name, value in given.items():
        words += [f"--{name}", value]
    raise click.exceptions.Exit(main([*words, "--", *command]))


def _show(told: Mapping[str, Any], output: str | None) -> None:
    if _is_json(output):
        show_json(told)
        return
    write = size_writer(human=False)
    fields = []
    for name, value in told.items():
        if name == "facts":
            continue
        text = write(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, list):
            text = joined(map(_item, value))
        fields.append((name.replace("_", " "), text))
    show_fields(fields)


def _item(item: Any) -> str:
    """Of a list: a tag with what became of it, or a word."""
    if not isinstance(item, dict):
        return str(item)
    how = [item.get(name) for name in ("as", "form", "guest_path")]
    return " ".join([str(item["tag"]), *(str(word) for word in how if word)])
