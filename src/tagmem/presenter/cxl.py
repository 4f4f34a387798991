"""An emulated CXL device with dynamic capacity: one extent per tag, offered and given back while
the guest runs, driven from the guest's user space where its kernel cannot.

The device is made when the VM starts, with the appliance's pool (media by DPA) behind it: what the
guest writes at an address is in the pool at that offset. There is one for each pool, directly on a
root port and a host bridge of its own, with one fixed memory window, never interleaved. QEMU drops
the tag that it is given, so the guest's agent is told by the channel what lies where, and the host
keeps the record (`extents`).

What QEMU cannot do is refused before it is tried: it neither takes an extent back by force, nor
migrates the device, nor ever lets go of the pool's file, so that even what the guest has given back
is free only when the VM has ended. Each access to the memory is emulated, tens of megabytes a
second.
"""

from __future__ import annotations

import msgspec

from tagmem.base.errors import OutcomeUnknown, Unsupported
from tagmem.base.units import MILLISECOND, SECOND
from tagmem.presenter import common, extents
from tagmem.presenter.contract import (
    AskGuest,
    Description,
    Impossible,
    Machine,
    OfferExtent,
    Plan,
    Presentation,
    ProveUnmapped,
    RecallExtent,
    Request,
    Step,
    VmFacts,
)
from tagmem.presenter.driver import Planned
from tagmem.wire import guest

DRIVER = "cxl-type3"
TAKE_NS = 30 * SECOND
PROVE_NS = SECOND // 5
"""It will not be: QEMU maps the pool as long as it runs."""
WARNING = (
    "QEMU keeps the whole pool mapped: what the guest gives back is the host's only when the VM "
    "has ended; nothing is taken from a guest by force, it cannot be migrated, and each access is "
    "emulated"
)
NO_FORCE = "QEMU does not release dynamic capacity by force"


class Cxl(Planned):
    """See the module."""

    description = Description(
        name="cxl",
        summary="an extent of an emulated CXL device with dynamic capacity",
        guaranteed=False,
        removal="vm-end",
        dax=True,
        ram=False,
        tag_in_band=False,
        granularity_bytes=extents.BLOCK_BYTES,
        minimum_bytes=extents.BLOCK_BYTES,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="broken",
        stock_kernel=True,
        guest_code="the agent drives the device and cuts DAX devices out of its window",
        qemu_min=(10, 0, 0),
        setup=(
            "-machine q35,cxl=on,cxl-fmw.0.targets.0=BRIDGE,cxl-fmw.0.size=SIZE",
            "-object memory-backend-file,id=POOL,mem-path=FILE,size=SIZE,share=on",
            "-device pxb-cxl,id=BRIDGE,bus_nr=N and -device cxl-rp,bus=BRIDGE,id=PORT",
            "-device cxl-type3,bus=PORT,volatile-dc-memdev=POOL,num-dc-regions=1,sn=SERIAL",
            "-append memmap=SIZE%BASE+0xefffffff",
            "cxl-add-dynamic-capacity",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        block = extents.BLOCK_BYTES
        reason = (
            common.unmet(request, self.description)
            or common.wrong_size(request, block, block)
            or common.wrong_vm(request, self.description, DRIVER, vm)
        )
        if reason is not None:
            return reason
        if any(lent.tag == request.tagged.tag for w in vm.cxl_windows for lent in w.lent):
            return "the tag is in this VM already"
        placed = extents.place(request.tagged, vm)
        if isinstance(placed, str):
            return placed
        if vm.guest is None:
            return "no guest agent answers, and nobody else could accept the extent"
        if "cxl" not in vm.guest.features:
            return (
                "the guest's kernel must have its CXL window marked as specific-purpose memory "
                "(memmap=SIZE%BASE+0xefffffff, which vm start --cxl-window adds)"
            )
        return None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Offer, and have the guest's agent take it."""
        placed = extents.place(request.tagged, vm)
        if isinstance(placed, str):
            raise Unsupported(placed)
        window, lent = placed
        told = extents.told(window, lent)
        steps: tuple[Step, ...] = (
            OfferExtent(lent),
            AskGuest(guest.Attach(0, lent.tag, TAKE_NS // MILLISECOND, told), TAKE_NS + SECOND),
        )
        name = self.description.name
        return Plan(name, window.device, steps, lent.length, window.device, WARNING)

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """As all; then it is on record as the guest's. A pool that was made anew has the name of
        the one that QEMU maps still, and other bytes.
        """
        paths = common.file_paths(request.tagged)
        able = self.can(request, await vm.facts()) is None
        if able and len(await vm.holds(paths)) != len(paths):
            raise Unsupported(f"{self.description.name}: QEMU does not map {', '.join(paths)}")
        shown = await super().attach(request, vm)
        if not shown.guest_path:
            raise OutcomeUnknown("the guest does not say that it has the extent")
        found = extents.find(shown.tagged.tag, await vm.facts())
        if found is not None:
            held = msgspec.structs.replace(found[1], state="held")
            await vm.lend(held.tag, held)
        return shown

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest proves, drops its DAX device, gives the extent back: QEMU says so. Then the
        proof that QEMU has let go, which fails as long as it keeps pools mapped.
        """
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung, eject=True),)
        if rung == "unplug":
            return (
                RecallExtent(presentation.tagged.tag, extents.RECALL_NS),
                ProveUnmapped(common.file_paths(presentation.tagged), PROVE_NS, common.CXL_KEPT),
            )
        if rung == "revoke":
            return (Impossible(NO_FORCE),)
        return ()
