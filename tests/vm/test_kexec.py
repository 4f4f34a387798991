"""A guest that leaves its kernel for another one: in order, unannounced, and because it crashed.

The kernel that comes next is started by the one before it, with neither firmware nor reset between:
what the devices hold and the bytes that they present stay as they were.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.vm.world import WAYS, World, booted

from tagmem.base.errors import OutcomeUnknown
from tagmem.base.units import MIB, SECOND
from tagmem.lab import image
from tagmem.lab.boot import STARTED, Lab
from tagmem.lab.spec import GuestSpec, kernel_line
from tagmem.presenter.attend import Attendant
from tagmem.presenter.contract import Detached, Presentation
from tagmem.wire import guest as wire

SIZE = 16 * MIB
SECONDS = 120.0
BEFORE, AFTER = b"written before", b"written after!"
LINE = kernel_line(GuestSpec())
CRASH = f"{LINE} nr_cpus=1 reset_devices rootfstype=ramfs"
"""A small memory holds the whole initramfs only where it is not limited to half of it."""
BLIND = "console=ttyS0 panic=0 quiet nr_cpus=1 reset_devices rootfstype=ramfs tagmem.agent=off"
"""As a distribution's, which has no driver of ours and no agent."""

LOAD = """
import subprocess, sys
how, line = sys.argv[1:]
kexec = ["kexec", how, "-s", "--initrd=/boot/initrd", f"--command-line={line}", "/boot/vmlinuz"]
subprocess.run(kexec, check=True)
"""
# In a session of its own: what the agent started, it ends with itself.
APART = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
for fd in 0, 1, 2:
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
os.execvp("sh", ["sh", "-c", sys.argv[1]])
"""
VMCORE = """
import json, struct
with open("/proc/vmcore", "rb") as file:
    head = file.read(64)
    file.seek(struct.unpack_from("<Q", head, 32)[0])
    found = [struct.unpack("<IIQQQQQQ", file.read(56))
             for _ in range(struct.unpack_from("<H", head, 56)[0])]
