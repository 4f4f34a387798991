"""All VMs of one host: started, adopted, found again, and which tags are in them.

What is needed after a restart is kept before it is acted upon: a VM before its QEMU is started, a
presentation before its first step. A QEMU that ends takes its presentations with it, because
nothing can reach the bytes through it any more; one that cannot be reached keeps them, and the tag
stays held. The bytes of a tag are released by nobody here: the host's proof looks at QEMU's process
like at any other.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    TagmemError,
)
from tagmem.base.ids import parse_name, parse_tag
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.ports import Emit, Holding, HostTag, Peers
from tagmem.presenter import ram, survey
from tagmem.presenter.arrival import Arrivals
from tagmem.presenter.attend import Attendant
from tagmem.presenter.brokerlink import Keeper, Window
from tagmem.presenter.choose import all_presenters, pick
from tagmem.presenter.common import device_id, tagged_of
from tagmem.presenter.contract import (
    Detached,
    Presentation,
    Request,
    Tagged,
    Value,
)
from tagmem.presenter.departure import Departures
from tagmem.presenter.house import Alone, House, Site, this_site
from tagmem.presenter.machine import VmSpec
from tagmem.presenter.migrate import Build, Later
from tagmem.presenter.qemu import Vm, started_at
from tagmem.presenter.requests import (
    Adopt,
    Attach,
    Detach,
    Migrate,
    Named,
    Run,
    Start,
    VmRecord,
    build_of,
    read,
    rebuildable,
    same_machine,
    spec_of,
)
from tagmem.presenter.window import Goal
from tagmem.wire import guest

log = logging.getLogger(__name__)

VERBS = (
    "start, adopt, list, show, stop, attach, detach, exec, migrate, migrate-look, migrate-cancel"
)
VMS_MAX = 256
BOOT_NS = 120 * SECOND
STOP_NS = 10 * SECOND
GIVEN_BACK_NS = 10 * SECOND
REATTACH_NS = 10 * SECOND
WINDOWED = "vhost-pmem"
"""The way whose windows the broker serves."""
EXEC_NS_MAX = 24 * 3600 * SECOND

Keep = Callable[[str, str | None], Awaitable[None]]
"""(key, document): durable when it returns; None forgets."""
Tags = Callable[[str], HostTag]
"""Raises NotFound for a tag that this host does not have."""
Parts = Callable[[VmSpec, str], Awaitable[VmSpec]]
"""Completes a machine that names no kernel: QEMU by name, kernel and initial RAM disk."""


class _Entry:
    """One VM: what is kept, the process if it was reached, what is in it."""

    def __init__(self, record: VmRecord) -> None:
        self.record = record
        self.vm: Vm | None = None
        self.trouble = ""
        self.busy = ""
        """Why nothing may be changed in it now."""
        self.lock = asyncio.Lock()
        """One attach or detach at a time: slots are judged and taken in one go."""
        self.attendant: Attendant | None = None


class Hypervisor:
    """`ports.Hypervisors` with QEMU."""

    def __init__(
        self,
        directory: Path,
        keep: Keep,
        tags: Tags,
        broker: Keeper,
        parts: Parts,
        peers: Peers | None = None,
        broker_death: str = "reattach",
        site: Site | None = None,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._tags = tags
        self._broker = broker
        broker.on_lost = self._broker_died
        self._broker_death = broker_death
        self._parts = parts
        self._ways = all_presenters() | {ram.NAME: ram.Ram()}
        self._entries: dict[str, _Entry] = {}
        self._shown: dict[tuple[str, str], Presentation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        house = self._house(site or this_site())
        self._arrivals = Arrivals(house)
        self._departures = Departures(house, peers or Alone())

    # ---- after a restart

    async def restore(self, kept: Mapping[str, str]) -> None:
        """See `ports.Hypervisors`."""
        for key, document in kept.items():
            if key.startswith("vm/"):
                record = msgspec.json.decode(document, type=VmRecord)
                self._entries[record.name] = _Entry(record)
        for key, document in kept.items():
            if key.startswith("tag/"):
                shown = msgspec.json.decode(document, type=Presentation)
                self._shown[shown.vm, shown.tagged.tag] = shown
        served = await self._served()
        for entry in list(self._entries.values()):
            await self._find_again(entry)
        for vm, device in served:
            if all(shown.device != device for shown in self._of(vm)):
                await self._broker.forget(vm, device)
        await self._arrivals.restore(kept)
        await self._departures.restore(kept)

    async def _find_again(self, entry: _Entry) -> None:
        record = entry.record
        if record.pid and started_at(record.pid) != record.started_at:
            await self._ended(record.name)
            return
        try:
            await self._reopen(record.name, record.pid)
            vm = await Vm.adopt(
                record.name,
                record.qmp,
                pid=record.pid,
                agent_path=record.agent,
                windows=self._broker.windows(record.name),
            )
        except NotFound:
            if record.pid:
                entry.trouble = f"process {record.pid} runs, and nobody answers at {record.qmp}"
            else:
                await self._ended(record.name)
        except TagmemError as error:
            entry.trouble = str(error)
        else:
            self._have(entry, vm)

    async def _served(self) -> Collection[Window]:
        try:
            return await self._broker.find_again()
        except TagmemError as error:
            log.warning("the broker: %s", error)
            return ()

    async def _reopen(self, name: str, pid: int) -> None:
        """Look after the windows that QEMU may have still, and no broker serves. QEMU does not
        connect again (it would abort), so they can be unplugged, and by force only the VM's end
        takes their bytes back.
        """
        for shown in self._of(name):
            if shown.presenter == WINDOWED and not self._broker.knows(name, shown.device):
                goal = Goal.REVOKED if shown.state == "revoked" else Goal.PRESENTED
                await self._broker.look_after(name, shown.device, shown.tagged, goal, pid)

    def _broker_died(self, windows: Collection[Window]) -> None:
        self._begin(self._recover({vm for vm, _ in windows}))

    async def _recover(self, names: Collection[str]) -> None:
        """What becomes of VMs whose windows nobody can take any more, as the host was told."""
        for name in names:
            entry = self._entries.get(name)
            if entry is None or entry.vm is None:
                continue
            try:
                async with entry.lock:
                    await self._reopen(name, entry.record.pid)
                    if self._broker_death == "reattach" and not entry.busy:
                        await self._attach_anew(name, entry.vm)
                if self._broker_death == "stop":
                    await entry.vm.stop(STOP_NS)
            except TagmemError as error:
                log.warning("VM %s, whose windows' broker has died: %s", name, error)

    async def _attach_anew(self, name: str, vm: Vm) -> None:
        """Unplugged and plugged again a window is in hand again; who holds it in the guest is not
        disturbed.
        """
        for shown in self._of(name):
            if shown.presenter != WINDOWED or self._broker.in_hand(name, shown.device):
                continue
            way = self._ways[WINDOWED]
            ended = await way.detach(shown, vm, deadline_ns=REATTACH_NS)
            if not ended.done:
                log.warning("tag %s stays as it is: %s", shown.tagged.tag, ended.reason)
                continue
            await self._hide(name, shown.tagged.tag)
            await self._show(msgspec.structs.replace(shown, state="attaching"))
            await self._present(self._entry(name), way.attach(Request(shown.tagged), vm))

    async def close(self) -> None:
        """See `ports.Hypervisors`."""
        self._arrivals.close()
        self._departures.close()
        for entry in self._entries.values():
            if entry.attendant is not None:
                entry.attendant.close()
            if entry.vm is not None:
                entry.vm.on_gone = lambda: None
                await entry.vm.close()
        await self._broker.close()

    # ---- what is kept

    async def _keep_value(self, key: str, value: Value | None) -> None:
        await self._keep(key, None if value is None else msgspec.json.encode(value).decode())

    async def _record(self, entry: _Entry, **changes: Any) -> None:
        entry.record = msgspec.structs.replace(entry.record, **changes)
        await self._keep_value(f"vm/{entry.record.name}", entry.record)

    async def _show(self, shown: Presentation) -> None:
        self._shown[shown.vm, shown.tagged.tag] = shown
        await self._keep_value(f"tag/{shown.vm}/{shown.tagged.tag}", shown)

    async def _hide(self, vm: str, tag: str) -> None:
        if self._shown.pop((vm, tag), None) is not None:
            await self._keep_value(f"tag/{vm}/{tag}", None)

    def _of(self, name: str) -> list[Presentation]:
        return [shown for (vm, _), shown in self._shown.items() if vm == name]

    def _given(self, name: str) -> list[Presentation]:
        """What was given to a VM that ran: not its RAM, which no word of the guest takes away."""
        return [shown for shown in self._of(name) if shown.presenter != ram.NAME]

    # ---- VMs come and go

    def _have(self, entry: _Entry, vm: Vm) -> None:
        entry.vm, entry.trouble = vm, ""
        vm.lent = {lent.tag: lent for lent in entry.record.lent}
        vm.on_lent = lambda: self._record(entry, lent=tuple(vm.lent.values()))
        if vm.guest is not None:
            entry.attendant = Attendant(
                vm.guest, lambda: self._given(vm.name), self._given_back, self._show
            )

        def gone() -> None:
            self._begin(self._ended(entry.record.name))

        vm.on_gone = gone
        if vm.gone:
            gone()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ended(self, name: str) -> None:
        """Its QEMU is no more, so nothing of a tag is in it."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        log.info("VM %s has ended", name)
        if entry.attendant is not None:
            entry.attendant.close()
        for shown in self._of(name):
            if shown.presenter == WINDOWED:
                await self._forget(name, shown.device)
            await self._hide(name, shown.tagged.tag)
        await self._keep_value(f"vm/{name}", None)
        if entry.vm is not None:
            await entry.vm.close()
        if entry.record.cgroup:
            await asyncio.to_thread(_remove_cgroup, entry.record.cgroup)

    def _new(self, name: str) -> None:
        parse_name(name, "name")
        if name in self._entries:
            raise Conflict(f"there is a VM {name} already")
        if len(self._entries) >= VMS_MAX:
            raise Conflict(f"there are {VMS_MAX} VMs, which is the most")

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise NotFound(f"no VM {name} on this host; there are: {known}")
        return entry

    def _vm(self, entry: _Entry) -> Vm:
        if entry.vm is None:
            raise OutcomeUnknown(
                f"VM {entry.record.name}: {entry.trouble or 'it is being started'}"
            )
        return entry.vm

    async def _start(self, request: Start) -> dict[str, Any]:
        self._new(request.name)
        directory = self._directory / request.name
        given = await ram.judged(request.memory_from, self._for_ram)
        nodes = tuple(node for _, nodes in given for node in nodes)
        spec = await asyncio.to_thread(spec_of, request, str(directory), nodes)
        shown = [ram.presentation(tagged, request.name, nodes) for tagged, nodes in given]
        self._new(request.name)
        for each in shown:
            self._only_here(request.name, each.tagged.tag)
        vm, entry = await self._launch(spec, request.qemu, build_of(request, spec), shown=shown)
        if request.wait and vm.guest is not None:
            await vm.guest.greeted(BOOT_NS)
        return await self._describe(entry)

    async def _launch(
        self,
        spec: VmSpec,
        qemu: str,
        build: Build | None,
        busy: str = "",
        shown: Sequence[Presentation] = (),
    ) -> tuple[Vm, _Entry]:
        """On record before QEMU is started, with the tags that its RAM is in (`shown`); nothing is
        left of one that did not start.
        """
        name, where = spec.name, spec.directory
        record = VmRecord(name, f"{where}/qmp", f"{where}/agent", directory=where, build=build)
        record = msgspec.structs.replace(record, nodes=spec.nodes)
        entry = self._entries[name] = _Entry(record)
        entry.busy = busy
        self._shown |= {(name, each.tagged.tag): each for each in shown}
        try:
            await self._keep_value(f"vm/{name}", record)
            for each in shown:
                await self._show(each)
            spec = await self._parts(spec, qemu)
            await self._record(entry, cgroup=spec.cgroup)
            vm = await Vm.start(spec, self._broker.windows(name))
        except TagmemError:
            await self._ended(name)
            raise
        await self._record(entry, pid=vm.pid, started_at=started_at(vm.pid))
        for each in shown:
            await self._show(msgspec.structs.replace(each, state="attached"))
        self._have(entry, vm)
        return vm, entry

    def _for_ram(self, wanted: ram.MemoryFrom) -> Tagged:
        return tagged_of(self._tags(parse_tag(wanted.tag)), overwrite=wanted.overwrite)

    async def _adopt(self, request: Adopt) -> dict[str, Any]:
        self._new(request.name)
        vm = await Vm.adopt(
            request.name,
            request.qmp,
            pid=request.pid,
            agent_path=request.agent,
            windows=self._broker.windows(request.name),
        )
        record = VmRecord(request.name, request.qmp, request.agent, vm.pid, started_at(vm.pid))
        entry = self._entries[request.name] = _Entry(record)
        await self._keep_value(f"vm/{request.name}", record)
        self._have(entry, vm)
        return await self._describe(entry)

    async def _stop(self, request: Named) -> dict[str, Any]:
        entry = self._entry(request.name)
        _idle(entry)
        await self._vm(entry).stop(STOP_NS)
        await self._ended(request.name)
        return {"name": request.name, "state": "ended"}

    async def _list(self) -> dict[str, Any]:
        return {"vms": [await self._describe(entry) for entry in self._entries.values()]}

    async def _describe(self, entry: _Entry, *, whole: bool = False) -> dict[str, Any]:
        record = entry.record
        told: dict[str, Any] = {
            "name": record.name,
            "pid": record.pid,
            "qmp": record.qmp,
            "started_by_us": bool(record.directory),
            "state": "unknown",
            "trouble": entry.trouble,
            "busy": entry.busy,
            "tags": [self._brief(shown) for shown in self._of(record.name)],
            "nodes": [ram.told(node) for node in record.nodes],
        }
        if entry.vm is None:
            return told
        try:
            facts = await entry.vm.facts()
        except TagmemError as error:
            return told | {"trouble": str(error)}
        told |= {"state": facts.state, "qemu": ".".join(map(str, facts.qemu)), "accel": facts.accel}
        told["missing"] = survey.missing(facts)
        if whole:
            told["facts"] = msgspec.to_builtins(facts)
        return told

    # ---- tags come and go

    async def _attach(self, request: Attach) -> dict[str, Any]:
        tag = parse_tag(request.tag)
        entry = self._entry(request.name)
        async with entry.lock:
            _idle(entry)
            tagged = tagged_of(self._tags(tag), overwrite=request.overwrite)
            wanted = Request(tagged, request.need)
            shown, why = await self._put(entry, wanted, request.way)
        return self._brief(shown) | {"why": why, "warning": shown.warning}

    async def _put(self, entry: _Entry, wanted: Request, name: str) -> tuple[Presentation, str]:
        """Attach, on record before it is; and why in this way."""
        vm, tag = self._vm(entry), wanted.tagged.tag
        self._only_here(vm.name, tag)
        way, choice = pick(self._ways, wanted, await vm.facts(), name)
        name = way.describe().name
        await self._show(Presentation(wanted.tagged, vm.name, name, device_id(tag), "attaching"))
        try:
            shown = await self._present(entry, way.attach(wanted, vm))
        except OutcomeUnknown:
            raise  # Something of it may be there: it stays on record, and a detach clears it.
        except TagmemError:
            await self._hide(vm.name, tag)
            raise
        return shown, choice.why

    async def _present(self, entry: _Entry, shown: Awaitable[Presentation]) -> Presentation:
        """Put on record what an attach has made."""
        if entry.attendant is not None:
            return await entry.attendant.attend(shown)
        made = await shown
        await self._show(made)
        return made

    def _brief(self, shown: Presentation) -> dict[str, Any]:
        promised = self._ways[shown.presenter].describe().guaranteed
        return {
            "tag": shown.tagged.tag,
            "name": shown.vm,
            "as": shown.presenter,
            "state": shown.state,
            "size_bytes": shown.tagged.size_bytes,
            "guest_path": shown.guest_path,
            "guaranteed": promised and self._in_hand(shown),
        }

    def _in_hand(self, shown: Presentation) -> bool:
        return shown.presenter != WINDOWED or self._broker.in_hand(shown.vm, shown.device)

    async def _forget(self, name: str, device: str) -> None:
        try:
            await self._broker.forget(name, device)
        except TagmemError as error:
            log.warning("window %s of VM %s: %s", device, name, error)

    def _only_here(self, vm: str, tag: str) -> None:
        """One VM at a time: two would write the same bytes without knowing of each other."""
        holder = next((name for name, shown in self._shown if shown == tag), None)
        if holder is not None:
            raise Conflict(f"tag {tag} is in VM {holder}" + (" already" if holder == vm else ""))

    async def _detach(self, request: Detach) -> dict[str, Any]:
        tag = parse_tag(request.tag)
        shown = self._shown.get((request.name, tag))
        if shown is None:
            self._entry(request.name)
            raise NotFound(f"tag {tag} is not in VM {request.name}")
        if shown.presenter == ram.NAME and not request.may_stop_vm:
            raise Conflict(
                f"VM {request.name} has its RAM in tag {tag}: only its end gives it back"
                f" (tagmem vm stop {request.name}, or --stop-vm)"
            )
        ended = await self._take(
            shown, request.deadline_ns, force=request.force, may_stop_vm=request.may_stop_vm
        )
        if not ended.done:
            hint = "" if request.force else "; --force goes on where it can"
            hint += "" if request.may_stop_vm else "; --stop-vm ends the VM"
            raise Conflict(f"tag {tag} stays in VM {request.name}: {ended.reason}{hint}")
        told: dict[str, Any] = msgspec.to_builtins(ended)
        return told | {"tag": tag, "name": request.name}

    async def _given_back(self, shown: Presentation) -> Detached:
        """A guest says that it has let go, which proves nothing: as if a user had asked."""
        return await self._take(shown, GIVEN_BACK_NS, force=False, may_stop_vm=False)

    async def _take(
        self, shown: Presentation, deadline_ns: Nanoseconds, *, force: bool, may_stop_vm: bool
    ) -> Detached:
        entry = self._entries.get(shown.vm)
        if entry is None:
            return Detached(done=True, rung="stop-vm", reason="QEMU has ended")
        _idle(entry)
        async with entry.lock:
            _idle(entry)
            return await self._remove(entry, shown, deadline_ns, force, may_stop_vm)

    async def _remove(
        self,
        entry: _Entry,
        shown: Presentation,
        deadline_ns: Nanoseconds,
        force: bool,
        may_stop_vm: bool,
    ) -> Detached:
        """Detach; what is left of it is on record."""
        ended = await self._ways[shown.presenter].detach(
            shown, self._vm(entry), deadline_ns=deadline_ns, force=force, may_stop_vm=may_stop_vm
        )
        if ended.presentation is not None:
            await self._show(ended.presentation)
        elif ended.done:
            await self._hide(shown.vm, shown.tagged.tag)
        return ended

    def holding(self, tag: str) -> str:
        """See `ports.Hypervisors`."""
        return "; ".join(_holds(one) for (_, held), one in self._shown.items() if held == tag)

    def holders(self, tag: str) -> Sequence[Holding]:
        """See `ports.Hypervisors`."""
        found = []
        for vm in (name for name, held in self._shown if held == tag):
            entry = self._entries.get(vm)
            found.append(Holding(entry.record.pid if entry else 0, f"VM {vm}", "maps"))
        return found

    async def release(
        self, tag: str, deadline_ns: Nanoseconds, *, may_stop_vm: bool, up_to: str = "detach"
    ) -> str:
        """See `ports.Hypervisors`."""
        reasons = []
        for (_, held), shown in list(self._shown.items()):
            is_ram = shown.presenter == ram.NAME
            if held != tag or (up_to != "detach" and not is_ram):
                continue
            may_stop = may_stop_vm or (is_ram and up_to != "ask")
            try:
                ended = await self._take(shown, deadline_ns // 2, force=False, may_stop_vm=False)
                if not ended.done and (may_stop or not is_ram):
                    left = ended.presentation or shown
                    ended = await self._take(
                        left, deadline_ns // 2, force=True, may_stop_vm=may_stop
                    )
            except TagmemError as error:
                reasons.append(f"{_holds(shown)}: {error}")
                continue
            if not ended.done:
                reasons.append(f"{_holds(shown)}: {ended.reason}")
        return "; ".join(reasons)

    # ---- in a guest

    async def _run(self, request: Run, emit: Emit) -> dict[str, Any]:
        vm = self._vm(self._entry(request.name))
        if vm.guest is None:
            raise Conflict(f"VM {request.name} has no channel to a guest agent")

        def tell(answer: guest.Answer) -> None:
            if isinstance(answer, guest.Output):
                text = base64.b64encode(answer.data).decode()
                emit({"stream": answer.stream, "data": text})

        command = guest.Exec(0, request.argv, request.env, request.tag)
        answer = await vm.guest.stream(command, tell, EXEC_NS_MAX)
        if isinstance(answer, guest.Failed):
            raise RemoteError(f"guest {request.name}", 1, f"{answer.reason} ({answer.code})")
        if not isinstance(answer, guest.Exited):
            raise OutcomeUnknown(f"guest {request.name}: {type(answer).__name__} for a command")
        return {"exit_code": answer.code, "dropped_bytes": answer.dropped_bytes}

    # ---- from host to host

    def _house(self, site: Site) -> House:
        """What migrations may do here."""

        async def occupy(name: str, why: str) -> None:
            entry = self._entry(name)
            async with entry.lock:
                entry.busy = why

        async def attach(name: str, todo: Later) -> Presentation:
            tagged = tagged_of(self._tags(todo.tag), overwrite=todo.overwrite)
            shown, _ = await self._put(self._entry(name), Request(tagged), todo.way)
            return shown

        async def take(shown: Presentation, deadline_ns: Nanoseconds, force: bool) -> Detached:
            return await self._remove(self._entry(shown.vm), shown, deadline_ns, force, False)

        async def launch(name: str, build: Build, words: tuple[str, ...]) -> Vm:
            spec = same_machine(build, name, str(self._directory / name), ("-S", *words))
            vm, _ = await self._launch(spec, build.qemu, build, busy=f"VM {name} is arriving")
            return vm

        def vacant(name: str, tags: tuple[str, ...]) -> None:
            if name:
                self._new(name)
            for tag in tags:
                self._only_here(name, tag)

        return House(
            site,
            self._ways,
            lambda name: self._vm(self._entry(name)),
            lambda name: rebuildable(self._entry(name).record),
            self._of,
            occupy,
            attach,
            take,
            self._show,
            launch,
            self._ended,
            vacant,
            lambda tag: tagged_of(self._tags(tag), overwrite=False),
            self._keep_value,
            self._directory,
        )

    # ---- the local API

    async def call(self, request: Mapping[str, Any], emit: Emit) -> Mapping[str, Any]:
        """See `ports.Hypervisors`."""
        body = {name: value for name, value in request.items() if name != "vm"}
        match request.get("vm"):
            case "start":
                return await self._start(read(body, Start))
            case "adopt":
                return await self._adopt(read(body, Adopt))
            case "list":
                return await self._list()
            case "show":
                return await self._describe(self._entry(read(body, Named).name), whole=True)
            case "stop":
                return await self._stop(read(body, Named))
            case "attach":
                return await self._attach(read(body, Attach))
            case "detach":
                return await self._detach(read(body, Detach))
            case "exec":
                return await self._run(read(body, Run), emit)
            case "migrate":
                return await self._departures.migrate(read(body, Migrate), emit)
            case "migrate-look":
                return await self._departures.look(read(body, Migrate))
            case "migrate-cancel":
                return self._departures.cancel(read(body, Named).name)
            case other:
                raise InvalidInput("vm", f"one of {VERBS}", other)

    async def serve(self, from_host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `ports.Hypervisors`."""
        return await self._arrivals.serve(from_host, request)


def _idle(entry: _Entry) -> None:
    if entry.busy:
        raise Conflict(entry.busy)


def _holds(shown: Presentation) -> str:
    """Who has a tag, and how, as the subject of a sentence."""
    return f"VM {shown.vm}" + (" has its RAM in it" if shown.presenter == ram.NAME else "")


def _remove_cgroup(path: str) -> None:
    try:
        Path(path).rmdir()
    except OSError as error:
        log.info("%s stays: %s", path, error.strerror)
