"""What the host has the DCD driver do, on the simulated device."""

from __future__ import annotations

import pytest

from tagmem.base.errors import NotFound
from tagmem.guest import dcd
from tagmem.guest.dcdctl import Device, give, show, take
from tagmem.guest.find import Roots
from tagmem.testing import type3
from tagmem.testing.type3 import Type3

MIB = 1 << 20
WINDOW = 0xA90000000


class OnType3(Device):
    """A start of the driver; the device goes on between starts."""

    def __init__(self, device: Type3) -> None:
        self._spaces = {"device": device.device, "component": device.component}
        self.driver = dcd.Driver(self.do(dcd.Mailbox.find(0, type3.DEVICE_BYTES)))

    def commit(self, window: int, length: int = 0) -> int:
        component = self.do(dcd.Decoders.find("component", 0, type3.COMPONENT_BYTES))
        self.do(component.program(window, WINDOW, 1 << 30))
        return WINDOW


def test_a_range_is_taken_shown_and_given_back() -> None:
    device = Type3()
    device.offer((256 * MIB, 2 * MIB))
    taken = take(OnType3(device), 256 * MIB, 2 * MIB, 0)
    assert taken["resource"] == WINDOW + 256 * MIB
    assert take(OnType3(device), 256 * MIB, 2 * MIB, 0) == taken, "found taken already"
    [held] = show(OnType3(device))["held"]
    assert (held["dpa"], held["length"]) == (256 * MIB, 2 * MIB)
    device.ask_release((256 * MIB, 2 * MIB))
    for _ in range(2):
        assert not give(OnType3(device), 256 * MIB, 2 * MIB)["held"]
    assert device.accepted == []


def test_what_was_offered_before_it_is_refused_and_what_came_after_waits() -> None:
    device = Type3()
    for dpa in (0, 4 * MIB, 8 * MIB):
        device.offer((dpa, 2 * MIB))
    take(OnType3(device), 4 * MIB, 2 * MIB, 0)
    assert [extent.start_dpa for extent in device.accepted] == [4 * MIB]
    [waiting] = show(OnType3(device))["waiting"]
    assert (waiting["kind"], waiting["extents"][0].dpa) == ("Offer", 8 * MIB)


def test_what_was_not_offered_is_not_there_and_costs_nobody_his_offer() -> None:
    device = Type3()
    device.offer((0, 2 * MIB))
    with pytest.raises(NotFound, match="was not offered"):
        take(OnType3(device), 4 * MIB, 2 * MIB, 0)
    with pytest.raises(NotFound):
        take(OnType3(device), 0, 4 * MIB, 0)
    assert len(device.pending) == 1


def test_a_guest_without_such_a_device_says_so() -> None:
    with pytest.raises(NotFound, match="found: none"):
        Device(sysfs=Roots(sysfs="/nowhere").sysfs)
