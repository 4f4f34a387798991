"""Our own source read as data: the habits that no other tool keeps.

Each rule is one test, which names every place that breaks it. A rule with exceptions has a list of
them here; a list is a ratchet: an entry that is no longer needed fails as well, so that it only
ever gets shorter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 700
COLUMNS_MAX = 100

# path::qualified name -> lines. Split one, and take its entry away.
LONG_FUNCTIONS: dict[str, int] = {}

# path -> lines.
LONG_MODULES: dict[str, int] = {}

# Where a program's outermost loop must outlive whatever a task raises: path::function -> why.
TASK_BOUNDARIES: dict[str, str] = {
    "src/tagmem/engine.py::_answer": "a reader's mistake is its caller's",
    "src/tagmem/orchestrator/watch.py::Waiters.wake": "a held request's mistake is its own answer",
}

# The console: what writes to a terminal does so here.
MAY_PRINT = ("src/tagmem/cli/render.py", "src/tagmem/demo/console.py")

# Waiting for a real process is polling against a deadline; each kind of test has one place for it.
MAY_SLEEP = ("tests/system/waiting.py", "tests/vm/waiting.py")

# Modules that something other than an import of ours starts.
ENTRY_POINTS = frozenset(
    {
        "tagmem",
        "tagmem.__main__",
        "tagmem.cli.main",
        "tagmem.cli.reference",
        "tagmem.guest.__main__",
    }
)

SKIPS = frozenset({"skip", "skipif", "skipIf", "skipUnless", "xfail", "importorskip", "skipTest"})

# Written so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.$}*])/(?:work|home|Users|root)/")
REGISTRY_HOSTS = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in [
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("deb", "debian", "org"),
            ("registry", "npmjs"),
            ("docker", "io"),
            ("ghcr", "io"),
            ("proxy", "golang"),
        ]
    )
    + "|--(?:extra-)?"
    + "index-url"
)
TEXT_SUFFIXES = frozenset(
    {".py", ".sql", ".md", ".toml", ".sh", ".txt", ".json", ".lock", ".ini", ".cfg", ".yaml"}
)


class Source:
    """One Python file of ours: where it is, what it says, what it means."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text, self.name)
        self.nodes = tuple(ast.walk(self.tree))
        """Every node once, walked once: most rules look at all of them."""

    @property
    def module(self) -> str:
        """Its dotted name, for files under src."""
        parts = self.path.relative_to(SRC).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}"

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Each function with its qualified name, outer ones first."""
        pending: list[tuple[str, ast.AST]] = [("", self.tree)]
        while pending:
            prefix, parent = pending.pop()
            for node in ast.iter_child_nodes(parent):
                name = prefix
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    name = f"{prefix}.{node.name}" if prefix else node.name
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield name, node
                pending.append((name, node))


@cache
def sources(*tops: str) -> tuple[Source, ...]:
    found = (path for top in tops for path in sorted((ROOT / top).rglob("*.py")))
    return tuple(Source(path) for path in found)


def everything() -> tuple[Source, ...]:
    return sources("src") + sources("tests") + sources("bench")


@cache
def texts() -> tuple[tuple[str, str], ...]:
    """Every text file that the repository ships, by name."""
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for top in ("src", "tests", "bench", "docs", "examples", "scripts", ".ci"):
        files += [path for path in (ROOT / top).rglob("*") if path.is_file()]
    known = [
        path
        for path in files
        if (path.suffix in TEXT_SUFFIXES or not path.suffix) and "__pycache__" not in path.parts
    ]
    return tuple(
        (path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted(known)
    )


def tell(offences: list[str], rule: str) -> None:
    assert not offences, f"{rule}:\n  " + "\n  ".join(offences)


def ratchet(found: dict[str, int], listed: dict[str, int], rule: str) -> None:
    """What is found must be listed and not have grown; what is listed must still be found."""
    offences = [f"{place}: {size}" for place, size in found.items() if size > listed.get(place, -1)]
    offences += [
        f"{place}: no longer needs its entry; take it away"
        for place in listed.keys() - found.keys()
    ]
    tell(offences, rule)


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written, or what can be told of it."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def imports(source: Source) -> Iterator[tuple[str, ast.stmt]]:
    """Each name that a file imports, as module and as module.name, with the statement."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module, node
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def test_functions_fit_a_screen() -> None:
    found: dict[str, int] = {}
    for source in everything():
        for name, node in source.functions():
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                found[f"{source.name}::{name}"] = lines
    ratchet(found, LONG_FUNCTIONS, f"functions of more than {FUNCTION_LINES_MAX} lines")


def test_modules_can_be_read_in_one_go() -> None:
    found = {s.name: len(s.lines) for s in everything() if len(s.lines) > MODULE_LINES_MAX}
    ratchet(found, LONG_MODULES, f"modules of more than {MODULE_LINES_MAX} lines")


