"""The VM as the application: part of a guest's RAM lies in a tag, as a NUMA node of its own.

It is given when the VM starts and taken when the VM ends, so the holder of the tag is the VM itself
and its release is a shutdown: the guest is *asked* (by its agent, else by ACPI's power button), and
*stop* ends QEMU, whatever state the guest is in. Nothing counts as released before QEMU's process
is gone. The guest is told the memory's bandwidth and latency in its HMAT, so that it can place what
it runs; as *specific-purpose* memory, its kernel leaves it alone and makes a DAX device of it.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Sequence

from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown, TagmemError, Unsupported
from tagmem.base.limits import DAX_ALIGN_BYTES
from tagmem.base.units import GIB, MIB, MILLISECOND, SECOND, Bytes, Nanoseconds
from tagmem.presenter import common
from tagmem.presenter.contract import (
    Description,
    Detached,
    Machine,
    Plan,
    Presentation,
    Request,
    Step,
    Tagged,
    Value,
    VmFacts,
)
from tagmem.presenter.machine import MemoryNode
from tagmem.wire import guest

NAME = "ram"
GIVEN_AT_START = "a VM's RAM is given when it starts (vm start --memory-from)"
PIECES_MAX = 8
"""Each is a node of its own: what a guest could still make sense of."""
STOP_NS = 10 * SECOND
AGENT_NS = 2 * SECOND
"""How long the guest's agent may take to say that it begins to shut down, beyond its own rungs."""
CHUNK_BYTES = 4 * MIB


class MemoryFrom(Value, frozen=True):
    """A tag that RAM is wanted in."""

    tag: str
    overwrite: bool = False
    """What the tag has may be lost."""
    specific_purpose: bool = False
    latency_ns: int = 250
    """Of one access from the guest's processors; a direct-attached CXL expander's unless said."""
    bandwidth_bytes: Bytes = 32 * GIB
    """In a second; of eight lanes of PCIe 5 unless said."""


async def judged(
    wanted: Sequence[MemoryFrom], look_up: Callable[[MemoryFrom], Tagged]
) -> list[tuple[Tagged, tuple[MemoryNode, ...]]]:
    """Each tag and the nodes of it, after all that can be checked before a VM is started.

    Raises InvalidInput, Unsupported, Conflict, and what `look_up` raises.
    """
    tags = [one.tag for one in wanted]
    if len(set(tags)) < len(tags):
        raise InvalidInput("memory_from", "each tag once", tags)
    found: list[tuple[Tagged, tuple[MemoryNode, ...]]] = []
    first = 1
    for one in wanted:
        check(one)
        tagged = look_up(one)
        made = nodes(one, tagged, first)
        await asyncio.to_thread(check_content, one, tagged)
        found.append((tagged, made))
        first += len(made)
    return found


def nodes(wanted: MemoryFrom, tagged: Tagged, first: int) -> tuple[MemoryNode, ...]:
    """The nodes of one tag, numbered from `first`. Raises Unsupported with the reason."""
    reason = unfit(tagged)
    if reason is not None:
        raise Unsupported(f"tag {tagged.tag} cannot be a guest's RAM: {reason}")
    names = [common.memory_id(tagged.tag)]
    names += [f"{names[0]}{number}" for number in range(1, len(tagged.pieces))]
    return tuple(
        MemoryNode(
            first + number,
            names[number],
            tagged.tag,
            piece.path,
            piece.offset,
            piece.length,
            wanted.latency_ns,
            wanted.bandwidth_bytes,
            wanted.specific_purpose,
        )
        for number, piece in enumerate(tagged.pieces)
    )


def presentation(tagged: Tagged, vm: str, found: Sequence[MemoryNode]) -> Presentation:
    """Of a tag in a VM that is to be started."""
    return Presentation(
        tagged,
        vm,
        NAME,
        found[0].memory,
        "attaching",
        device_bytes=tagged.size_bytes,
        guest_path=f"/sys/devices/system/node/node{found[0].number}",
        warning=Ram.description.warning,
    )


def told(node: MemoryNode) -> dict[str, object]:
    """A node as people are told of it."""
    return {
        "node": node.number,
        "tag": node.tag,
        "size_bytes": node.size_bytes,
        "latency_ns": node.latency_ns,
        "bandwidth_bytes": node.bandwidth_bytes,
        "specific_purpose": node.specific_purpose,
    }


def unfit(tagged: Tagged) -> str | None:
    """Why a tag cannot be RAM; None when it can. Pure."""
    if tagged.read_only:
        return "it is read-only on this host"
    if tagged.shared:
        return "other hosts share it, and a guest's kernel would overwrite what they see"
    if len(tagged.pieces) > PIECES_MAX:
        return f"it must be in at most {PIECES_MAX} pieces, a node each, and is in " + str(
            len(tagged.pieces)
        )
    return common.wrong_size(Request(tagged), DAX_ALIGN_BYTES, 2 * DAX_ALIGN_BYTES)


