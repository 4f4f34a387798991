"""The window that our own back-end owns: a virtio-pmem device whose memory the broker maps and
unmaps, so that the host takes bytes back with no help from the guest.

QEMU 11.1 and later have a generic vhost-user device with shared-memory regions; as device 27 the
guest's stock driver makes a DAX device of it, and finds the tag in the header, which comes from
private memory of the broker: the tag's own bytes carry nothing of it. QEMU refuses to migrate it.
"""

from __future__ import annotations

import logging

import msgspec

from tagmem.base.errors import RemoteError, Unsupported
from tagmem.base.limits import WINDOW_PIECES_MAX
from tagmem.base.units import MIB, SECOND
from tagmem.presenter import common
from tagmem.presenter.contract import (
    AwaitDeleted,
    CloseWindow,
    Command,
    Description,
    Machine,
    MapWindow,
    OpenWindow,
    Plan,
    Presentation,
    ProveUnmapped,
    Request,
    RevokeWindow,
    SeeWindow,
    Step,
    VmFacts,
)
from tagmem.presenter.driver import PROVE_NS, UNPLUG_NS, LookedTooEarly, Planned, perform
from tagmem.presenter.window import TABLE_PARTS_MAX, Part, lay_out
from tagmem.wire.vhost_user import TABLE_REGIONS_MAX

log = logging.getLogger(__name__)

DRIVER = "vhost-user-test-device-pci"
"""Upstream's name of the generic device; a named vhost-user-pmem would be the product form."""
VIRTIO_ID_PMEM = 27
CONFIG_BYTES = 16
START_NS = 20 * SECOND
REVOKE_NS = 5 * SECOND
SEE_NS = 1 * SECOND
TRIES = 4
FRAGMENTED = "in so many pieces QEMU 11.1 does not outlive a reboot of the guest: detach before it"
NO_HANDSHAKE = "vhost_backend_init failed"
"""QEMU's words when the first messages on a new connection go wrong: nothing was plugged."""


