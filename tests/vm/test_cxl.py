"""CXL memory in a guest with a stock kernel: extents of an emulated device with dynamic capacity,
and a device per tag. Both QEMUs, held to what each way says of itself.

What QEMU cannot do is expected, and must be said; it is tried bluntly too, so that a QEMU that can
one day is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.vm.world import World, booted

from tagmem.appliance.media import ByDpaMedia
from tagmem.base.errors import RemoteError, Unsupported
from tagmem.base.units import MIB, SECOND
from tagmem.lab.spec import GuestSpec, with_cxl
from tagmem.presenter.common import memory_id
from tagmem.presenter.contract import Piece, Presentation
from tagmem.presenter.machine import CxlSpec
from tagmem.wire import guest as wire

POOL_BYTES = 512 * MIB
DEVICE_BYTES = 256 * MIB
PORTS = 3
SIZE = 16 * MIB


def spec(name: str, qemu: str, folder: Path) -> GuestSpec:
    pool = folder / "pool"
    media = ByDpaMedia(pool, [], {0: POOL_BYTES})
    media.renew()
    media.close()
    cxl = CxlSpec(PORTS, str(pool / "media" / "pool0"), POOL_BYTES)
    plain = GuestSpec(name=name, qemu=qemu, memory_bytes=512 * MIB, root_ports=1)
    return with_cxl(plain, cxl)


def boot(name: str, qemu: str) -> Iterator[World]:
    with booted(lambda folder: spec(name, qemu, folder)) as made:
        yield made


@pytest.fixture(scope="module")
def pod() -> Iterator[World]:
    yield from boot("cxl", "11.1")


@pytest.fixture(scope="module")
def older() -> Iterator[World]:
    yield from boot("cxl-older", "10.0")


@pytest.fixture(params=["pod", "older"])
def either(request: pytest.FixtureRequest) -> World:
    made: World = request.getfixturevalue(request.param)
    return made


def test_ports_and_windows_are_found(either: World) -> None:
    facts = either.run(either.vm.facts())
    assert len(facts.cxl_ports) == PORTS
    [window] = facts.cxl_windows
    assert (window.size_bytes, window.offset, window.regions) == (POOL_BYTES, 0, 1)
    assert window.path.endswith("/pool0")
    assert facts.guest is not None
    assert {"cxl", "cxl-static"} <= {*facts.guest.features}


def test_extents_go_in_and_out_and_bytes_are_the_pools(either: World) -> None:
    first, second = either.extent(SIZE), either.extent(SIZE)
    either.write(first, 5 * MIB, b"from the host")
    shown = [either.attach("cxl", first), either.attach("cxl", second)]
    assert shown[0].guest_path != shown[1].guest_path
    assert either.peek(shown[0], 5 * MIB, 13) == b"from the host"
    either.poke(shown[1], SIZE - 14, b"from the guest")
    assert either.read(second, SIZE - 14, 14) == b"from the guest"
    for one in shown:
        given_back(either, one)
    again = either.extent(SIZE, at=first.pieces[0].offset)
    there = either.attach("cxl", again)
    assert either.peek(there, 5 * MIB, 13) == b"from the host"
    given_back(either, there)


def given_back(pod: World, shown: Presentation, *, force: bool = False) -> None:
    """The guest has it no more, which QEMU says; QEMU's own process keeps the pool."""
    gone = pod.detach(shown, force=force)
    assert not gone.done
    assert "QEMU still has" in gone.reason, gone
    [window] = pod.run(pod.vm.facts()).cxl_windows
    assert shown.tagged.tag not in [lent.tag for lent in window.lent]
    assert pod.run(pod.find(shown)) is None
    with pytest.raises(RemoteError, match="non-existing DPA range"):
        release(pod, shown.tagged.pieces[0])


def release(pod: World, piece: Piece, **how: object) -> None:
    arguments = {
        "path": "/machine/peripheral/tmcw0",
        "host-id": 0,
        "removal-policy": "prescriptive",
        "region": 0,
        "extents": [{"offset": piece.offset, "len": piece.length}],
    }
    pod.run(pod.vm.execute("cxl-release-dynamic-capacity", arguments | how))


