"""Two hosts' halves of a migration on QEMUs that are none, killed at every step they take.

Whatever is lost, whoever dies: in the end the VM runs on one host, it never ran on two, and neither
side remembers anything of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG
from tests.unit.presenter.machines import tagged as described
from tests.vm.waiting import until

from tagmem.base.errors import Conflict, NotFound, OutcomeUnknown, RemoteError, TagmemError
from tagmem.base.units import MIB
from tagmem.presenter import common
from tagmem.presenter.arrival import Arrivals
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import Detached, Piece, Presentation, Tagged, VmFacts
from tagmem.presenter.departure import Departures
from tagmem.presenter.house import House, Site
from tagmem.presenter.migrate import Build, Later
from tagmem.presenter.requests import Migrate

SIZE = 128 * MIB
NAME = "vm1"


def tagged() -> Tagged:
    """A tag whose header may be written: into nothing."""
    return described(SIZE, pieces=(Piece("/dev/null", 2 * MIB, SIZE),))


def presented(way: str) -> Presentation:
    device = common.device_id(TAG)
    return Presentation(tagged(), NAME, way, device, "attached", "tmp1", SIZE + 2 * MIB)


class Killed(BaseException):
    """The agent, by SIGKILL: nothing of it is carried out any more."""


class Qemu:
    """What a migration sees of QEMU; it outlives agents."""

    guest = None
    windows = None

    def __init__(self, world: World, *, waits: bool) -> None:
        self.world = world
        self.name = NAME
        self.state = "inmigrate" if waits else "running"
        self.stream = "none"
        self.gone = self.continued = False
        self.target: Qemu | None = None

    async def facts(self) -> VmFacts:
        return msgspec.structs.replace(ROOMY, name=NAME, state=self.state)

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if self.gone:
            raise OutcomeUnknown(f"VM {NAME} has ended")
        self.world.step()
        match command:
            case "query-migrate":
                if self.stream == "completed" and self.world.silences:
                    self.world.silences -= 1
                    raise OutcomeUnknown("query-migrate was not answered")
                return {"status": self.stream}
            case "query-status":
                return {"status": self.state}
            case "query-memory-devices":
                data = {"id": common.device_id(TAG), "memaddr": 1 << 32}
                return [{"type": "virtio-pmem", "data": data}]
            case "migrate":
                self.stream = "active"
                self.target = next((q for q in self.world.qemus if q.stream == "setup"), None)
            case "migrate-incoming":
                self.stream = "setup"
            case "migrate-continue" if self.continued:
                raise RemoteError("QEMU", 1, "Migration not in expected state: device")
            case "migrate-continue":
                self.continued = True
            case "migrate_cancel":
                self.stream, self.state = "cancelled", "running"
            case "cont":
                self.state = "running"
                self.world.judge()
        self.world.step()
        return {}

    def _sent(self) -> None:
        if self.target is None or self.target.gone:
            self.stream, self.state = "failed", "running"
        else:
            self.stream, self.state = "completed", "postmigrate"
            self.target.stream, self.target.state = "completed", "paused"

    async def news(self, deadline_ns: int) -> None:
        if self.continued and self.stream == "pre-switchover":
            self._sent()  # Not before: it tells the old state for a moment longer.
        if self.stream == "active":
            self.stream, self.state = "pre-switchover", "finish-migrate"
        await asyncio.sleep(0)

    async def deleted(self, device: str, deadline_ns: int) -> bool:
        return True

    async def holds(self, paths: Sequence[str]) -> Sequence[str]:
        return ()

    async def wait_gone(self, deadline_ns: int) -> bool:
        return self.gone

    async def size_of(self, device: str) -> int:
        return 0

    async def lend(self, tag: str, lent: object) -> None:
        raise AssertionError("nothing here has a CXL window")

    async def stop(self, deadline_ns: int) -> None:
        self.world.step()
        self.gone, self.state = True, "gone"
        for host in self.world.hosts.values():
            if host.vms.get(NAME) is self:
                await host.ended(NAME)


class Host:
    """One host, without anything but what a migration asks of it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.vms: dict[str, Qemu] = {}
        self.presentations: dict[str, Presentation] = {}
        self.busy: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        house = House(
            Site("one"), all_presenters(), self.vm, lambda _: Build("11.1", 512 * MIB),
            lambda _: list(self.presentations.values()), self.occupy, self.attach, self.take,
            self.show, self.launch, self.ended, self.vacant, lambda _: tagged(), self.keep,
            Path("/run/vm"),
        )  # fmt: skip
        self.arrivals, self.departures = Arrivals(house), Departures(house, self)

    async def call(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """`ports.Peers`: what is asked may be lost, and what is answered too."""
        self.world.step()
        if self.world.lost(request, before=True):
            raise OutcomeUnknown("the question was lost")
        answer = await self.world.hosts[host].arrivals.serve(self.name, request)
        self.world.step()
        if self.world.lost(request, before=False):
            raise OutcomeUnknown("the answer was lost")
        return answer

    def vm(self, name: str) -> Qemu:
        if name not in self.vms:
            raise NotFound(f"no VM {name}")
        return self.vms[name]

    async def occupy(self, name: str, why: str) -> None:
        self.vm(name)
        self.busy[name] = why

    async def attach(self, name: str, todo: Later) -> Presentation:
        self.vm(name)
        device = common.device_id(TAG)
        made = Presentation(tagged(), name, todo.way, device, "attached", "tmp1", SIZE + 2 * MIB)
        await self.show(made)
        return made

    async def take(self, shown: Presentation, deadline_ns: int, force: bool) -> Detached:
        self.world.step()
        self.presentations.pop(shown.tagged.tag)
        return Detached(done=True, rung="unplug")

    async def show(self, shown: Presentation) -> None:
        self.world.step()
        self.presentations[shown.tagged.tag] = shown

    async def launch(self, name: str, build: Build, words: tuple[str, ...]) -> Qemu:
        self.world.step()
        self.vms[name] = made = Qemu(self.world, waits=True)
        self.world.qemus.append(made)
        return made

    async def ended(self, name: str) -> None:
        self.vms.pop(name, None)
        self.busy.pop(name, None)
        self.presentations.clear()

    def vacant(self, name: str, tags: tuple[str, ...]) -> None:
        if name in self.vms:
            raise Conflict(f"there is a VM {name} already")

    async def keep(self, key: str, value: Any) -> None:
        self.world.step()
        if value is None:
            self.kept.pop(key, None)
        else:
            self.kept[key] = msgspec.json.encode(value).decode()
        self.world.step()


class World:
    """Two hosts; the VM runs on w1 with one tag."""

    def __init__(
        self,
        way: str,
        *,
        kill_at: int = -1,
        losing: tuple[str, bool] = ("", True),
        losses: int = 3,
        silences: int = 0,
    ) -> None:
        self.steps = self.last_step = 0
        self.kill_at = kill_at
        self.losing = losing
        self.losses = losses
        self.silences = silences
        self.qemus: list[Qemu] = []
        self.hosts = {name: Host(self, name) for name in ("w1", "w2")}
        self.here, self.there = self.hosts["w1"], self.hosts["w2"]
        self.here.vms[NAME] = Qemu(self, waits=False)
        self.qemus.append(self.here.vms[NAME])
        self.here.presentations[TAG] = presented(way)

    def step(self) -> None:
        """Something is about to be done, or has been."""
        self.steps += 1
        if self.steps == self.kill_at:
            raise Killed

    def lost(self, request: Mapping[str, Any], *, before: bool) -> bool:
        if self.losing != (request["vm"], before) or not self.losses:
            return False
        self.losses -= 1
        return True

    def judge(self) -> None:
        """At no moment may two of them run."""
        running = [qemu for qemu in self.qemus if qemu.state == "running"]
        assert len(running) <= 1, "the VM runs on both hosts"

    async def migrate(self) -> str:
        """How it ended, by the one who asked."""
        try:
            await self.here.departures.migrate(Migrate(NAME, "w2"), lambda _: None)
        except Killed:
            await self.restart()
            return "killed"
        except TagmemError as error:
            return str(error)
        return "moved"

    async def restart(self) -> None:
        """Both agents were killed: what they kept is all that they know."""
        for host in self.hosts.values():
            host.arrivals.close()
            host.departures.close()
            host.busy.clear()
            host.begin()
        for host in self.hosts.values():
            await host.arrivals.restore(dict(host.kept))
            await host.departures.restore(dict(host.kept))

    async def settled(self) -> None:
        """Nobody is at it any more."""
        await until(lambda: not self.here.kept, 20)
        # A target that was never told gives up by itself; here its time is up at once.
        for record in list(self.there.arrivals.waiting()):
            await self.there.arrivals.give_up(record)

    def check(self, way: str) -> str:
        """Where it is; whole, and nowhere else."""
        running = [name for name, host in self.hosts.items() if NAME in host.vms]
        assert len(running) == 1, f"it is on {running}"
        host = self.hosts[running[0]]
        assert host.vms[NAME].state == "running"
        assert not host.busy.get(NAME)
        assert [one.presenter for one in host.presentations.values()] == [way]
        assert not [key for one in self.hosts.values() for key in one.kept]
        return host.name


async def played(way: str, **how: Any) -> tuple[World, str]:
    world = World(way, **how)
    said = await world.migrate()
    world.kill_at = -1
    world.last_step = world.steps
    await world.settled()
    return world, said


@pytest.mark.parametrize("way", ["pmem", "vhost-pmem"])
def test_it_moves(way: str) -> None:
    world, said = asyncio.run(played(way))
    assert (said, world.check(way)) == ("moved", "w2")


@pytest.mark.parametrize("way", ["pmem", "vhost-pmem"])
def test_agents_killed_at_any_step_leave_one_vm(way: str) -> None:
    whole, _ = asyncio.run(played(way))
    ends = set()
    for step in range(1, whole.last_step + 1):
        world, said = asyncio.run(played(way, kill_at=step))
        assert said == "killed", step
        ends.add(world.check(way))
    assert ends == {"w1", "w2"}, "some kills come before the turning point, some after it"


def test_a_stream_that_was_given_up_never_counts_again() -> None:
    """It had completed, only that was not heard; the target was not told, and then agents die."""
    how: dict[str, Any] = {"losing": ("abandon", True), "losses": 1, "silences": 1}
    whole, said = asyncio.run(played("pmem", **how))
    assert "was not answered" in said
    assert whole.check("pmem") == "w1"
    for step in range(1, whole.last_step + 1):
        world, _ = asyncio.run(played("pmem", kill_at=step, **how))
        world.check("pmem")


@pytest.mark.parametrize("verb", ["look", "incoming", "arrived", "settle", "forget"])
@pytest.mark.parametrize("before", [True, False])
def test_words_that_are_lost_leave_one_vm(verb: str, before: bool) -> None:
    world, said = asyncio.run(played("vhost-pmem", losing=(verb, before)))
    moved = verb not in ("look", "incoming")
    if verb != "settle":
        assert world.check("vhost-pmem") == ("w2" if moved else "w1")
    assert (said == "moved") is moved, said


def test_only_the_source_speaks_of_its_vm() -> None:
    async def go() -> None:
        world = World("pmem", losing=("arrived", True))
        moving = asyncio.create_task(world.migrate())
        await until(lambda: bool(world.there.kept))
        (id_,) = (key.removeprefix("arrival/") for key in world.there.kept)
        for verb in ("arrived", "abandon", "settle", "forget"):
            with pytest.raises((NotFound, Conflict)):
                await world.there.arrivals.serve("w3", {"vm": verb, "id": id_})
        assert await moving == "moved"
        with pytest.raises(Conflict, match="not arrived"):
            await world.there.arrivals.serve("w1", {"vm": "settle", "id": id_})

    asyncio.run(go())
