"""A DIMM: hot-plugged RAM on the tag's file. Not guaranteed, and shown so.

The guest's kernel hands the bytes out to anybody, so a tag with content, or one that others share,
is refused. Whether it ever comes back is the kernel's affair: one page that cannot be moved keeps
128 MiB. With `online_movable` an unused one leaves in 0.2 s, with Debian's default it never does.
"""

from __future__ import annotations

from tagmem.base.units import MIB, SECOND
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
from tagmem.presenter.driver import PROVE_NS, Planned

DRIVER = "pc-dimm"
BLOCK_BYTES = 128 * MIB
"""A memory block of an x86 guest of up to 64 GiB: what it takes on line at once."""
UNPLUG_NS = 30 * SECOND
WARNING = "this is RAM to the guest's kernel, which may never give it back: not guaranteed"


class Dimm(Planned):
    """See the module."""

    description = Description(
        name="dimm",
        summary="hot-plugged RAM on the tag's file",
        guaranteed=False,
        removal="sometimes",
        dax=False,
        ram=True,
        tag_in_band=False,
        granularity_bytes=BLOCK_BYTES,
        minimum_bytes=BLOCK_BYTES,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="stays",
        stock_kernel=True,
        guest_code="",
        qemu_min=(10, 0, 0),
        setup=(
            "-m SIZE,slots=N,maxmem=MAXMEM",
            "object-add memory-backend-file,share=on and device_add pc-dimm",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        return (
            common.unmet(request, self.description)
            or common.wrong_size(request, BLOCK_BYTES, BLOCK_BYTES)
            or common.wrong_vm(request, self.description, DRIVER, vm)
            or common.no_room(vm, request.tagged.size_bytes, memory_slot=True)
        )

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Memory, device."""
        tagged = request.tagged
        steps: tuple[Step, ...] = (
            common.memory_file(tagged.tag, tagged.pieces[0]),
            common.add_device(DRIVER, tagged.tag, memdev=common.memory_id(tagged.tag)),
        )
        return Plan(
            self.description.name,
            common.device_id(tagged.tag),
            steps,
            tagged.size_bytes,
            warning=WARNING,
        )

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """There is nobody to ask but the kernel, which QEMU asks."""
        if rung == "unplug":
            return (
                Command("device_del", {"id": presentation.device}),
                AwaitDeleted(presentation.device, UNPLUG_NS),
                Command("object-del", {"id": common.memory_id(presentation.tagged.tag)}),
                ProveUnmapped(common.file_paths(presentation.tagged), PROVE_NS),
            )
        return ()