def test_a_holder_of_an_extent_is_named_and_then_made_to_let_go(pod: World) -> None:
    shown = pod.attach("cxl", pod.extent(SIZE))
    pid = pod.hold(shown)
    kept = pod.detach(shown, seconds=3)
    assert pid in [holder.pid for holder in kept.holders], kept
    [window] = pod.run(pod.vm.facts()).cxl_windows
    assert shown.tagged.tag in [lent.tag for lent in window.lent]
    with pytest.raises(RemoteError, match="not supported"):
        release(pod, shown.tagged.pieces[0], **{"forced-removal": True})
    given_back(pod, shown, force=True)


@pytest.mark.parametrize("way", ["cxl", "cxl-static"])
def test_a_guest_that_is_silent_or_paused_keeps_what_it_has(pod: World, way: str) -> None:
    dynamic = way == "cxl"
    shown = pod.attach(way, pod.extent(SIZE) if dynamic else pod.make(DEVICE_BYTES))
    pod.poke(shown, 0, b"still there")
    pod.run(pod.vm.pause())
    paused = pod.detach(shown, seconds=1, force=True)
    assert not paused.done
    assert "paused" in paused.reason
    pod.run(pod.vm.resume())
    assert pod.peek(shown, 0, 11) == b"still there"
    pod.run(pod.silence(6))
    silent = pod.detach(shown, seconds=2, force=True)
    assert not silent.done
    assert not dynamic or "by force" in silent.reason
    pod.run(pod.answering())  # And does then what it was asked.
    (given_back if dynamic else leave_device)(pod, shown)


def test_no_port_is_left(pod: World) -> None:
    taken = [pod.attach("cxl-static", pod.make(DEVICE_BYTES)) for _ in range(PORTS)]
    tagged = pod.make(DEVICE_BYTES)
    before = pod.run(pod.vm.facts()).devices
    with pytest.raises(Unsupported, match="port"):
        pod.attach("cxl-static", tagged)
    assert pod.run(pod.vm.facts()).devices == before
    assert not pod.run(pod.vm.holds([tagged.pieces[0].path]))
    for one in taken:
        leave_device(pod, one)


def test_addresses_that_may_be_taken_are_not_used_again(pod: World) -> None:
    shown = pod.attach("cxl", pod.extent(SIZE))
    other = pod.extent(SIZE, at=shown.tagged.pieces[0].offset)
    with pytest.raises(Unsupported, match="must be detached first"):
        pod.attach("cxl", other)
    with pytest.raises(Unsupported, match="in this VM already"):
        pod.attach("cxl", shown.tagged)
    given_back(pod, shown)


def test_what_lies_elsewhere_is_not_shown_by_an_extent(pod: World) -> None:
    by_tag = pod.make(SIZE)
    with pytest.raises(Unsupported, match="media by DPA"):
        pod.attach("cxl", by_tag)
    with pytest.raises(Unsupported, match="ends at"):
        pod.attach("cxl", pod.extent(SIZE, at=POOL_BYTES))
    with pytest.raises(Unsupported, match="multiple of"):
        pod.attach("cxl", pod.extent(3 * MIB))


def test_a_pool_that_was_made_anew_is_not_taken_for_the_one_that_qemu_has(pod: World) -> None:
    aside = pod.pool.with_suffix(".aside")
    pod.pool.rename(aside)
    try:
        with pod.pool.open("wb") as file:
            file.truncate(POOL_BYTES)
        with pytest.raises(Unsupported, match="does not map"):
            pod.attach("cxl", pod.extent(SIZE))
    finally:
        aside.rename(pod.pool)


def test_both_outlive_the_guests_reboot_when_it_is_told_again(pod: World) -> None:
    shown = [
        pod.attach("cxl", pod.extent(SIZE)),
        pod.attach("cxl-static", pod.make(DEVICE_BYTES)),
    ]
    for one in shown:
        pod.poke(one, 0, b"before the reboot")
    pod.run(pod.reboot())
    for one in shown:
        assert one.told is not None
        again = wire.Attach(0, one.tagged.tag, 40_000, one.told)
        assert pod.vm.guest is not None
        answer = pod.run(pod.vm.guest.ask(again, 60 * SECOND))
        assert isinstance(answer, wire.Attached), answer
        assert pod.peek(replace(one, guest_path=answer.memory.path), 0, 17) == b"before the reboot"
    given_back(pod, shown[0])
    leave_device(pod, shown[1])


