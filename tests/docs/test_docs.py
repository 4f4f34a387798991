"""What the documents say is checked where a program can: links lead somewhere, promises are held.

Examples in `console` fences are run by tests of their own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROMISES = ROOT / "docs" / "PROMISES.md"

FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
NAMED_TEST = re.compile(r"`(tests/[\w./-]+\.(?:py|txt|toml))(?:::([\w:]+)(?:\[[^\]`]*\])?)?`")
MAKE_TARGET = re.compile(r"\bmake ([a-z][a-z-]*)")


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its fenced blocks, in which brackets mean other things."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The fragments that headings of a Markdown file can be reached by."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(path)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeated = sum(1 for other in found if re.fullmatch(re.escape(anchor) + r"(-\d+)?", other))
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


def broken_links(document: Path) -> Iterator[str]:
    text = prose(document)
    for target in [*LINK.findall(text), *REFERENCE.findall(text)]:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or not there.is_relative_to(ROOT):
            yield f"{name_of(document)}: {target}: no such file in the repository"
        elif fragment and there.suffix == ".md" and fragment not in anchors(there):
            yield f"{name_of(document)}: {target}: no such heading"


def names_in(path: Path) -> set[str]:
    """Tests of a file, as pytest writes them after `::`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
            found.update(
                f"{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            )
        # A stateful model is run through a name that is assigned: TestX = Machine.TestCase.
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def missing_tests(document: Path) -> Iterator[str]:
    for path, test in NAMED_TEST.findall(document.read_text(encoding="utf-8")):
        where = ROOT / path
        if not where.is_file():
            yield f"{name_of(document)}: {path}: no such file"
        elif test and test not in names_in(where):
            yield f"{name_of(document)}: {path}::{test}: no such test in it"


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def test_every_link_leads_somewhere() -> None:
    broken = [line for document in documents() for line in broken_links(document)]
    assert not broken, "\n".join(["broken links:", *broken])


def test_every_test_that_a_document_names_exists() -> None:
    missing = [line for document in documents() for line in missing_tests(document)]
    assert not missing, "\n".join(["tests that are not there:", *missing])


def test_every_promise_names_its_test_or_says_that_it_is_pending() -> None:
    """A promise is a list item or a table row of PROMISES.md; it is held by a test, or says so."""
    if not PROMISES.exists():
        return
    bare = [
        line.strip()
        for line in items(PROMISES.read_text(encoding="utf-8"))
        if not NAMED_TEST.search(line) and "test pending" not in line
    ]
    assert not bare, "\n".join(["promises that no test holds:", *bare])


def items(text: str) -> Iterator[str]:
    """List items with the lines that go on under them, and table rows but for the head."""
    item = ""
    below_rule = False
    for line in [*FENCE.sub("", text).splitlines(), ""]:
        if re.match(r"\s*[-*] ", line):
            if item:
                yield item
            item = line
        elif item and re.match(r"\s+\S", line):
            item += " " + line.strip()
        else:
            if item:
                yield item
            item = ""
            if re.match(r"\|[\s:|-]+\|$", line):
                below_rule = True
            elif line.startswith("|"):
                if below_rule:
                    yield line
            else:
                below_rule = False


def test_documents_name_make_targets_that_exist() -> None:
    targets = make_targets()
    unknown = [
        f"{name_of(document)}: make {target}"
        for document in documents()
        for quoted in code(document.read_text(encoding="utf-8"))
        for target in MAKE_TARGET.findall(quoted)
        if target not in targets
    ]
    assert not unknown, "\n".join(["make targets that are not there:", *unknown])


def code(text: str) -> Iterator[str]:
    """What is set as code: fences, indented blocks, `inline`."""
    yield from (match.group() for match in FENCE.finditer(text))
    rest = FENCE.sub("", text)
    yield from re.findall(r"^(?: {4}|\t)(.*)$", rest, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", rest)
