"""A window as data: layout, what is asked next, and a hypervisor that forgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import InvalidInput
from tagmem.base.limits import WINDOW_PIECES_MAX
from tagmem.base.units import GIB, MIB
from tagmem.presenter.window import (
    HEAD_BYTES,
    Goal,
    Map,
    Operation,
    Part,
    Probe,
    Source,
    Unmap,
    Window,
    bar_bytes,
    lay_out,
)

PIECES = (("a", 8 * MIB, 4 * MIB), ("b", 0, 2 * MIB), ("a", 0, 2 * MIB))


def window(*, read_only: bool = False) -> Window:
    return Window(lay_out(PIECES, read_only=read_only))


class Hypervisor:
    """Maps like QEMU: overlaps and unknown pieces are refused."""

    def __init__(self) -> None:
        self.mapped: dict[int, Part] = {}

    def ask(self, operation: Operation) -> bool:
        part = operation.part
        if isinstance(operation, Map):
            for other in self.mapped.values():
                if part.at < other.at + other.length and other.at < part.at + part.length:
                    return False
            self.mapped[part.at] = part
            return True
        found = self.mapped.get(part.at)
        if found is None or found.length != part.length:
            return False
        del self.mapped[part.at]
        return True

    def settle(self, window: Window, steps: int = 100) -> list[Operation]:
        asked = []
        while (operation := window.next()) is not None:
            window.done(operation, self.ask(operation))
            asked.append(operation)
            assert len(asked) <= steps
        return asked

    def has(self, source: Source) -> bool:
        return any(part.source is source for part in self.mapped.values())


def test_pieces_follow_each_other_behind_the_header() -> None:
    header, *data = window().parts
    assert (header.source, header.at, header.length) == (Source.HEADER, 0, HEAD_BYTES)
    assert not header.writable
    assert [(p.at, p.length, p.path, p.file_offset) for p in data] == [
        (2 * MIB, 4 * MIB, "a", 8 * MIB),
        (6 * MIB, 2 * MIB, "b", 0),
        (8 * MIB, 2 * MIB, "a", 0),
    ]
    assert all(p.writable for p in data)
    assert window().data_bytes == 8 * MIB


def test_a_read_only_window_has_no_writable_part() -> None:
    assert not any(part.writable for part in window(read_only=True).parts)


def test_neighbours_become_one_part() -> None:
    pieces = [("a", 2 * MIB * n, 2 * MIB) for n in range(4 * WINDOW_PIECES_MAX)]
    assert len(lay_out(pieces, read_only=False)) == 2


@pytest.mark.parametrize(
    ("pieces", "field"),
    [
        ([], "pieces"),
        ([("a", 4 * MIB * n, 2 * MIB) for n in range(WINDOW_PIECES_MAX + 1)], "pieces"),
        ([("a", 0, 0)], "piece length"),
        ([("a", 0, MIB)], "piece length"),
        ([("a", 0, -2 * MIB)], "piece length"),
        ([("a", -4096, 2 * MIB)], "piece offset"),
        ([("a", 100, 2 * MIB)], "piece offset"),
    ],
)
def test_what_cannot_be_mapped_is_refused(pieces: list[tuple[str, int, int]], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        lay_out(pieces, read_only=False)


def test_a_bar_is_a_power_of_two() -> None:
    assert bar_bytes(64 * MIB) == 64 * MIB
    assert bar_bytes(64 * MIB + 1) == 128 * MIB
    assert bar_bytes(5 * GIB) == 8 * GIB


def test_the_header_comes_first_when_it_is_presented() -> None:
    hypervisor, ours = Hypervisor(), window()
    asked = hypervisor.settle(ours)
    assert [type(o) for o in asked] == [Map] * 4
    assert asked[0].part.source is Source.HEADER
    assert ours.settled
    assert ours.has_data


def test_revoking_takes_the_bytes_first_and_fills_the_hole() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    ours.goal = Goal.REVOKED
    asked = hypervisor.settle(ours)
    assert [(type(o), o.part.source) for o in asked] == [
        (Unmap, Source.DATA),
        (Unmap, Source.DATA),
        (Unmap, Source.DATA),
        (Map, Source.SCRAP),
    ]
    scrap = asked[-1].part
    assert (scrap.at, scrap.length) == (2 * MIB, 8 * MIB)
    assert not ours.has_data
    assert hypervisor.has(Source.HEADER)


def test_revoking_may_leave_the_hole() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    ours.goal, ours.scrap = Goal.REVOKED, False
    hypervisor.settle(ours)
    assert not hypervisor.has(Source.SCRAP)
    assert not hypervisor.has(Source.DATA)


def test_revoked_bytes_can_be_presented_again() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    ours.goal = Goal.REVOKED
    hypervisor.settle(ours)
    ours.goal = Goal.PRESENTED
    hypervisor.settle(ours)
    assert hypervisor.mapped == {part.at: part for part in ours.parts}


def test_a_pause_keeps_the_bytes_where_they_are() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    ours.doubt()
    asked = hypervisor.settle(ours)
    # A guest that runs meanwhile never sees its bytes go.
    assert [(type(o), o.part.source) for o in asked] == [
        (Probe, Source.HEADER),
        (Map, Source.HEADER),
    ]


def test_after_a_reboot_everything_is_mapped_anew() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    hypervisor.mapped.clear()
    ours.doubt()
    asked = hypervisor.settle(ours)
    assert isinstance(asked[0], Probe)
    assert [type(o) for o in asked[1:]] == [Map] * 4


def test_after_a_reboot_a_revoked_window_shows_no_tag() -> None:
    hypervisor, ours = Hypervisor(), window()
    hypervisor.settle(ours)
    ours.goal = Goal.REVOKED
    hypervisor.settle(ours)
    hypervisor.mapped.clear()
    ours.doubt()
    hypervisor.settle(ours)
    assert not hypervisor.has(Source.HEADER)
    assert not hypervisor.has(Source.DATA)
    assert hypervisor.has(Source.SCRAP)


def test_a_refused_map_ends_it() -> None:
    ours = window()
    operation = ours.next()
    assert operation is not None
    ours.done(operation, succeeded=False)
    assert ours.next() is None
    assert not ours.settled
    assert "header" in ours.failed


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("there", [True, False])
def test_a_new_broker_finds_out_what_is_there(goal: Goal, there: bool) -> None:
    hypervisor, before = Hypervisor(), window()
    hypervisor.settle(before)
    before.goal = goal
    hypervisor.settle(before)
    if not there:
        hypervisor.mapped.clear()
    kept = dict(hypervisor.mapped)
    after = window()
    after.assume(goal)
    hypervisor.settle(after)
    assert after.settled
    assert hypervisor.has(Source.DATA) == (goal is Goal.PRESENTED)
    if there and goal is Goal.REVOKED:
        # Its header was taken out to look, and nobody is to find the tag any more.
        del kept[0]
    if there:
        assert hypervisor.mapped == kept


@given(
    st.lists(st.sampled_from(["present", "revoke", "pause", "reset", "step", "step", "step"])),
    st.sampled_from(Goal),
)
def test_whatever_happens_the_goal_is_reached(events: list[str], last: Goal) -> None:
    hypervisor, ours = Hypervisor(), window()
    for event in events:
        if event == "present":
            ours.goal = Goal.PRESENTED
        elif event == "revoke":
            ours.goal = Goal.REVOKED
        elif event == "pause":
            ours.doubt()
        elif event == "reset":
            hypervisor.mapped.clear()
            ours.doubt()
        elif (operation := ours.next()) is not None:
            ours.done(operation, hypervisor.ask(operation))
        # It is never thought that bytes are gone while they are there.
        if hypervisor.has(Source.DATA):
            assert ours.has_data
        assert not ours.failed
    ours.goal = last
    hypervisor.settle(ours)
    assert ours.settled
    assert hypervisor.has(Source.DATA) == (last is Goal.PRESENTED)
    assert {p.at: p for p in ours.mapped} == hypervisor.mapped


def test_a_window_of_few_pieces_fits_a_memory_table() -> None:
    assert window().fits_table
    pieces = [("a", 4 * MIB * n, 2 * MIB) for n in range(6)]
    assert Window(lay_out(pieces[:5], read_only=False)).fits_table
    assert not Window(lay_out(pieces, read_only=False)).fits_table
