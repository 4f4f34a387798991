"""VMs that move between two hosts' hypervisors, with an application writing in the guest.

One guest is booted and moved to and fro by most tests: what is left on either side by one would be
seen by the next.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tests.vm.hosts import COUNT, RAM_BYTES, SIZE, Host, Pair, pair
from tests.vm.waiting import until

from tagmem.base.errors import Conflict, NotFound, OutcomeUnknown, Unsupported
from tagmem.base.units import GIB, MIB, SECOND
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.migrate import forms

WAYS = all_presenters()
SWITCHED = [name for name, way in WAYS.items() if forms(way.describe()).switch is None]
LARGE = 1 * GIB
"""Of a tag that would be seen in the stream if it were in it: larger than the guest's RAM."""


class Moving:
    """The VM, wherever it is."""

    def __init__(self, world: Pair, name: str) -> None:
        self.world = world
        self.name = name
        self.at, self.other = world.hosts["w1"], world.hosts["w2"]

    def run(self, coroutine: Any) -> Any:
        return self.world.run(coroutine)

    async def start(self, qemu: str) -> None:
        await self.at.ask(
            "start",
            name=self.name,
            memory_bytes=RAM_BYTES,
            qemu=qemu,
            nvdimm=True,
            append="memhp_default_state=online_movable",
        )

    async def attach(self, tag: str, way: str, **more: Any) -> Mapping[str, Any]:
        return await self.at.ask("attach", name=self.name, tag=tag, way=way, **more)

    async def move(self, **wish: Any) -> Mapping[str, Any]:
        told = await self.at.ask("migrate", name=self.name, to_host=self.other.name, **wish)
        self.at, self.other = self.other, self.at
        return told

    async def running(self, host: Host) -> dict[str, Any]:
        vm = (await host.vms())[self.name]
        assert vm["state"] == "running", vm
        return vm

    async def only_here(self) -> None:
        """It runs at `at`; nothing of it is at the other host, and nothing is under way."""
        await self.running(self.at)
        assert self.name not in await self.other.vms()
        for host in (self.at, self.other):
            assert not under_way(host)
        assert not [key for key in self.other.kept if key.startswith("tag/")]
        await self.at.python(self.name, "pass")

    async def clear(self) -> None:
        """Every tag out of the VM."""
        for shown in (await self.at.vms())[self.name]["tags"]:
            body = {"name": self.name, "tag": shown["tag"], "force": True}
            await self.at.ask("detach", **body)


@pytest.fixture(scope="module")
def world() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.fixture(scope="module")
def booted(world: Pair) -> Moving:
    vm = Moving(world, "db1")
    world.run(vm.start("11.1"))
    return vm


@pytest.fixture
def vm(booted: Moving) -> Iterator[Moving]:
    for host in (booted.at, booted.other):
        host.told.clear()
    yield booted
    booted.world.before = booted.world.after = None
    booted.run(booted.only_here())
    booted.run(booted.clear())


def under_way(host: Host) -> list[str]:
    return [key for key in host.kept if key.startswith(("move/", "arrival/"))]


async def counted(vm: Moving, tag: str, path: str, size: int = SIZE) -> int:
    """An application in the guest counts in the tag; its process."""
    pid = int(await vm.at.python(vm.name, COUNT, path, size))
    await vm.world.counts(tag)
    return pid


# ---- (b): it stays


def test_a_tag_stays_and_its_application_never_loses_its_mapping(vm: Moving) -> None:
    world = vm.world
    tag = world.tag("w1", "w2", size=LARGE)
    world.write(tag, LARGE - 64, b"the last bytes of the tag")

    async def go() -> Mapping[str, Any]:
        shown = await vm.attach(tag, "pmem")
        pid = await counted(vm, tag, shown["guest_path"], LARGE)
        before = world.count(tag)
        source = vm.at
        told = await vm.move()
        assert world.count(tag) >= before, "what was counted is never taken back"
        await world.counts(tag)
        assert source.phases()[-2:] == ["switchover", "arrived"]
        comm = f"print(open('/proc/{pid}/comm').read())"
        assert await vm.at.python(vm.name, comm) == "python3", "the same process, not restarted"
        await vm.only_here()
        return told

    told = vm.run(go())
    assert told["tags"][0]["form"] == "stays"
    assert 0 < told["transferred_bytes"] < RAM_BYTES < LARGE, "RAM is copied and the tag is not"
    assert 0 < told["downtime_ms"] < 20_000
    assert world.read(tag, LARGE - 64, 25) == b"the last bytes of the tag"


# ---- (b): another takes its place


