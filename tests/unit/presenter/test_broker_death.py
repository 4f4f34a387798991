"""What a host does with its VMs when the process that serves their windows dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG, FakeMachine, FakeWindows, tagged

from tagmem.base.errors import NotFound
from tagmem.ports import HostTag
from tagmem.presenter.brokerlink import Window
from tagmem.presenter.contract import Presentation, Tagged
from tagmem.presenter.host import Hypervisor, _Entry
from tagmem.presenter.machine import VmSpec
from tagmem.presenter.qemu import Vm
from tagmem.presenter.requests import VmRecord
from tagmem.presenter.window import Goal
from tagmem.wire import guest

DEVICE = f"tm-{TAG}"
SHOWN = Presentation(tagged(), "vm1", "vhost-pmem", DEVICE, "attached")
MEMORY = guest.Memory(TAG, "vhost-pmem", "dax0.0", "/dev/dax0.0", 1, 1)
RELEASED = guest.Released(1, TAG, present=True)
FOUND = guest.Attached(1, MEMORY)
HELD = guest.Held(1, TAG, (guest.Holder(7, "app", "maps"),))


class Keeper:
    """A broker's link whose broker has died; what is opened anew is in hand."""

    def __init__(self, vm: FakeMachine) -> None:
        self.vm = vm
        self.looked_after: list[tuple[str, str, Goal, int]] = []
        self.on_lost: Callable[[Collection[Window]], None] = lambda _: None

    def windows(self, vm: str) -> FakeWindows:
        assert self.vm.windows is not None
        return self.vm.windows

    def knows(self, vm: str, device: str) -> bool:
        return "open" in self.vm.log

    in_hand = knows

    async def find_again(self) -> Collection[Window]:
        return ()

    async def look_after(
        self, vm: str, device: str, tagged: Tagged, goal: Goal, qemu_pid: int
    ) -> None:
        self.looked_after.append((vm, device, goal, qemu_pid))

    async def forget(self, vm: str, device: str) -> None:
        self.vm.log.append("forget")

    async def close(self) -> None:
        self.vm.log.append("close")


async def keep(key: str, document: str | None) -> None:
    """Nothing is remembered."""


def tags(tag: str) -> HostTag:
    raise NotFound(tag)


async def parts(spec: VmSpec, qemu: str) -> VmSpec:
    return spec


def died(policy: str, *answers: guest.Answer | None) -> tuple[FakeMachine, Keeper, dict[str, Any]]:
    """The VM, what was done about its windows, and what is told of it afterwards."""

    async def main() -> dict[str, Any]:
        hypervisor = Hypervisor(Path("/run"), keep, tags, keeper, parts, broker_death=policy)
        entry = _Entry(VmRecord("vm1", "/run/qmp", pid=7))
        entry.vm = cast(Vm, vm)
        hypervisor._entries["vm1"] = entry
        hypervisor._shown["vm1", TAG] = SHOWN
        keeper.on_lost((("vm1", DEVICE),))
        await asyncio.gather(*hypervisor._tasks)
        (told,) = (await hypervisor.call({"vm": "list"}, lambda _: None))["vms"]
        return dict(told)

    vm = FakeMachine(msgspec.structs.replace(ROOMY), *answers)
    keeper = Keeper(vm)
    return vm, keeper, asyncio.run(main())


@pytest.mark.parametrize("policy", ["reattach", "keep", "stop"])
def test_what_is_left_in_qemu_is_looked_after(policy: str) -> None:
    _, keeper, _ = died(policy, HELD)
    assert keeper.looked_after == [("vm1", DEVICE, Goal.PRESENTED, 7)]


def test_what_nobody_holds_is_plugged_anew() -> None:
    vm, _, told = died("reattach", RELEASED, FOUND)
    once = ["device_del", "chardev-remove", "close", "open", "chardev-add", "device_add", "mapped"]
    assert vm.log == once
    assert [(tag["state"], tag["guaranteed"]) for tag in told["tags"]] == [("attached", True)]


def test_a_holder_keeps_it_and_the_guarantee_is_not_claimed() -> None:
    vm, _, told = died("reattach", HELD)
    assert vm.log == []
    assert [(tag["state"], tag["guaranteed"]) for tag in told["tags"]] == [("attached", False)]


def test_it_may_be_left_as_it_is() -> None:
    vm, _, told = died("keep", RELEASED)
    assert vm.log == []
    assert told["tags"][0]["guaranteed"] is False


def test_the_vm_may_be_stopped() -> None:
    vm, _, _ = died("stop", RELEASED)
    assert vm.log == ["stop-vm"]
