"""Extents of a CXL window: where one may lie, and that no confusion of QEMU's, the guest's or the
channel's ever gives two tags the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.presenter.machines import ROOMY, TAG, FakeMachine

from tagmem.base.errors import Conflict, OutcomeUnknown, RemoteError, TagmemError
from tagmem.base.units import SECOND, Bytes
from tagmem.presenter import extents
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import (
    CxlWindow,
    Lent,
    OfferExtent,
    Piece,
    RecallExtent,
    Request,
    Tagged,
    VmFacts,
)
from tagmem.wire import guest

BLOCK = extents.BLOCK_BYTES
POOL = "/media/pool0"
BLOCKS = 16
WINDOW = CxlWindow("tmcw0", "0xabc", POOL, 0, BLOCKS * BLOCK)
OTHER = str(UUID(int=7, version=4))


def tagged(at: Bytes, length: Bytes, tag: str = TAG, path: str = POOL) -> Tagged:
    return Tagged(tag, length, (Piece(path, at, length),), loaded=False)


def with_windows(*windows: CxlWindow) -> VmFacts:
    return replace(ROOMY, cxl_windows=windows)


# ---- where


def test_a_tag_lies_where_the_pool_has_it() -> None:
    window = replace(WINDOW, offset=4 * BLOCK)
    assert extents.place(tagged(6 * BLOCK, BLOCK), with_windows(window)) == (
        window,
        Lent(TAG, "tmcw0", 2 * BLOCK, BLOCK),
    )


@pytest.mark.parametrize(
    ("at", "length", "path", "reason"),
    [
        (0, BLOCK, "/media/another", "tmcw0 shows /media/pool0"),
        (BLOCKS * BLOCK, BLOCK, POOL, "tmcw0 ends at 32 MiB"),
        ((BLOCKS - 1) * BLOCK, 2 * BLOCK, POOL, "tmcw0 ends at"),
        (7 * BLOCK, 2 * BLOCK, POOL, "must lie in one region of tmcw0, each 16 MiB"),
    ],
)
def test_what_is_outside_is_refused_with_where_it_ends(
    at: Bytes, length: Bytes, path: str, reason: str
) -> None:
    vm = with_windows(replace(WINDOW, regions=2))
    assert reason in str(extents.place(tagged(at, length, path=path), vm))


def test_what_is_before_the_window_is_refused() -> None:
    vm = with_windows(replace(WINDOW, offset=4 * BLOCK))
    assert "tmcw0 ends at" in str(extents.place(tagged(0, BLOCK), vm))


def test_without_a_window_the_option_is_named() -> None:
    assert "--cxl-window" in str(extents.place(tagged(0, BLOCK), with_windows()))


def test_the_window_that_has_the_bytes_is_found_among_several() -> None:
    second = replace(WINDOW, device="tmcw1", path="/media/pool1")
    placed = extents.place(tagged(0, BLOCK, path="/media/pool1"), with_windows(WINDOW, second))
    assert isinstance(placed, tuple)
    assert placed[1].window == "tmcw1"


@pytest.mark.parametrize(("state", "word"), [("held", "is there"), ("offered", "may be there")])
def test_bytes_that_are_lent_are_not_lent_again(
    state: Literal["held", "offered"], word: str
) -> None:
    vm = with_windows(replace(WINDOW, lent=(Lent(OTHER, "tmcw0", BLOCK, BLOCK, state),)))
    assert word in str(extents.place(tagged(0, 2 * BLOCK), vm))
    assert isinstance(extents.place(tagged(2 * BLOCK, BLOCK), vm), tuple), "they only touch"


def test_no_more_is_offered_than_the_device_remembers() -> None:
    lent = tuple(
        Lent(str(UUID(int=n, version=4)), "tmcw0", n * BLOCK, BLOCK)
        for n in range(extents.OFFERED_MAX)
    )
    vm = with_windows(replace(WINDOW, lent=lent))
    assert "8 unanswered" in str(extents.place(tagged(9 * BLOCK, BLOCK), vm))
    held = tuple(replace(one, state="held") for one in lent)
    assert isinstance(
        extents.place(tagged(9 * BLOCK, BLOCK), with_windows(replace(WINDOW, lent=held))), tuple
    )


# ---- with QEMU and the guest


class Fates(NamedTuple):
    """What becomes of the next commands and questions."""

    qemu: str = "does"
    """`does`, `refuses`, `lost` (nobody hears it), `done-unsaid` (the answer is lost)."""
    guest: str = "does"
    """`does`, `refuses`, `silent`, `done-unsaid`."""


class Emulated(FakeMachine):
    """A VM whose QEMU keeps extents as it was seen to: two lists without tags."""

    def __init__(self) -> None:
        super().__init__(with_windows(WINDOW))
        self.offered: list[tuple[int, int]] = []
        self.accepted: list[tuple[int, int]] = []
        self.fates = Fates()
        self.guest = self  # type: ignore[assignment] # one object plays both

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        return tuple(paths)

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "cxl-add-dynamic-capacity":
            if self.fates.qemu == "lost":
                raise OutcomeUnknown("no answer")
            if self.fates.qemu == "refuses":
                raise RemoteError("QEMU", 1, "duplicate or overlapped extents are detected")
        [extent] = arguments["extents"]
        place = (extent["offset"], extent["len"])
        if command == "cxl-add-dynamic-capacity":
            assert not any(
                at < place[0] + place[1] and place[0] < at + length
                for at, length in (*self.offered, *self.accepted)
            ), "QEMU is asked twice for the same bytes"
            self.offered.append(place)
            if self.fates.qemu == "done-unsaid":
                raise OutcomeUnknown("no answer")
            return {}
        if place in self.offered:
            reason = "cannot release extent with pending DPA range"
            raise RemoteError("QEMU", 1, reason)
        if place not in self.accepted:
            reason = "cannot release extent with non-existing DPA range"
            raise RemoteError("QEMU", 1, reason)
        return {}

    async def ask(self, request: guest.Request, deadline_ns: int) -> guest.Answer:
        assert isinstance(request, guest.Attach | guest.Give)
        told = request.told
        assert told is not None
        if self.fates.guest == "silent":
            raise OutcomeUnknown("the guest did not answer")
        if self.fates.guest == "refuses":
            return guest.Failed(0, "failed", "it will not")
        place = (told.dpa, told.size_bytes)
        if isinstance(request, guest.Attach):
            if place in self.offered:
                self.offered.remove(place)
                self.accepted.append(place)
        else:
            for places in (self.offered, self.accepted):
                if place in places:
                    places.remove(place)
        if self.fates.guest == "done-unsaid":
            raise OutcomeUnknown("the guest did not answer")
        if isinstance(request, guest.Give):
            return guest.Done(0)
        made = guest.Memory(told.tag, "cxl-dcd", "dax1.0", "/dev/dax1.0", told.size_bytes, BLOCK)
        return guest.Attached(0, made)

    def lent(self) -> tuple[Lent, ...]:
        return self.known.cxl_windows[0].lent

    def check(self) -> None:
        """Every byte that QEMU may show is one tag's, on record."""
        blocks: dict[int, str] = {}
        for one in self.lent():
            for block in range(one.dpa // BLOCK, (one.dpa + one.length) // BLOCK):
                assert blocks.setdefault(block, one.tag) == one.tag, "two tags on one DPA"
        known = {(one.dpa, one.length) for one in self.lent()}
        assert {*self.offered, *self.accepted} <= known, "what QEMU has nobody knows of"
        for one in self.lent():
            if one.state == "held":
                assert (one.dpa, one.length) not in self.offered


def offer(vm: Emulated, at: int = 0) -> None:
    asyncio.run(extents.offer(OfferExtent(Lent(TAG, "tmcw0", at, BLOCK)), vm))


def recall(vm: Emulated, tag: str = TAG) -> None:
    asyncio.run(extents.recall(RecallExtent(tag, SECOND), vm))


def test_an_offer_is_on_record_before_qemu_hears_of_it() -> None:
    vm = Emulated()
    offer(vm)
    assert vm.log == ["lend"]
    assert vm.offered == [(0, BLOCK)]


def test_an_offer_that_qemu_refuses_is_struck_off() -> None:
    vm = Emulated()
    vm.fates = Fates(qemu="refuses")
    with pytest.raises(RemoteError):
        offer(vm)
    assert vm.lent() == ()


@pytest.mark.parametrize("fate", ["lost", "done-unsaid"])
def test_an_offer_of_unknown_fate_stays_on_record_until_qemu_says_that_it_is_not(
    fate: str,
) -> None:
    vm = Emulated()
    vm.fates = Fates(qemu=fate)
    with pytest.raises(OutcomeUnknown):
        offer(vm)
    assert isinstance(extents.place(tagged(0, BLOCK, OTHER), vm.known), str)
    vm.fates = Fates()
    recall(vm)
    assert vm.lent() == ()


def test_a_release_that_only_the_guest_claims_is_none() -> None:
    vm = Emulated()
    offer(vm)

    class Liar:
        async def ask(self, request: guest.Request, deadline_ns: int) -> guest.Answer:
            return guest.Done(0)

    vm.guest = Liar()  # type: ignore[assignment] # as little as is asked
    with pytest.raises(Conflict, match="it says that it did"):
        recall(vm)
    assert [one.tag for one in vm.lent()] == [TAG]


def test_without_a_guest_an_extent_stays() -> None:
    vm = Emulated()
    offer(vm)
    vm.guest = None
    with pytest.raises(OutcomeUnknown, match="no guest agent"):
        recall(vm)
    assert vm.lent()


def test_what_is_not_on_record_is_gone_already() -> None:
    recall(Emulated(), OTHER)


def test_an_extent_is_named_by_its_place_in_its_region() -> None:
    vm = Emulated()
    vm.known = with_windows(replace(WINDOW, regions=2))
    heard: list[Mapping[str, Any]] = []

    async def hear(command: str, arguments: Mapping[str, Any]) -> Any:
        heard.append(arguments)
        return {}

    vm.execute = hear  # type: ignore[method-assign] # to see what is said
    offer(vm, 9 * BLOCK)
    [said] = heard
    assert said["region"] == 1
    assert said["extents"] == [{"offset": BLOCK, "len": BLOCK}]


fates = st.builds(
    Fates,
    st.sampled_from(["does", "does", "refuses", "lost", "done-unsaid"]),
    st.sampled_from(["does", "does", "refuses", "silent", "done-unsaid"]),
)
deeds = st.tuples(
    st.sampled_from(["attach", "attach", "recall"]),
    st.integers(0, 4),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 4),
    fates,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(deeds, max_size=14))
def test_never_two_tags_on_one_address_whatever_is_lost(
    done: list[tuple[str, int, int, int, Fates]],
) -> None:
    cxl = all_presenters()["cxl"]

    async def live() -> None:
        vm = Emulated()
        for deed, number, block, length, vm.fates in done:
            tag = str(UUID(int=number + 1, version=4))
            wanted = tagged(block * BLOCK, min(length, BLOCKS - block) * BLOCK, tag)
            with suppress(TagmemError):
                if deed == "attach":
                    await cxl.attach(Request(wanted), vm)
                else:
                    await extents.recall(RecallExtent(tag, SECOND), vm)
            vm.check()
        # Nothing is lost for ever: once all answer, all comes back.
        vm.fates = Fates()
        for one in vm.lent():
            await extents.recall(RecallExtent(one.tag, SECOND), vm)
        assert vm.lent() == ()
        assert vm.offered == vm.accepted == []

    asyncio.run(live())