def check_content(wanted: MemoryFrom, tagged: Tagged) -> None:
    """Raises Conflict where the tag has content that nobody said may go. Reads the bytes."""
    if not wanted.overwrite and has_content(tagged):
        raise Conflict(
            f"tag {tagged.tag} may have content, which a guest's kernel would overwrite;"
            " --overwrite says that it may be lost"
        )


def has_content(tagged: Tagged) -> bool:
    """Whether a byte of it is not zero; a device that cannot be read may have any."""
    for piece in tagged.pieces:
        try:
            fd = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Conflict(f"tag {tagged.tag}: {piece.path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or _written(fd, piece.offset, piece.length):
                return True
        finally:
            os.close(fd)
    return False


def _written(fd: int, at: Bytes, length: Bytes) -> bool:
    zeroes, end = bytes(CHUNK_BYTES), at + length
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but holes from here.
            return False
        data = os.pread(fd, min(CHUNK_BYTES, max(0, end - at)), at)
        if not data:
            return False
        if data != zeroes[: len(data)]:
            return True
        at += len(data)
    return False


class Ram:
    """`contract.Presenter` of RAM: it is never attached to a VM that runs."""

    description = Description(
        name=NAME,
        summary="part of the guest's RAM, from its start to its end",
        guaranteed=False,
        removal="never",
        dax=False,
        ram=True,
        tag_in_band=False,
        granularity_bytes=DAX_ALIGN_BYTES,
        minimum_bytes=2 * DAX_ALIGN_BYTES,
        pieces=True,
        read_only=False,
        header_bytes=0,
        migration="refused",
        stock_kernel=True,
        guest_code="",
        qemu_min=(10, 0, 0),
        setup=(
            "-object memory-backend-file,share=on and -numa node,memdev=",
            "-machine hmat=on and -numa hmat-lb for each node",
        ),
        warning="the VM itself holds the tag: it is released by the VM's end",
    )

    def describe(self) -> Description:
        """See `contract.Presenter`."""
        return self.description

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Never, while the VM runs."""
        return GIVEN_AT_START

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """There is none."""
        raise Unsupported(GIVEN_AT_START)

    def unplan(self, presentation: Presentation, rung: str) -> Sequence[Step]:
        """Nothing of a running guest's RAM can be taken."""
        return ()

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """There is no way."""
        raise Unsupported(GIVEN_AT_START)

    async def detach(
        self,
        presentation: Presentation,
        vm: Machine,
        *,
        deadline_ns: Nanoseconds,
        force: bool = False,
        may_stop_vm: bool = False,
    ) -> Detached:
        """Ask the guest to shut down, unless `force`; end QEMU, if `may_stop_vm`."""
        try:
            state = (await vm.facts()).state
        except OutcomeUnknown as error:
            state, reason = "", f"QEMU does not answer: {error}"
        else:
            reason = "" if force else await _ask(vm, state, deadline_ns)
        if state == "gone":
            return Detached(done=True, rung="stop-vm", reason="QEMU has ended")
        if state and not force and not reason:
            return Detached(done=True, rung="ask")
        if may_stop_vm:
            try:
                await vm.stop(STOP_NS)
            except TagmemError as error:
                reason = f"{reason}; stopping the VM: {error}".lstrip("; ")
            else:
                return Detached(done=True, rung="stop-vm", reason=reason)
        rung = "stop-vm" if may_stop_vm else "ask"
        reason = reason or "only the VM's end gives it back"
        return Detached(False, rung, (), reason, presentation)


async def _ask(vm: Machine, state: str, deadline_ns: Nanoseconds) -> str:
    """Have the guest shut down; why it did not, or nothing when QEMU has ended."""
    if state == "gone":
        return ""
    if state != "running":
        return f"the guest is {state} and cannot be asked to shut down"
    reason = "the guest does not shut down"
    asked = False
    if vm.guest is not None:
        ms = deadline_ns // MILLISECOND
        shutdown = guest.Shutdown(0, "poweroff", ms * 4 // 10, ms * 2 // 10)
        try:
            answer = await vm.guest.ask(shutdown, deadline_ns * 6 // 10 + AGENT_NS)
        except OutcomeUnknown as error:
            reason = f"{reason}: {error}"
        else:
            asked = not isinstance(answer, guest.Failed)
            if isinstance(answer, guest.Failed):
                reason = f"{reason}: its agent refused: {answer.reason} ({answer.code})"
    if not asked:
        try:
            await vm.execute("system_powerdown", {})
        except TagmemError as error:
            reason = f"{reason}; its power button: {error}"
    return "" if await vm.wait_gone(deadline_ns) else reason


def check(wanted: MemoryFrom) -> None:
    """Raises InvalidInput that names the field, the limit and the value."""
    if not 1 <= wanted.latency_ns <= 60_000:
        raise InvalidInput("latency_ns", "1 to 60000", wanted.latency_ns)
    granule = 256 * MIB
    if not granule <= wanted.bandwidth_bytes <= 4096 * GIB or wanted.bandwidth_bytes % granule:
        limit = "a multiple of 256 MiB per second, up to 4 TiB"
        raise InvalidInput("bandwidth_bytes", limit, wanted.bandwidth_bytes)
