"""The broker and a real QEMU 11.1 with a stock guest: the tag is seen, bytes go both ways, and come
back whatever the guest does.

One guest for all, in an order: the tests that cost it its life come last.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vm.conftest import Boot, Run

from tagmem.base.errors import OutcomeUnknown, RemoteError
from tagmem.base.units import MIB, SECOND
from tagmem.io import stream
from tagmem.lab.boot import READY, Guest
from tagmem.lab.spec import GuestSpec
from tagmem.presenter.broker import Broker, State
from tagmem.presenter.contract import Piece, Tagged
from tagmem.presenter.window import Goal

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
OTHER = "c0ffee00-0000-4000-8000-000000000042"
SIZE = 60 * MIB
"""With its header no power of two, which QEMU would abort on if it were told."""
TRIES = 5

FIND = """
import os, glob, time
def find(tag):
    for path in glob.glob("/sys/bus/dax/devices/*"):
        real = os.path.realpath(path)
        try:
            if open(real + "/../uuid").read().strip() == tag:
                return "/dev/" + os.path.basename(path), int(open(real + "/size").read())
        except OSError:
            pass
"""


class Rig:
    """A guest, a broker, and media with words in them."""

    def __init__(self, run: Run, guest: Guest, folder: Path) -> None:
        self.run = run
        self.guest = guest
        self.folder = folder
        self.broker = run(self._made())
        self.slots: dict[str, str] = {}

    async def _made(self) -> Broker:
        return Broker(stream, self.folder)

    def tagged(self, tag: str, *, read_only: bool = False) -> Tagged:
        path = self.folder / tag
        with path.open("wb") as file:
            file.truncate(200 * MIB)
            for at, words in ((100 * MIB, b"FIRST"), (10 * MIB, b"SECOND")):
                file.seek(at)
                file.write(words + tag.encode())
        pieces = (
            Piece(str(path), 100 * MIB, 40 * MIB),
            Piece(str(path), 10 * MIB, 20 * MIB),
        )
        return Tagged(tag, SIZE, pieces, read_only=read_only)

    def media(self, tag: str, at: int, size: int) -> bytes:
        with (self.folder / tag).open("rb") as file:
            file.seek(at)
            return file.read(size)

    def attach(self, tag: str, *, slot: str = "rp1") -> None:
        """Until the guest has found it: on a loaded machine it may look before QEMU has mapped."""
        self.run(self._attach(tag, slot))

    async def _attach(self, tag: str, slot: str) -> None:
        for _ in range(TRIES):
            await self.plug(self.tagged(tag), slot)
            await self.broker.mapped("vm", tag, 20 * SECOND)
            if await self.broker.found("vm", tag, 5 * SECOND):
                return
            await self._detach(tag)
        raise AssertionError(f"the guest has not found {tag} in {TRIES} tries")

    async def plug(self, tagged: Tagged, slot: str = "rp1") -> None:
        path = self.broker.open("vm", tagged.tag, tagged)
        address = {"type": "unix", "data": {"path": path}}
        backend = {"addr": address, "server": False}
        chardev = {"id": f"c{slot}", "backend": {"type": "socket", "data": backend}}
        await self.guest.command("chardev-add", chardev)
        self.slots[tagged.tag] = slot
        device = {"virtio-id": 27, "num_vqs": 1, "config_size": 16}
        driver = {"driver": "vhost-user-test-device-pci", "id": f"d{slot}", "bus": slot}
        await self.guest.command("device_add", {**driver, **device, "chardev": f"c{slot}"})

    def detach(self, tag: str) -> None:
        self.run(self._detach(tag))

    async def _detach(self, tag: str) -> None:
        slot = self.slots.pop(tag)
        seen = len(self.guest.events)
        await self.guest.command("device_del", {"id": f"d{slot}"})
        await self.guest.event("DEVICE_DELETED", after=seen)
        await self.guest.command("chardev-remove", {"id": f"c{slot}"})
        self.broker.forget("vm", tag)

    def revoke(self, tag: str, deadline_ns: int = 5 * SECOND) -> int:
        return self.run(self.broker.revoke("vm", tag, deadline_ns))

    def python(self, code: str) -> str:
        return self.run(self.guest.python(FIND + code))

    def command(self, name: str) -> None:
        self.run(self.guest.command(name))

    def until(self, tag: str, state: State) -> None:
        self.run(self._reached(tag, state))

    async def _reached(self, tag: str, state: State) -> None:
        async with asyncio.timeout(60):
            while self.state(tag) is not state:  # noqa: ASYNC110 - lets the loop run
                await asyncio.sleep(0)

    def state(self, tag: str) -> State:
        return next(r.state for r in self.broker.reports() if r.device == tag)

    def read(self, tag: str, at: int, size: int) -> bytes:
        """Through a mapping of the DAX device, in the guest."""
        code = (
            "import mmap\n"
            f"path, size = find({tag!r})\n"
            "m = mmap.mmap(os.open(path, os.O_RDWR), size)\n"
            f"print(m[{at}:{at + size}].hex())"
        )
        return bytes.fromhex(self.python(code))


@pytest.fixture(scope="module")
def rig(boot: Boot, run: Run) -> Iterator[Rig]:
    guest = boot(GuestSpec(name="broker", memory_bytes=512 * MIB, root_ports=2))
    folder = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    made = Rig(run, guest, folder)
    yield made

    async def close() -> None:
        made.broker.close()

    run(close())
    shutil.rmtree(folder)


def holder(rig: Rig, tag: str) -> None:
    """A process in the guest that has the tag mapped, and writes on it all the time."""
    rig.python(f"""
