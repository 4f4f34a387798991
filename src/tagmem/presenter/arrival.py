"""The receiving half of a migration: what another host's hypervisor may ask of this one.

A QEMU is started that waits, stopped (`-S`), with the devices of the tags that travel already on
this host's own files; so it has its extents before the source stops. When the stream is in, it
still does not run: it is the source that decides, and says so (`arrived`). Thus there is no moment
in which both run, whatever is lost on the way, and a VM that nobody claims is ended by itself.

The other host is not believed: it names tags, sizes and addresses, never a path, a program or a
socket, and can speak only of what it has sent itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tagmem.base.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    TagmemError,
    Unsupported,
)
from tagmem.base.ids import parse_name, parse_tag
from tagmem.base.units import SECOND
from tagmem.presenter.common import device_id
from tagmem.presenter.contract import Plan, Presentation, Value
from tagmem.presenter.driver import perform
from tagmem.presenter.house import House, MovingVm
from tagmem.presenter.migrate import (
    About,
    Arrival,
    Incoming,
    Later,
    Look,
    Seat,
    Seen,
    Settled,
    Settlement,
    TargetTag,
    Waiting,
    arguments,
    arrival,
    headers,
)
from tagmem.presenter.requests import read

log = logging.getLogger(__name__)

ARRIVALS_MAX = 256
GRACE_NS = 60 * SECOND
"""After the source's own deadline."""
LOADED_NS = 10 * SECOND
"""For the end of the stream, once the source has seen it off."""
STOP_NS = 10 * SECOND
SWITCH_NS = 10 * SECOND
CAPABILITIES = ("x-ignore-shared", "return-path", "events", "pause-before-switchover")
"""Of both sides. The return path lets the source fail where the target could not load it."""


class Record(Value, frozen=True):
    """What is kept of a VM that comes. Key: `arrival/ID`. Gone: it was given up for good."""

    id: str
    name: str
    from_host: str
    state: Literal["waiting", "arrived"]
    deadline_ns: int
    later: tuple[Later, ...] = ()


def capabilities() -> dict[str, Any]:
    """As QMP wants them."""
    return {"capabilities": [{"capability": name, "state": True} for name in CAPABILITIES]}


