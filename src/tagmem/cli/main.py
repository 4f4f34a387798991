"""The command `tagmem`: puts the commands together, and turns every end into an exit code.

Modules that a command needs (the API's client, documents, tables) are loaded when it runs, so that
`tagmem --help` and completion cost little more than Python itself.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from tagmem import __version__
from tagmem.base.errors import TagmemError
from tagmem.cli.base import EXIT_CODES, EXIT_FAILED, EXIT_USAGE, Command, Group
from tagmem.cli.capacity import capacity
from tagmem.cli.coherence import check_coherence
from tagmem.cli.daemons import demo, down, orchestrator, up
from tagmem.cli.fabric import appliance, host
from tagmem.cli.guest import guest
from tagmem.cli.lab import lab
from tagmem.cli.objects import shared
from tagmem.cli.sharing import hand_over, publish, retain
from tagmem.cli.vm import vm
from tagmem.cli.watch import events, explain
from tagmem.cli.workload import EXIT_INTERRUPTED, run, stop

_EPILOG = "\b\nExit codes (stable):\n" + "\n".join(
    f"  {code}  {meaning}" for code, meaning in EXIT_CODES
)


@click.group(
    "tagmem",
    cls=Group,
    epilog=_EPILOG,
    example="tagmem capacity create --size 2GiB --host w1",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Lend memory by name: tagged capacity from CXL appliances, offered, mapped, given back, wiped.

    Results go to stdout, as tables on a terminal and as JSON elsewhere; progress and errors go to
    stderr.
    """


@click.command(
    "completion",
    cls=Command,
    short_help="Completion for bash, zsh or fish.",
    example='eval "$(tagmem completion bash)"',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: for tags and hosts too."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"no completion for {shell}")
    script = found(cli, {}, "tagmem", "_TAGMEM_COMPLETE")
    # Not script.source(): that starts a shell to ask for its version.
    click.echo(script.source_template % script.source_vars())


for verb in (hand_over, publish, retain):
    capacity.add_command(verb)
for command in (
    demo,
    up,
    down,
    capacity,
    run,
    stop,
    shared,
    events,
    explain,
    host,
    appliance,
    orchestrator,
    guest,
    lab,
    vm,
    check_coherence,
    completion,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line of this process. Exits with one of the documented codes."""
    sys.exit(invoke(sys.argv[1:]))


def failed(daemon: str, error: TagmemError) -> int:
    """Say why a daemon that was started without the command line has ended; the exit code."""

    def end() -> NoReturn:
        raise error

    return invoke([], Command(daemon, callback=end))


def invoke(arguments: list[str], command: click.Command = cli) -> int:
    """Run one command line; the exit code."""
    try:
        result = command.main(arguments, prog_name="tagmem", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.UsageError as error:
        where = (
            f"; see {error.ctx.command_path} -h" if error.ctx and " -h" not in str(error) else ""
        )
        message = error.format_message().rstrip(".")
        click.echo(f"tagmem: error: {message[:1].lower()}{message[1:]}{where}", err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        click.echo(f"tagmem: error: {error.format_message()}", err=True)
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`tagmem events -f | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0
