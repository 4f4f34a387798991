"""Every scenario's transcript is what happens now; `--rewrite` writes them anew, for people to read
the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tagmem.testing.scenario import ScenarioError, play

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_transcript(path: Path, rewrite: bool) -> None:
    """The file is its own expectation."""
    before = path.read_text(encoding="utf-8")
    after = play(before)
    if rewrite and after != before:
        path.write_text(after, encoding="utf-8")
        return
    assert after.splitlines() == before.splitlines()


def test_what_is_no_command_is_named_with_its_line() -> None:
    """A misspelt verb must not pass for one that did nothing."""
    with pytest.raises(ScenarioError, match=r"line 2: > crate A.*no such verb"):
        play("> pod hosts w1\n> crate A 8MiB")
