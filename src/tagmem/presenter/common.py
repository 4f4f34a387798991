"""What presenters judge alike: needs, sizes, slots and files, each with one sentence that says why
not.

Pure: the same functions serve `--as auto`, the explicit choice and the tests.
"""

from __future__ import annotations

from tagmem.base.limits import DAX_ALIGN_BYTES
from tagmem.base.units import MIB, MILLISECOND, SECOND, Bytes, format_size
from tagmem.ports import HostTag
from tagmem.presenter.contract import (
    AskGuest,
    Command,
    Description,
    Impossible,
    MakeHeader,
    Piece,
    Presentation,
    Request,
    Slot,
    Tagged,
    Version,
    VmFacts,
)
from tagmem.wire import guest
from tagmem.wire.vhost_user import TABLE_REGIONS_MAX

HEADER_BYTES = DAX_ALIGN_BYTES
"""What a header takes in front of the bytes: the kernel wants the data aligned to 2 MiB."""
SMALL_BAR_BYTES = 2 * MIB
"""Left of a slot's address space for the other registers of the device in it."""
CXL_KEPT = (
    "it does not let go of a CXL device's memory while it runs, so the VM must end first "
    "(vm detach --stop-vm, vm stop)"
)
FIND_NS = 5 * SECOND
"""How long the guest's agent may look for a tag that has just been plugged in."""
ASK_NS = 60 * SECOND
"""At most; a detach's own deadline is the limit that counts."""


def device_id(tag: str) -> str:
    """QEMU's id of the device that presents a tag: known again after a restart of ours."""
    return f"tm-{tag}"


def tag_of(device: str) -> str:
    """The tag that a device of ours presents; empty for a device of somebody else."""
    return device[3:] if device.startswith("tm-") and len(device) == 39 else ""


def memory_id(tag: str) -> str:
    """QEMU's id of the memory behind it."""
    return f"tm-{tag}-m"


def version_text(version: Version) -> str:
    """As people write it."""
    return ".".join(str(part) for part in version)


def power_of_two_at_least(size: Bytes) -> Bytes:
    """What a PCI BAR of `size` takes."""
    return 1 << (size - 1).bit_length()


def unmet(request: Request, what: Description) -> str | None:
    """Why the promises of a presenter are not what is needed."""
    need, tagged = request.need, request.tagged
    if need.guaranteed and not what.guaranteed:
        return "the host cannot take it back without the guest, and a guarantee is needed"
    if need.dax and not what.dax:
        return "the guest gets no DAX device, and one is needed"
    if need.ram and not what.ram:
        return "it is not ordinary memory to the guest, and that is needed"
    if need.live_migration and what.migration != "stays":
        return "it cannot stay while the VM migrates, and that is needed"
    if need.discoverable and not what.tag_in_band:
        return "the guest does not see the tag by itself, and that is needed"
    if tagged.read_only and not what.read_only:
        return "it cannot keep a read-only sharer from writing"
    if len(tagged.pieces) > 1 and not what.pieces:
        return f"the tag must be in one piece, and is in {len(tagged.pieces)}"
    if what.ram and (tagged.shared or tagged.loaded):
        why = "other hosts share it" if tagged.shared else "it may have content"
        return f"the guest's kernel would overwrite the tag, and {why}"
    return None


def wrong_size(request: Request, granularity: Bytes, minimum: Bytes) -> str | None:
    """Why this size or alignment cannot be presented."""
    size = request.tagged.size_bytes
    if size < minimum:
        return f"size: must be at least {format_size(minimum)}, got {format_size(size)}"
    if size % granularity:
        return f"size: must be a multiple of {format_size(granularity)}, got {size} bytes"
    for piece in request.tagged.pieces:
        if piece.length <= 0:
            return f"piece: must not be empty, got {piece.length} bytes"
        if piece.offset % DAX_ALIGN_BYTES or piece.length % DAX_ALIGN_BYTES:
            limit = format_size(DAX_ALIGN_BYTES)
            return f"piece: offset and length must be multiples of {limit}, got {piece.offset}"
    if sum(piece.length for piece in request.tagged.pieces) != size:
        return f"pieces: must be {size} bytes together"
    if request.align_bytes & (request.align_bytes - 1) or request.align_bytes > DAX_ALIGN_BYTES:
        limit = format_size(DAX_ALIGN_BYTES)
        return f"align: must be a power of two up to {limit}, got {request.align_bytes}"
    return None


def wrong_vm(request: Request, what: Description, driver: str, vm: VmFacts) -> str | None:
    """Why this VM cannot take such a device now."""
    if vm.state == "gone":
        return f"VM {vm.name} has ended"
    if vm.state != "running":
        return f"VM {vm.name} must be running, and is {vm.state}"
    if vm.qemu < what.qemu_min:
        return f"QEMU must be {version_text(what.qemu_min)} or later, is {version_text(vm.qemu)}"
    if driver not in vm.drivers:
        return f"this QEMU has no device {driver}"
    if device_id(request.tagged.tag) in vm.devices:
        return "the tag is in this VM already"
    return None


def free_slot(vm: VmFacts, prefetch_bytes: Bytes = 0) -> Slot | str:
    """The smallest free slot that is large enough, or why there is none."""
    free = [slot for slot in vm.slots if not slot.taken_by]
    if not vm.slots:
        return "the machine has no pcie-root-port to plug a device in"
    if not free:
        return f"all {len(vm.slots)} slots are taken"
    fitting = [slot for slot in free if slot.prefetch_bytes >= prefetch_bytes]
    if not fitting:
        most = format_size(max(slot.prefetch_bytes for slot in free))
        need = format_size(prefetch_bytes)
        return f"pref64-reserve of a free slot: must be at least {need}, the largest has {most}"
    return min(fitting, key=lambda slot: slot.prefetch_bytes)


