"""What the host has the DCD driver do, on the simulated device."""

from __future__ import annotations

from typing import Any

import pytest

from tagmem.base.errors import NotFound
from tagmem.guest import dcd
from tagmem.guest.cxl import Device, Range
from tagmem.guest.dcdctl import run
from tagmem.guest.find import Roots
from tagmem.testing import type3
from tagmem.testing.type3 import Type3

MIB = 1 << 20
WINDOW = 0xA90000000


class OnType3(Device):
    """A start of the driver; the device goes on between starts."""

    def __init__(self, device: Type3) -> None:
        self._spaces = {"device": device.device, "component": device.component}
        mailbox = self.do(dcd.Mailbox.find(0, type3.DEVICE_BYTES))
        self.driver = dcd.Driver(mailbox, keep_asked=True)

    def commit(self, length: int = 0) -> int:
        component = self.do(dcd.Decoders.find("component", 0, type3.COMPONENT_BYTES))
        self.do(component.program(0, WINDOW, 1 << 30))
        return WINDOW


def start(device: Type3, operation: str, *ranges: tuple[int, int]) -> dict[str, Any]:
    """The program, started once more."""
    return run(operation, OnType3(device), [Range(*one) for one in ranges], 0)


def test_a_range_is_taken_shown_and_given_back() -> None:
    device = Type3()
    device.offer((256 * MIB, 2 * MIB))
    taken = start(device, "take", (256 * MIB, 2 * MIB))
    assert taken["resource"] == WINDOW + 256 * MIB
    assert start(device, "take", (256 * MIB, 2 * MIB)) == taken, "found taken already"
    [held] = start(device, "list")["held"]
    assert (held["dpa"], held["length"]) == (256 * MIB, 2 * MIB)
    device.ask_release((256 * MIB, 2 * MIB))
    for _ in range(2):
        start(device, "give", (256 * MIB, 2 * MIB))
        assert device.accepted == []


def test_an_offer_of_several_extents_is_taken_whole() -> None:
    device = Type3()
    several = [(0, 2 * MIB), (4 * MIB, 4 * MIB)]
    device.offer(*several)
    with pytest.raises(NotFound):
        start(device, "take", several[0])
    start(device, "take", *reversed(several))
    assert [(e.start_dpa, e.length_bytes) for e in device.accepted] == several
    start(device, "give", *several)
    assert device.accepted == []


def test_what_is_asked_back_is_told_until_it_is_given() -> None:
    device = Type3()
    device.offer((0, 2 * MIB))
    start(device, "take", (0, 2 * MIB))
    device.ask_release((0, 2 * MIB))
    for _ in range(2):
        [waiting] = start(device, "list")["waiting"]
        assert waiting["kind"] == "ReleaseAsked"
    device.offer((4 * MIB, 2 * MIB))
    asked = [{"dpa": 0, "length": 2 * MIB}]
    assert start(device, "take", (4 * MIB, 2 * MIB))["asked_back"] == asked
    assert start(device, "give", (0, 2 * MIB))["asked_back"] == asked
    assert start(device, "list")["waiting"] == []


def test_askings_that_nobody_heeds_do_not_fill_the_log() -> None:
    device = Type3()
    for number in range(8):
        device.offer((number * 4 * MIB, 2 * MIB))
        start(device, "take", (number * 4 * MIB, 2 * MIB))
        device.ask_release((number * 4 * MIB, 2 * MIB))
    assert len(start(device, "list")["held"]) == 8
    assert 0 < len(start(device, "list")["waiting"]) <= dcd.RECORDS_KEPT_MAX


def test_an_offer_that_waits_is_refused_by_giving_it_back() -> None:
    device = Type3()
    device.offer((0, 2 * MIB))
    start(device, "give", (0, 2 * MIB))
    assert not device.pending
    assert not device.accepted


def test_what_was_offered_before_it_is_refused_and_what_came_after_waits() -> None:
    device = Type3()
    for dpa in (0, 4 * MIB, 8 * MIB):
        device.offer((dpa, 2 * MIB))
    start(device, "take", (4 * MIB, 2 * MIB))
    assert [extent.start_dpa for extent in device.accepted] == [4 * MIB]
    [waiting] = start(device, "list")["waiting"]
    assert (waiting["kind"], waiting["extents"][0].dpa) == ("Offer", 8 * MIB)


def test_what_was_not_offered_is_not_there_and_costs_nobody_his_offer() -> None:
    device = Type3()
    device.offer((0, 2 * MIB))
    with pytest.raises(NotFound, match="was not offered"):
        start(device, "take", (4 * MIB, 2 * MIB))
    with pytest.raises(NotFound):
        start(device, "take", (0, 4 * MIB))
    assert len(device.pending) == 1


def test_a_guest_without_such_a_device_says_so() -> None:
    with pytest.raises(NotFound, match="found: none"):
        Device(sysfs=Roots(sysfs="/nowhere").sysfs)
