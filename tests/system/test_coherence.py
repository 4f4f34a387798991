"""`tagmem check-coherence` on real programs: each planted mistake is found and named, the right
program passes, and a seed tells the same again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "05-coherence"
DATA = ROOT / "tests" / "data" / "coherence"
TAGMEM = Path(sys.executable).with_name("tagmem")

MISTAKES = {
    "flush": "missing flush",
    "fence": "missing fence",
    "order": "flush after publish",
    "invalidate": "missing invalidate",
}


def check(*arguments: str | Path, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    ended = subprocess.run(
        [TAGMEM, "check-coherence", "-o", "json", *options, "--", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.stdout, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return ended.returncode, document


def python(program: Path, *arguments: str) -> tuple[str | Path, ...]:
    return (sys.executable, program, *arguments)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("coherence") / "publish"
    source = EXAMPLES / "publish.c"
    subprocess.run(
        ["cc", "-O2", "-g", "-Wall", "-Werror", "-mclflushopt", "-o", target, source], check=True
    )
    return target


@pytest.mark.parametrize("forgotten", MISTAKES)
def test_a_mistake_in_python_is_found_and_named(forgotten: str) -> None:
    program = python(EXAMPLES / "publish.py", forgotten)
    code, document = check(*program, options=("--seed", "7"))
    found = document["found"]
    assert (code, found["missing"]) == (1, MISTAKES[forgotten])
    assert (found["by"]["host"], found["stored"]["host"]) == ("h2", "h1")
    assert found["line"] == 64
    assert any("publish.py" in line and "(read)" in line for line in found["by"]["where"])
    assert any("publish.py" in line and "(write)" in line for line in found["stored"]["where"])
    assert check(*program, options=("--seed", "7")) == (code, document)


@pytest.mark.parametrize("forgotten", MISTAKES)
def test_a_mistake_in_c_is_found_and_named(forgotten: str, compiled: Path) -> None:
    program = (compiled, "{dax}", forgotten)
    code, document = check(*program, options=("--word", "256", "--schedules", "3"))
    found = document["found"]
    assert (code, found["missing"]) == (1, MISTAKES[forgotten])
    assert (found["by"]["host"], found["stored"]["host"]) == ("h2", "h1")
    assert "publish" in found["by"]["where"][0]
    assert check(*program, options=("--word", "256", "--schedules", "3")) == (code, document)


def test_right_programs_pass(compiled: Path) -> None:
    program = python(EXAMPLES / "publish.py", "nothing")
    for command, options in (
        (program, ("--schedules", "5")),
        ((compiled, "{dax}", "nothing"), ("--schedules", "5", "--word", "256")),
    ):
        code, document = check(*command, options=options)
        assert (code, document["found"], document["exit_codes"]) == (0, None, [0, 0])
        assert document["schedules"] == 5


def test_the_librarys_objects_depend_on_no_luck() -> None:
    code, document = check(*python(DATA / "objects.py"), options=("--seed", "3"))
    assert (code, document["found"], document["exit_codes"]) == (0, None, [0, 0])
    assert document["accesses"] > 100


def test_arrays_threads_and_children_are_seen_as_well() -> None:
    named = {"nothing": None, "flush": "missing flush", "invalidate": "missing invalidate"}
    for forgotten, missing in named.items():
        code, document = check(*python(DATA / "arrays.py", forgotten), options=("--once",))
        found = document["found"]
        assert (found and found["missing"]) == missing
        assert code == (1 if missing else 0)
        if found:
            assert any("arrays.py" in line for line in found["by"]["where"])
            assert "arrays.py" in found["stored"]["where"][0]


def test_the_end_of_the_command_is_told() -> None:
    code, document = check("sh", "-c", "exit 5")
    assert (code, document["found"], document["exit_codes"]) == (5, None, [5, 5])
    waits = (sys.executable, "-c", "import signal; signal.pause()")
    code, document = check(*waits, options=("--timeout", "1s", "--hosts", "1"))
    assert (code, document["timed_out"]) == (5, True)
    ended = plain("--", "no-such-command-anywhere")
    assert ended.returncode == 3
    assert "no such command" in ended.stderr
    ended = plain("--", "sh", "-c", "exit 5")
    assert (ended.returncode, ended.stdout) == (5, "")
    assert "COMMAND ended with 5 on h1, with seed 0" in ended.stderr


def test_what_touched_nothing_was_not_checked() -> None:
    ended = plain("--schedules", "2", "--", "true")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "nothing was checked" in ended.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--word", "3"), "must be a multiple of 8 (bytes), got '3'"),
        (("--word", "0x1000", "--size", "4KiB"), "--word: must be below the tag's 4096"),
        (("--racing", "4096:1", "--size", "4KiB"), "must be at most the tag's 4096"),
        (("--racing", "0:0"), "got '0:0'"),
        (("--racing", "seven"), "got 'seven'"),
    ],
)
def test_offsets_that_name_nothing_are_refused(options: tuple[str, ...], said: str) -> None:
    ended = plain(*options, "--", "true")
    assert ended.returncode == 2
    assert said in ended.stderr


def plain(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The checker as people see it."""
    return subprocess.run(
        [TAGMEM, "check-coherence", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
