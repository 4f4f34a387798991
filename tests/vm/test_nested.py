"""One level down: a tag in a VM is presented to a VM inside it, and leaves from the inside out.

The outer guest boots once; each test boots an inner one in it. The outer one's KVM, which emulated
processors have too, is what makes that a matter of seconds.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from tests.vm.world import WAYS, World, booted

from tagmem.base.units import MIB, SECOND
from tagmem.lab import nested
from tagmem.lab.boot import Lab
from tagmem.lab.spec import GuestSpec
from tagmem.presenter.contract import Detached, Presentation, Tagged
from tagmem.wire import guest as wire

SIZE = 16 * MIB
BOOT_SECONDS = 300.0
DETACH_NS = 60 * SECOND
REFUSED_NS = 5 * SECOND
PATTERN = b"written two machines down"
FROM_HERE = b"from the appliance"
DRIVERS = ("virtio_pmem", "nd_pmem", "device_dax", "dax_pmem")
APPEND = "console=ttyS0 quiet audit=0 nokaslr no_timer_check cryptomgr.notests tagmem.modules=nfit"
INNERMOST = f"""
import mmap, os, signal
path, size = os.environ["TAGMEM_DAX"], int(os.environ["TAGMEM_SIZE"])
memory = mmap.mmap(os.open(path, os.O_RDWR), size)
memory[:{len(PATTERN)}] = {PATTERN!r}
print(os.path.realpath(path), memory[4096:4096 + {len(FROM_HERE)}].decode(), flush=True)
signal.pause()  # it keeps the tag until it is ended
"""


class Inner:
    """An inner host that runs in the outer guest, and what it tells."""

    def __init__(self, world: World, tag: str, *, on_the_tag: bool) -> None:
        channel = world.vm.guest
        assert channel is not None
        words = ["python3", "-m", "tagmem.presenter.within", tag]
        words += ["--qemu", f"/{nested.START}", "--append", APPEND, "--memory", "320"]
        words += ["--kernel", f"/{nested.KERNEL}", "--initrd", f"/{nested.INITRD}"]
        words += ["--timeout", "30", "--", "python3", "-c", INNERMOST]
        command = wire.Exec(0, tuple(words), tag=tag if on_the_tag else "")
        self.pid = 0
        self.heard: list[dict[str, Any]] = []
        self.errors = ""
        self.running = asyncio.ensure_future(channel.stream(command, self._said, None))
        self._news = asyncio.Event()
        self._text = ""
        self.running.add_done_callback(lambda _: self._news.set())

    def _said(self, answer: wire.Answer) -> None:
        if isinstance(answer, wire.Started):
            self.pid = answer.pid
        elif isinstance(answer, wire.Output) and answer.stream == 2:
            self.errors += answer.data.decode()
        elif isinstance(answer, wire.Output):
            *lines, self._text = (self._text + answer.data.decode()).split("\n")
            self.heard += [json.loads(line) for line in lines]
            self._news.set()

    async def told(self, name: str) -> dict[str, Any]:
        """The event of that name, waited for."""
        while True:
            for event in self.heard:
                if event["event"] == name:
                    return event
            assert not self.running.done(), (self.running.result(), self.heard, self.errors)
            self._news.clear()
            await self._news.wait()

    async def ended_well(self) -> bool:
        """Whether it has ended its application, taken its tag back, by asking alone, and ended."""
        ran, taken = await self.told("ran"), await self.told("taken")
        ended = await self.running
        assert isinstance(ended, wire.Exited)
        assert ended.code == 0, (self.heard, self.errors)
        return (ran["code"], taken["done"], taken["rung"]) == (128 + signal.SIGTERM, True, "unplug")


@pytest.fixture(scope="module")
def world(lab: Lab) -> Iterator[World]:
    spec = GuestSpec(
        name="outer", memory_bytes=1024 * MIB, root_ports=1, modules=DRIVERS, nested=True
    )
    with booted(spec) as world:
        yield world


@pytest.fixture
def tagged(world: World) -> Iterator[Tagged]:
    """A tag that the outer guest has, with something in it."""
    tagged = world.make(SIZE)
    world.write(tagged, 4096, FROM_HERE)
    yield tagged
    world.tidy()


async def presented(world: World, tagged: Tagged, *, on_the_tag: bool) -> Inner:
    """A VM in the outer guest whose application has the tag, and wrote to it."""
    inner = Inner(world, tagged.tag, on_the_tag=on_the_tag)
    async with asyncio.timeout(BOOT_SECONDS):
        output = await inner.told("output")
    shown = await inner.told("presented")
    assert ((await inner.told("started"))["accel"], shown["as"]) == ("kvm", "ivshmem")
    assert output["text"].split(maxsplit=1) == [shown["path"], f"{FROM_HERE.decode()}\n"]
    assert world.read(tagged, 0, len(PATTERN)) == PATTERN
    return inner


async def taken(world: World, shown: Presentation, deadline_ns: int = DETACH_NS) -> Detached:
    return await WAYS["vhost-pmem"].detach(shown, world.vm, deadline_ns=deadline_ns)


def test_taken_from_the_outer_vm_it_leaves_the_inner_one_first(
    world: World, tagged: Tagged
) -> None:
    shown = world.attach("vhost-pmem", tagged)

    async def whole() -> None:
        inner = await presented(world, tagged, on_the_tag=True)
        ended = await taken(world, shown)
        assert (ended.done, ended.rung) == (True, "unplug"), (ended, inner.heard)
        assert await inner.ended_well(), inner.heard
        assert await world.vm.holds([tagged.pieces[0].path]) == ()

    world.run(whole())


def test_the_outer_vm_does_not_give_back_what_the_inner_one_has(
    world: World, tagged: Tagged
) -> None:
    """The agent there was not told what the inner host is for, so it asks nobody, and refuses."""
    shown = world.attach("vhost-pmem", tagged)

    async def whole() -> None:
        inner = await presented(world, tagged, on_the_tag=False)
        emulator = (await inner.told("started"))["pid"]
        refused = await taken(world, shown, REFUSED_NS)
        assert not refused.done
        assert [holder.pid for holder in refused.holders] == [emulator], refused
        assert world.read(tagged, 0, len(PATTERN)) == PATTERN
        await world._python("import os, sys; os.kill(int(sys.argv[1]), 15)", [str(inner.pid)])
        assert await inner.ended_well(), inner.heard
        ended = await taken(world, shown)
        assert (ended.done, ended.rung) == (True, "unplug"), (ended, inner.heard)
        assert await world.vm.holds([tagged.pieces[0].path]) == ()

    world.run(whole())


def test_the_host_takes_it_by_force_past_both(world: World, tagged: Tagged) -> None:
    """An inner host that was killed leaves a VM that keeps the tag, and that nobody asks. The
    guarantee of the host's presenter does not need them.
    """
    shown = world.attach("vhost-pmem", tagged)

    async def left_behind() -> None:
        inner = await presented(world, tagged, on_the_tag=True)
        emulator = (await inner.told("started"))["pid"]
        await world._python("import os, sys; os.kill(int(sys.argv[1]), 9)", [str(inner.pid)])
        await inner.running
        refused = await taken(world, shown, REFUSED_NS)
        assert not refused.done
        assert [holder.pid for holder in refused.holders] == [emulator], refused

    world.run(left_behind())
    with world.without_agent():
        ended = world.detach(shown, force=True)
    assert (ended.done, ended.rung) == (True, "revoke"), ended
    assert world.run(world.vm.holds([tagged.pieces[0].path])) == ()
    assert world.read(tagged, 0, len(PATTERN)) == PATTERN
    world.run(world.answering())