class VhostPmem(Planned):
    """See the module."""

    description = Description(
        name="vhost-pmem",
        summary="virtio-pmem served by the broker through a shared-memory region",
        guaranteed=True,
        removal="host",
        dax=True,
        ram=False,
        tag_in_band=True,
        granularity_bytes=2 * MIB,
        minimum_bytes=2 * MIB,
        pieces=True,
        # QEMU 11.1 maps writable whatever the request's flags say, and fails where the descriptor
        # does not allow that: there is no read-only window to be had.
        read_only=False,
        header_bytes=common.HEADER_BYTES,
        migration="refused",
        stock_kernel=True,
        guest_code="",
        qemu_min=(11, 1, 0),
        setup=(
            "-object memory-backend-memfd,id=ram0,size=SIZE,share=on -machine memory-backend=ram0",
            "-device pcie-root-port,id=PORT,chassis=N,slot=N,pref64-reserve=RESERVE",
            "chardev-add (unix socket of the broker)",
            "device_add vhost-user-test-device-pci,virtio-id=27,num_vqs=1,config_size=16",
        ),
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        reason = (
            common.unmet(request, self.description)
            or common.wrong_size(request, 2 * MIB, 2 * MIB)
            or common.wrong_vm(request, self.description, DRIVER, vm)
        )
        if reason is not None:
            return reason
        if len(request.tagged.pieces) > WINDOW_PIECES_MAX:
            return f"pieces: at most {WINDOW_PIECES_MAX}, got {len(request.tagged.pieces)}"
        if any(map(common.is_dax, request.tagged.pieces)):
            return "QEMU 11.1 maps files into a window, and refuses a DAX device"
        if not vm.broker:
            return "no broker runs on this host"
        if not vm.ram_shared:
            return "the guest's RAM must be shared (memory-backend-memfd,share=on)"
        parts = _parts(request)
        if len(parts) <= TABLE_PARTS_MAX or vm.window_regions:
            taken = vm.regions_taken
            if taken + len(parts) > TABLE_REGIONS_MAX:
                return (
                    f"QEMU tells a window's back-end of {TABLE_REGIONS_MAX} memory regions, "
                    f"{taken} are taken and this tag takes {len(parts)}: detach another"
                )
        slot = common.free_slot(vm, _window_bytes(request))
        return slot if isinstance(slot, str) else None

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """The broker listens, QEMU connects, the guest's driver starts it, the bytes are mapped."""
        tag = request.tagged.tag
        device = common.device_id(tag)
        chardev = _chardev(device)
        slot = common.free_slot(vm, _window_bytes(request))
        assert not isinstance(slot, str)
        device_bytes = common.HEADER_BYTES + request.tagged.size_bytes
        properties = {
            "virtio-id": VIRTIO_ID_PMEM,
            "num_vqs": 1,
            "config_size": CONFIG_BYTES,
        }
        steps: tuple[Step, ...] = (
            OpenWindow(device, chardev, request.tagged, device_bytes),
            common.add_device(DRIVER, tag, bus=slot.bus, chardev=chardev, **properties),
            MapWindow(device, START_NS),
            SeeWindow(device, SEE_NS),
            common.find_in_guest(tag),
        )
        many = len(_parts(request)) > TABLE_PARTS_MAX
        warning = FRAGMENTED if many else ""
        return Plan(self.description.name, device, steps, device_bytes, slot.bus, warning)

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """As all, and again when the guest looked too early, or QEMU and broker did not get along.

        The guest's driver looks for the header once, some milliseconds after it started the device,
        which is when the memory may first be mapped; QEMU does that in another thread, which a busy
        host may keep waiting. A guest that won that race has a raw device, and plugged anew it
        looks anew, if its agent has not had it look again already. The last try takes what comes.
        """
        for number in range(1, TRIES + 1):
            facts = await vm.facts()
            reason = self.can(request, facts)
            if reason is not None:
                raise Unsupported(f"{self.description.name}: {reason}")
            plan = self.plan(request, facts)
            if number == TRIES:
                steps = tuple(step for step in plan.steps if not isinstance(step, SeeWindow))
                plan = msgspec.structs.replace(plan, steps=steps)
            try:
                shown = await self.carry_out(request, facts, plan, vm)
                if number == TRIES or shown.guest_path or await _has_seen(shown, vm):
                    return shown
                log.warning("tag %s: try %d: the guest has not found it", shown.tagged.tag, number)
                for step in self.unplan(shown, "unplug"):
                    await perform(step, vm)
            except (LookedTooEarly, RemoteError) as error:
                passes = isinstance(error, LookedTooEarly) or NO_HANDSHAKE in str(error)
                if number == TRIES or not passes:
                    raise
                log.warning("tag %s: try %d: %s", request.tagged.tag, number, error)
        raise AssertionError("the last try returns or raises")

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """All four rungs but the last, which is the same for every presenter."""
        device = presentation.device
        prove = ProveUnmapped(common.file_paths(presentation.tagged), PROVE_NS)
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung),)
        if rung == "revoke":
            return (RevokeWindow(device, REVOKE_NS), prove)
        if rung == "unplug":
            return (
                Command("device_del", {"id": device}),
                AwaitDeleted(device, UNPLUG_NS),
                Command("chardev-remove", {"id": _chardev(device)}),
                CloseWindow(device),
                prove,
            )
        return ()


async def _has_seen(shown: Presentation, vm: Machine) -> bool:
    """Whether the guest's kernel has the tag although no agent says so."""
    return vm.windows is None or await vm.windows.found(shown.device, 0) is True


def _chardev(device: str) -> str:
    return f"{device}-c"


def _parts(request: Request) -> tuple[Part, ...]:
    tagged = request.tagged
    pieces = [(piece.path, piece.offset, piece.length) for piece in tagged.pieces]
    return lay_out(pieces, read_only=tagged.read_only)


def _window_bytes(request: Request) -> int:
    """Of the slot's address space: the BAR rounds up, and the device has a second one."""
    whole = common.HEADER_BYTES + request.tagged.size_bytes
    return common.power_of_two_at_least(whole) + common.SMALL_BAR_BYTES
