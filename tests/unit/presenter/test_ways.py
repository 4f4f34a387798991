"""What each way of presenting is willing to do, plans and promises; what `auto` makes of it."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG, tagged

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.base.units import GIB, MIB
from tagmem.presenter.choose import all_presenters, choose, pick
from tagmem.presenter.contract import (
    Command,
    Impossible,
    MakeHeader,
    Need,
    OpenWindow,
    Piece,
    Presentation,
    ProveUnmapped,
    Request,
    Slot,
    Tagged,
    VmFacts,
)
from tagmem.presenter.driver import Planned

WAYS = all_presenters()
replace = msgspec.structs.replace


@pytest.mark.parametrize("way", WAYS)
def test_each_can_where_there_is_room(way: str) -> None:
    assert WAYS[way].can(Request(tagged()), ROOMY) is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("what", "vm", "reason"),
    [
        (tagged(3 * MIB), ROOMY, "size"),
        (tagged(), replace(ROOMY, state="paused"), "must be running, and is paused"),
        (tagged(), replace(ROOMY, state="gone"), "has ended"),
        (tagged(), replace(ROOMY, qemu=(7, 2, 0)), "QEMU must be"),
        (tagged(), replace(ROOMY, drivers=()), "has no device"),
        (tagged(), replace(ROOMY, devices=(f"tm-{TAG}",)), "in this VM already"),
    ],
)
def test_each_says_why_not(way: str, what: Tagged, vm: VmFacts, reason: str) -> None:
    assert reason in (WAYS[way].can(Request(what), vm) or "")


FULL = replace(ROOMY, regions_taken=8, window_regions=6)


@pytest.mark.parametrize(
    ("way", "what", "vm", "reason"),
    [
        ("vhost-pmem", tagged(), replace(ROOMY, ram_shared=False), "RAM must be shared"),
        ("vhost-pmem", tagged(), replace(ROOMY, broker=False), "no broker"),
        ("vhost-pmem", tagged(4 * GIB), ROOMY, "pref64-reserve"),
        ("vhost-pmem", tagged(), replace(ROOMY, slots=()), "no pcie-root-port"),
        ("pmem", tagged(head_room_bytes=0), ROOMY, "in front of the tag"),
        ("vhost-pmem", tagged(read_only=True), ROOMY, "read-only"),
        ("ivshmem", tagged(read_only=True), ROOMY, "read-only"),
        (
            "vhost-pmem",
            tagged(),
            replace(ROOMY, regions_taken=7),
            "7 are taken and this tag takes 2",
        ),
        ("pmem", tagged(), FULL, "8 are taken, 6 of them by windows"),
        ("nvdimm", tagged(), FULL, "8 are taken, 6 of them by windows"),
        ("dimm", tagged(), FULL, "8 are taken, 6 of them by windows"),
        ("virtio-mem", tagged(), FULL, "8 are taken, 6 of them by windows"),
        ("ivshmem", tagged(), FULL, "8 are taken, 6 of them by windows"),
        ("pmem", tagged(), replace(ROOMY, memory_free_bytes=MIB), "maxmem"),
        ("pmem", tagged(), replace(ROOMY, slots=(Slot("rp1", 0, "x"),)), "all 1 slots are taken"),
        ("nvdimm", tagged(), replace(ROOMY, nvdimm=False), "nvdimm=on"),
        ("nvdimm", tagged(), replace(ROOMY, memory_slots_free=0), "slots="),
        ("dimm", tagged(loaded=True), ROOMY, "may have content"),
        ("dimm", tagged(64 * MIB), ROOMY, "at least 128 MiB"),
        ("virtio-mem", tagged(shared=True), ROOMY, "other hosts share it"),
        ("ivshmem", tagged(96 * MIB), ROOMY, "power of two"),
        ("ivshmem", tagged(dead_end=False), ROOMY, "dead end"),
    ],
)
def test_its_own_limits(way: str, what: Tagged, vm: VmFacts, reason: str) -> None:
    assert reason in (WAYS[way].can(Request(what), vm) or "")


def test_only_the_window_takes_a_tag_in_pieces() -> None:
    two = (Piece("/media/tag", 0, 128 * MIB), Piece("/media/tag", GIB, 128 * MIB))
    request = Request(tagged(pieces=two))
    able = [name for name, way in WAYS.items() if way.can(request, ROOMY) is None]
    assert able == ["vhost-pmem"]


def test_a_tag_in_more_pieces_than_a_table_has_goes_alone() -> None:
    pieces = tuple(Piece("/media/tag", number * GIB, 16 * MIB) for number in range(8))
    request = Request(tagged(128 * MIB, pieces=pieces))
    way = WAYS["vhost-pmem"]
    assert way.can(request, ROOMY) is None
    assert "reboot" in way.plan(request, ROOMY).warning
    beside = replace(ROOMY, regions_taken=3, window_regions=2)
    assert "this tag takes 9" in (way.can(request, beside) or "")


def test_without_windows_memory_devices_are_not_counted() -> None:
    many = replace(ROOMY, regions_taken=20)
    assert WAYS["pmem"].can(Request(tagged()), many) is None


@pytest.mark.parametrize(("way", "unarmed"), [("pmem", None), ("nvdimm", True)])
def test_a_read_only_sharer_gets_memory_that_cannot_be_written(
    way: str, unarmed: bool | None
) -> None:
    request = Request(tagged(read_only=True, shared=True))
    assert WAYS[way].can(request, ROOMY) is None
    plan = WAYS[way].plan(request, ROOMY)
    assert "dropped" in plan.warning
    header, memory, device, _ = plan.steps
    assert isinstance(header, MakeHeader)
    assert header.read_only
    assert isinstance(memory, Command)
    assert memory.arguments["readonly"] is True
    assert memory.arguments["rom"] == "on"
    assert isinstance(device, Command)
    assert device.arguments.get("unarmed") is unarmed
    assert choose(WAYS, request, ROOMY).presenter == "pmem"


@pytest.mark.parametrize(
    ("need", "first"),
    [
        (Need(), "vhost-pmem"),
        (Need(guaranteed=True), "vhost-pmem"),
        (Need(live_migration=True), "pmem"),
        (Need(live_migration=True, discoverable=True, dax=True), "pmem"),
        (Need(ram=True), "dimm"),
        (Need(ram=True, guaranteed=True), ""),
    ],
)
def test_auto_follows_the_need(need: Need, first: str) -> None:
    chosen = choose(WAYS, Request(tagged(), need), ROOMY)
    assert chosen.presenter == first
    assert chosen.why
    assert len(chosen.verdicts) == len(WAYS)


def test_auto_gives_every_reason_when_none_can() -> None:
    with pytest.raises(Unsupported) as caught:
        pick(WAYS, Request(tagged()), replace(ROOMY, state="paused"))
    for way in WAYS:
        assert way in str(caught.value)


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(InvalidInput, match="vhost-pmem"):
        choose(WAYS, Request(tagged()), ROOMY, "floppy")


@pytest.mark.parametrize("way", WAYS)
def test_a_header_never_takes_the_capacity(way: str) -> None:
    plan = WAYS[way].plan(Request(tagged()), ROOMY)
    what = WAYS[way].describe()
    assert plan.device_bytes == 256 * MIB + what.header_bytes
    for step in plan.steps:
        if isinstance(step, MakeHeader):
            assert step.offset + what.header_bytes == tagged().pieces[0].offset
        if isinstance(step, OpenWindow):
            assert step.tagged == tagged()
    if not what.header_bytes and way != "cxl":  # which maps a whole pool, before
        backend = next(s for s in plan.steps if isinstance(s, Command))
        assert backend.arguments["offset"] == tagged().pieces[0].offset


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_guaranteed_warns(way: str) -> None:
    what = WAYS[way].describe()
    plan = WAYS[way].plan(Request(tagged()), ROOMY)
    assert bool(plan.warning) is not what.guaranteed
    assert what.guaranteed == (what.removal == "host")


def test_the_smallest_slot_that_fits_is_taken() -> None:
    assert WAYS["pmem"].plan(Request(tagged()), ROOMY).slot == "rp1"
    assert WAYS["vhost-pmem"].plan(Request(tagged(GIB)), ROOMY).slot == "rp2"


@pytest.mark.parametrize("way", ["cxl", "cxl-static"])
def test_attaching_cxl_says_what_cannot_be_done_with_it(way: str) -> None:
    what = WAYS[way].describe()
    for text in (what.warning, WAYS[way].plan(Request(tagged()), ROOMY).warning):
        assert "only when the VM has ended" in text
        assert "by force" in text
        assert "cannot be migrated" in text
    assert what.migration == "broken"
    for need in (Need(live_migration=True), Need(guaranteed=True)):
        reason = WAYS[way].can(Request(tagged(), need), ROOMY)
        assert reason is not None
    assert choose(WAYS, Request(tagged()), ROOMY).presenter not in ("cxl", "cxl-static")


@pytest.mark.parametrize("way", ["cxl", "cxl-static"])
def test_detaching_cxl_tries_nothing_that_qemu_cannot_do(way: str) -> None:
    presenter = WAYS[way]
    assert isinstance(presenter, Planned)
    shown = Presentation(tagged(), "vm1", way, "tmcw0", "attached")
    steps = [
        s for rung in ("ask", "insist", "unplug", "revoke") for s in presenter.unplan(shown, rung)
    ]
    assert not any(isinstance(step, Command) for step in steps), "neither object-del nor device_del"
    [proof] = [step for step in steps if isinstance(step, ProveUnmapped)]
    assert "the VM must end first" in proof.otherwise
    [force] = presenter.unplan(shown, "revoke")
    assert isinstance(force, Impossible)
    assert force.reason
