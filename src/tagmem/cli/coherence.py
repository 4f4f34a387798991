"""`tagmem check-coherence`: a program on hosts whose caches lie, and what it owed to luck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tagmem.base.errors import InvalidInput
from tagmem.cli.base import EXIT_FAILED, EXIT_TIMEOUT, Seconds, Size, fail
from tagmem.cli.render import show_json
from tagmem.cli.workload import Run, shell_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tagmem.coherence.check import Plan, Verdict

_HOSTS_MAX = 16
_WORD_BYTES = 8
_TAG = "7a67a67a-c0fe-4e1e-9c0c-5eed5eed5eed"
"""Of the region that is made for the check, when none is given."""


class Span(click.ParamType[range]):
    """OFFSET:LENGTH, in bytes."""

    name = "offset:length"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> range:
        """Raises click's usage error."""
        if isinstance(value, range):
            return value
        offset, _, length = str(value).partition(":")
        try:
            at = int(offset, 0)
            found = range(at, at + int(length, 0))
        except ValueError:
            self.fail(f"must be OFFSET:LENGTH in bytes, got {value!r}", param, ctx)
        if at < 0 or not found:
            self.fail(f"must be OFFSET:LENGTH, 0 or more and 1 or more, got {value!r}", param, ctx)
        return found


class Word(click.ParamType[int]):
    """Offset of an aligned word, in bytes."""

    name = "offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click's usage error."""
        try:
            at = int(str(value), 0)
        except ValueError:
            at = -1
        if at < 0 or at % _WORD_BYTES:
            self.fail(f"must be a multiple of {_WORD_BYTES} (bytes), got {value!r}", param, ctx)
        return at


@click.command(
    "check-coherence",
    cls=Run,
    short_help="Run a program on hosts whose caches lie.",
    example="tagmem check-coherence -- python3 examples/05-coherence/publish.py flush",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--hosts",
    type=click.IntRange(1, _HOSTS_MAX),
    default=2,
    show_default=True,
    help="COMMAND is started on each: h1, h2, …",
)
@click.option(
    "--once", is_flag=True, help="Start COMMAND on h1 only; it starts the other hosts itself."
)
@click.option("--size", type=Size(), default="1MiB", show_default=True, help="Of the shared tag.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--schedules",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="So many runs, each with the next seed, until one depends on luck.",
)
@click.option(
    "--word",
    "words",
    multiple=True,
    type=Word(),
    metavar="OFFSET",
    help="An aligned 8-byte word that races by design. Those of tagmem.shared are known.",
)
@click.option(
    "--racing",
    multiple=True,
    type=Span(),
    metavar="OFFSET:LENGTH",
    help="Bytes that are checked after they were loaded, as by a checksum.",
)
@click.option(
    "--timeout", type=Seconds(), default="60s", show_default=True, help="Of each run of COMMAND."
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: the result alone on stdout; COMMAND's own output goes to stderr.",
)
def check_coherence(
    command: tuple[str, ...],
    hosts: int,
    once: bool,
    size: int,
    seed: int,
    schedules: int,
    words: tuple[int, ...],
    racing: tuple[range, ...],
    timeout: float,
    output: str,
) -> None:
    """Run COMMAND with a software-coherent tag of its own, on hosts whose caches lie, and report
    the first access that depended on luck.

    Needs no appliance. COMMAND finds the tag as ever: `tagmem.open(os.environ["TAGMEM_TAG"])`, or
    by the path in TAGMEM_DAX; TAGMEM_HOST says which host it is. `{tag}`, `{dax}`, `{host}` and
    `{size}` in its arguments are filled in. Exits with 1 when something was found, or when COMMAND
    never touched the tag, so that nothing was checked; else with the exit code of COMMAND.
    """
    from tagmem.base.ids import Tag
    from tagmem.coherence.check import Check, Plan

    names = tuple(f"h{number}" for number in range(1, hosts + 1))
    size = -(-size // 4096) * 4096
    _within(size, words, racing)
    plan = Plan(
        command,
        names,
        size,
        Tag(_TAG),
        words=frozenset(words),
        racing=racing,
        once=once,
        deadline_s=timeout,
        # As JSON our output is the document alone.
        stdout=2 if output == "json" else None,
    )
    verdict = None
    accesses = 0
    for number in range(seed, seed + schedules):
        verdict = Check(plan, number).run()
        accesses += verdict.accesses
        if verdict.finding or verdict.timed_out or any(verdict.codes):
            break
    assert verdict is not None
    runs = verdict.seed - seed + 1
    _show(plan, verdict, runs, accesses, as_json=output == "json")


def _within(size: int, words: Sequence[int], racing: Sequence[range]) -> None:
    """Raises InvalidInput for an offset that is not in the tag: nothing there would be checked."""
    for word in words:
        if word >= size:
            raise InvalidInput("--word", f"below the tag's {size} (bytes)", word)
    for span in racing:
        if span.stop > size:
            raise InvalidInput("--racing: its end", f"at most the tag's {size} (bytes)", span.stop)


def _show(plan: Plan, verdict: Verdict, runs: int, accesses: int, *, as_json: bool) -> None:
    """The result; ends with the exit code that goes with it."""
    from tagmem.coherence.report import report, tell
    from tagmem.coherence.trace import source_lines

    found = report(verdict.finding, plan.hosts, source_lines) if verdict.finding else None
    if as_json:
        import msgspec

        document = {
            "seed": verdict.seed,
            "schedules": runs,
            "accesses": verdict.accesses,
            "exit_codes": list(verdict.codes),
            "timed_out": verdict.timed_out,
            "fence_not_seen": verdict.unfenced,
            "found": msgspec.to_builtins(found) if found else None,
        }
        show_json(document)
    elif found:
        click.echo(tell(found))
        if verdict.unfenced:
            click.echo("  no fence was seen for long after a write back: see docs/coherence.md")
        click.echo(f"  seed {verdict.seed} (--seed {verdict.seed} shows it again)")
    if found:
        raise click.exceptions.Exit(EXIT_FAILED)
    if verdict.timed_out:
        fail(f"with seed {verdict.seed} it did not end in {plan.deadline_s:g} s", EXIT_TIMEOUT)
    for host, code in zip(plan.hosts, verdict.codes, strict=False):
        if code:
            ended = f"COMMAND ended with {shell_code(code)} on {host}"
            fail(
                f"{ended}, with seed {verdict.seed}; no access before depended on luck",
                shell_code(code),
            )
    if not accesses:
        fail("COMMAND made no access to the tag, so nothing was checked", EXIT_FAILED)
    if not as_json:
        times = "1 schedule" if runs == 1 else f"{runs} schedules"
        click.echo(
            f"no access depended on luck: {times}, seeds up to {verdict.seed}, {accesses} accesses"
        )
