"""ivshmem: the tag's file as a PCI BAR, for guests without any driver.

A mapping of the BAR outlives the device: when another tag is plugged into the same slot, the old
mapping shows that one's bytes. So it leaves only after the guest's agent has proved that nobody has
it, there is no force, and it is allowed only where the tag's file is a dead end: cut off at release
and never another tag's. QEMU aborts on sizes that are no power of two; those are refused first.
"""

from __future__ import annotations

import binascii

from tagmem.base.units import MIB, is_power_of_two
from tagmem.presenter import common
from tagmem.presenter.contract import (
    AwaitDeleted,
    Command,
    Description,
    Plan,
    Presentation,
    ProveUnmapped,
    Request,
    Slot,
    Step,
    VmFacts,
)
from tagmem.presenter.driver import PROVE_NS, UNPLUG_NS, Planned
from tagmem.wire import guest

DRIVER = "ivshmem-plain"
ACPI_INDEX_MAX = 16383
WARNING = (
    "the guest's mappings of it outlive a detach that nobody proved; "
    "if the guest does not let go, only stopping the VM gives the bytes back"
)


class Ivshmem(Planned):
    """See the module."""

    description = Description(
        name="ivshmem",
        summary="the tag's file as a PCI BAR",
        guaranteed=False,
        removal="guest",
        dax=False,
        ram=False,
        tag_in_band=False,
        granularity_bytes=2 * MIB,
        minimum_bytes=2 * MIB,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="broken",
        stock_kernel=True,
        guest_code="agent or side channel, for the name",
        qemu_min=(10, 0, 0),
        setup=(
            "-cpu …,phys-bits=46",
            "-device pcie-root-port,id=PORT,chassis=N,slot=N,pref64-reserve=RESERVE",
            "object-add memory-backend-file,share=on and device_add ivshmem-plain,acpi-index=N",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        tagged = request.tagged
        reason = common.unmet(request, self.description) or common.wrong_size(
            request, 2 * MIB, 2 * MIB
        )
        if reason is not None:
            return reason
        if not is_power_of_two(tagged.size_bytes):
            return f"size: must be a power of two, got {tagged.size_bytes} bytes"
        if not tagged.dead_end:
            return "stale mappings would show the next tag's bytes: its media are not a dead end"
        reason = common.wrong_vm(request, self.description, DRIVER, vm) or common.no_region(vm)
        if reason is not None:
            return reason
        slot = _slot(request, vm)
        return slot if isinstance(slot, str) else None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Memory, device, and the name by the side channel."""
        tagged = request.tagged
        slot = _slot(request, vm)
        assert not isinstance(slot, str)
        index = acpi_index(tagged.tag, vm)
        properties: dict[str, object] = {"acpi-index": index, "master": "on"}
        told = guest.Told(tagged.tag, "ivshmem", acpi_index=index, size_bytes=tagged.size_bytes)
        steps: tuple[Step, ...] = (
            common.memory_file(tagged.tag, tagged.pieces[0]),
            common.add_device(
                DRIVER, tagged.tag, memdev=common.memory_id(tagged.tag), bus=slot.bus, **properties
            ),
            common.find_in_guest(tagged.tag, told),
        )
        return Plan(
            self.description.name,
            common.device_id(tagged.tag),
            steps,
            tagged.size_bytes,
            slot.bus,
            WARNING,
        )

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest proves first: it gets no signal when the BAR goes."""
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung),)
        if rung == "unplug":
            return (
                Command("device_del", {"id": presentation.device}),
                AwaitDeleted(presentation.device, UNPLUG_NS),
                Command("object-del", {"id": common.memory_id(presentation.tagged.tag)}),
                ProveUnmapped(common.file_paths(presentation.tagged), PROVE_NS),
            )
        return ()


def _slot(request: Request, vm: VmFacts) -> Slot | str:
    return common.free_slot(vm, request.tagged.size_bytes + common.SMALL_BAR_BYTES)


def acpi_index(tag: str, vm: VmFacts) -> int:
    """The number by which the guest tells this BAR from others. It follows from the tag, so that a
    tag never inherits the number (and in the guest the name) of the one before it in the slot.
    """
    others = {_home(common.tag_of(device)) for device in vm.devices if common.tag_of(device)}
    index = _home(tag)
    while index in others:
        index = index % ACPI_INDEX_MAX + 1
    return index


def _home(tag: str) -> int:
    return binascii.crc32(tag.encode()) % ACPI_INDEX_MAX + 1
