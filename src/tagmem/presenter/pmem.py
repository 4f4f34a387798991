"""virtio-pmem inside QEMU, with the tag's header in front of the bytes: for QEMU 10.0, and for
migration in place.

QEMU maps one stretch of one file, so the header needs room in front of the capacity in the same
file: the appliance leaves it (`head_room`). Without it there is no way: a guest that made the
device itself (`ndctl create-namespace`) would write its header into the tag's first bytes.
QEMU refuses to unplug it; the guest can eject it. When the guest does not, only ending the VM
gives the bytes back, and the user is told so when attaching.
"""

from __future__ import annotations

from tagmem.base.units import MIB
from tagmem.presenter import common
from tagmem.presenter.contract import (
    AwaitDeleted,
    Command,
    Description,
    Plan,
    Presentation,
    ProveUnmapped,
    Request,
    Step,
    VmFacts,
)
from tagmem.presenter.driver import PROVE_NS, UNPLUG_NS, Planned

DRIVER = "virtio-pmem-pci"
WARNING = "if the guest does not let go, only stopping the VM gives the bytes back"


class Pmem(Planned):
    """See the module."""

    description = Description(
        name="pmem",
        summary="virtio-pmem inside QEMU on the tag's file",
        guaranteed=False,
        removal="guest",
        dax=True,
        ram=False,
        tag_in_band=True,
        granularity_bytes=2 * MIB,
        minimum_bytes=2 * MIB,
        pieces=False,
        read_only=True,
        header_bytes=common.HEADER_BYTES,
        migration="stays",
        stock_kernel=True,
        guest_code="eject, for removal",
        qemu_min=(10, 0, 0),
        setup=(
            "-m SIZE,maxmem=MAXMEM and -device pcie-root-port,id=PORT,chassis=N,slot=N",
            "object-add memory-backend-file,share=on",
            "device_add virtio-pmem-pci",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        whole = common.HEADER_BYTES + request.tagged.size_bytes
        reason = (
            common.unmet(request, self.description)
            or common.wrong_size(request, 2 * MIB, 2 * MIB)
            or common.no_head_room(request.tagged)
            or common.wrong_vm(request, self.description, DRIVER, vm)
            or common.no_room(vm, whole, memory_slot=False)
        )
        if reason is not None:
            return reason
        slot = common.free_slot(vm)
        return slot if isinstance(slot, str) else None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Header, memory, device."""
        tag = request.tagged.tag
        slot = common.free_slot(vm)
        assert not isinstance(slot, str)
        whole, header = common.with_header(request.tagged)
        steps: tuple[Step, ...] = (
            header,
            common.memory_file(tag, whole, read_only=request.tagged.read_only),
            common.add_device(DRIVER, tag, memdev=common.memory_id(tag), bus=slot.bus),
            common.find_in_guest(tag),
        )
        return Plan(
            self.description.name,
            common.device_id(tag),
            steps,
            whole.length,
            slot.bus,
            common.drops_writes(WARNING, request.tagged),
        )

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest proves and ejects; then QEMU lets the memory go."""
        tagged = presentation.tagged
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung, eject=True),)
        if rung == "unplug":
            return (
                AwaitDeleted(presentation.device, UNPLUG_NS),
                Command("object-del", {"id": common.memory_id(tagged.tag)}),
                ProveUnmapped(common.file_paths(tagged), PROVE_NS),
            )
        return ()