@pytest.mark.parametrize("way", SWITCHED)
def test_what_blocks_migration_is_switched_and_switched_back(vm: Moving, way: str) -> None:
    world = vm.world
    tag = world.tag("w1", "w2")
    what = WAYS[way].describe()

    async def go() -> Mapping[str, Any]:
        await vm.attach(tag, way)
        world.write(tag, 4096, b"kept")
        told = await vm.move()
        shown = (await vm.running(vm.at))["tags"][0]
        assert shown["as"] == way
        assert shown["guaranteed"] is what.guaranteed, "by the broker of the host where it is now"
        pid = await counted(vm, tag, shown["guest_path"])
        with pytest.raises(Conflict, match=f"process {pid} .* holds it"):
            await vm.at.ask("migrate", name=vm.name, to_host=vm.other.name, ask_ns=2 * SECOND)
        await vm.only_here()
        await world.counts(tag)
        return told

    told = vm.run(go())
    assert told["tags"][0] | {"why": ""} == {
        "tag": tag, "form": "switch", "why": "", "as": way, "reason": "",
    }  # fmt: skip
    assert str(forms(what).stays) in told["tags"][0]["why"]
    assert world.read(tag, 4096, 4) == b"kept"


def test_it_may_keep_what_took_its_place(vm: Moving) -> None:
    tag = vm.world.tag("w1", "w2")

    async def go() -> None:
        await vm.attach(tag, "vhost-pmem")
        told = await vm.move(back=False)
        assert told["tags"][0]["as"] == "pmem"
        shown = (await vm.running(vm.at))["tags"][0]
        assert shown["as"] == "pmem"
        await counted(vm, tag, shown["guest_path"])

    vm.run(go())


# ---- (a): remove all


def test_all_is_removed_and_attached_again(vm: Moving) -> None:
    world = vm.world
    both, here = world.tag("w1", "w2"), world.tag(vm.at.name)

    async def go() -> Mapping[str, Any]:
        await vm.attach(both, "vhost-pmem")
        await vm.attach(here, "ivshmem")
        with pytest.raises(Unsupported, match=f"host {vm.other.name} does not have it"):
            await vm.at.ask("migrate", name=vm.name, to_host=vm.other.name)
        await vm.only_here()
        told = await vm.move(form="remove-all")
        tags = (await vm.running(vm.at))["tags"]
        assert [(shown["tag"], shown["as"]) for shown in tags] == [(both, "vhost-pmem")]
        # Whoever moves the capacity attaches what the target's host did not have.
        vm.at.have(here, SIZE)
        await vm.attach(here, "ivshmem")
        return told

    told = vm.run(go())
    ends = {one["tag"]: (one["form"], one["as"]) for one in told["tags"]}
    assert ends == {both: ("remove-all", "vhost-pmem"), here: ("remove-all", "")}


# ---- the table, held to


@pytest.mark.parametrize("way", SWITCHED)
def test_what_is_said_not_to_migrate_does_not(vm: Moving, way: str) -> None:
    """Asked to stay, it is refused before anything is done, with the reason of the table."""
    tag = vm.world.tag("w1", "w2")
    reason = forms(WAYS[way].describe()).stays
    assert reason is not None

    async def go() -> None:
        await vm.attach(tag, way)
        with pytest.raises(Unsupported, match=reason):
            await vm.at.ask("migrate", name=vm.name, to_host=vm.other.name, form="stays")
        assert vm.at.phases() == []

    vm.run(go())


@pytest.mark.parametrize("way", ["dimm", "virtio-mem"])
def test_ram_from_a_tag_travels_too(vm: Moving, way: str) -> None:
    tag = vm.world.tag("w1", "w2", size=256 * MIB)

    async def go() -> None:
        await vm.attach(tag, way, overwrite=True, need={"ram": True})
        told = await vm.move()
        assert (told["tags"][0]["form"], told["tags"][0]["as"]) == ("stays", way)
        assert told["transferred_bytes"] < RAM_BYTES

    vm.run(go())


# ---- what goes wrong leaves the source whole


async def kill(host: Host, name: str) -> None:
    os.kill((await host.vms())[name]["pid"], signal.SIGKILL)


def test_a_target_that_dies_in_the_middle_leaves_the_source_whole(vm: Moving) -> None:
    world = vm.world
    tag = world.tag("w1", "w2")

    async def go() -> None:
        shown = await vm.attach(tag, "pmem")
        pid = await counted(vm, tag, shown["guest_path"])
        body = {"name": vm.name, "to_host": vm.other.name, "bandwidth_bytes": 8 * MIB}
        moving = asyncio.create_task(vm.at.ask("migrate", **body))
        await until(lambda: "copying" in vm.at.phases())
        with pytest.raises(Conflict, match="is moving to host"):
            await vm.at.ask("detach", name=vm.name, tag=tag)
        assert "is moving to host" in await vm.at.hypervisor.release(tag, SECOND, may_stop_vm=False)
        await kill(vm.other, vm.name)
        with pytest.raises(Conflict, match="stays on this host"):
            await moving
        await world.counts(tag)
        await vm.only_here()
        assert str(pid) in await vm.at.python(vm.name, "import os; print(os.listdir('/proc'))")

    vm.run(go())


