"""Carries plans out: the half of a presenter that touches the world, the same for all of them.

Attach: each step that took effect names its undoing; when a later one fails, they are undone in
reverse, and what could not be undone is said in the error. Detach is a ladder: *ask* the guest (its
agent proves that nobody there holds the tag, then lets go), *unplug* the device, *revoke* the bytes
where the presenter can, *stop the VM* where the caller allowed it. Each rung has its share of the
deadline, and nothing counts as done before QEMU's own process is seen without the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tagmem.base.errors import Conflict, OutcomeUnknown, RemoteError, TagmemError, Unsupported
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.presenter import extents
from tagmem.presenter.contract import (
    AskGuest,
    AwaitDeleted,
    AwaitSize,
    CloseWindow,
    Command,
    Description,
    Detached,
    Holder,
    Impossible,
    Machine,
    MakeHeader,
    MapWindow,
    OfferExtent,
    OpenWindow,
    Plan,
    Presentation,
    ProveUnmapped,
    RecallExtent,
    Request,
    RevokeWindow,
    SeeWindow,
    Step,
    StopVm,
    VmFacts,
    Windows,
)
from tagmem.presenter.header import HEADER_AT, dax_header
from tagmem.wire import guest

log = logging.getLogger(__name__)

UNPLUG_NS = 5 * SECOND
"""A device whose guest answers leaves in 0.1 s with ACPI hot-plug, in 6 s with the native one's
button."""
CLEAR_AWAY_NS = 2 * SECOND
"""After the bytes were taken, how long the empty device may take to leave before it is left."""
PROVE_NS = 2 * SECOND
CHARDEV_NS = 5 * SECOND
STOP_VM_NS = 10 * SECOND
POLL_SECONDS = 0.01
BUSY_SECONDS = 0.2
BUSY = ("busy", "conflict")
"""Refusals of a guest's agent that pass."""
_RESUMABLE = ("paused", "guest-panicked")
"""States in which QEMU has stopped devices, and from which it can be made to run for a moment."""


class Refused(Conflict):
    """The guest does not let go."""

    def __init__(self, answer: guest.Answer) -> None:
        self.holders: tuple[Holder, ...] = ()
        reason = "the guest refused"
        if isinstance(answer, guest.Held):
            self.holders = tuple(Holder(h.pid, h.name, h.how) for h in answer.holders)
            reason = _held(answer)
        elif isinstance(answer, guest.Failed):
            reason = f"the guest refused ({answer.code}): {answer.reason}"
        super().__init__(reason)


class StillMapped(Conflict):
    """QEMU still has the bytes."""


class LookedTooEarly(Conflict):
    """The guest's kernel has made a raw device, and will not look again."""


class NotGone(Conflict):
    """The device is still in the VM."""


def now() -> Nanoseconds:
    """Of the event loop's clock."""
    return int(asyncio.get_running_loop().time() * SECOND)


async def perform(step: Step, vm: Machine) -> guest.Answer | None:
    """Carry one step out. Raises RemoteError, OutcomeUnknown, Conflict."""
    match step:
        case Command():
            await _execute(vm, step.execute, step.arguments)
        case MakeHeader():
            await asyncio.to_thread(_write_header, step)
        case OpenWindow():
            await _open_window(step, vm)
        case MapWindow():
            await _windows(vm).mapped(step.device, step.deadline_ns)
        case SeeWindow():
            if await _windows(vm).found(step.device, step.deadline_ns) is None:
                raise LookedTooEarly(f"{step.device}: the guest looked before it was mapped")
        case RevokeWindow():
            await _windows(vm).revoke(step.device, step.deadline_ns)
        case CloseWindow():
            await _windows(vm).close(step.device)
        case OfferExtent():
            await extents.offer(step, vm)
        case RecallExtent():
            await extents.recall(step, vm)
        case AskGuest():
            return await _ask(step, vm)
        case AwaitDeleted():
            if not await vm.deleted(step.device, step.deadline_ns):
                raise NotGone(f"{step.device} has not left the VM")
        case AwaitSize():
            await _await_size(step, vm)
        case ProveUnmapped():
            await _prove(step, vm)
        case Impossible():
            raise Unsupported(step.reason)
        case StopVm():
            await vm.stop(step.deadline_ns)
    return None