@pytest.mark.parametrize("way", ["cxl", "cxl-static"])
def test_what_it_cannot_promise_is_refused(pod: World, way: str) -> None:
    tagged = pod.extent(SIZE) if way == "cxl" else pod.make(DEVICE_BYTES)
    for need in ("guaranteed", "live_migration", "ram", "discoverable"):
        with pytest.raises(Unsupported):
            pod.attach(way, tagged, **{need: True})


def test_a_device_per_tag_is_a_dax_device_of_a_stock_kernel(either: World) -> None:
    first, second = either.make(DEVICE_BYTES), either.make(DEVICE_BYTES)
    either.write(first, 5 * MIB, b"first")
    either.write(second, 5 * MIB, b"other")
    shown = [either.attach("cxl-static", first), either.attach("cxl-static", second)]
    assert [either.peek(s, 5 * MIB, 5) for s in shown] == [b"first", b"other"]
    either.poke(shown[0], 7 * MIB, b"from the guest")
    assert either.read(first, 7 * MIB, 14) == b"from the guest"
    found = either.run(either.find(shown[0]))
    assert found is not None
    assert (found.kind, found.tag) == ("cxl-static", first.tag)
    for one in shown:
        leave_device(either, one)


def leave_device(pod: World, shown: Presentation) -> None:
    """The guest ejects it and the port is free again; QEMU keeps the memory, 10.0 in a device that
    is nowhere any more: it is not asked to free it, and would refuse.
    """
    gone = pod.detach(shown, seconds=20)
    assert not gone.done
    facts = pod.run(pod.vm.facts())
    assert "does not let go of a CXL device's memory" in gone.reason, gone
    kept = "Cannot delete host memory backend" if facts.qemu >= (11, 0, 0) else "is in use"
    with pytest.raises(RemoteError, match=kept):
        pod.run(pod.vm.execute("object-del", {"id": memory_id(shown.tagged.tag)}))
    assert shown.device not in facts.devices
    assert shown.slot in facts.cxl_ports
    assert pod.run(pod.find(shown)) is None
    assert pod.run(pod.vm.holds([shown.tagged.pieces[0].path]))


def test_a_port_is_used_again_and_a_holder_is_named(pod: World) -> None:
    shown = pod.attach("cxl-static", pod.make(2 * DEVICE_BYTES))
    pid = pod.hold(shown)
    kept = pod.detach(shown, seconds=3)
    assert pid in [holder.pid for holder in kept.holders], kept
    forced = pod.detach(shown, seconds=20, force=True)
    assert "the VM must end first" in forced.reason, forced
    assert "only when its guest lets it" in forced.reason, forced


def test_the_last_rung_gives_all_back(pod: World, older: World) -> None:
    """Last: the VM ends, and another one reads none of what was written in it."""
    static = pod.attach("cxl-static", pod.make(DEVICE_BYTES))
    dynamic = pod.attach("cxl", pod.extent(SIZE))
    pod.poke(static, 0, b"secret of the first")
    pod.run(pod.panic())
    for one in (static, dynamic):
        assert not pod.detach(one, seconds=2, force=True).done
    assert pod.run(pod.vm.holds([static.tagged.pieces[0].path]))
    ended = pod.detach(dynamic, seconds=3, may_stop_vm=True)
    assert ended.done
    assert ended.rung == "stop-vm"
    assert pod.detach(static).done
    assert pod.vm.gone
    assert pod.read(static.tagged, 0, 6) == b"secret"
    seen = pod.witness(static.tagged)
    pod.sanitise(static.tagged)
    assert seen.stat().st_size == 0
    there = older.attach("cxl-static", pod.make(DEVICE_BYTES))
    assert older.peek(there, 0, 32) == bytes(32)
    leave_device(older, there)
