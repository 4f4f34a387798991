"""`tagmem run` in a guest, where nothing but Python is there: the same words as on a host.

tagmem run TAG -- ./app --memory {dax}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tagmem.base.errors import TagmemError
from tagmem.client.launch import AS_FILE, become

EXIT_FAILED, EXIT_CANNOT_RUN, EXIT_NO_COMMAND = 1, 126, 127


def main(words: Sequence[str]) -> int:
    """`run`'s own words. Returns only when it could not."""
    parser = argparse.ArgumentParser("tagmem run", description="Run a command on a tag.")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the tag")
    parser.add_argument("--as-file", action="store_true", help="let it take the device for a file")
    parser.add_argument("tag")
    parser.add_argument("command", nargs="+", help="{dax}, {tag} and {size} are filled in")
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
