"""`python -m tagmem`, and what the script `tagmem` calls.

A daemon that is started with nothing but its configuration does not load the command line: that
would be an eighth of the time until its first answer. Everything else is in `cli`.
"""

import gc
import os
import sys

from tagmem.base.errors import TagmemError

_DAEMONS = ("orchestrator", "appliance", "host")


def main() -> None:
    """Run the command line of this process. Exits with one of the documented codes."""
    given = sys.argv[1:]
    plain = len(given) == 3 and given[0] in _DAEMONS and given[1] == "--config"
    if plain and os.path.isfile(given[2]):
        sys.exit(_be(given[0], given[2]))
    if len(given) == 2 and given[0] == "broker":
        # Started by a host's agent, never by people.
        sys.exit(_be(*given))
    from tagmem.cli import main as command_line

    command_line.main()


def _be(daemon: str, config: str) -> int:
    """Be a daemon until told to stop; its exit code is that of the same command in `cli`."""
    # Loading makes no garbage worth looking for; the program turns the collector on again.
    gc.disable()
    from pathlib import Path

    from tagmem import programs

    try:
        if daemon == "orchestrator":
            return programs.orchestrator(Path(config), {})
        others = {"appliance": programs.appliance, "broker": programs.broker}
        return others.get(daemon, programs.host)(Path(config))
    except TagmemError as error:
        from tagmem.cli import main as command_line

        return command_line.failed(daemon, error)


if __name__ == "__main__":
    main()
