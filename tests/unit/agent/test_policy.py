"""Each rule for offers, and the sentence that the user sees."""

from __future__ import annotations

import msgspec
import pytest

from tagmem.agent.policy import Limits, in_sequence, judge
from tagmem.agent.records import Extent, Region
from tagmem.base.units import GIB, MIB, Dpa
from tagmem.wire.agentapi import Desired

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
REGIONS = (Region(Dpa(0), GIB, 2 * MIB), Region(Dpa(4 * GIB), GIB, 2 * MIB))
Given = tuple[tuple[float, float, int], ...]
"""(start MiB, length MiB, sequence)"""
GOOD = ((0, 2, 0), (8, 4, 0))
WANTED = Desired(TAG, 1, "attached", "a0", 6 * MIB)


def extents(*given: tuple[float, float, int]) -> tuple[Extent, ...]:
    """(start MiB, length MiB, sequence)"""
    return tuple(Extent(Dpa(int(d * MIB)), int(n * MIB), TAG, q) for d, n, q in given)


def verdict(
    *given: tuple[float, float, int],
    wanted: Desired = WANTED,
    appliance: str = "a0",
    limits: Limits | None = None,
    devices: int = 0,
) -> str:
    return judge(extents(*given), wanted, appliance, REGIONS, limits or Limits(), devices)


def test_what_was_announced_is_accepted() -> None:
    assert verdict(*GOOD) == ""
    assert verdict((0, 2, 0), (8, 4, 1)) == ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (((0, 2, 0),), f"size must be {6 * MIB} bytes as announced, offered {2 * MIB}"),
        (((0, 2, 0), (9, 4, 0)), "start must be a multiple of 2 MiB, got 0x900000"),
        (((0, 5, 0), (8, 1, 0)), "length must be a multiple of 2 MiB, got 0x500000"),
        (((0, 6, 0), (2, 0, 0)), "length must be a multiple of 2 MiB, got 0x0"),
        (((0, 2, 0), (4096, 4, 0)), "a tag must lie in one region, got regions 0 and 1"),
        (((1022, 6, 0),), "must lie inside one region of the device"),
        (((0, 4, 0), (2, 2, 0)), "extents must not overlap, and it lies in 0x0+0x400000"),
        (((0, 2, 0), (8, 4, 2)), "sequence numbers must be 0 to 1, each once, got 0, 2"),
        (((0, 2, 1), (8, 4, 1)), "sequence numbers must be 0 to 1, each once, got 1, 1"),
    ],
)
def test_what_the_offer_itself_breaks(given: Given, says: str) -> None:
    assert says in verdict(*given)


def test_what_this_host_cannot_take() -> None:
    low = Limits(highest_dpa=Dpa(10 * MIB - 1))
    assert "last address must be at most 0x9fffff, got 0xbfffff" in verdict(*GOOD, limits=low)
    assert "at most 3, all are in use" in verdict(*GOOD, limits=Limits(devices_max=3), devices=3)


def test_what_was_not_announced() -> None:
    leaving = msgspec.structs.replace(WANTED, goal="released")
    assert "is being released on this host" in verdict(*GOOD, wanted=leaving)
    assert verdict(*GOOD, appliance="a1") == "appliance must be a0, offered by a1"
    other = msgspec.structs.replace(WANTED, extents=((0, 2 * MIB), (16 * MIB, 4 * MIB)))
    assert "extent 1 must be 0x1000000+0x400000 as announced" in verdict(*GOOD, wanted=other)
    fewer = msgspec.structs.replace(WANTED, extents=((0, 6 * MIB),))
    assert verdict(*GOOD, wanted=fewer) == "extents must be 1 as announced, offered 2"


def test_the_order_of_the_bytes() -> None:
    first, second = extents((8, 4, 1), (0, 2, 0))
    assert in_sequence((first, second)) == (second, first)
    plain = extents((8, 4, 0), (0, 2, 0))
    assert in_sequence(plain) == plain
    assert in_sequence(plain, ((0, 2 * MIB), (8 * MIB, 4 * MIB))) == plain[::-1]
