"""docs/opcodes.md is what the code does: which commands are known, vectored, answered and asked.

`--rewrite` writes it anew. A command that nobody answers or asks shows as an empty cell, not as a
promise.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import tagmem.orchestrator.links
from tagmem.appliance.dispatch import FmDispatch, HostDispatch, Identity
from tagmem.base.units import MIB
from tagmem.domain.device_records import DeviceSpec, LdSpec, RegionSpec
from tagmem.wire.commands import COMMANDS, Command

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "opcodes.md"
SRC = Path(tagmem.orchestrator.links.__file__).parent.parent
CLAUSE = re.compile(r"(CXL r3\.1 [\d.]*\d|tagmem)")

HEAD = """\
# CCI commands

Generated from the code by `tests/docs/test_opcodes.py` (`--rewrite`). *Device* names the ports on
which the appliance answers: the fabric manager's, a host's mailbox. *Fabric manager* is what the
orchestrator asks, *host agent* what `tagmem host` asks. Every command is decoded and encoded by one
table and has golden vectors in `tests/vectors/`.

| opcode | name | clause | codec | vectors | device | fabric manager | host agent |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
Any other opcode is answered *Unsupported* (03h). 0106h goes from device to host and is answered by
nobody. C000h to C003h are ours (`wire/vendor.py`). An appliance without C002h is taken to map
identically; one without C003h cannot be fenced.
"""


def names_used(*folders: str) -> set[str]:
    """Every name that the modules of some packages mention."""
    found: set[str] = set()
    for folder in folders:
        for path in sorted((SRC / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = node.func
                    found.add(name.attr if isinstance(name, ast.Attribute) else "")
                    found.add(name.id if isinstance(name, ast.Name) else "")
    return found


def ports_of(opcode: int) -> str:
    """Where the appliance answers a command."""
    spec = DeviceSpec((RegionSpec(0, 2 * MIB, 2 * MIB),), (LdSpec("w1"),))
    identity = Identity("a0", "sim", spec)
    host = HostDispatch(identity, 0, 4096)
    manager = FmDispatch(identity, (host,))
    ports = (("fm", manager), ("host", host))
    return ", ".join(name for name, port in ports if opcode in port._table)


def clause_of(command: Command) -> str:
    """The clause that the request's docstring cites."""
    cited = CLAUSE.search(" ".join((command.request.__doc__ or "").split()))
    return cited.group(1) if cited else ""


def vectors() -> dict[str, int]:
    """How many golden vectors each opcode has, by its four digits."""
    found: dict[str, int] = {}
    for path in (ROOT / "tests" / "vectors").glob("*.toml"):
        opcode = tomllib.loads(path.read_text(encoding="utf-8")).get("opcode", "")
        found[opcode] = found.get(opcode, 0) + 1
    return found


def page() -> str:
    """The whole document."""
    counted = vectors()
    manager, agent = names_used("orchestrator"), names_used("agent")
    lines = []
    for opcode, command in sorted(COMMANDS.items()):
        written = f"{opcode:04x}".upper() + "h"
        request = command.request.__name__
        cells = (
            written,
            command.name,
            clause_of(command),
            f"`wire/{command.request.__module__.rpartition('.')[2]}.py`",
            str(counted.get(written, 0)),
            "sends" if command.name == "event notification" else ports_of(opcode),
            "yes" if request in manager else "",
            "yes" if request in agent else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def test_the_page_of_opcodes_is_current(rewrite: bool) -> None:
    if rewrite:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew with --rewrite"


def test_every_command_cites_its_clause_and_has_a_vector() -> None:
    counted = vectors()
    bare = [
        f"{opcode:04x}h {command.name}"
        for opcode, command in COMMANDS.items()
        if not clause_of(command) or not counted.get(f"{opcode:04x}".upper() + "h")
    ]
    assert not bare
