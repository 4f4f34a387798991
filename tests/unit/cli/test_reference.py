"""What the command line promises about itself: its page, its examples, its numbers, its start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from tests.unit.client.fake_api import FakeApi, attachment
from tests.unit.client.fake_api import capacity as capacity_document
from tests.unit.client.tags import TAG, surface

from tagmem.base.units import MIB
from tagmem.cli import base, capacity, render
from tagmem.cli.main import cli, invoke
from tagmem.cli.reference import commands
from tagmem.cli.reference import render as render_reference
from tagmem.domain import outcome, records
from tagmem.wire import rest

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
ALL = list(commands(click.Context(cli, info_name="tagmem")))


def test_the_reference_is_current(rewrite: bool) -> None:
    if rewrite:
        PAGE.write_text(render_reference(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run pytest with --rewrite"


@pytest.mark.parametrize("path", [context.command_path for _, context in ALL])
def test_every_command_has_help_and_an_example_that_parses(path: str) -> None:
    command = next(command for command, context in ALL if context.command_path == path)
    assert command.help
    assert isinstance(command, base.Command | base.Group)
    if command.example.startswith("eval"):
        return
    program, *rest = shlex.split(command.example.replace("$TAG", TAG))
    assert program == "tagmem"
    found: click.Command = cli
    while isinstance(found, click.Group) and rest and rest[0] in found.commands:
        found = found.commands[rest.pop(0)]
    # The files that an example names need not be there.
    if "--config" not in rest:
        assert not isinstance(found, click.Group)
        found.parse_args(click.Context(found), rest)


def test_the_numbers_are_the_outcomes_own() -> None:
    names = [name for name in vars(base) if name.startswith("EXIT_") and name != "EXIT_CODES"]
    assert {name: getattr(base, name) for name in names} == {
        name: getattr(outcome, name) for name in names
    }
    assert capacity.RUNGS == records.RUNGS
    assert set(capacity.SHARING) == {sharing.value for sharing in records.Sharing}
    assert set(capacity.STATES) == {state.value for state in records.CapacityState}


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    out = capsys.readouterr().out
    for code, meaning in base.EXIT_CODES:
        assert f"  {code}  {meaning}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tagmem 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["completion", shell]) == 0
    assert "_TAGMEM_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB (1.02 KB)"),
        (256 * MIB, "256.00 MiB (268.44 MB)"),
        (3 << 40, "3.00 TiB (3.30 TB)"),
    ],
)
def test_human_sizes_are_the_fields_own(size: int, text: str) -> None:
    assert render.human_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("0.5", 0.5), ("500ms", 0.5), ("2m", 120), ("1h", 3600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert base.Seconds().convert(text, None, None) == seconds


def tagmem(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tagmem", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_here_becomes_the_command(tmp_path: Path) -> None:
    """Chosen by itself when there is no orchestrator and the tag is here."""
    path = surface(tmp_path)
    script = "echo {tag} {size} $TAGMEM_DAX $X; exit 7"
    environment = {"TAGMEM_RUN_DIR": str(tmp_path), "TAGMEM_STATE_DIR": str(tmp_path / "none")}
    ended = tagmem("run", "-e", "X={dax}", TAG, "--", "sh", "-c", script, **environment)
    assert ended.returncode == 7
    assert ended.stdout == f"{TAG} {2 * MIB} {path} {path}\n"


def test_help_loads_neither_documents_nor_tables_nor_http() -> None:
    code = (
        "import sys\n"
        "from tagmem.cli.main import invoke\n"
        "invoke(['--help'])\n"
        "heavy = {'msgspec', 'rich', 'http.client', 'asyncio', 'json'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_completion_answers_a_shell() -> None:
    ended = tagmem(
        _TAGMEM_COMPLETE="bash_complete", COMP_WORDS="tagmem capacity rel", COMP_CWORD="2"
    )
    assert ended.stdout.split() == ["plain,release"]


def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    with FakeApi(tmp_path) as api:
        document = capacity_document(attachment(), owner="me")
        api.on("GET", "/v1/capacities", rest.CapacityPage((document,), None))
        ours, theirs = os.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "TAGMEM_URL": api.url}
        environment.pop("NO_COLOR", None)
        without: dict[str, str] = {"NO_COLOR": "1"}
        for colours in ({}, without):
            subprocess.run(
                [sys.executable, "-m", "tagmem", "capacity", "list"],
                env={**environment, **colours},
                stdout=theirs,
                check=True,
            )
            text = os.read(ours, 65536).decode()
            assert TAG in text
            assert ("\x1b[32m" in text) is not bool(colours)
        os.close(ours)
        os.close(theirs)