import subprocess
code = '''
import mmap, os, sys
m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 2 << 20)
n = 0
while True:
    n += 1
    m[1 << 20:(1 << 20) + 8] = n.to_bytes(8, "little")
    open("/tmp/held", "wb").write(m[:5])
'''
subprocess.Popen(["python3", "-c", code, find({tag!r})[0]], start_new_session=True)
""")


def test_the_tag_is_found_and_bytes_go_both_ways(rig: Rig) -> None:
    rig.attach(TAG)
    path, size = rig.python(f"print(*find({TAG!r}))").split()
    assert path.startswith("/dev/dax")
    assert int(size) == SIZE
    assert rig.read(TAG, 0, 41) == b"FIRST" + TAG.encode()
    assert rig.read(TAG, 40 * MIB, 42) == b"SECOND" + TAG.encode()
    rig.python(f"""
import mmap
path, size = find({TAG!r})
m = mmap.mmap(os.open(path, os.O_RDWR), size)
m[1 << 20:(1 << 20) + 4] = b"here"
m[size - 5:] = b"there"
""")
    assert rig.media(TAG, 101 * MIB, 4) == b"here"
    assert rig.media(TAG, 30 * MIB - 5, 5) == b"there"


def test_two_tags_are_told_apart(rig: Rig) -> None:
    rig.attach(OTHER, slot="rp2")
    assert rig.read(OTHER, 0, 41) == b"FIRST" + OTHER.encode()
    assert rig.read(TAG, 0, 41) == b"FIRST" + TAG.encode()
    rig.detach(OTHER)


def test_a_pause_changes_nothing(rig: Rig) -> None:
    rig.command("stop")
    rig.until(TAG, State.STOPPED)
    rig.command("cont")
    rig.until(TAG, State.STARTED)
    rig.run(rig.broker.mapped("vm", TAG, 5 * SECOND))
    assert rig.read(TAG, 0, 5) == b"FIRST"
    assert rig.guest.alive


def test_a_driver_bound_again_finds_it_again(rig: Rig) -> None:
    rig.python("""
