"""An ACPI NVDIMM on the tag's file, with the tag's header: DAX on machines without virtio.

Hot-plugged like any DIMM, but QEMU cannot unplug it, and it has no slot that the guest could power
off: the bytes come back when QEMU ends.
"""

from __future__ import annotations

from tagmem.base.units import MIB
from tagmem.presenter import common
from tagmem.presenter.contract import Description, Plan, Presentation, Request, Step, VmFacts
from tagmem.presenter.driver import Planned

DRIVER = "nvdimm"
WARNING = "an NVDIMM cannot be unplugged: only stopping the VM gives the bytes back"


class Nvdimm(Planned):
    """See the module."""

    description = Description(
        name="nvdimm",
        summary="an ACPI NVDIMM on the tag's file",
        guaranteed=False,
        removal="never",
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
        guest_code="",
        qemu_min=(10, 0, 0),
        setup=(
            "-machine nvdimm=on and -m SIZE,slots=N,maxmem=MAXMEM",
            "object-add memory-backend-file,share=on",
            "device_add nvdimm",
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
        )
        if reason is not None:
            return reason
        if not vm.nvdimm:
            return "the machine was started without nvdimm=on"
        return common.no_room(vm, whole, memory_slot=True)

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Header, memory, device."""
        tag = request.tagged.tag
        whole, header = common.with_header(request.tagged)
        read_only = request.tagged.read_only
        steps: tuple[Step, ...] = (
            header,
            common.memory_file(tag, whole, read_only=read_only),
            # Unarmed is how an NVDIMM says that what is written to it may be lost.
            common.add_device(DRIVER, tag, memdev=common.memory_id(tag), unarmed=read_only),
            common.find_in_guest(tag),
        )
        warning = common.drops_writes(WARNING, request.tagged)
        device = common.device_id(tag)
        return Plan(self.description.name, device, steps, whole.length, warning=warning)

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest can be asked to stop using it; QEMU keeps it."""
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung),)
        if rung == "unplug":
            return (common.never(WARNING),)
        return ()