def test_a_cancelled_migration_gives_back_what_was_switched(vm: Moving) -> None:
    tag = vm.world.tag("w1", "w2")

    async def go() -> None:
        await vm.attach(tag, "vhost-pmem")
        body = {"name": vm.name, "to_host": vm.other.name, "bandwidth_bytes": 8 * MIB}
        moving = asyncio.create_task(vm.at.ask("migrate", **body))
        await until(lambda: "copying" in vm.at.phases())
        await vm.at.ask("migrate-cancel", name=vm.name)
        with pytest.raises(Conflict, match="it was cancelled"):
            await moving
        shown = (await vm.running(vm.at))["tags"][0]
        assert (shown["as"], shown["guaranteed"]) == ("vhost-pmem", True)
        with pytest.raises(Conflict, match="is not moving"):
            await vm.at.ask("migrate-cancel", name=vm.name)

    vm.run(go())


def test_a_stream_that_does_not_end_is_given_up(vm: Moving) -> None:
    async def go() -> None:
        with pytest.raises(Conflict, match="bytes were left after 1 s"):
            await vm.at.ask(
                "migrate",
                name=vm.name,
                to_host=vm.other.name,
                bandwidth_bytes=8 * MIB,
                deadline_ns=SECOND,
            )

    vm.run(go())


def test_a_refusal_is_heard_before_anything_is_done(vm: Moving) -> None:
    tag = vm.world.tag("w1", "w2")

    async def go() -> None:
        await vm.attach(tag, "pmem")
        with pytest.raises(NotFound, match="no host w9"):
            await vm.at.ask("migrate", name=vm.name, to_host="w9")
        directory = vm.other.run / "db2"
        del vm.other.tags[tag]
        with pytest.raises(Unsupported, match="attach it there first"):
            await vm.at.ask("migrate", name=vm.name, to_host=vm.other.name)
        assert vm.at.phases() == []
        assert not directory.exists()

    vm.run(go())


# ---- crash points


def test_an_agent_that_is_killed_while_it_streams_takes_its_vm_back(vm: Moving) -> None:
    world = vm.world
    tag = world.tag("w1", "w2")

    async def go() -> None:
        shown = await vm.attach(tag, "pmem")
        await counted(vm, tag, shown["guest_path"])
        body = {"name": vm.name, "to_host": vm.other.name, "bandwidth_bytes": 8 * MIB}
        moving = asyncio.create_task(vm.at.ask("migrate", **body))
        await until(lambda: "copying" in vm.at.phases())
        moving.cancel()
        await asyncio.wait([moving])
        await vm.at.restart()
        await until(lambda: not under_way(vm.at))
        await vm.other.gone(vm.name)
        await world.counts(tag)

    vm.run(go())


def test_an_answer_that_is_lost_leaves_one_vm_running_and_no_second(vm: Moving) -> None:
    """The target runs it, and the source's agent is killed before it hears so."""
    world = vm.world
    tag = world.tag("w1", "w2")

    async def lose(host: str, request: Mapping[str, Any]) -> None:
        if request["vm"] == "arrived":
            raise OutcomeUnknown("the answer was lost")

    async def go() -> None:
        shown = await vm.attach(tag, "pmem")
        await counted(vm, tag, shown["guest_path"])
        world.after = lose
        moving = asyncio.create_task(vm.move())
        await until(lambda: "waiting" in vm.at.phases())
        assert (await vm.at.vms())[vm.name]["state"] == "postmigrate", "it does not run twice"
        await vm.running(vm.other)
        moving.cancel()
        await asyncio.wait([moving])
        await vm.at.restart()
        await vm.other.restart()
        world.after = None
        await vm.at.gone(vm.name)
        vm.at, vm.other = vm.other, vm.at
        await until(lambda: not under_way(vm.other))
        await world.counts(tag)

    vm.run(go())


def test_a_target_that_gave_up_is_believed_and_the_source_runs_on(vm: Moving) -> None:
    """QEMU has sent everything, and the target's QEMU dies before it is told to run."""
    world = vm.world
    tag = world.tag("w1", "w2")

    async def die(host: str, request: Mapping[str, Any]) -> None:
        if request["vm"] == "arrived":
            await kill(vm.other, vm.name)
            await vm.other.gone(vm.name)

    async def go() -> None:
        shown = await vm.attach(tag, "pmem")
        await counted(vm, tag, shown["guest_path"])
        world.before = die
        with pytest.raises(Conflict, match="its QEMU has ended"):
            await vm.at.ask("migrate", name=vm.name, to_host=vm.other.name)
        await world.counts(tag)

    vm.run(go())


# ---- other machines, other QEMUs


def test_the_older_qemu_goes_to_another_machine_by_tcp(world: Pair) -> None:
    """Two tags in two ways at once; a host that has no address for that says so."""
    vm = Moving(world, "older")

    async def go() -> None:
        first, second = world.tag("w1", "far"), world.tag("w1", "far")
        await vm.start("10.0")
        shown = await vm.attach(first, "pmem")
        await vm.attach(second, "nvdimm")
        await counted(vm, first, shown["guest_path"])
        with pytest.raises(Conflict, match="no migration_address"):
            await vm.at.ask("migrate", name=vm.name, to_host="closed")
        vm.other = world.hosts["far"]
        told = await vm.move()
        assert [one["form"] for one in told["tags"]] == ["stays", "stays"]
        assert told["transferred_bytes"] < RAM_BYTES
        await world.counts(first)
        await vm.only_here()
        await vm.at.ask("stop", name=vm.name)

    vm.run(go())