def test_every_module_says_why_it_exists() -> None:
    offences = []
    for source in everything():
        docstring = ast.get_docstring(source.tree) or ""
        if len(docstring.split()) < 6:
            offences.append(f"{source.name}: {docstring!r}")
    tell(offences, "modules whose docstring is missing or says nothing")


def test_nothing_prints() -> None:
    offences = [
        source.at(node)
        for source in sources("src")
        if source.name not in MAY_PRINT
        for node in source.nodes
        if isinstance(node, ast.Call) and dotted(node.func) in {"print", "sys.stdout.write"}
    ]
    tell(offences, f"output beside the console helper ({', '.join(MAY_PRINT)})")


def test_only_task_boundaries_catch_everything() -> None:
    found: dict[str, int] = {}
    places: dict[str, str] = {}
    for source in everything():
        within = {
            id(child): name for name, function in source.functions() for child in ast.walk(function)
        }
        for node in source.nodes:
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = {None if kind is None else dotted(kind) for kind in kinds}
            if broad & {None, "Exception", "BaseException", "builtins.Exception"}:
                place = f"{source.name}::{within.get(id(node), '<module>')}"
                found[place] = 0
                places[place] = source.at(node)
    ratchet(found, dict.fromkeys(TASK_BOUNDARIES, 0), "broad `except` outside a task boundary")


def test_no_star_imports() -> None:
    offences = [
        source.at(node)
        for source in everything()
        for node in source.nodes
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    tell(offences, "star imports")


def test_no_test_sleeps() -> None:
    offences = []
    for source in sources("tests"):
        if source.name in MAY_SLEEP:
            continue
        for node in source.nodes:
            if not isinstance(node, ast.Call):
                continue
            if dotted(node.func).rpartition(".")[2] != "sleep":
                continue
            # sleep(0) lets other tasks run, and takes no time.
            first = node.args[0] if node.args else None
            if not (isinstance(first, ast.Constant) and first.value == 0):
                offences.append(source.at(node))
    tell(offences, f"sleeps in tests beside the waiting helpers ({', '.join(MAY_SLEEP)})")


def test_no_test_patches_the_code_under_it() -> None:
    offences = []
    for source in sources("tests"):
        offences += [
            source.at(node)
            for name, node in imports(source)
            if name in {"mock", "unittest.mock", "pytest_mock"}
        ]
        offences += [
            source.at(node)
            for node in source.nodes
            if isinstance(node, ast.Attribute)
            and dotted(node) in {"monkeypatch.setattr", "monkeypatch.delattr", "mocker.patch"}
        ]
    tell(offences, "mocks and patches; write a fake of the port, and run the contract suite on it")


def test_no_test_is_skipped() -> None:
    offences = []
    for source in sources("tests"):
        for node in source.nodes:
            if isinstance(node, ast.Attribute) and node.attr in SKIPS:
                name = dotted(node)
                if name.startswith(("pytest.", "unittest.", "self.")):
                    offences.append(f"{source.at(node)}: {name}")
    tell(offences, "skipped or expected-to-fail tests")


def test_type_ignores_are_explained() -> None:
    explained = re.compile(r"# type: ignore\[[\w, -]+\]\s+#\s+\w+")
    offences = [
        f"{source.name}:{number}"
        for source in sources("src")
        for number, line in enumerate(source.lines, 1)
        if "# type: " + "ignore" in line and not explained.search(line)
    ]
    tell(offences, "`type: ignore[code]` without `  # why` after it")


def test_no_line_is_too_long() -> None:
    offences = [
        f"{name}:{number}: {len(line)} columns"
        for name, text in texts()
        if name.endswith((".py", ".sql", ".sh")) or name == "Makefile"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > COLUMNS_MAX
    ]
    tell(offences, f"lines of more than {COLUMNS_MAX} columns")


def test_nothing_names_a_machine() -> None:
    offences = [
        f"{name}:{number}: {match.group()}"
        for name, text in texts()
        for pattern in (MACHINE_PATHS, REGISTRY_HOSTS)
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]
    tell(offences, "paths of one machine, or hosts that packages come from")


def test_no_module_is_dead() -> None:
    """Each module is imported by another of src; the simulator and its kin may be so by tests."""
    modules = {source.module: source for source in sources("src")}
    imported: set[str] = set(ENTRY_POINTS)
    for source in sources("src"):
        imported.update(name for name, _ in imports(source) if name != source.module)
        # Names of modules that are loaded by name: the package's own lazy attributes, programs.
        imported.update(
            node.value.partition(":")[0]
            for node in source.nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("tagmem.")
        )
    for source in sources("tests") + sources("bench"):
        imported.update(n for n, _ in imports(source) if n.startswith("tagmem.testing"))
    # To import a module is to import the packages that it lies in.
    alive = {
        name.rsplit(".", depth)[0] for name in imported for depth in range(name.count(".") + 1)
    }
    tell(sorted(modules.keys() - alive), "modules that nothing imports")
