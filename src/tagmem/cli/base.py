"""What all commands share: help that shows an example, suggestions, options, errors, exit codes.

Kept to click and the standard library's cheap parts, because every start of `tagmem` loads it,
`--help` included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    Retry,
    TagmemError,
)

if TYPE_CHECKING:
    from tagmem.client.session import Client

F = TypeVar("F", bound=Callable[..., Any])

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_CONFLICT, EXIT_TIMEOUT, EXIT_UNAVAILABLE = (
    range(7)
)
"""The same numbers as in domain/outcome.py, which would cost start-up time here; a test compares
them.
"""

EXIT_CODES = (
    (EXIT_OK, "done"),
    (EXIT_FAILED, "failed, or not supported"),
    (EXIT_USAGE, "wrong usage or a value outside its limit"),
    (EXIT_NOT_FOUND, "no such tag, host or appliance"),
    (EXIT_CONFLICT, "the present state forbids it"),
    (EXIT_TIMEOUT, "not done in time: it may still happen"),
    (EXIT_UNAVAILABLE, "not now: no orchestrator, no room, or in doubt; try later"),
)


class _Taught(click.Command):
    """Help that ends with an example; errors that are one line and an exit code."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, then whatever else there is to say."""
        _write_example(self.example, formatter)
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, or one of its commands. Errors of ours end here."""
        try:
            return super().invoke(ctx)
        except TagmemError as error:
            report(ctx, error)


class Command(_Taught):
    """A verb."""


class Group(_Taught, click.Group):
    """A noun. Mistyped verbs get a suggestion."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added: in the order in which a newcomer meets them."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest names when there is no such command."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"see {ctx.command_path} -h"
            raise click.UsageError(f"no such command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


Group.group_class = Group


def _write_example(example: str, formatter: click.HelpFormatter) -> None:
    if example:
        with formatter.section("Example"):
            formatter.write_text(example)


class Settings:
    """How to reach the orchestrator, and how to show what it says."""

    def __init__(
        self, url: str | None, state_dir: Path | None, output: str | None, *, human: bool
    ) -> None:
        self.url = url
        self.state_dir = state_dir
        self.output = output or ("table" if sys.stdout.isatty() else "json")
        self.human = human

    def client(self) -> Client:
        """A session with the orchestrator. Raises Unreachable when none is configured."""
        from tagmem.client.session import Client, Unreachable

        url = self.url or configured_url(self.state_dir)
        if url is None:
            raise Unreachable(
                "no orchestrator is configured: start one with `tagmem up`, "
                f"or name one with --url or TAGMEM_URL (looked at {state_dir(self.state_dir)}/url)"
            )
        return Client(url)


def state_dir(given: Path | None = None) -> Path:
    """Where `tagmem up` keeps its state: as given, else TAGMEM_STATE_DIR, else the user's."""
    if given is not None:
        return given
    if named := os.environ.get("TAGMEM_STATE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base, "tagmem")


def configured_url(given: Path | None = None) -> str | None:
    """The endpoint of the system that `tagmem up` started, if there is one."""
    try:
        return (state_dir(given) / "url").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def state_dir_option(function: F) -> F:
    """--state-dir, for every command that needs no orchestrator but its folder."""
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of `tagmem up`. [$TAGMEM_STATE_DIR; ~/.local/state/tagmem]",
    )(function)


def api_options(function: F) -> F:
    """The options of every command that talks to the orchestrator; the command gets `settings`."""
    import functools

    @functools.wraps(function)
    def with_settings(
        *args: Any,
        url: str | None,
        state_dir: Path | None,
        output: str | None,
        human: bool,
        **kwargs: Any,
    ) -> Any:
        settings = Settings(url, state_dir, output, human=human)
        return function(*args, settings=settings, **kwargs)

    wrapped: Any = with_settings
    for option in (
        click.option(
            "--human", is_flag=True, help="Sizes as 256.00 MiB (268.44 MB), times as dates."
        ),
        click.option(
            "-o",
            "--output",
            type=click.Choice(["table", "json", "wide"]),
            help="Table on a terminal, JSON elsewhere, unless said.",
        ),
        state_dir_option,
        click.option(
            "--url",
            envvar="TAGMEM_URL",
            help="http://HOST:PORT or unix:/PATH. [$TAGMEM_URL; what `tagmem up` left]",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]  # click's decorators keep the function's type


class Size(click.ParamType[int]):
    """A size in bytes, as people write it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click's usage error with the limit."""
        if isinstance(value, int):
            return value
        from tagmem.base.units import parse_size

        try:
            return parse_size(value)
        except InvalidInput as error:
            self.fail(f"must be {error.limit}, got {value!r}", param, ctx)


class Forward(click.ParamType[tuple[int, int]]):
    """A port of this machine that leads to one of a guest: `11211:11211`."""

    name = "host:guest"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Raises click's usage error with the limit."""
        if isinstance(value, tuple):
            return value
        ours, colon, theirs = value.partition(":")
        if not (colon and ours.isdecimal() and theirs.isdecimal()):
            self.fail(f"must be two ports with a colon, got {value!r}", param, ctx)
        return int(ours), int(theirs)


class Seconds(click.ParamType[float]):
    """A duration: `10`, `10s`, `500ms`, `2m`, `1h`."""

    name = "duration"
    _UNITS = (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds. Raises click's usage error for anything else."""
        if isinstance(value, int | float):
            return float(value)
        text = value.strip().lower()
        factor = 1.0
        for suffix, seconds in self._UNITS:
            if text.endswith(suffix):
                text, factor = text.removesuffix(suffix), seconds
                break
        try:
            number = float(text) * factor
        except ValueError:
            number = -1.0
        if not 0 <= number < 10**9:
            self.fail(f"must be a duration such as 10, 500ms, 10s or 2m, got {value!r}", param, ctx)
        return number


def tag_argument(function: F) -> F:
    """The TAG argument, completed from the orchestrator's list."""
    return click.argument("tag", shell_complete=_complete_tags)(function)


def host_option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """--host, or an option with other names, completed from the orchestrator's list."""
    attributes = {"metavar": "NAME", "shell_complete": _complete_hosts, **attributes}
    return click.option(*(names or ("--host",)), **attributes)


def _complete_tags(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    return _complete(ctx, incomplete, lambda client: [c.tag for c in client.capacities()])


def _complete_hosts(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    return _complete(ctx, incomplete, lambda client: [h.id for h in client.hosts()])


def _complete(
    ctx: click.Context, incomplete: str, names: Callable[[Client], list[str]]
) -> list[str]:
    """What the orchestrator knows; nothing at all when it cannot be asked, because a shell is
    waiting.
    """
    settings = Settings(ctx.params.get("url"), ctx.params.get("state_dir"), "json", human=False)
    try:
        with settings.client() as client:
            return [name for name in names(client) if name.startswith(incomplete)]
    except TagmemError:
        return []


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"tagmem: error: {message}", err=True)
    raise click.exceptions.Exit(code)


def exit_code(error: TagmemError) -> int:
    """The documented exit code of an error."""
    problem = getattr(error, "problem", None)
    if problem is not None:
        from tagmem.domain.outcome import Outcome

        try:
            return Outcome(problem.code).facts.exit_code
        except ValueError:
            pass  # a newer orchestrator's outcome: its kind still says enough
    if isinstance(error, TimeoutError | OutcomeUnknown):
        return EXIT_TIMEOUT
    if isinstance(error, InvalidInput):
        return EXIT_USAGE
    if isinstance(error, NotFound):
        return EXIT_NOT_FOUND
    if isinstance(error, Conflict):
        return EXIT_CONFLICT
    return EXIT_UNAVAILABLE if error.retry is Retry.LATER else EXIT_FAILED


def report(ctx: click.Context, error: TagmemError) -> NoReturn:
    """One line on stderr; with an explicit `-o json` also the problem document on stdout. Exits."""
    code = exit_code(error)
    if ctx.params.get("output") == "json":
        from tagmem.cli.render import problem_document, show_json

        show_json(problem_document(error, code))
    hint = _hint(error)
    fail(f"{error}{'; ' + hint if hint else ''}", code)


def _hint(error: TagmemError) -> str:
    """What to do next, where that is not in the message already."""
    problem = getattr(error, "problem", None)
    outcome = getattr(problem, "outcome", "")
    return _HINTS.get(outcome, "")


_HINTS = {
    "host_is_unknown": "see `tagmem host list`",
    "appliance_is_unknown": "see `tagmem appliance list`",
    "tag_is_unknown": "see `tagmem capacity list`",
    "not_enough_free_capacity": "see `tagmem explain SIZE --host NAME`",
    "no_contiguous_capacity": "--scatter allows several extents",
    "tag_exists_with_other_parameters": "see `tagmem capacity show TAG`",
    "tag_is_still_held": "see the holders in `tagmem capacity show TAG`, or raise --up-to",
    "workload_is_running": "`tagmem stop TAG` ends it",
}
