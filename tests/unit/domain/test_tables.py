"""The tables are total, the page drawn from them is current, and the small pure parts do what they
say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.domain import diagrams

from tagmem.base.units import GIB, MIB, SECOND, Dpa, MediaOffset
from tagmem.domain import attachment, capacity, dpa, ladder
from tagmem.domain.attachment import Happening
from tagmem.domain.capacity import Condition
from tagmem.domain.records import (
    RUNGS,
    AttachmentState,
    CapacityState,
    Extent,
    LdRecord,
    RegionRecord,
    ReleasePlan,
)

ROOT = Path(__file__).parents[3]


def test_the_tables_are_total() -> None:
    assert set(attachment.TABLE) == {(s, h) for s in AttachmentState for h in Happening}
    assert set(capacity.TABLE) == {(s, c) for s in CapacityState for c in Condition}


def test_only_proof_ends_a_release() -> None:
    to_released = {key for key, to in attachment.TABLE.items() if to is AttachmentState.RELEASED}
    came = {(state, cause) for state, cause in to_released if state is not AttachmentState.RELEASED}
    assert came == {
        (AttachmentState.RELEASING, Happening.OVER),
        (AttachmentState.FENCING, Happening.OVER),
    }


def test_only_a_clean_and_left_capacity_is_free() -> None:
    assert {c for (_, c), to in capacity.TABLE.items() if to is capacity.FREE} == {Condition.DONE}


def test_the_page_of_state_machines_is_current(pytestconfig: pytest.Config) -> None:
    path = ROOT / "docs" / "state-machines.md"
    if pytestconfig.getoption("--rewrite"):
        path.write_text(diagrams.page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == diagrams.page(), "write it anew with --rewrite"


@pytest.mark.parametrize("mirrored", [False, True])
def test_addresses_go_there_and_back(mirrored: bool) -> None:
    region = RegionRecord(1, 1, GIB, 2 * MIB)
    ld = LdRecord(0, (Dpa(0), Dpa(4 * GIB)), mirrored)
    extent = Extent(MediaOffset(6 * MIB), 4 * MIB)
    start = dpa.to_dpa(ld, region, extent)
    assert start == (5 * GIB - 10 * MIB if mirrored else 4 * GIB + 6 * MIB)
    assert dpa.from_dpa(ld, region, start, extent.length) == extent
    assert dpa.region_at(ld, (region,), start) is region
    assert dpa.region_at(ld, (region,), Dpa(0)) is None
    with pytest.raises(ValueError, match="region 1"):
        dpa.from_dpa(ld, region, Dpa(5 * GIB - MIB), 2 * MIB)
    with pytest.raises(ValueError, match="must lie in"):
        dpa.to_dpa(ld, region, Extent(MediaOffset(GIB), 2 * MIB))


def test_the_ladder_climbs_only_as_far_as_allowed() -> None:
    climbed = []
    plan, rung = ReleasePlan("force"), "ask"
    while rung:
        climbed.append(rung)
        rung = ladder.next_rung(plan, rung)
    assert climbed == ["ask", "restart", "fence", "force"]
    for up_to in RUNGS[:3]:
        assert ladder.next_rung(ReleasePlan(up_to), "ask") == ""
    assert ladder.next_rung(ReleasePlan("fence"), "fence") == ""
    assert ladder.agent_time_ns(ReleasePlan("ask", {"ask": SECOND})) == 3 * SECOND
    assert ladder.higher("stop", "fence") == "fence"
    assert ladder.rank("") < ladder.rank("ask")