print(json.dumps([[at, at + size] for kind, _, _, _, at, _, size, _ in found if kind == 1]))
"""
CRASH_NOW = "open('/proc/sysrq-trigger', 'w').write('c')"


@pytest.fixture(scope="module")
def module_world(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = lab.image()
    inner = image.initrd(made, tmp_path_factory.mktemp("inner"))
    spec = GuestSpec(
        name="kexec",
        memory_bytes=1024 * MIB,
        cpus=1,
        root_ports=3,
        kernel_arguments=("crashkernel=320M",),
        files={"boot/vmlinuz": made.kernel.read_bytes(), "boot/initrd": inner.read_bytes()},
    )
    with booted(spec) as world:
        yield world


@pytest.fixture
def world(module_world: World) -> Iterator[World]:
    """The first kernel, from QEMU, with nothing in it; a kernel from the image has no /boot."""
    if module_world.guest.console().count(STARTED.decode()) > 1:
        module_world.run(module_world.reboot())
    yield module_world
    module_world.tidy()


async def next_boot(world: World, before: str) -> wire.Hello:
    channel = world.vm.guest
    assert channel is not None
    async with asyncio.timeout(SECONDS):
        while channel.boot_id in ("", before):
            await channel.heard()
    return await channel.greeted(SECOND)


def leave(world: World, command: str) -> wire.Hello:
    """The agent of the kernel to which `command` leads."""
    assert world.vm.guest is not None
    before = world.vm.guest.boot_id

    async def whole() -> wire.Hello:
        assert world.vm.guest is not None
        with suppress(OutcomeUnknown):
            await world.vm.guest.ask(wire.Exec(0, ("python3", "-c", APART, command)), 5 * SECOND)
        return await next_boot(world, before)

    return world.run(whole())


def crash(world: World) -> None:
    async def whole() -> None:
        assert world.vm.guest is not None
        with suppress(OutcomeUnknown):
            await world.vm.guest.ask(wire.Exec(0, ("python3", "-c", CRASH_NOW)), 2 * SECOND)

    world.run(whole())


def attach_both(world: World) -> tuple[Presentation, Presentation]:
    """While a window is there QEMU plugs in no other memory: the window comes last."""
    both = tuple(world.attach(way, world.make(SIZE)) for way in ("pmem", "vhost-pmem"))
    for shown in both:
        world.poke(shown, 0, BEFORE)
    return both[0], both[1]


def test_before_an_orderly_kexec_everything_is_given_back(world: World) -> None:
    both = attach_both(world)
    world.python(LOAD, "-l", LINE)
    world.hold(both[1])
    taken: list[Detached] = []

    async def take(shown: Presentation) -> Detached:
        way = WAYS[shown.presenter]
        taken.append(await way.detach(shown, world.vm, deadline_ns=20 * SECOND))
        return taken[-1]

    async def keep(_: Presentation) -> None:
        raise AssertionError("nothing is left to be found again")

    async def attend() -> Attendant:
        assert world.vm.guest is not None
        return Attendant(world.vm.guest, lambda: [] if taken else list(both), take, keep)

    attendant = world.run(attend())
    hello = leave(world, "python3 -m tagmem.guest down && kexec -e")
    attendant.close()
    assert [ended.done for ended in taken] == [True, True], taken
    assert hello.tags == ()
    paths = [shown.tagged.pieces[0].path for shown in both]
    assert world.run(world.vm.holds(paths)) == ()
    assert [world.read(shown.tagged, 0, len(BEFORE)) for shown in both] == [BEFORE, BEFORE]


def test_after_a_kexec_that_nobody_announced_the_tags_are_found_again(world: World) -> None:
    both = attach_both(world)
    world.python(LOAD, "-l", LINE)
    hello = leave(world, "kexec -e")
    assert set(hello.tags) == {shown.tagged.tag for shown in both}
    for shown in both:
        assert world.peek(shown, 0, len(BEFORE)) == BEFORE
        world.poke(shown, 0, AFTER)
        assert world.read(shown.tagged, 0, len(AFTER)) == AFTER
        assert world.detach(shown).done


def test_a_crash_kernel_finds_the_tags_whole_and_dumps_none_of_them(world: World) -> None:
    both = attach_both(world)
    for shown in both:
        world.hold(shown)
    world.python(LOAD, "-p", CRASH)
    assert world.vm.guest is not None
    before = world.vm.guest.boot_id
    crash(world)
    hello = world.run(next_boot(world, before))
    assert "Kernel panic" in world.guest.console()
    assert set(hello.tags) == {shown.tagged.tag for shown in both}
    dumped = json.loads(world.python(VMCORE))
    assert sum(end - start for start, end in dumped) > 256 * MIB
    for shown in both:
        memory = world.run(world.find(shown))
        assert memory is not None
        start, end = memory.resource, memory.resource + memory.size_bytes
        assert not [area for area in dumped if area[0] < end and start < area[1]]
        assert world.peek(shown, 0, len(BEFORE)) == BEFORE
        assert world.read(shown.tagged, 0, len(BEFORE)) == BEFORE
        assert world.detach(shown, force=True).done
    assert world.run(world.vm.holds([shown.tagged.pieces[0].path for shown in both])) == ()


def test_a_crash_kernel_without_our_drivers_cannot_keep_a_window(world: World) -> None:
    """The device runs on as the dead kernel left it, which is what the broker needs."""
    pmem, window = attach_both(world)
    world.python(LOAD, "-p", BLIND)
    seen = len(world.guest.console().encode())
    crash(world)
    seen = world.run(world.guest.see(b"Kernel panic", SECONDS, after=seen))
    world.run(world.guest.see(STARTED, SECONDS, after=seen))
    assert [world.read(shown.tagged, 0, len(BEFORE)) for shown in (pmem, window)] == [BEFORE] * 2
    ended = world.detach(window, force=True)
    assert (ended.done, ended.rung) == (True, "revoke")
    assert world.run(world.vm.holds([window.tagged.pieces[0].path])) == ()
    kept = world.detach(pmem, seconds=3.0, force=True)
    assert not kept.done, "in-QEMU pmem ends with its VM"
    assert world.detach(pmem, seconds=3.0, force=True, may_stop_vm=True).rung == "stop-vm"
    world.shown.clear()
