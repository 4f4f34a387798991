"""The sending half of a migration: judge, make ready, stream, hand over; or leave the VM as it was.

What is kept of it says who decides. While it is *leaving*, nothing that happened is final: the
target's VM does not run before it is told to, so the source takes its tags back and runs on. *gone*
is the turning point: QEMU has sent everything, and from then on this host never lets the VM run
again unless the target says in so many words that it has given it up; no answer is no such word.
*arrived* is that word's opposite: the rest is clearing up; once this host's QEMU has ended it is
*over*, and the name may come back. *staying* is kept before the VM runs on
here, so that no later look at QEMU takes a stream that was given up for one that counts. A restart
goes on from whichever is kept, and from *leaving* by asking QEMU what became of the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import msgspec

from tagmem.base.errors import Conflict, NotFound, OutcomeUnknown, TagmemError, Unsupported
from tagmem.base.ids import parse_name
from tagmem.base.units import SECOND, Bytes
from tagmem.ports import Emit, Peers
from tagmem.presenter.arrival import capabilities
from tagmem.presenter.contract import Presentation, Value
from tagmem.presenter.house import House, MovingVm
from tagmem.presenter.migrate import (
    TRAVELLER,
    About,
    Arrival,
    Incoming,
    Later,
    Look,
    Move,
    Seen,
    Settled,
    Settlement,
    TargetTag,
    Waiting,
    Wish,
    address,
    judge,
    later,
    seats,
)
from tagmem.presenter.requests import UNLIMITED, Migrate, read

log = logging.getLogger(__name__)

PUT_BACK_NS = 10 * SECOND
STOP_NS = 10 * SECOND
CANCEL_NS = 20 * SECOND
TELL_NS = SECOND // 2
RETRY_SECONDS = 0.1
RETRY_SECONDS_MAX = 5.0
TRIES = 12
"""After a restart, when the way to other hosts may not be there yet: about half a minute."""
_UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")


class Leaving(Value, frozen=True):
    """What is kept of a VM that goes. Key: `move/ID`."""

    id: str
    name: str
    to_host: str
    state: Literal["leaving", "gone", "arrived", "over", "staying"]
    moves: tuple[Move, ...] = ()


class Sent(NamedTuple):
    """What the stream was."""

    transferred_bytes: Bytes
    stopped_ms: int
    """Until QEMU had sent everything."""
    duration_ms: int


class Stayed(Conflict):
    """The VM runs here as before."""


class Departures:
    """VMs that go to other hosts."""

    def __init__(self, house: House, peers: Peers) -> None:
        self._house = house
        self._peers = peers
        self._leaving: dict[str, Leaving] = {}
        """By id: one that is over is kept until the target has been told to forget it."""
        self._cancelled: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- what is kept

    async def _keep(self, leaving: Leaving) -> Leaving:
        self._leaving[leaving.id] = leaving
        await self._house.keep(f"move/{leaving.id}", leaving)
        return leaving

    async def _forget(self, leaving: Leaving) -> None:
        await self._house.keep(f"move/{leaving.id}", None)
        self._leaving.pop(leaving.id, None)
        self._cancelled.discard(leaving.id)

    def _under_way(self, name: str) -> Leaving | None:
        """The migration that a VM is in."""
        moving = (one for one in self._leaving.values() if one.state != "over")
        return next((one for one in moving if one.name == name), None)

    async def restore(self, kept: Mapping[str, str]) -> None:
        """Take up what was under way; the VMs have been found again before."""
        for key, document in kept.items():
            if key.startswith("move/"):
                leaving = msgspec.json.decode(document, type=Leaving)
                self._leaving[leaving.id] = leaving
                if leaving.state != "over":
                    await self._busy(leaving.name, _reason(leaving))
                self._begin(leaving)

    def _begin(self, leaving: Leaving) -> None:
        task = asyncio.get_running_loop().create_task(self._take_up(leaving))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_up(self, leaving: Leaving) -> None:
        wait = RETRY_SECONDS
        while True:
            try:
                await self._go_on(self._leaving.get(leaving.id, leaving))
            except Stayed as error:
                log.warning("%s", error)
            except TagmemError as error:
                log.warning("migration of VM %s: %s", leaving.name, error)
                if leaving.id in self._leaving:
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, RETRY_SECONDS_MAX)
                    continue
            return

    async def _go_on(self, leaving: Leaving) -> None:
        if leaving.state == "leaving":
            leaving = await self._found(leaving)
        if leaving.state == "staying":
            await self._return(leaving, tries=TRIES)
            return
        if leaving.state == "gone":
            leaving = await self._hand_over(leaving, _silent)
        await self._finish(leaving)
        await self._told_to_forget(leaving)

    async def _found(self, leaving: Leaving) -> Leaving:
        """What QEMU says became of it while nobody watched. Raises Stayed."""
        try:
            vm = self._house.vm(leaving.name)
            status = (await vm.execute("query-migrate", {})).get("status")
        except NotFound:
            status = "its QEMU has ended"
        if status == "completed":
            return await self._keep(msgspec.structs.replace(leaving, state="gone"))
        log.warning("VM %s stays: its migration was interrupted", leaving.name)
        return msgspec.structs.replace(leaving, state="staying")

    def close(self) -> None:
        """Watch nothing any more; what is under way is on record."""
        for task in self._tasks:
            task.cancel()

    # ---- a whole migration

    async def migrate(self, ask: Migrate, emit: Emit) -> dict[str, Any]:
        """Move a VM. Raises Conflict, Unsupported, … with the VM running here as before, and says
        so; OutcomeUnknown where it does not.
        """
        name = ask.name
        parse_name(ask.to_host, "to_host")
        build, vm = self._house.build(name), self._house.vm(name)
        already = self._under_way(name)
        if already is not None:
            raise Conflict(f"{_reason(already)} already")
        leaving = Leaving(str(uuid4()), name, ask.to_host, "leaving")
        self._leaving[leaving.id] = leaving
        try:
            await self._house.occupy(name, _reason(leaving))
            moves = await self._judge(ask, vm)
        except TagmemError:
            self._leaving.pop(leaving.id)
            await self._busy(name, "")
            raise
        emit({"phase": "judged", "moves": msgspec.to_builtins(moves)})
        leaving = await self._keep(msgspec.structs.replace(leaving, moves=moves))
        try:
            await self._make_way(ask, leaving, emit)
            incoming = Incoming(
                leaving.id,
                name,
                self._house.site.boot_id,
                build,
                seats(self._house.shown(name), await vm.execute("query-memory-devices", {}), moves),
                later(moves, back=ask.back),
                ask.deadline_ns + CANCEL_NS,
            )
            target = await self._prepare(leaving, vm, incoming)
            sent = await self._stream(ask, leaving, vm, target, emit)
        except TagmemError as error:
            try:
                await self._return(leaving, error)
            except OutcomeUnknown:
                self._begin(leaving)
                raise
            raise Stayed(f"VM {name} stays on this host: {error}") from error
        begun = asyncio.get_running_loop().time()
        leaving = await self._keep(msgspec.structs.replace(leaving, state="gone"))
        leaving = await self._hand_over(leaving, emit)
        waited_ms = int((asyncio.get_running_loop().time() - begun) * 1000)
        emit({"phase": "arrived", "downtime_ms": sent.stopped_ms + waited_ms})
        settled = await self._finish(leaving)
        try:
            await self._told_to_forget(leaving)
        except TagmemError as error:
            log.info("host %s keeps migration %s: %s", leaving.to_host, leaving.id, error)
            self._begin(self._leaving[leaving.id])
        return {
            "name": name,
            "to_host": ask.to_host,
            "downtime_ms": sent.stopped_ms + waited_ms,
            "duration_ms": sent.duration_ms,
            "transferred_bytes": sent.transferred_bytes,
            "tags": [_told(move, settled) for move in moves],
        }

    async def look(self, ask: Migrate) -> dict[str, Any]:
        """What `migrate` would do, were the tags that the target lacks attached there as they are
        here; and which those are. Nothing is changed. Raises Conflict, Unsupported, ….
        """
        parse_name(ask.to_host, "to_host")
        self._house.build(ask.name)
        moves, missing = await self._judged(ask, self._house.vm(ask.name), attached=True)
        return {"moves": msgspec.to_builtins(moves), "missing": missing}

    def cancel(self, name: str) -> dict[str, Any]:
        """Ask a migration to end; `migrate` itself tells how it ended. Raises Conflict."""
        leaving = self._under_way(name)
        if leaving is None:
            raise Conflict(f"VM {name} is not moving")
        if leaving.state != "leaving":
            raise Conflict(f"VM {name} has been handed over to host {leaving.to_host}")
        self._cancelled.add(leaving.id)
        return {"name": name, "state": "cancelling"}

    async def _judge(self, ask: Migrate, vm: MovingVm) -> tuple[Move, ...]:
        return (await self._judged(ask, vm))[0]

    async def _judged(
        self, ask: Migrate, vm: MovingVm, *, attached: bool = False
    ) -> tuple[tuple[Move, ...], list[str]]:
        """The moves, and the tags that the target lacks; as though it had them if `attached`."""
        facts = await vm.facts()
        if facts.state != "running":
            raise Conflict(f"VM {ask.name} must be running, and is {facts.state}")
        shown = self._house.shown(ask.name)
        look = Look(ask.name, self._house.site.boot_id, tuple(one.tagged.tag for one in shown))
        seen = read(await self._call(ask.to_host, "look", look), Seen)
        if seen.refusal:
            raise Conflict(f"host {ask.to_host}: {seen.refusal}")
        there = {tag.tag: tag for tag in seen.tags}
        missing = [one.tagged for one in shown if one.tagged.tag not in there]
        if attached:
            there |= {
                t.tag: TargetTag(t.tag, t.size_bytes, len(t.pieces), t.head_room_bytes, t.read_only)
                for t in missing
            }
        wish = Wish(ask.form, ask.back)
        moves = judge(shown, there, self._house.ways, facts, wish, ask.to_host)
        return moves, [tagged.tag for tagged in missing]

    async def _make_way(self, ask: Migrate, leaving: Leaving, emit: Emit) -> None:
        """Take out what cannot travel, and let another take its place where one can."""
        for move in leaving.moves:
            if move.form == "stays":
                continue
            self._not_cancelled(leaving)
            emit({"phase": move.form, "tag": move.tag})
            shown = self._shown(ask.name, move.tag)
            if shown is not None:
                gone = await self._house.take(shown, ask.ask_ns, ask.force)
                if not gone.done:
                    raise Conflict(f"tag {move.tag}: {gone.reason}")
            if move.form == "switch":
                await self._house.attach(ask.name, Later(move.tag, TRAVELLER))

    async def _prepare(self, leaving: Leaving, vm: MovingVm, incoming: Incoming) -> dict[str, Any]:
        """Have the target wait; where the stream goes."""
        self._not_cancelled(leaving)
        waiting = read(await self._call(leaving.to_host, "incoming", incoming), Waiting)
        facts = await vm.facts()
        for word, here, there in (
            ("machine", facts.machine, waiting.machine),
            ("accelerator", facts.accel, waiting.accel),
        ):
            if here != there:
                text = f"its {word} is {here}, and host {leaving.to_host} has {there}"
                raise Unsupported(text)
        return address(waiting, leaving.name)

    async def _stream(
        self, ask: Migrate, leaving: Leaving, vm: MovingVm, target: Mapping[str, Any], emit: Emit
    ) -> Sent:
        """Until QEMU has sent everything. Raises Conflict for a stream that failed."""
        limits = {
            "max-bandwidth": ask.bandwidth_bytes or UNLIMITED,
            "downtime-limit": ask.downtime_ms,
        }
        await vm.execute("migrate-set-capabilities", capabilities())
        await vm.execute("migrate-set-parameters", limits)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        channels = [{"channel-type": "main", "addr": target}]
        await vm.execute("migrate", {"channels": channels})
        told_at, switching = 0.0, False
        while True:
            told = await vm.execute("query-migrate", {})
            status, ram = told.get("status"), told.get("ram", {})
            if status == "completed":
                return _sent(told, begun, loop.time())
            if status in ("failed", "cancelled"):
                raise Conflict(f"the stream {status}: {told.get('error-desc', 'no reason given')}")
            self._not_cancelled(leaving)
            if loop.time() - begun > ask.deadline_ns / SECOND:
                left = ram.get("remaining", 0)
                raise Conflict(f"{left} bytes were left after {ask.deadline_ns // SECOND} s")
            if status == "pre-switchover" and not switching:
                # The guest stands, and its devices have stopped: nothing of it writes any more.
                # Said once: QEMU tells the same state for a moment longer, and refuses a second.
                switching = True
                emit({"phase": "switchover"})
                await vm.execute("migrate-continue", {"state": "pre-switchover"})
                continue
            if status == "active" and loop.time() - told_at > TELL_NS / SECOND:
                told_at = loop.time()
                progress = {key: ram.get(key, 0) for key in ("transferred", "remaining", "total")}
                named = {f"{key}_bytes": value for key, value in progress.items()}
                emit({"phase": "copying", **named})
            await vm.news(SECOND // 20)

    # ---- the handover

    async def _hand_over(self, leaving: Leaving, emit: Emit) -> Leaving:
        """Have the target let it run. Only its own word ends this: arrived, or given up (then it
        runs here again, and Stayed is raised).
        """
        about, wait = About(leaving.id), RETRY_SECONDS
        while True:
            try:
                answer = read(await self._call(leaving.to_host, "arrived", about), Arrival)
            except TagmemError as error:
                log.warning("VM %s, handed over to %s: %s", leaving.name, leaving.to_host, error)
                emit({"phase": "waiting", "reason": str(error)})
                await asyncio.sleep(wait)
                wait = min(2 * wait, RETRY_SECONDS_MAX)
                continue
            break
        if answer.state == "abandoned":
            await self._return(leaving)
            raise Stayed(f"VM {leaving.name} stays on this host: {answer.reason}")
        return await self._keep(msgspec.structs.replace(leaving, state="arrived"))

    async def _finish(self, leaving: Leaving) -> dict[str, Settled]:
        """The source's QEMU ends, the target attaches what could not travel."""
        if leaving.state == "arrived":
            try:
                vm = self._house.vm(leaving.name)
            except NotFound:
                pass
            else:
                await vm.stop(STOP_NS)
            await self._house.ended(leaving.name)
            leaving = await self._keep(msgspec.structs.replace(leaving, state="over"))
        settled: dict[str, Settled] = {}
        about = About(leaving.id)
        try:
            if any(move.form != "stays" for move in leaving.moves):
                answer = await self._call(leaving.to_host, "settle", about)
                settled = {one.tag: one for one in read(answer, Settlement).tags}
        except TagmemError as error:
            reason = str(error)[:4096]
            settled = {move.tag: Settled(move.tag, "", reason) for move in leaving.moves}
        return settled

    async def _told_to_forget(self, leaving: Leaving) -> None:
        """The last word: afterwards neither side knows of it. Raises TagmemError."""
        await self._call(leaving.to_host, "forget", About(leaving.id))
        await self._forget(leaving)

    # ---- the way back

    async def _return(
        self, leaving: Leaving, cause: TagmemError | None = None, *, tries: int = 1
    ) -> None:
        """The VM runs here as before, and nothing is left on the target.

        Raises OutcomeUnknown where that cannot be said (it stays on record then), Stayed where a
        tag is in another way than before, Conflict for a VM that has ended meanwhile.
        """
        try:
            vm = self._house.vm(leaving.name)
        except NotFound:
            vm = None
        if vm is not None and not vm.gone:
            await self._stop_stream(vm)
        leaving = await self._keep(msgspec.structs.replace(leaving, state="staying"))
        left: list[str] = []
        if vm is not None and not vm.gone:
            if (await vm.execute("query-status", {})).get("status") != "running":
                await vm.execute("cont", {})
            left = await self._put_back(leaving)
        await self._abandon(leaving, tries)
        await self._forget(leaving)
        await self._busy(leaving.name, "")
        if vm is None or vm.gone:
            raise Conflict(f"VM {leaving.name} ended during its migration: {cause or 'no reason'}")
        if left:
            text = f"{cause}; " if cause else ""
            raise Stayed(f"{text}VM {leaving.name} runs on here, but {'; '.join(left)}")

    async def _stop_stream(self, vm: MovingVm) -> None:
        status = (await vm.execute("query-migrate", {})).get("status")
        if status not in _UNDER_WAY:
            return
        await vm.execute("migrate_cancel", {})
        loop = asyncio.get_running_loop()
        end = loop.time() + CANCEL_NS / SECOND
        while status in _UNDER_WAY:
            if loop.time() > end:
                raise OutcomeUnknown(f"VM {vm.name}: its migration does not end: {status}")
            await vm.news(SECOND // 20)
            status = (await vm.execute("query-migrate", {})).get("status")

    async def _abandon(self, leaving: Leaving, tries: int) -> None:
        wait = RETRY_SECONDS
        for left in reversed(range(tries)):
            try:
                await self._call(leaving.to_host, "abandon", About(leaving.id))
            except TagmemError as error:
                # It does not run there, and ends by itself after its deadline.
                log.warning("host %s was not told to give up: %s", leaving.to_host, error)
                if left:
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, RETRY_SECONDS_MAX)
                continue
            return

    async def _put_back(self, leaving: Leaving) -> list[str]:
        """Every tag presented as it was; what could not be."""
        left = []
        for move in leaving.moves:
            shown = self._shown(leaving.name, move.tag)
            if shown is not None and shown.presenter == move.presenter:
                continue
            try:
                if shown is not None:
                    gone = await self._house.take(shown, PUT_BACK_NS, False)
                    if not gone.done:
                        left.append(f"tag {move.tag} is {shown.presenter} still: {gone.reason}")
                        continue
                todo = Later(move.tag, move.presenter, overwrite=not move.loaded)
                await self._house.attach(leaving.name, todo)
            except TagmemError as error:
                left.append(f"tag {move.tag} is not in it: {error}")
        return left

    # ---- small things

    def _not_cancelled(self, leaving: Leaving) -> None:
        if leaving.id in self._cancelled:
            raise Conflict("it was cancelled")

    def _shown(self, name: str, tag: str) -> Presentation | None:
        return next((one for one in self._house.shown(name) if one.tagged.tag == tag), None)

    async def _busy(self, name: str, why: str) -> None:
        try:
            await self._house.occupy(name, why)
        except NotFound:
            log.info("VM %s has ended", name)

    async def _call(self, host: str, verb: str, body: Value) -> Mapping[str, Any]:
        request: dict[str, Any] = msgspec.to_builtins(body)
        return await self._peers.call(host, {"vm": verb, **request})


def _silent(_: Mapping[str, Any]) -> None:
    """Nobody listens after a restart."""


def _reason(leaving: Leaving) -> str:
    return f"VM {leaving.name} is moving to host {leaving.to_host}"


def _sent(told: Mapping[str, Any], begun: float, now: float) -> Sent:
    """With what passed since QEMU sent the last of it and we heard so."""
    total, stopped = int(told.get("total-time", 0)), int(told.get("downtime", 0))
    late = max(0, int((now - begun) * 1000) - total)
    return Sent(int(told.get("ram", {}).get("transferred", 0)), stopped + late, total)


def _told(move: Move, settled: Mapping[str, Settled]) -> dict[str, Any]:
    """How one tag fared."""
    told: dict[str, Any] = {"tag": move.tag, "form": move.form, "why": move.why}
    end = settled.get(move.tag)
    if end is not None and move.form != "stays":
        return told | {"as": end.presenter, "reason": end.reason}
    return told | {"as": move.travels_as, "reason": "" if move.attach else move.why}
