"""An appliance behind the kernel's driver: what sysfs shows is what the loop hears."""

from __future__ import annotations

import shutil
from pathlib import Path

from tagmem.agent import records as r
from tagmem.agent.kernel import KernelAppliance, KernelDax
from tagmem.base.units import MIB, Dpa
from tagmem.ports import Event

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
OTHER = "0f2a8a3c-1c5d-4e6f-9a7b-3b2d1c0e4f55"
SYSFS = Path(__file__).parent.parent.parent / "data" / "sysfs"


def test_what_the_kernel_has_is_told_when_it_changes(tmp_path: Path) -> None:
    shutil.copytree(SYSFS, tmp_path / "sys")
    heard: list[Event] = []
    appliance = KernelAppliance("a0", KernelDax(tmp_path / "run", tmp_path / "sys"), heard.append)
    appliance.look()
    appliance.look()
    (read,) = heard
    assert isinstance(read, r.DeviceRead)
    assert read.fresh
    assert read.held == (
        r.Extent(Dpa(4 * MIB), 2 * MIB, OTHER),
        r.Extent(Dpa(0), 2 * MIB, TAG),
        r.Extent(Dpa(8 * MIB), 2 * MIB, TAG),
    )
    appliance.perform(r.ReturnExtents(0, "a0", TAG, ()))
    assert heard[1:] == [r.Returned("a0", TAG, 0)]
    appliance.look()
    (_, _, again) = heard
    assert isinstance(again, r.DeviceRead)
    assert not again.fresh
    assert [extent.tag for extent in again.held] == [OTHER], "given up, though still listed"
