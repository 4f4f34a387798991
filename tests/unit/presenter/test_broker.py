"""The broker against a front-end process with real memory: what the guest sees, what the kernel
says, what is left behind.
"""

# ruff: noqa: ASYNC240 - a test looks at the file system where it stands

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tagmem.base.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, RemoteError
from tagmem.base.units import MIB, SECOND
from tagmem.io import stream
from tagmem.presenter.broker import Broker, Report, State
from tagmem.presenter.contract import Piece, Tagged
from tagmem.presenter.header import HEADER_AT, HEADER_SIZE, parse_dax_header
from tagmem.presenter.window import Goal
from tagmem.testing.vhost_frontend import Driver
from tagmem.wire.vhost_user import message

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
DEVICE = f"tm-{TAG}"
FIRST, SECOND_PIECE = 2 * MIB, 6 * MIB
"""Where the two pieces begin in the window."""
LONG = 10 * SECOND
SHORT = SECOND // 20


@pytest.fixture
def folder() -> Iterator[Path]:
    # On the memory file system, like an appliance's media.
    folder = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def tagged(folder: Path, *, read_only: bool = False) -> Tagged:
    """Eight MiB in two pieces, in two files, the second not from its start."""
    for name, at, words in (("a", 0, b"FIRST"), ("b", 2 * MIB, b"SECOND")):
        with (folder / name).open("wb") as file:
            file.truncate(8 * MIB)
            file.seek(at)
            file.write(words)
    pieces = (Piece(str(folder / "a"), 0, 4 * MIB), Piece(str(folder / "b"), 2 * MIB, 4 * MIB))
    return Tagged(TAG, 8 * MIB, pieces, read_only=read_only)


