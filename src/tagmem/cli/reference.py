"""Writes docs/cli.md from the commands themselves, so that the reference cannot fall behind: a test
compares them.

    python -m tagmem.cli.reference > docs/cli.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from tagmem.cli.base import EXIT_CODES, Command, Group
from tagmem.cli.main import cli
from tagmem.cli.workload import EXIT_CANNOT_RUN, EXIT_INTERRUPTED, EXIT_NO_COMMAND

_HEAD = """\
# The command line

`tagmem` speaks in nouns and verbs, in the family of `cxl` and `daxctl`. This page is made from the
commands' own help (`python -m tagmem.cli.reference`).

**Output.** Results go to stdout: tables on a terminal, JSON when piped; `-o table`, `-o wide` and
`-o json` choose. In JSON sizes are integers of bytes; lists are arrays of objects, one thing is
an object. `--human` writes sizes as `256.00 MiB (268.44 MB)`, addresses in hex and times as dates.
Progress goes to stderr, a line per step; `-q` leaves it out. `NO_COLOR` is honoured.

**Sizes.** `4096`, `0x1000`, `64M`, `64Mi` and `64MiB`: all are powers of 1024. `64MB` is refused,
because it would mean powers of 1000.

**Where the orchestrator is.** `--url`, else `TAGMEM_URL`, else what `tagmem up` left in `url` of
its state folder (`--state-dir`, `TAGMEM_STATE_DIR`, `~/.local/state/tagmem`).

**Errors** are one line on stderr that names the field, the limit and the value. With `-o json` the
problem document (RFC 9457) goes to stdout as well, with `exit_code` in it.

## Exit codes

Stable; scripts may rely on them.

| code | meaning |
| ---: | --- |
"""


def render() -> str:
    """The whole page."""
    codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES]
    codes += [
        f"| {EXIT_CANNOT_RUN} | `tagmem run --local`: the command cannot be run |",
        f"| {EXIT_NO_COMMAND} | `tagmem run --local`: no such command |",
        f"| {EXIT_INTERRUPTED} | interrupted |",
    ]
    tail = "\n`tagmem run` otherwise exits with its command's exit code (128 + N for signal N).\n"
    context = click.Context(cli, info_name="tagmem", **cli.context_settings)
    sections = [_HEAD + "\n".join(codes) + "\n" + tail]
    sections += [_section(command, ctx) for command, ctx in commands(context)]
    return "\n".join(sections)


def commands(context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Every command with its context, groups before their commands."""
    group = context.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        command = group.commands[name]
        inner = click.Context(command, info_name=name, parent=context)
        yield command, inner
        yield from commands(inner)


def _section(command: click.Command, ctx: click.Context) -> str:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [f"## {ctx.command_path}", "", _paragraphs(command.help or ""), "", f"    {usage}", ""]
    rows = [
        record
        for parameter in command.get_params(ctx)
        if "--help" not in parameter.opts and (record := parameter.get_help_record(ctx))
    ]
    if rows:
        lines += ["| option | meaning |", "| --- | --- |"]
        lines += [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows]
        lines.append("")
    if isinstance(command, Command | Group) and command.example:
        lines += ["Example:", "", f"    {command.example}", ""]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    return inspect.cleandoc(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    click.echo(render(), nl=False)
