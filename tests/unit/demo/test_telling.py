"""What the demo says, how long it goes on asking, and paths that fit into a socket's address."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from tagmem.base.errors import Conflict, OutcomeUnknown
from tagmem.demo.chaos import MOMENTS, STEPS, always, seeded
from tagmem.demo.console import Console
from tagmem.demo.layout import DAEMONS, HOSTS, Layout
from tagmem.demo.patience import TooLate, insist, until


def test_steps_are_numbered_and_end_in_a_table_with_times() -> None:
    out = io.StringIO()
    console = Console(out)
    for title in ("Decide: where", "Offer: what"):
        with console.step(title) as came_to:
            console.fact("one", "first\nsecond")
            console.proof("two", "so it is,")
            came_to.append("done")
    console.table()
    told = out.getvalue()
    assert "1. Decide: where\n   one            first\n                  second\n" in told
    assert "   two            so it is, ok\n" in told
    assert re.search(r"^ 2 offer +0\.\d{3}  done$", told, re.MULTILINE)
    assert "\x1b" not in told


def test_a_step_that_fails_is_not_in_the_table() -> None:
    console = Console(io.StringIO())
    with pytest.raises(Conflict), console.step("Decide: where"):
        raise Conflict("no")
    assert console.times == []


def test_it_asks_again_while_the_answer_is_later() -> None:
    answers = iter([OutcomeUnknown("away"), OutcomeUnknown("still away")])

    def call() -> str:
        for error in answers:
            raise error
        return "here"

    assert insist(call) == "here"


def test_it_does_not_ask_again_what_was_refused() -> None:
    asked = []

    def call() -> None:
        asked.append(1)
        raise Conflict("no")

    with pytest.raises(Conflict):
        insist(call)
    assert len(asked) == 1


def test_waiting_ends_and_says_for_what() -> None:
    with pytest.raises(TooLate, match="the sun rises"):
        until(lambda: None, "the sun rises", 0.0)
    assert until(lambda: 7, "seven") == 7


def test_an_error_ends_the_waiting_when_the_time_is_over() -> None:
    def away() -> int:
        raise OutcomeUnknown("away")

    with pytest.raises(OutcomeUnknown, match="away"):
        until(away, "an answer", 0.0)


def test_sockets_fit_however_long_the_state_directory_is(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path / ("long" * 50))
    sockets = [layout.fm_socket, layout.api_socket, *map(layout.port_socket, HOSTS)]
    assert len({*map(str, sockets)}) == len(sockets)
    assert all(len(str(path)) <= 107 for path in sockets)
    assert layout.volatile != Layout.of(tmp_path / "other").volatile


def test_chaos_follows_from_its_seed() -> None:
    moments = [(step, moment) for step in STEPS for moment in MOMENTS]
    one, again = ([choose(*m) for m in moments] for choose in (seeded(7), seeded(7)))
    assert one == again
    assert {*one} <= {*DAEMONS, ""}
    assert sum(name != "" for name in one) >= 3
    chosen = [always("w1", "during")(*m) for m in moments]
    assert chosen == ["", "w1"] * len(STEPS)
