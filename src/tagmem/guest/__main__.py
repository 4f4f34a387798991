"""`python3 -m tagmem.guest [down]`: the agent where nothing but Python is there, with the options
of `tagmem guest`; and `run`, as `tagmem run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tagmem.base.errors import TagmemError
from tagmem.guest.agent import Options, serve
from tagmem.guest.down import down
from tagmem.guest.find import Roots
from tagmem.guest.run import main as run
from tagmem.guest.system import say
from tagmem.wire.guest import PORT_NAME

CHANNEL = f"/dev/virtio-ports/{PORT_NAME}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and be the agent, or end the one that is; or be `tagmem run`, the guest's
    other command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        return run(words[1:])
    parser = argparse.ArgumentParser("tagmem guest", description="Be a guest's agent.")
    parser.add_argument(
        "action", nargs="?", choices=["down"], help="have the agent give every tag back and end"
    )
    parser.add_argument(
        "--channel", default=CHANNEL, help="device path, unix:PATH or vsock[:PORT] (%(default)s)"
    )
    parser.add_argument("--run-dir", default=Roots().run, help="where names are made")
    parser.add_argument("--no-exec", action="store_true", help="run no commands for the host")
    parser.add_argument("--modules", action="store_true", help="load the modules of DAX devices")
    given = parser.parse_args(words)
    roots = Roots(run=given.run_dir)
    options = Options(given.channel, roots, commands=not given.no_exec, modules=given.modules)
    try:
        if given.action == "down":
            down(given.run_dir)
            return 0
        return serve(options)
    except (TagmemError, OSError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