there = "/sys/bus/virtio/drivers/virtio_pmem/"
name = next(name for name in os.listdir(there) if name.startswith("virtio"))
open(there + "unbind", "w").write(name)
time.sleep(0.3)
open(there + "bind", "w").write(name)
""")
    rig.until(TAG, State.STARTED)
    rig.run(rig.broker.mapped("vm", TAG, 5 * SECOND))
    assert rig.guest.alive
    if not rig.run(rig.broker.found("vm", TAG, 5 * SECOND)):
        rig.detach(TAG)
        rig.attach(TAG)
    assert rig.read(TAG, 0, 5) == b"FIRST"


def test_a_guest_that_reboots_finds_it_again(rig: Rig) -> None:
    async def reboot() -> None:
        after = len(rig.guest.console())
        seen = len(rig.guest.events)
        await rig.guest.release_agent()
        await rig.guest.command("system_reset")
        await rig.guest.event("RESET", after=seen)
        await rig.guest.see(READY, 120, after=after)

    rig.run(reboot())
    rig.until(TAG, State.STARTED)
    rig.run(rig.broker.mapped("vm", TAG, 5 * SECOND))
    if not rig.run(rig.broker.found("vm", TAG, 5 * SECOND)):
        rig.detach(TAG)
        rig.attach(TAG)
    assert rig.read(TAG, 0, 5) == b"FIRST"


def test_when_the_broker_dies_nothing_is_claimed(rig: Rig) -> None:
    """QEMU keeps the bytes; it must not be connected to again (it aborts); unplugging helps."""

    async def replace() -> None:
        tagged = rig.tagged(TAG)
        rig.broker.close()
        rig.broker = Broker(stream, rig.folder)
        rig.broker.open("vm", TAG, tagged, adopt=Goal.PRESENTED, qemu_pid=rig.guest.pid)
        with pytest.raises(OutcomeUnknown, match="2 mappings"):
            await rig.broker.revoke("vm", TAG, SECOND // 5)

    rig.run(replace())
    assert rig.guest.alive
    assert rig.read(TAG, 0, 5) == b"FIRST"
    seen = len(rig.guest.events)
    slot = rig.slots.pop(TAG)
    rig.run(rig.guest.command("device_del", {"id": f"d{slot}"}))
    rig.run(rig.guest.event("DEVICE_DELETED", after=seen))
    rig.revoke(TAG)
    rig.run(rig.guest.command("chardev-remove", {"id": f"c{slot}"}))
    rig.broker.forget("vm", TAG)
    rig.attach(TAG)
    assert rig.read(TAG, 0, 5) == b"FIRST"


def test_bytes_are_taken_from_a_process_that_holds_them(rig: Rig) -> None:
    holder(rig, TAG)
    rig.python("""
while not os.path.exists("/tmp/held") or open("/tmp/held", "rb").read() != b"FIRST":
    time.sleep(0.05)
""")
    took = rig.revoke(TAG)
    assert took < SECOND
    before = rig.media(TAG, 101 * MIB, 8)
    rig.python("""
while open("/tmp/held", "rb").read() != bytes(5):
    time.sleep(0.05)
""")
    # The process runs on, on scrap memory; nothing of what it writes is on the media.
    assert rig.media(TAG, 101 * MIB, 8) == before
    assert str(rig.folder) not in Path(f"/proc/{rig.guest.pid}/maps").read_text()
    rig.detach(TAG)


def test_qemu_11_1_does_not_do_read_only(rig: Rig) -> None:
    """It maps everything writable; given a descriptor that cannot be written it refuses, and that
    is what keeps a read-only sharer from writing.
    """

    async def scene() -> None:
        await rig.plug(rig.tagged(TAG, read_only=True))
        with pytest.raises(RemoteError, match="refused to map data"):
            await rig.broker.mapped("vm", TAG, 20 * SECOND)

    rig.run(scene())
    assert str(rig.folder) not in Path(f"/proc/{rig.guest.pid}/maps").read_text()
    rig.detach(TAG)
    assert rig.guest.alive


def test_a_paused_vm_is_waited_for(rig: Rig) -> None:
    rig.attach(TAG)
    rig.command("stop")
    rig.until(TAG, State.STOPPED)
    with pytest.raises(OutcomeUnknown, match="stopped"):
        rig.revoke(TAG, SECOND // 10)
    assert rig.guest.alive
    rig.command("cont")
    rig.revoke(TAG)
    assert rig.guest.alive
    rig.detach(TAG)


def test_a_panicked_guest_is_not_asked(rig: Rig) -> None:
    rig.attach(TAG)
    holder(rig, TAG)

    async def panic() -> None:
        channel = await rig.guest.agent()
        code = "open('/proc/sysrq-trigger', 'w').write('c')"
        asking = asyncio.ensure_future(channel.run(["python3", "-c", code]))
        async with asyncio.timeout(60):
            while "sysrq triggered crash" not in rig.guest.console():  # noqa: ASYNC110
                await asyncio.sleep(0)
        asking.cancel()

    rig.run(panic())
    took = rig.revoke(TAG)
    assert took < SECOND
    assert rig.guest.alive
    assert str(rig.folder) not in Path(f"/proc/{rig.guest.pid}/maps").read_text()
    held = [os.path.realpath(f"/proc/{rig.guest.pid}/fd/{n}") for n in
            os.listdir(f"/proc/{rig.guest.pid}/fd")]  # fmt: skip
    assert str(rig.folder / TAG) not in held
