"""A CXL memory device of its own for each tag, plugged into a free CXL root port, the tag's file as
its volatile memory.

A stock kernel makes the DAX device, once the guest's agent has committed the decoders: inside a VM
the kernel refuses to do that, and adopts what is committed before its driver comes. The device
carries the first 64 bits of the tag as its serial number; the whole tag is told by the channel.
QEMU 11.1 maps the memory into the guest directly, 10.0 emulates each access.

The guest can eject the device, but no QEMU lets the memory of a CXL device go: the bytes are the
host's again when the VM has ended. QEMU 10.0 does not even let the device leave.
"""

from __future__ import annotations

from uuid import UUID

from tagmem.base.errors import OutcomeUnknown
from tagmem.base.units import MIB, MILLISECOND, SECOND
from tagmem.presenter import common
from tagmem.presenter.contract import (
    AskGuest,
    AwaitDeleted,
    Description,
    Impossible,
    Machine,
    Plan,
    Presentation,
    ProveUnmapped,
    Request,
    Step,
    VmFacts,
)
from tagmem.presenter.driver import Planned
from tagmem.wire import guest

DRIVER = "cxl-type3"
UNIT_BYTES = 256 * MIB
"""Of decoders and windows."""
COMMIT_NS = 40 * SECOND
LEAVE_NS = 8 * SECOND
"""Root ports of CXL know only the native hot-plug, with its button's five seconds."""
KEPT_NS = SECOND // 5
"""It will be mapped still: no QEMU lets the memory of a CXL device go."""
WARNING = (
    "QEMU keeps the memory of a CXL device mapped when the device has left: the bytes are the "
    "host's only when the VM has ended; nothing is taken from a guest by force, and it cannot be "
    "migrated"
)
NO_FORCE = "a CXL device leaves only when its guest lets it"


def serial(tag: str) -> int:
    """The first 64 bits of a tag."""
    return UUID(tag).int >> 64


class CxlStatic(Planned):
    """See the module."""

    description = Description(
        name="cxl-static",
        summary="a CXL memory device of its own on the tag's file",
        guaranteed=False,
        removal="vm-end",
        dax=True,
        ram=False,
        tag_in_band=False,
        granularity_bytes=UNIT_BYTES,
        minimum_bytes=UNIT_BYTES,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="broken",
        stock_kernel=True,
        guest_code="the agent commits the decoders before the kernel's driver sees the device",
        qemu_min=(10, 0, 0),
        setup=(
            "-machine q35,cxl=on,cxl-fmw.0.targets.0=BRIDGE,cxl-fmw.0.size=SIZE",
            "-device pxb-cxl,id=BRIDGE,bus_nr=N,hdm_for_passthrough=on",
            "-device cxl-rp,bus=BRIDGE,id=PORT",
            "object-add memory-backend-file,share=on",
            "device_add cxl-type3,bus=PORT,volatile-memdev=MEMORY,sn=SERIAL",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        reason = (
            common.unmet(request, self.description)
            or common.wrong_size(request, UNIT_BYTES, UNIT_BYTES)
            or common.wrong_vm(request, self.description, DRIVER, vm)
        )
        if reason is not None:
            return reason
        if not vm.cxl_ports:
            return "the machine has no free CXL root port (vm start --cxl-ports N)"
        if vm.guest is None:
            return "no guest agent answers, and nobody else could commit the decoders"
        if "cxl-static" not in vm.guest.features:
            return "the guest's agent must be root and have /dev/mem, to commit decoders"
        return None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Memory, device, and the agent commits and waits for the kernel's DAX device."""
        tagged = request.tagged
        tag, port = tagged.tag, vm.cxl_ports[0]
        number = serial(tag)
        memory = {"volatile-memdev": common.memory_id(tag)}
        told = guest.Told(tag, "cxl-static", serial=f"{number:#x}", size_bytes=tagged.size_bytes)
        steps: tuple[Step, ...] = (
            common.memory_file(tag, tagged.pieces[0]),
            common.add_device(DRIVER, tag, bus=port, sn=number, **memory),
            AskGuest(guest.Attach(0, tag, COMMIT_NS // MILLISECOND, told), COMMIT_NS + SECOND),
        )
        device = common.device_id(tag)
        size = tagged.size_bytes
        return Plan(self.description.name, device, steps, size, port, WARNING)

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """As all."""
        shown = await super().attach(request, vm)
        if not shown.guest_path:
            raise OutcomeUnknown("the guest does not say that it has the device")
        return shown

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest proves and ejects. QEMU is not asked to let the memory go: it refuses that once
        a CXL device has had it.
        """
        tagged = presentation.tagged
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung, eject=True),)
        if rung == "unplug":
            return (
                AwaitDeleted(presentation.device, LEAVE_NS),
                ProveUnmapped(common.file_paths(tagged), KEPT_NS, common.CXL_KEPT),
            )
        if rung == "revoke":
            return (Impossible(NO_FORCE),)
        return ()
