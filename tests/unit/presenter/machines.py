"""A VM that is none: what presenters ask of one is answered from a script and written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec

from tagmem.base.errors import OutcomeUnknown, RemoteError
from tagmem.base.units import GIB, MIB, Bytes, Nanoseconds
from tagmem.presenter.contract import (
    CxlWindow,
    GuestFacts,
    Lent,
    Piece,
    Slot,
    Tagged,
    VmFacts,
)
from tagmem.wire import guest

TAG = str(UUID(int=0x5BE13BCE, version=4))
ROOMY = VmFacts(
    "vm1",
    (11, 1, 3),
    accel="tcg",
    machine="pc-q35-11.1-machine",
    nvdimm=True,
    ram_shared=True,
    slots=(Slot("rp1", 2 * GIB), Slot("rp2", 4 * GIB), Slot("rp3", 4 * GIB, "other")),
    memory_slots_free=4,
    memory_free_bytes=8 * GIB,
    drivers=(
        "vhost-user-test-device-pci",
        "virtio-pmem-pci",
        "nvdimm",
        "pc-dimm",
        "virtio-mem-pci",
        "ivshmem-plain",
        "cxl-type3",
    ),
    cxl_ports=("tmcp1",),
    cxl_windows=(CxlWindow("tmcw0", "0xabc", "/media/tag", 0, 1 * GIB),),
    broker=True,
    guest=GuestFacts("Linux", ("cxl-static", "cxl")),
)


def tagged(size: Bytes = 256 * MIB, **changes: Any) -> Tagged:
    made = Tagged(
        TAG,
        size,
        (Piece("/media/tag", 2 * MIB, size),),
        loaded=False,
        dead_end=True,
        head_room_bytes=2 * MIB,
    )
    return msgspec.structs.replace(made, **changes)


class FakeGuest:
    """Answers what it was given, one after another; silence is None."""

    def __init__(self, *answers: guest.Answer | None) -> None:
        self.answers = list(answers)
        self.asked: list[guest.Request] = []

    async def ask(self, request: guest.Request, deadline_ns: Nanoseconds) -> guest.Answer:
        self.asked.append(request)
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            raise OutcomeUnknown("the guest did not answer")
        return answer


class FakeWindows:
    def __init__(self, log: list[str], *, stuck: bool = False) -> None:
        self.log = log
        self.stuck = stuck
        self.looks: list[bool | None] = []
        """What the guest is found to have seen, one attach after another; then True."""

    async def found(self, device: str, deadline_ns: Nanoseconds) -> bool | None:
        return self.looks.pop(0) if self.looks else True

    async def open(self, device: str, tagged: Tagged, device_bytes: Bytes) -> str:
        self.log.append("open")
        return "/run/window"

    async def mapped(self, device: str, deadline_ns: Nanoseconds) -> None:
        self.log.append("mapped")

    async def revoke(self, device: str, deadline_ns: Nanoseconds) -> None:
        self.log.append("revoke")
        if self.stuck:
            raise OutcomeUnknown("QEMU still has it")

    async def close(self, device: str) -> None:
        self.log.append("close")

    def regions(self) -> int:
        return 0


class FakeMachine:
    """`contract.Machine`."""

    def __init__(
        self,
        facts: VmFacts = ROOMY,
        *answers: guest.Answer | None,
        refuse: Sequence[str] = (),
        refusals: Sequence[tuple[str, str]] = (),
        leaves: bool = True,
        stuck: bool = False,
    ) -> None:
        self.known = facts
        self.log: list[str] = []
        self.refuse = refuse
        self.refusals = list(refusals)
        """(command, reason): each refuses the command once."""
        self.leaves = leaves
        self.held = True
        self.ends = False
        self.guest: FakeGuest | None = FakeGuest(*answers)
        self.windows: FakeWindows | None = FakeWindows(self.log, stuck=stuck)

    async def facts(self) -> VmFacts:
        return self.known

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        self.log.append(command)
        for refusal in self.refusals:
            if refusal[0] == command:
                self.refusals.remove(refusal)
                raise RemoteError("QEMU", 1, refusal[1])
        if command in self.refuse:
            raise RemoteError("QEMU", 1, f"no {command}")
        return {}

    async def deleted(self, device: str, deadline_ns: Nanoseconds) -> bool:
        return self.leaves

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        return ()

    async def size_of(self, device: str) -> Bytes:
        return 0

    async def wait_gone(self, deadline_ns: Nanoseconds) -> bool:
        return self.ends

    async def lend(self, tag: str, lent: Lent | None) -> None:
        self.log.append("lend" if lent else "struck off")
        [window] = self.known.cxl_windows
        others = tuple(one for one in window.lent if one.tag != tag)
        now = msgspec.structs.replace(window, lent=(*others, *((lent,) if lent else ())))
        self.known = msgspec.structs.replace(self.known, cxl_windows=(now,))

    async def stop(self, deadline_ns: Nanoseconds) -> None:
        self.log.append("stop-vm")