class Arrivals:
    """VMs that come from other hosts."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._records: dict[str, Record] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def restore(self, kept: Mapping[str, str]) -> None:
        """Take up what was kept; the VMs themselves have been found again before."""
        for key, document in kept.items():
            if not key.startswith("arrival/"):
                continue
            record = msgspec.json.decode(document, type=Record)
            self._records[record.id] = record
            if record.state == "waiting":
                try:
                    await self._house.occupy(record.name, _reason(record))
                except NotFound:
                    await self._drop(record)
                else:
                    self._expire(record)

    def waiting(self) -> tuple[Record, ...]:
        """Those that have not come yet."""
        return tuple(one for one in self._records.values() if one.state == "waiting")

    def close(self) -> None:
        """Wait for nothing any more; what was begun is on record."""
        for task in self._tasks:
            task.cancel()

    async def serve(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """One request of another host. Raises TagmemError."""
        body = {name: value for name, value in request.items() if name != "vm"}
        answer: Value
        match request.get("vm"):
            case "look":
                answer = self._look(read(body, Look))
            case "incoming":
                answer = await self._incoming(host, read(body, Incoming))
            case "arrived":
                answer = await self._arrived(host, read(body, About))
            case "abandon":
                answer = await self._abandon(host, read(body, About))
            case "settle":
                answer = await self._settle(host, read(body, About))
            case "forget":
                answer = await self._forget(host, read(body, About))
            case other:
                verbs = "look, incoming, arrived, abandon, settle, forget"
                raise InvalidInput("vm", f"one of {verbs}", other)
        told: dict[str, Any] = msgspec.to_builtins(answer)
        return told

    # ---- before anything is done

    def _look(self, ask: Look) -> Seen:
        try:
            parse_name(ask.name, "name")
            self._house.vacant(ask.name, ())
            self._reachable(ask.boot_id)
        except TagmemError as error:
            return Seen(refusal=str(error))
        tags = []
        for tag in ask.tags:
            try:
                found = self._house.tagged(parse_tag(tag))
                self._house.vacant("", (found.tag,))
            except NotFound:
                continue
            except TagmemError as error:
                return Seen(refusal=str(error))
            count, head = len(found.pieces), found.head_room_bytes
            tags.append(TargetTag(found.tag, found.size_bytes, count, head, found.read_only))
        return Seen(tuple(tags))

    def _reachable(self, boot_id: str) -> None:
        site = self._house.site
        if boot_id != site.boot_id and not site.migration_address:
            raise Unsupported(
                "VMs of other machines cannot come here: this host's configuration has no "
                "migration_address in [vms]"
            )

    # ---- waiting for it

    async def _incoming(self, host: str, ask: Incoming) -> Waiting:
        parse_name(ask.name, "name")
        self._reachable(ask.boot_id)
        if ask.id in self._records:
            raise Conflict(f"migration {ask.id} is known already")
        if len(self.waiting()) >= ARRIVALS_MAX:
            raise Conflict(f"there are {ARRIVALS_MAX} VMs coming, which is the most")
        later = tuple(parse_tag(todo.tag) for todo in ask.later)
        self._house.vacant(ask.name, (*(parse_tag(seat.tag) for seat in ask.seats), *later))
        planned = [self._plan(ask, seat) for seat in ask.seats]
        record = Record(ask.id, ask.name, host, "waiting", ask.deadline_ns, ask.later)
        self._records[ask.id] = record
        try:
            await self._house.keep(f"arrival/{ask.id}", record)
            return await self._open(record, ask, planned)
        except TagmemError:
            await self.give_up(record)
            raise

    def _plan(self, ask: Incoming, seat: Seat) -> tuple[Plan, Seat, Presentation]:
        way = self._house.ways.get(seat.presenter)
        if way is None:
            raise InvalidInput("presenter", "one of this host's", seat.presenter)
        if seat.slot and not 1 <= int(seat.slot.removeprefix("tmp")) <= ask.build.ports:
            raise InvalidInput("slot", f"tmp1 to tmp{ask.build.ports}", seat.slot)
        tagged = self._house.tagged(parse_tag(seat.tag))
        plan = arrival(way, tagged, seat, ask.name)
        shown = Presentation(
            tagged,
            ask.name,
            seat.presenter,
            device_id(tagged.tag),
            "attaching",
            seat.slot,
            plan.device_bytes,
            seat.guest_path,
            plan.warning,
        )
        return plan, seat, shown

    async def _open(
        self, record: Record, ask: Incoming, planned: list[tuple[Plan, Seat, Presentation]]
    ) -> Waiting:
        for _, _, shown in planned:
            await self._house.show(shown)
        words = tuple(word for plan, seat, _ in planned for word in arguments(plan, seat))
        vm = await self._house.launch(ask.name, ask.build, words)
        await self._house.occupy(ask.name, _reason(record))
        for plan, _, _ in planned:
            for step in headers(plan):
                await perform(step, vm)
        facts = await vm.facts()
        await vm.execute("migrate-set-capabilities", capabilities())
        waiting = Waiting(facts.machine, facts.accel)
        waiting = await self._listen(vm, waiting, local=ask.boot_id == self._house.site.boot_id)
        self._expire(record)
        return waiting

    async def _listen(self, vm: MovingVm, waiting: Waiting, *, local: bool) -> Waiting:
        """Where QEMU is to be connected to. A TCP port is open to everybody who can reach it."""
        address: dict[str, Any] = {"transport": "socket"}
        path = str(self._house.directory / vm.name / "incoming")
        if local:
            address |= {"type": "unix", "path": path}
        else:
            host = self._house.site.migration_address
            address |= {"type": "inet", "host": host, "port": "0"}
        channels = [{"channel-type": "main", "addr": address}]
        await vm.execute("migrate-incoming", {"channels": channels})
        if local:
            return msgspec.structs.replace(waiting, path=path)
        told = await vm.execute("query-migrate", {})
        try:
            bound = told["socket-address"][0]
            port = int(bound["port"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise OutcomeUnknown(f"VM {vm.name}: QEMU does not say where it listens") from None
        return msgspec.structs.replace(waiting, address=address["host"], port=port)

    # ---- its end, one way or the other

    def _record(self, host: str, about: About) -> Record | None:
        record = self._records.get(about.id)
        if record is not None and record.from_host != host:
            raise NotFound(f"no migration {about.id} of host {host}")
        return record

    def _lock(self, id_: str) -> asyncio.Lock:
        return self._locks.setdefault(id_, asyncio.Lock())

    async def _arrived(self, host: str, about: About) -> Arrival:
        async with self._lock(about.id):
            record = self._record(host, about)
            if record is None:
                self._locks.pop(about.id, None)
                return Arrival("abandoned", "it was given up here")
            if record.state == "waiting":
                reason = await self._missing(record)
                if reason:
                    await self.give_up(record)
                    return Arrival("abandoned", reason)
                record = msgspec.structs.replace(record, state="arrived")
                # From here on it is this host's: the source may forget it when it hears of it.
                await self._house.keep(f"arrival/{record.id}", record)
                self._records[record.id] = record
            await self._run(record)
        return Arrival("arrived")

    async def _missing(self, record: Record) -> str:
        """Why the VM is not here whole; nothing when it is. Raises OutcomeUnknown."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LOADED_NS / SECOND
        try:
            vm = self._house.vm(record.name)
            while True:
                told = await vm.execute("query-migrate", {})
                status = told.get("status")
                if status == "completed":
                    return ""
                if status in ("failed", "cancelled"):
                    return f"its QEMU says {status}: {told.get('error-desc', 'no reason')}"
                if loop.time() >= end:
                    return f"the stream has not ended: {status}"
                await vm.news(SECOND // 10)
        except NotFound:
            return "its QEMU has ended"
        except OutcomeUnknown:
            if self._alive(record.name):
                raise
            return "its QEMU has ended"

    def _alive(self, name: str) -> bool:
        try:
            return not self._house.vm(name).gone
        except NotFound:
            return False

    async def _run(self, record: Record) -> None:
        """Let it run, whatever has been done of that already."""
        if not self._alive(record.name):
            return  # It came, and has ended since.
        vm = self._house.vm(record.name)
        for shown in self._house.shown(record.name):
            if shown.state == "attaching":
                await self._house.show(msgspec.structs.replace(shown, state="attached"))
        if (await vm.execute("query-status", {})).get("status") != "running":
            await vm.execute("cont", {})
        await self._house.occupy(record.name, "")
        log.info("VM %s has arrived from host %s", record.name, record.from_host)

    async def _abandon(self, host: str, about: About) -> Value:
        async with self._lock(about.id):
            record = self._record(host, about)
            if record is not None:
                if record.state == "arrived":
                    raise Conflict(f"VM {record.name} has arrived")
                await self.give_up(record)
        self._locks.pop(about.id, None)
        return Value()

    async def give_up(self, record: Record) -> None:
        """End its QEMU; then it is forgotten, which says for good that it never ran here."""
        try:
            vm = self._house.vm(record.name)
        except NotFound:
            pass
        else:
            await vm.stop(STOP_NS)
        await self._house.ended(record.name)
        await self._drop(record)

    async def _drop(self, record: Record) -> None:
        self._records.pop(record.id, None)
        await self._house.keep(f"arrival/{record.id}", None)

    def _expire(self, record: Record) -> None:
        async def later() -> None:
            await asyncio.sleep((record.deadline_ns + GRACE_NS) / SECOND)
            async with self._lock(record.id):
                left = self._records.get(record.id)
                if left is not None and left.state == "waiting":
                    log.warning("VM %s did not come from %s", left.name, left.from_host)
                    await self.give_up(left)

        task = asyncio.get_running_loop().create_task(later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, host: str, about: About) -> Value:
        record = self._record(host, about)
        if record is not None and record.state == "arrived":
            await self._drop(record)
            self._locks.pop(about.id, None)
        return Value()

    # ---- what could not travel

    async def _settle(self, host: str, about: About) -> Settlement:
        record = self._record(host, about)
        if record is None or record.state != "arrived":
            raise Conflict(f"migration {about.id} has not arrived")
        async with self._lock(about.id):
            record = self._records.get(about.id, record)
            settled = [await self._present(record.name, todo) for todo in record.later]
            # Once: what people do with the tags afterwards is not undone by a question repeated.
            record = msgspec.structs.replace(record, later=())
            await self._house.keep(f"arrival/{record.id}", record)
            self._records[record.id] = record
        return Settlement(tuple(settled))

    async def _present(self, name: str, todo: Later) -> Settled:
        """Have a tag presented as it was on the source; if that fails, as it was before."""
        tag, before = todo.tag, ""
        now = next((one for one in self._house.shown(name) if one.tagged.tag == tag), None)
        try:
            if now is not None:
                if now.presenter == todo.way:
                    return Settled(tag, todo.way)
                before = now.presenter
                gone = await self._house.take(now, SWITCH_NS, False)
                if not gone.done:
                    return Settled(tag, before, gone.reason[:4096])
            await self._house.attach(name, todo)
        except TagmemError as error:
            reason = str(error)[:4096]
            if before and not any(one.tagged.tag == tag for one in self._house.shown(name)):
                return await self._again(name, Later(tag, before), reason)
            return Settled(tag, before, reason)
        return Settled(tag, todo.way)

    async def _again(self, name: str, todo: Later, reason: str) -> Settled:
        try:
            await self._house.attach(name, todo)
        except TagmemError as error:
            return Settled(todo.tag, "", f"{reason}; {error}"[:4096])
        return Settled(todo.tag, todo.way, reason)


def _reason(record: Record) -> str:
    return f"VM {record.name} is arriving from host {record.from_host}"