async def _execute(vm: Machine, command: str, arguments: Mapping[str, Any]) -> None:
    """As QEMU's; a character device is busy for a moment after its device has been deleted."""
    end = now() + CHARDEV_NS
    while True:
        try:
            await vm.execute(command, arguments)
            return
        except RemoteError as error:
            if command != "chardev-remove" or "busy" not in str(error) or now() >= end:
                raise
        await asyncio.sleep(POLL_SECONDS)


def _windows(vm: Machine) -> Windows:
    if vm.windows is None:
        raise Unsupported("no broker runs on this host")
    return vm.windows


def _write_header(step: MakeHeader) -> None:
    """Outside the capacity: nothing of the tag's own bytes changes."""
    header = dax_header(step.tag, step.device_bytes)
    at = step.offset + HEADER_AT
    try:
        mode = os.O_RDONLY if step.read_only else os.O_RDWR
        fd = os.open(step.path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.pread(fd, len(header), at) == header:
                return
            if step.read_only:
                raise Conflict(
                    f"header of {step.tag}: it is not on the media, and this host may only read "
                    "them; a host that may write puts it there (--as pmem)"
                )
            os.pwrite(fd, header, at)
        finally:
            os.close(fd)
    except OSError as error:
        raise Conflict(f"header of {step.tag}: {error.strerror}") from error


async def _open_window(step: OpenWindow, vm: Machine) -> None:
    path = await _windows(vm).open(step.device, step.tagged, step.device_bytes)
    address = {"type": "unix", "data": {"path": path}}
    # Not reconnect-ms: QEMU 11.1 aborts in vhost_dev_start when it connects a second time.
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    try:
        await vm.execute("chardev-add", {"id": step.chardev, "backend": backend})
    except TagmemError:
        await _windows(vm).close(step.device)
        raise


async def _ask(step: AskGuest, vm: Machine) -> guest.Answer | None:
    """Raises Refused, and OutcomeUnknown for silence, where the answer is needed."""
    if vm.guest is None:
        if step.needed:
            raise OutcomeUnknown("the VM has no guest agent that could say whether it is in use")
        return None
    end = now() + step.deadline_ns
    try:
        answer = await vm.guest.ask(step.request, step.deadline_ns)
        # One that was silent may still be busy with what it was asked before.
        while isinstance(answer, guest.Failed) and answer.code in BUSY and now() < end:
            await asyncio.sleep(BUSY_SECONDS)
            answer = await vm.guest.ask(step.request, max(end - now(), SECOND // 10))
    except OutcomeUnknown as error:
        if step.needed:
            raise
        log.info("the guest did not answer: %s", error)
        return None
    if step.needed and isinstance(answer, guest.Held | guest.Failed):
        if isinstance(answer, guest.Failed) and answer.code == "absent":
            return answer  # The guest has no such device: nobody there can have it.
        raise Refused(answer)
    if isinstance(answer, guest.Failed):
        log.warning("the guest does not find it: %s (%s)", answer.reason, answer.code)
    return answer


async def _await_size(step: AwaitSize, vm: Machine) -> None:
    end = now() + step.deadline_ns
    while (size := await vm.size_of(step.device)) != step.size_bytes:
        if now() >= end:
            raise NotGone(f"{step.device} has {size} bytes plugged, not {step.size_bytes}")
        await asyncio.sleep(POLL_SECONDS)


async def _prove(step: ProveUnmapped, vm: Machine) -> None:
    end = now() + step.deadline_ns
    while held := await vm.holds(step.paths):
        if now() >= end:
            more = f"; {step.otherwise}" if step.otherwise else ""
            raise StillMapped(f"QEMU still has {', '.join(held)}{more}")
        await asyncio.sleep(POLL_SECONDS)


async def carry_out(steps: Sequence[Step], vm: Machine) -> guest.Answer | None:
    """Carry a plan out, whole or not at all; the guest's last answer.

    Raises what the failing step raised, after undoing; its message says what could not be undone.
    """
    done: list[Step] = []
    answer: guest.Answer | None = None
    for step in steps:
        try:
            said = await perform(step, vm)
        except TagmemError as error:
            # What failed by silence may have taken effect.
            tried = [*done, step] if isinstance(error, OutcomeUnknown) else done
            left = await undo(tried, vm)
            if left:
                raise OutcomeUnknown(f"{error}; left behind: {', '.join(left)}") from error
            raise
        done.append(step)
        answer = said or answer
    return answer


async def undo(done: Sequence[Step], vm: Machine) -> list[str]:
    """Take steps back, the last one first; what could not be taken back."""
    left: list[str] = []
    for step in reversed(done):
        try:
            if isinstance(step, OpenWindow):
                await _execute(vm, "chardev-remove", {"id": step.chardev})
                await _windows(vm).close(step.device)
            elif isinstance(step, OfferExtent):
                await extents.recall(RecallExtent(step.lent.tag, extents.RECALL_NS), vm)
            elif isinstance(step, Command) and step.undo is not None:
                command, arguments = step.undo
                await vm.execute(command, arguments)
                if command == "device_del" and not await vm.deleted(arguments["id"], UNPLUG_NS):
                    left.append(f"device {arguments['id']}")
        except TagmemError as error:
            log.warning("undoing %s: %s", type(step).__name__, error)
            left.append(f"{type(step).__name__} ({error})")
    return left


class Planned:
    """A presenter that has its own `can`, `plan` and `unplan`, and the rest from here."""

    description: Description

    def describe(self) -> Description:
        """What it promises."""
        return self.description

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Why not; None when it can."""
        raise NotImplementedError

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """How it will attach."""
        raise NotImplementedError

    def unplan(self, presentation: Presentation, rung: str) -> Sequence[Step]:
        """How a rung takes it back; empty: no such rung."""
        raise NotImplementedError

    async def attach(self, request: Request, vm: Machine) -> Presentation:
        """See `contract.Presenter`."""
        facts = await vm.facts()
        reason = self.can(request, facts)
        if reason is not None:
            raise Unsupported(f"{self.description.name}: {reason}")
        return await self.carry_out(request, facts, self.plan(request, facts), vm)

    async def carry_out(
        self, request: Request, facts: VmFacts, plan: Plan, vm: Machine
    ) -> Presentation:
        """What a plan has made. Raises as the step that failed, after undoing."""
        answer = await carry_out(plan.steps, vm)
        return Presentation(
            request.tagged,
            facts.name,
            plan.presenter,
            plan.device,
            "attached",
            plan.slot,
            plan.device_bytes,
            answer.memory.path if isinstance(answer, guest.Attached) else "",
            plan.warning,
            _told_of(plan.steps),
        )

    async def detach(
        self,
        presentation: Presentation,
        vm: Machine,
        *,
        deadline_ns: Nanoseconds,
        force: bool = False,
        may_stop_vm: bool = False,
    ) -> Detached:
        """See `contract.Presenter`."""
        return await Descent(self, presentation, vm, deadline_ns).climb(
            force=force, may_stop_vm=may_stop_vm
        )


class Descent:
    """One detach, rung by rung."""

    def __init__(
        self, presenter: Planned, presentation: Presentation, vm: Machine, deadline_ns: Nanoseconds
    ) -> None:
        self._presenter = presenter
        self._presentation = presentation
        self._vm = vm
        self._end = now() + deadline_ns
        self._holders: tuple[Holder, ...] = ()
        self._reason = ""

    async def climb(self, *, force: bool, may_stop_vm: bool) -> Detached:
        """The rungs in order, the hard ones only where allowed."""
        state = (await self._vm.facts()).state
        if state == "gone":
            return Detached(done=True, rung="stop-vm", reason="QEMU has ended")
        rung = "insist" if force else "ask"
        if await self._ask(state, rung):
            rung = "unplug"
            if await self._rung(rung):
                return Detached(done=True, rung=rung)
        if force:
            taken = await self._revoke(state)
            if taken is not None:
                return taken
        if may_stop_vm:
            rung = "stop-vm"
            if await self._stop_vm():
                return Detached(True, rung, self._holders, self._reason)
        return Detached(False, rung, self._holders, self._reason, self._presentation)

    async def _ask(self, state: str, rung: str) -> bool:
        """Whether the guest has let go, or there is nothing to ask it."""
        if self._presentation.state == "revoked":
            return True
        if state != "running":
            self._reason = f"the guest is {state} and cannot answer"
            return False
        return await self._rung(rung)

    async def _rung(self, name: str) -> bool:
        steps = self._presenter.unplan(self._presentation, name)
        try:
            for step in steps:
                await perform(self._within(step), self._vm)
        except Refused as error:
            self._holders, self._reason = error.holders, str(error)
            return False
        except TagmemError as error:
            self._reason = self._reason or str(error)
            return False
        return True

    def _within(self, step: Step) -> Step:
        """The step with no more time than is left; a moment always is."""
        left = max(self._end - now(), SECOND // 10)
        if isinstance(step, AskGuest):
            deadline = min(step.deadline_ns, left)
            request = step.request
            if isinstance(request, guest.Detach):
                ms = deadline // MILLISECOND
                request = request._replace(ask_ms=ms * 6 // 10, stop_ms=ms * 3 // 10)
            return AskGuest(request, deadline, step.needed)
        if isinstance(step, AwaitDeleted):
            return AwaitDeleted(step.device, min(step.deadline_ns, left))
        if isinstance(step, RecallExtent):
            return RecallExtent(step.tag, min(step.deadline_ns, left))
        if isinstance(step, AwaitSize):
            return AwaitSize(step.device, step.size_bytes, left)
        return step

    async def _revoke(self, state: str) -> Detached | None:
        """Take the bytes; None where this presenter cannot, or it did not work.

        QEMU must not be told anything of a device that is stopped, and a VM that is paused has
        stopped its devices: it runs for the moment that this takes, and is paused again.
        """
        steps = self._presenter.unplan(self._presentation, "revoke")
        if not steps or state not in ("running", *_RESUMABLE):
            return None
        self._end = max(self._end, now() + PROVE_NS + CLEAR_AWAY_NS)
        resumed = state in _RESUMABLE
        try:
            if resumed:
                # Said before it runs, the bytes go in the moment in which the device starts.
                with contextlib.suppress(OutcomeUnknown):
                    await perform(steps[0], self._vm)
                await self._vm.execute("cont", {})
            try:
                for step in steps:
                    await perform(step, self._vm)
            finally:
                if resumed and state == "paused":
                    await self._vm.execute("stop", {})
        except TagmemError as error:
            self._reason = f"{self._reason}; taking it by force: {error}".lstrip("; ")
            return None
        self._presentation = msgspec.structs.replace(self._presentation, state="revoked")
        reason = self._reason
        if state == "running":
            self._end = now() + CLEAR_AWAY_NS
            if await self._rung("unplug"):
                return Detached(True, "revoke", self._holders, reason)
        return Detached(True, "revoke", self._holders, reason, self._presentation)

    async def _stop_vm(self) -> bool:
        try:
            await perform(StopVm(STOP_VM_NS), self._vm)
            if self._vm.windows is not None:
                await self._vm.windows.close(self._presentation.device)
        except TagmemError as error:
            self._reason = f"{self._reason}; stopping the VM: {error}"
            return False
        return True


def _told_of(steps: Sequence[Step]) -> guest.Told | None:
    for step in steps:
        if isinstance(step, AskGuest) and isinstance(step.request, guest.Attach):
            return step.request.told
    return None


def _held(answer: guest.Held) -> str:
    if not answer.holders:
        return f"the guest cannot tell who holds it: {answer.reason or 'it does not say why'}"
    first = answer.holders[0]
    more = f" and {len(answer.holders) - 1} more" if len(answer.holders) > 1 else ""
    return f"in the guest process {first.pid} ({first.name}){more} holds it"