class World:
    """One broker, one window, one front-end."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder = folder
        self.reports: list[Report] = []
        self.broker = Broker(stream, folder, self.reports.append)
        self.tagged = tagged(folder, read_only=read_only)
        self.path = self.broker.open("vm1", DEVICE, self.tagged)
        self.driver = Driver(self.path)

    async def order(self, do: str, **more: Any) -> Any:
        return await asyncio.to_thread(self.driver.order, do, **more)

    async def read(self, at: int, size: int) -> bytes:
        return await asyncio.to_thread(self.driver.read, at, size)

    async def write(self, at: int, data: bytes) -> None:
        await self.order("write", at=at, data=data.hex())

    async def mapped(self) -> None:
        await self.broker.mapped("vm1", DEVICE, LONG)

    async def revoke(self, deadline_ns: int = LONG) -> int:
        return await self.broker.revoke("vm1", DEVICE, deadline_ns)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - polls; lets the loop run, takes no time
                await asyncio.sleep(0)

    def report(self) -> Report:
        (report,) = self.broker.reports()
        return report

    def in_file(self, name: str, at: int, size: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            file.seek(at)
            return file.read(size)


@asynccontextmanager
async def world(folder: Path, *, read_only: bool = False) -> AsyncIterator[World]:
    made = World(folder, read_only=read_only)
    try:
        with made.driver:
            yield made
    finally:
        made.broker.close()


def run(
    folder: Path, scene: Callable[[World], Awaitable[None]], *, read_only: bool = False
) -> None:
    """Play it, and see that no descriptor is left open."""

    async def main() -> None:
        async with world(folder, read_only=read_only) as made:
            await scene(made)

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def attached(w: World) -> None:
    await w.order("connect")
    await w.order("start")
    await w.mapped()


def test_the_guest_sees_header_and_bytes(folder: Path) -> None:
    async def scene(w: World) -> None:
        assert w.report().state is State.WAITING
        said = await w.order("connect")
        assert said["window"] == 16 * MIB
        assert said["queues"] == 1
        assert (await w.order("mapped")) == []
        assert w.report().state is State.CONNECTED
        assert w.report().qemu_pid == w.driver.pid
        await w.order("start")
        await w.mapped()
        assert not await w.broker.found("vm1", DEVICE, 0)
        header = parse_dax_header(await w.read(HEADER_AT, HEADER_SIZE))
        assert await w.broker.found("vm1", DEVICE, 0)
        assert (header.tag, header.data_at, header.data_bytes) == (TAG, FIRST, 8 * MIB)
        assert await w.read(FIRST, 5) == b"FIRST"
        assert await w.read(SECOND_PIECE, 6) == b"SECOND"
        await w.write(FIRST + 100, b"from the guest")
        await w.write(SECOND_PIECE + 100, b"and here")
        assert w.in_file("a", 100, 14) == b"from the guest"
        assert w.in_file("b", 2 * MIB + 100, 8) == b"and here"
        assert w.report().mapped_bytes == 8 * MIB

    run(folder, scene)


def test_a_guest_that_looked_too_early_is_noticed(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        # What a raw device's partition scan does, and a DAX device never.
        await w.read(0, 512)
        await w.read(HEADER_AT, 512)
        assert not await w.broker.found("vm1", DEVICE, LONG)
        # The next boot has a new chance.
        await w.order("stop", drop=True)
        await w.order("start")
        await w.mapped()
        await w.read(HEADER_AT, 512)
        assert await w.broker.found("vm1", DEVICE, LONG)

    run(folder, scene)


def test_nothing_is_asked_before_the_start(folder: Path) -> None:
    async def scene(w: World) -> None:
        await w.order("connect")
        with pytest.raises(OutcomeUnknown, match="connected"):
            await w.broker.mapped("vm1", DEVICE, SHORT)
        assert (await w.order("mapped")) == []

    run(folder, scene)


def test_bytes_are_taken_back_and_the_hole_is_filled(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        took = await w.revoke()
        assert took < LONG
        assert await w.read(FIRST, 5) == bytes(5)
        await w.write(FIRST, b"TOO LATE")
        assert await w.read(FIRST, 8) == b"TOO LATE"
        assert w.in_file("a", 0, 5) == b"FIRST"
        maps = Path(f"/proc/{w.driver.pid}/maps").read_text()
        assert str(folder) not in maps
        assert "tagmem-scrap" in maps
        # Nor does this process hold the bytes.
        ours = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
        assert not {str(folder / "a"), str(folder / "b")} & ours
        assert w.report().mapped_bytes == 0
        assert w.report().goal is Goal.REVOKED
        with pytest.raises(Conflict):
            await w.mapped()

    run(folder, scene)


def test_what_was_taken_can_be_given_again(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.revoke()
        w.broker.present("vm1", DEVICE)
        await w.mapped()
        assert await w.read(SECOND_PIECE, 6) == b"SECOND"

    run(folder, scene)


def test_a_window_that_nobody_has_connected_to_is_revoked_at_once(folder: Path) -> None:
    async def scene(w: World) -> None:
        await w.revoke()
        await w.order("connect")
        await w.order("start")
        await w.until(lambda: w.report().state is State.STARTED)
        assert await w.read(FIRST, 5) == bytes(5)

    run(folder, scene)


def test_a_read_only_window_cannot_be_written(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        assert await w.read(FIRST, 5) == b"FIRST"
        lines = Path(f"/proc/{w.driver.pid}/maps").read_text().splitlines()
        ours = [line for line in lines if str(folder) in line]
        assert len(ours) == 2
        assert all(line.split()[1] == "r--s" for line in ours)

    run(folder, scene, read_only=True)


def test_a_paused_vm_keeps_its_bytes_and_goes_on(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("stop", drop=False)
        assert w.report().state is State.STOPPED
        before = await w.order("mapped")
        await w.order("start")
        await w.mapped()
        assert await w.order("mapped") == before
        assert await w.read(FIRST, 5) == b"FIRST"

    run(folder, scene)


def test_a_guest_that_reboots_gets_its_window_again(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("stop", drop=True)
        assert (await w.order("mapped")) == []
        await w.order("start")
        await w.mapped()
        assert await w.read(SECOND_PIECE, 6) == b"SECOND"

    run(folder, scene)


def test_a_paused_vm_is_not_told_anything(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("stop", drop=False)
        before = await w.order("mapped")
        with pytest.raises(OutcomeUnknown, match="stopped"):
            await w.revoke(SHORT)
        assert await w.order("mapped") == before
        assert w.report().mapped_bytes == 8 * MIB
        # When it runs again it is taken at once, for it stayed revoked.
        await w.order("start")
        await w.revoke()
        assert await w.read(FIRST, 5) == bytes(5)

    run(folder, scene)


def test_what_was_taken_while_paused_stays_so_through_the_next_pause(folder: Path) -> None:
    """Scrap memory is then all that is mapped, and is not mapped a second time."""

    async def scene(w: World) -> None:
        await attached(w)
        await w.order("stop", drop=False)
        with pytest.raises(OutcomeUnknown, match="stopped"):
            await w.revoke(SHORT)
        await w.order("start")
        await w.revoke()
        await w.write(FIRST, b"on scrap")
        await w.order("stop", drop=False)
        await w.order("start")
        await w.until(lambda: w.report().state is State.STARTED)
        await w.revoke()
        assert w.report().reason == ""
        assert await w.read(FIRST, 8) == b"on scrap"

    run(folder, scene)


def test_the_broker_is_no_holder_of_what_a_guest_has(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        assert await w.order("flush") == 0
        ours = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
        assert not {str(folder / "a"), str(folder / "b")} & ours

    run(folder, scene)


def test_another_file_of_the_name_is_not_the_tag(folder: Path) -> None:
    async def scene(w: World) -> None:
        (folder / "b").rename(folder / "c")
        shutil.copy(folder / "a", folder / "b")
        await w.order("connect")
        await w.order("start")
        with pytest.raises(RemoteError, match="tale file handle"):
            await w.mapped()
        assert not [line for line in await w.order("mapped") if line == SECOND_PIECE]

    run(folder, scene)


def test_a_file_that_is_too_short_is_refused(folder: Path) -> None:
    async def scene(w: World) -> None:
        os.truncate(folder / "b", 4 * MIB)
        with pytest.raises(InvalidInput, match="within the 4194304 bytes"):
            w.broker.open("vm3", DEVICE, w.tagged)

    run(folder, scene)


def test_an_unbound_driver_has_nothing_left_to_take(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("stop", drop=True)
        await w.revoke()

    run(folder, scene)


def test_a_dead_qemu_has_nothing(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await asyncio.to_thread(w.driver.kill)
        await w.revoke()
        await w.until(lambda: w.report().state is State.LOST)

    run(folder, scene)


def test_a_front_end_that_lies_is_found_out(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("be", how={"keep": True})
        with pytest.raises(OutcomeUnknown, match="2 mappings"):
            await w.revoke(SHORT)

    run(folder, scene)


def test_a_front_end_that_says_nothing_is_waited_for_no_longer_than_allowed(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("be", how={"mute": True, "keep": True})
        with pytest.raises(OutcomeUnknown, match="started"):
            await w.revoke(SHORT)

    run(folder, scene)


def test_a_front_end_that_refuses_is_told_of(folder: Path) -> None:
    async def scene(w: World) -> None:
        await w.order("be", how={"refuse": True})
        await w.order("connect")
        await w.order("start")
        with pytest.raises(RemoteError, match="refused to map header"):
            await w.mapped()

    run(folder, scene)


def test_without_a_channel_only_the_end_of_the_vm_helps(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("close channel")
        await w.until(lambda: w.report().must_stop_vm)
        with pytest.raises(OutcomeUnknown):
            await w.revoke()
        await asyncio.to_thread(w.driver.kill)
        await w.revoke()

    run(folder, scene)


def test_a_second_front_end_is_turned_away(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        with Driver(w.path) as other, pytest.raises(RuntimeError):
            await asyncio.to_thread(other.order, "connect")
        assert await w.read(FIRST, 5) == b"FIRST"

    run(folder, scene)


@pytest.mark.parametrize("goal", Goal)
def test_a_new_broker_takes_over(folder: Path, goal: Goal) -> None:
    """The first one dies: its front-end keeps everything, and connects to the next."""

    async def scene(w: World) -> None:
        await attached(w)
        if goal is Goal.REVOKED:
            await w.revoke()
        pid = w.driver.pid
        w.broker.close()
        await w.order("write", at=FIRST + 50, data=b"kept".hex())
        after = Broker(stream, folder, w.reports.append)
        after.open("vm1", DEVICE, w.tagged, adopt=goal, qemu_pid=pid)
        w.broker = after
        if goal is Goal.PRESENTED:
            # Nobody has connected again yet: nothing can be asked, and nothing is claimed.
            with pytest.raises(OutcomeUnknown):
                await w.revoke(SHORT)
        else:
            await w.revoke()
        await w.order("hang up")
        await w.order("again", path=w.path)
        await w.order("start")
        await w.until(lambda: w.report().state is State.STARTED)
        await w.revoke()
        assert w.in_file("a", 50, 4) == (b"kept" if goal is Goal.PRESENTED else bytes(4))
        assert await w.read(FIRST, 5) == bytes(5)

    run(folder, scene)


def test_flushes_are_answered(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        for _ in range(70):  # once round the ring, and over its end
            assert await w.order("flush") == 0
        assert await w.order("stop", drop=False) == 70
        await w.order("start")
        assert await w.order("flush") == 0
        await w.revoke()
        # What the guest writes now is on no medium, and it is told so.
        assert await w.order("flush") == 1

    run(folder, scene)


def test_a_broken_queue_costs_the_guest_its_queue_only(folder: Path) -> None:
    async def scene(w: World) -> None:
        await attached(w)
        await w.order("break")
        assert await w.read(FIRST, 5) == b"FIRST"
        await w.revoke()

    run(folder, scene)


def test_bytes_that_are_no_message_end_the_connection(folder: Path) -> None:
    async def scene(w: World) -> None:
        await w.order("connect")
        await w.order("raw", data=(message(1)[:4] + b"\xff" * 64).hex())
        await w.until(lambda: w.report().state is State.LOST)

    run(folder, scene)


def test_open_and_forget(folder: Path) -> None:
    async def scene(w: World) -> None:
        with pytest.raises(Conflict, match="served already"):
            w.broker.open("vm1", DEVICE, w.tagged)
        windows = w.broker.windows("vm2")
        with pytest.raises(InvalidInput, match="device_bytes"):
            await windows.open(DEVICE, w.tagged, 8 * MIB)
        path = await windows.open(DEVICE, w.tagged, 10 * MIB)
        assert path != w.path
        await windows.revoke(DEVICE, LONG)
        await windows.close(DEVICE)
        await windows.close(DEVICE)
        with pytest.raises(NotFound):
            await windows.mapped(DEVICE, LONG)

    run(folder, scene)


def test_a_tag_whose_pieces_do_not_make_its_size(folder: Path) -> None:
    async def scene(w: World) -> None:
        wrong = Tagged(TAG, 4 * MIB, w.tagged.pieces)
        with pytest.raises(InvalidInput, match="size_bytes"):
            w.broker.open("vm3", DEVICE, wrong)
        gone = Tagged(TAG, 2 * MIB, (Piece(str(folder / "none"), 0, 2 * MIB),))
        with pytest.raises(InvalidInput, match="pieces"):
            w.broker.open("vm3", DEVICE, gone)

    run(folder, scene)
