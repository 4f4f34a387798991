"""The names that tagged memory has in a guest: the same directory as on a host, so that the client
library, and whoever reads the directory, cannot tell one from the other.

    <run>/<name>/        <name> (a link to the device), size, align, uuid, mode, read_only, extents
    <run>/by-tag/<uuid>  a link to it

What the host told of a tag is kept beside it (`told`), for an agent that is started anew.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_tag
from tagmem.wire.guest import Memory, Told

_NEW = ".new-"


class Names:
    """The run directory of one guest. One agent per run directory. Raises OSError."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._by_tag = f"{run}/by-tag"
        self._names: dict[str, str] = {}
        os.makedirs(self._by_tag, mode=0o755, exist_ok=True)

    def adopt(self) -> dict[str, Told | None]:
        """The tags that an earlier agent named, and what it was told; leftovers go."""
        found: dict[str, Told | None] = {}
        for link in os.listdir(self._by_tag):
            try:
                tag = parse_tag(link)
                folder = os.path.dirname(os.readlink(f"{self._by_tag}/{link}"))
                self._names[tag] = os.path.basename(folder)
                found[tag] = self._told(self._names[tag])
            except (InvalidInput, OSError):
                with suppress(OSError):
                    os.unlink(f"{self._by_tag}/{link}")
        for entry in os.listdir(self._run):
            folder = f"{self._run}/{entry}"
            if os.path.isfile(f"{folder}/uuid") and entry not in self._names.values():
                shutil.rmtree(folder, ignore_errors=True)
        return found

    def _told(self, name: str) -> Told | None:
        try:
            with open(f"{self._run}/{name}/told", encoding="ascii") as file:
                return Told(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None

    def path(self, memory: Memory) -> str:
        """What an application is given as the device of a tag."""
        return f"{self._run}/{memory.name}/{memory.name}"

    def surface(self, memory: Memory, told: Told | None = None) -> None:
        """Give a tag its names, whole or not at all. Idempotent."""
        folder = f"{self._run}/{memory.name}"
        attributes = {
            "size": str(memory.size_bytes),
            "align": str(memory.align_bytes),
            "uuid": memory.tag,
            "mode": "devdax" if memory.name.startswith("dax") else "bar",
            "read_only": "1" if memory.read_only else "0",
            "extents": f'[{{"offset":0,"length":{memory.size_bytes}}}]',
        }
        if told is not None:
            attributes["told"] = json.dumps(told._asdict())
        aside = f"{self._run}/{_NEW}{memory.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.mkdir(aside, 0o755)
        for name, value in attributes.items():
            with open(f"{aside}/{name}", "w", encoding="ascii") as file:
                file.write(value + "\n")
            os.chmod(f"{aside}/{name}", 0o444)
        os.symlink(memory.path, f"{aside}/{memory.name}")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
        self._link(memory.tag, f"../{memory.name}/{memory.name}")
        self._names[memory.tag] = memory.name

    def _link(self, tag: str, target: str) -> None:
        aside = f"{self._by_tag}/{_NEW}{tag}"
        with suppress(FileNotFoundError):
            os.unlink(aside)
        os.symlink(target, aside)
        os.rename(aside, f"{self._by_tag}/{tag}")

    def withdraw(self, tag: str) -> None:
        """Take a tag's names away. Idempotent."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self._by_tag}/{tag}")
        name = self._names.pop(tag, None)
        if name is not None and name not in self._names.values():
            shutil.rmtree(f"{self._run}/{name}", ignore_errors=True)
