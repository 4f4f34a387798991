"""How a command gets to know its tag: placeholders in its arguments, variables in its environment.

One place for everything that starts something on a tag: the command line, a host's agent and a
guest's. Standard library only, because a guest's python3 has nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from tagmem.base.errors import Conflict, NotFound
from tagmem.client.locate import default_run_dir, wait_for

AS_FILE = ("LD_PRELOAD", "{asfile}")
"""The variable that lets a program take its DAX device for a file (`asfile.c` says how): many that
could live in a mapping first size their file, and device-dax refuses that.
"""
LIBRARY = Path(__file__).with_name("libasfile.so")
_PLACEHOLDER = re.compile(r"\{(dax|tag|size|asfile)\}")


def values(tag: str, dax_path: str, size_bytes: int) -> dict[str, str]:
    """What the placeholders stand for. Without a path, `{dax}` stays as it is."""
    known = {"tag": tag, "size": str(size_bytes), "asfile": str(LIBRARY)}
    return known | ({"dax": dax_path} if dax_path else {})


def variables(tag: str, dax_path: str, size_bytes: int, run_dir: str) -> dict[str, str]:
    """What a command finds in its environment."""
    return {
        "TAGMEM_TAG": tag,
        "TAGMEM_DAX": dax_path,
        "TAGMEM_SIZE": str(size_bytes),
        "TAGMEM_RUN_DIR": run_dir,
    }


def fill(text: str, known: Mapping[str, str]) -> str:
    """`text` with the placeholders filled in that are known; other braces are the application's.

    Raises NotFound for `{asfile}` where the library was not compiled.
    """
    filled = _PLACEHOLDER.sub(lambda match: known.get(match.group(1), match.group(0)), text)
    if "{asfile}" in text and not LIBRARY.is_file():
        raise NotFound(f"{LIBRARY} is not there: it is compiled when tagmem is installed (gcc)")
    return filled


def become(
    tag: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    timeout: float | None,
) -> NoReturn:
    """Become `command`, on a tag that is here within `timeout` seconds.

    Raises TagAbsent; Conflict when it wants a path and the tag has none; NotFound without the
    library of `{asfile}`; OSError when it cannot be run.
    """
    device = wait_for(tag, timeout=timeout)
    if not device.has_path and any("{dax}" in text for text in (*command, *environment.values())):
        raise Conflict(
            f"tag {device.tag} has no path here: its bytes come as a descriptor, "
            "which tagmem.open() asks for"
        )
    known = values(device.tag, device.path, device.size_bytes)
    arguments = [fill(argument, known) for argument in command]
    told = variables(device.tag, device.path, device.size_bytes, default_run_dir())
    own = {name: fill(value, known) for name, value in environment.items()}
    os.execvpe(arguments[0], arguments, {**os.environ, **told, **own})  # noqa: S606 - as asked
