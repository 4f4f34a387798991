"""Extents in a window of dynamic capacity: where a tag's bytes lie in one, who has which, and the
two conversations that put them there and take them out.

QEMU keeps no tags, says nothing of what the guest answered, and must not be asked twice for the
same bytes. So what is offered is on record before QEMU is told, and is struck off only when QEMU
itself says that nothing is there: it refuses to release what is not held, which is the proof.
Addresses whose state is unknown are not used again.
"""

from __future__ import annotations

from typing import Any

from tagmem.base.errors import Conflict, OutcomeUnknown, RemoteError
from tagmem.base.units import SECOND, Bytes, format_size
from tagmem.presenter.contract import (
    CxlWindow,
    Lent,
    Machine,
    OfferExtent,
    RecallExtent,
    Tagged,
    VmFacts,
)
from tagmem.wire import guest

OFFERED_MAX = 8
"""Records in the event log of QEMU's device: what is offered beyond is lost."""
HELD_MAX = 512
"""Extents that QEMU's device can have, those offered included."""
BLOCK_BYTES = 2 << 20
RECALL_NS = 20 * SECOND
NOTHING_THERE = "non-existing DPA range"
UNANSWERED = "pending DPA range"
"""QEMU's words, the same from 10.0 to 11.1."""


def place(tagged: Tagged, vm: VmFacts) -> tuple[CxlWindow, Lent] | str:
    """Where a tag's bytes lie in a window of this VM, or why they do not. Pure."""
    if not vm.cxl_windows:
        return "the VM has no CXL window (vm start --cxl-window)"
    piece = tagged.pieces[0]
    reasons = []
    for window in vm.cxl_windows:
        dpa = piece.offset - window.offset
        if piece.path != window.path:
            reasons.append(f"{window.device} shows {window.path}, the tag is in {piece.path}")
        elif not 0 <= dpa <= window.size_bytes - piece.length:
            reasons.append(f"{window.device} ends at {format_size(window.size_bytes)}")
        elif reason := _clash(window, dpa, piece.length):
            reasons.append(reason)
        else:
            return window, Lent(tagged.tag, window.device, dpa, piece.length)
    return f"its bytes must lie in a CXL window's file (media by DPA): {'; '.join(reasons)}"


def _clash(window: CxlWindow, dpa: Bytes, length: Bytes) -> str:
    """Why an extent cannot be there now; empty when it can."""
    size = window.size_bytes // window.regions
    if dpa // size != (dpa + length - 1) // size:
        return f"an extent must lie in one region of {window.device}, each {format_size(size)}"
    for lent in window.lent:
        if lent.dpa < dpa + length and dpa < lent.dpa + lent.length:
            known = "is there" if lent.state == "held" else "may be there"
            return f"tag {lent.tag} {known}, at {lent.dpa:#x}: it must be detached first"
    offered = sum(lent.state == "offered" for lent in window.lent)
    if offered >= OFFERED_MAX or len(window.lent) >= HELD_MAX:
        return f"{window.device} has {offered} unanswered of {len(window.lent)} extents"
    return ""


def told(window: CxlWindow, lent: Lent) -> guest.Told:
    """What the guest's agent is told of an extent."""
    return guest.Told(lent.tag, "cxl", serial=window.serial, size_bytes=lent.length, dpa=lent.dpa)


def find(tag: str, vm: VmFacts) -> tuple[CxlWindow, Lent] | None:
    """The extent that is on record under a tag."""
    for window in vm.cxl_windows:
        for lent in window.lent:
            if lent.tag == tag:
                return window, lent
    return None


# ---- with QEMU and the guest


def _named(window: CxlWindow, lent: Lent) -> dict[str, Any]:
    """How QEMU is told of an extent: by its offset in a region."""
    size = window.size_bytes // window.regions
    return {
        "path": f"/machine/peripheral/{window.device}",
        "host-id": 0,
        "region": lent.dpa // size,
        "extents": [{"offset": lent.dpa % size, "len": lent.length}],
    }


async def offer(step: OfferExtent, vm: Machine) -> None:
    """Put an offer into the device's log. Raises RemoteError (then nothing was offered),
    OutcomeUnknown.
    """
    lent = step.lent
    await vm.lend(lent.tag, lent)
    found = find(lent.tag, await vm.facts())
    if found is None:
        raise OutcomeUnknown(f"{lent.window} is not in the VM any more")
    how = {"selection-policy": "prescriptive", "tag": lent.tag}
    try:
        await vm.execute("cxl-add-dynamic-capacity", _named(*found) | how)
    except RemoteError:
        await vm.lend(lent.tag, None)
        raise


async def recall(step: RecallExtent, vm: Machine) -> None:
    """Ask for an extent back, politely: there is no other way in QEMU. Raises Conflict when it is
    still there, OutcomeUnknown when nobody says.
    """
    found = find(step.tag, await vm.facts())
    if found is None or await _gone(*found, vm):
        return
    if vm.guest is None:
        raise OutcomeUnknown("the VM has no guest agent that could give the extent back")
    answer = await vm.guest.ask(guest.Give(0, told(*found)), step.deadline_ns)
    if not await _gone(*found, vm):
        reason = answer.reason if isinstance(answer, guest.Failed) else "it says that it did"
        raise Conflict(f"the guest has not given {found[1].dpa:#x} back: {reason}")


async def _gone(window: CxlWindow, lent: Lent, vm: Machine) -> bool:
    """Whether QEMU has nothing there; if it has, the guest is told by this that it is wanted."""
    how = {"removal-policy": "prescriptive"}
    try:
        await vm.execute("cxl-release-dynamic-capacity", _named(window, lent) | how)
    except RemoteError as error:
        if UNANSWERED in str(error):
            return False
        if NOTHING_THERE not in str(error):
            raise
        await vm.lend(lent.tag, None)
        return True
    return False