def no_room(vm: VmFacts, size: Bytes, *, memory_slot: bool) -> str | None:
    """Why no more device memory fits."""
    if reason := no_region(vm):
        return reason
    if memory_slot and vm.memory_slots_free < 1:
        return "all memory slots of the machine are taken (-m slots=)"
    if vm.memory_free_bytes < size:
        left, need = format_size(vm.memory_free_bytes), format_size(size)
        return f"the machine has room for {left} of device memory (-m maxmem=), {need} are needed"
    return None


def no_region(vm: VmFacts) -> str | None:
    """Why QEMU, or a window, would not bear one more stretch of memory.

    While a window is attached QEMU 11.1 tells its back-end of at most 8. It refuses further memory
    devices itself; a BAR it takes, and then cannot start the window again after a pause.
    """
    if not vm.window_regions or vm.window_regions >= TABLE_REGIONS_MAX:
        return None  # A window of so many pieces has another, longer way of being told.
    if vm.regions_taken < TABLE_REGIONS_MAX:
        return None
    return (
        f"beside windows (vhost-pmem) QEMU bears {TABLE_REGIONS_MAX} memory regions, "
        f"{vm.regions_taken} are taken, {vm.window_regions} of them by windows: detach one"
    )


def no_head_room(tagged: Tagged) -> str | None:
    """Why no header fits in front: it must lie outside the capacity, and QEMU maps one stretch of
    one file.
    """
    if tagged.head_room_bytes >= HEADER_BYTES and tagged.pieces[0].offset >= HEADER_BYTES:
        return None
    need, got = format_size(HEADER_BYTES), format_size(tagged.head_room_bytes)
    return f"the media must leave {need} in front of the tag for its header, and leave {got}"


def with_header(tagged: Tagged) -> tuple[Piece, MakeHeader]:
    """The stretch of the file that has header and bytes, and the step that writes the header."""
    piece = tagged.pieces[0]
    device_bytes = HEADER_BYTES + tagged.size_bytes
    whole = Piece(piece.path, piece.offset - HEADER_BYTES, device_bytes)
    return whole, MakeHeader(tagged.tag, piece.path, whole.offset, device_bytes, tagged.read_only)


def memory_file(tag: str, piece: Piece, *, read_only: bool = False, **extra: object) -> Command:
    """The step that makes QEMU map a stretch of a file. Read-only, the kernel maps it so, and what
    the guest writes is dropped: it is told nothing.
    """
    arguments: dict[str, object] = {
        "qom-type": "memory-backend-file",
        "id": memory_id(tag),
        "size": piece.length,
        "mem-path": piece.path,
        "share": True,
        "dump": False,
    }
    if piece.offset:
        arguments["offset"] = piece.offset
    if read_only:
        arguments |= {"readonly": True, "rom": "on"}
    if is_dax(piece):
        # Such a device is mapped in whole pages of its own, and QEMU takes 4 KiB unless told.
        arguments["align"] = DAX_ALIGN_BYTES
    return Command("object-add", arguments | extra, ("object-del", {"id": memory_id(tag)}))


def is_dax(piece: Piece) -> bool:
    """Whether the bytes are a DAX device's rather than a file's: a VM's own, or a host's."""
    return piece.path.startswith("/dev/dax")


def add_device(driver: str, tag: str, **properties: object) -> Command:
    """The step that plugs the device."""
    device = device_id(tag)
    return Command(
        "device_add",
        {"driver": driver, "id": device, **properties},
        ("device_del", {"id": device}),
    )


def find_in_guest(tag: str, told: guest.Told | None = None) -> AskGuest:
    """The step that learns what the tag is called in the guest; a guest without an agent has it
    all the same.
    """
    request = guest.Attach(0, tag, FIND_NS // MILLISECOND, told)
    return AskGuest(request, FIND_NS + SECOND, needed=False)


def let_go(presentation: Presentation, rung: str, *, eject: bool = False) -> AskGuest:
    """The step in which the guest's agent proves that nobody holds the tag there, or says who.

    `ask` ends what the agent itself has started on the tag, `insist` every process that has it.
    How much time they get is set when the step is taken.
    """
    insist = rung == "insist"
    request = guest.Detach(
        0, presentation.tagged.tag, everyone=insist, eject=eject, force=insist and eject
    )
    return AskGuest(request, ASK_NS)


def never(reason: str) -> Impossible:
    """The step of a rung that this presenter has no way to take."""
    return Impossible(reason)


def drops_writes(warning: str, tagged: Tagged) -> str:
    """A presenter's warning, and what a guest of a read-only sharer must know."""
    if not tagged.read_only:
        return warning
    return f"{warning}; it is read-only: what the guest writes is dropped without a word to it"


def file_paths(tagged: Tagged) -> tuple[str, ...]:
    """Each file that has bytes of the tag, once."""
    return tuple(dict.fromkeys(piece.path for piece in tagged.pieces))


def tagged_of(source: HostTag, *, overwrite: bool) -> Tagged:
    """What a host has, as presenters know it; `overwrite`: what it has may be lost."""
    pieces = tuple(Piece(source.path, piece.offset, piece.length) for piece in source.pieces)
    return Tagged(
        source.tag,
        source.size_bytes,
        pieces,
        read_only=source.read_only,
        shared=source.shared,
        loaded=not overwrite,
        dead_end=source.dead_end,
        head_room_bytes=source.head_room_bytes,
    )
