"""`tagmem run` in a guest, where nothing but Python is there: the same words as on a host.

tagmem run TAG -- ./app --memory {dax}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tagmem.base.errors import TagmemError
from tagmem.client.launch import AS_FILE, become
from tagmem.guest.__main__ import main as be_agent

EXIT_FAILED, EXIT_CANNOT_RUN, EXIT_NO_COMMAND = 1, 126, 127


def main(arguments: Sequence[str] | None = None) -> int:
    """The guest's `tagmem`: `run`, and `guest`. Returns only when it could not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["guest"]:
        return be_agent(words[1:])
    parser = argparse.ArgumentParser("tagmem", description="What a guest has of tagmem.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("guest", help="be this guest's agent", add_help=False)
    run = verbs.add_parser("run", help="run a command on a tag")
    run.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the tag")
    run.add_argument("--as-file", action="store_true", help="let it take the device for a file")
    run.add_argument("tag")
    run.add_argument("command", nargs="+", help="{dax}, {tag} and {size} are filled in")
    given = parser.parse_args(words)
    try:
        environment = dict([AS_FILE]) if given.as_file else {}
        become(given.tag, given.command, environment, timeout=given.timeout)
    except TagmemError as error:
        sys.stderr.write(f"tagmem: {error}\n")
        return EXIT_FAILED
    except OSError as error:
        sys.stderr.write(f"tagmem: cannot run {given.command[0]}: {error.strerror}\n")
        return EXIT_NO_COMMAND if isinstance(error, FileNotFoundError) else EXIT_CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
