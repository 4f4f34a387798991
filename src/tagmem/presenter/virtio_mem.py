"""virtio-mem: RAM that grows and shrinks in 2 MiB steps. Not guaranteed.

The device wipes its backing the moment it is added, so a tag that has content, or that others
share, is refused before anything is tried. A guest that uses its memory keeps what it likes. What a
tagged use would need is beside it only: neither extents nor tags are in the protocol.
"""

from __future__ import annotations

from tagmem.base.units import MIB, SECOND
from tagmem.presenter import common
from tagmem.presenter.contract import (
    AwaitDeleted,
    AwaitSize,
    Command,
    Description,
    Plan,
    Presentation,
    ProveUnmapped,
    Request,
    Step,
    VmFacts,
)
from tagmem.presenter.dimm import BLOCK_BYTES
from tagmem.presenter.driver import PROVE_NS, UNPLUG_NS, Planned

DRIVER = "virtio-mem-pci"
SHRINK_NS = 30 * SECOND
WARNING = (
    "this is RAM to the guest's kernel, which keeps what it uses: not guaranteed; the tag is wiped"
)


class VirtioMem(Planned):
    """See the module."""

    description = Description(
        name="virtio-mem",
        summary="elastic RAM on the tag's file",
        guaranteed=False,
        removal="sometimes",
        dax=False,
        ram=True,
        tag_in_band=False,
        granularity_bytes=2 * MIB,
        minimum_bytes=BLOCK_BYTES,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="stays",
        stock_kernel=True,
        guest_code="",
        qemu_min=(10, 0, 0),
        setup=(
            "-m SIZE,maxmem=MAXMEM and -device pcie-root-port,id=PORT,chassis=N,slot=N",
            "object-add memory-backend-file,share=on,reserve=off and device_add virtio-mem-pci",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        reason = (
            common.unmet(request, self.description)
            or common.wrong_size(request, 2 * MIB, BLOCK_BYTES)
            or common.wrong_vm(request, self.description, DRIVER, vm)
            or common.no_room(vm, request.tagged.size_bytes, memory_slot=False)
        )
        if reason is not None:
            return reason
        slot = common.free_slot(vm)
        return slot if isinstance(slot, str) else None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Memory, device, all of it requested."""
        tagged = request.tagged
        slot = common.free_slot(vm)
        assert not isinstance(slot, str)
        device = common.device_id(tagged.tag)
        properties = {"requested-size": tagged.size_bytes}
        steps: tuple[Step, ...] = (
            common.memory_file(tagged.tag, tagged.pieces[0], reserve=False),
            common.add_device(
                DRIVER, tagged.tag, memdev=common.memory_id(tagged.tag), bus=slot.bus, **properties
            ),
        )
        return Plan(
            self.description.name, device, steps, tagged.size_bytes, slot.bus, warning=WARNING
        )

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """Shrunk to nothing, then unplugged."""
        device = presentation.device
        if rung == "unplug":
            shrink = {
                "path": f"/machine/peripheral/{device}",
                "property": "requested-size",
                "value": 0,
            }
            return (
                Command("qom-set", shrink),
                AwaitSize(device, 0, SHRINK_NS),
                Command("device_del", {"id": device}),
                AwaitDeleted(device, UNPLUG_NS),
                Command("object-del", {"id": common.memory_id(presentation.tagged.tag)}),
                ProveUnmapped(common.file_paths(presentation.tagged), PROVE_NS),
            )
        return ()
