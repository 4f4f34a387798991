"""Every way of presenting, on a real guest with a stock kernel, held to what it says of itself.

One boot serves many tests; those that end a guest come last and have their own. What a way cannot
do is expected of it from its description, and then it must say so, and leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from tests.vm.world import WAYS, World, booted

from tagmem.base.errors import Unsupported
from tagmem.base.units import MIB, SECOND
from tagmem.lab.spec import GuestSpec
from tagmem.presenter import survey
from tagmem.presenter.choose import choose
from tagmem.presenter.contract import Presentation, Request

SIZE = 32 * MIB
RAM_SIZE = 128 * MIB
SLOTS = 4

MAPPED = [name for name, way in WAYS.items() if not way.describe().ram]
"""What applications map: they find bytes of theirs in it."""
LEAVING = [n for n in MAPPED if WAYS[n].describe().removal in ("host", "guest")]
"""The others have tests of their own, here and in test_cxl."""
RAM = [name for name, way in WAYS.items() if way.describe().ram]


def spec(name: str, qemu: str) -> GuestSpec:
    return GuestSpec(
        name=name,
        qemu=qemu,
        memory_bytes=512 * MIB,
        root_ports=SLOTS,
        machine=("nvdimm=on",),
        kernel_arguments=("memhp_default_state=online_movable",),
    )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with booted(spec("ways", "11.1")) as made:
        yield made


@pytest.fixture(scope="module")
def older() -> Iterator[World]:
    with booted(spec("older", "10.0")) as made:
        yield made


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds empty slots, whatever became of the one before."""
    yield
    for name in {"world", "older"} & set(request.fixturenames):
        request.getfixturevalue(name).tidy()


def leave(world: World, shown: Presentation, *, wipe: bool = True) -> None:
    """Out of the VM again, with nothing left of it."""
    gone = world.detach(shown)
    assert gone.done, gone
    assert not world.run(world.vm.holds([shown.tagged.pieces[0].path]))
    assert shown.device not in world.run(world.vm.facts()).devices
    if wipe:
        world.sanitise(shown.tagged)


def test_the_machine_is_known_without_being_told(world: World) -> None:
    facts = world.run(world.vm.facts())
    assert facts.qemu >= (11, 1, 0)
    assert len(facts.slots) == SLOTS
    assert all(slot.prefetch_bytes and not slot.taken_by for slot in facts.slots)
    assert facts.ram_shared
    assert facts.nvdimm
    assert facts.guest is not None
    assert survey.missing(facts) == ()


def test_auto_takes_what_is_guaranteed(world: World) -> None:
    tagged = world.make(SIZE)
    facts = world.run(world.vm.facts())
    chosen = choose(WAYS, Request(tagged), facts)
    assert chosen.presenter == "vhost-pmem"
    assert "without the guest" in chosen.why
    world.sanitise(tagged)


@pytest.mark.parametrize("way", LEAVING)
def test_bytes_go_both_ways_and_it_leaves(world: World, way: str) -> None:
    tagged = world.make(SIZE)
    world.write(tagged, 5 * MIB, b"from the host")
    shown = world.attach(way, tagged)
    assert shown.guest_path
    assert world.peek(shown, 5 * MIB, 13) == b"from the host"
    world.poke(shown, 7 * MIB, b"from the guest")
    assert world.read(tagged, 7 * MIB, 14) == b"from the guest"
    assert world.read(tagged, 0, 4096) == bytes(4096), "nothing of a header in the capacity"
    leave(world, shown)


@pytest.mark.parametrize("way", [w for w in LEAVING if WAYS[w].describe().tag_in_band])
def test_the_guest_finds_the_tag_by_itself(world: World, way: str) -> None:
    """No channel is asked: the UUID stands in the guest's sysfs."""
    shown = world.attach(way, world.make(SIZE))
    listed = world.python(
        "import glob\nfor p in glob.glob('/sys/bus/dax/devices/*'):\n"
        "  import os; u = os.path.join(os.path.realpath(p), '..', 'uuid')\n"
        "  print(open(u).read() if os.path.exists(u) else '-')"
    )
    assert shown.tagged.tag in listed.split()
    leave(world, shown)


@pytest.mark.parametrize("way", LEAVING)
def test_two_tags_are_told_apart(world: World, way: str) -> None:
    first, second = world.make(SIZE), world.make(SIZE)
    world.write(first, 0, b"first")
    world.write(second, 0, b"other")
    shown = [world.attach(way, first), world.attach(way, second)]
    assert shown[0].guest_path != shown[1].guest_path
    assert [world.peek(s, 0, 5) for s in shown] == [b"first", b"other"]
    for one in shown:
        leave(world, one)


@pytest.mark.parametrize("way", LEAVING)
def test_a_holder_is_named_and_then_made_to_let_go(world: World, way: str) -> None:
    shown = world.attach(way, world.make(SIZE))
    pid = world.hold(shown)
    kept = world.detach(shown, seconds=3)
    assert not kept.done
    assert pid in [holder.pid for holder in kept.holders], kept
    assert f"process {pid}" in kept.reason
    assert world.run(world.vm.holds([shown.tagged.pieces[0].path]))
    forced = world.detach(shown, force=True)
    assert forced.done, forced
    assert not world.run(world.vm.holds([shown.tagged.pieces[0].path]))
    assert shown.device not in world.run(world.vm.facts()).devices
    world.sanitise(shown.tagged)


@pytest.mark.parametrize("way", LEAVING)
def test_by_force_from_a_paused_guest(world: World, way: str) -> None:
    guaranteed = WAYS[way].describe().guaranteed
    shown = world.attach(way, world.make(SIZE))
    path = shown.tagged.pieces[0].path
    world.run(world.vm.pause())
    taken = world.detach(shown, seconds=1, force=True)
    assert taken.done is guaranteed, taken
    assert world.run(world.vm.facts()).state == "paused"
    assert bool(world.run(world.vm.holds([path]))) is not guaranteed
    world.run(world.vm.resume())
    left = taken.presentation
    assert left is not None
    assert (left.state == "revoked") is guaranteed
    leave(world, left)


@pytest.mark.parametrize("way", LEAVING)
def test_by_force_from_a_guest_that_never_answers(world: World, way: str) -> None:
    guaranteed = WAYS[way].describe().guaranteed
    shown = world.attach(way, world.make(SIZE))
    world.run(world.silence(6))
    silent = world.detach(shown, seconds=1)
    assert not silent.done
    assert "did not answer" in silent.reason
    taken = world.detach(shown, seconds=1, force=True)
    assert taken.done is guaranteed, taken
    if guaranteed:
        assert not world.run(world.vm.holds([shown.tagged.pieces[0].path]))
        assert taken.rung == "revoke"
    world.run(world.answering())
    if taken.presentation is not None:
        leave(world, taken.presentation)
    assert shown.device not in world.run(world.vm.facts()).devices


def test_a_read_only_sharer_reads_and_cannot_write(world: World) -> None:
    tagged = world.make(SIZE)
    world.write(tagged, MIB, b"of its writer")
    shared = msgspec.structs.replace(tagged, read_only=True, shared=True)
    chosen = choose(WAYS, Request(shared), world.run(world.vm.facts()))
    assert chosen.presenter == "pmem"
    shown = world.attach("pmem", shared)
    assert "dropped" in shown.warning
    assert world.peek(shown, MIB, 13) == b"of its writer"
    world.poke(shown, MIB, b"of the reader")
    assert world.peek(shown, MIB, 13) == b"of its writer"
    assert world.read(tagged, MIB, 13) == b"of its writer"
    leave(world, shown)


def test_windows_take_what_qemu_can_be_told_of(world: World) -> None:
    """More would be plugged in, and could not be started again after a pause."""
    taken = [world.attach("vhost-pmem", world.make(SIZE)) for _ in range(3)]
    facts = world.run(world.vm.facts())
    assert (facts.regions_taken, facts.window_regions) == (7, 6)
    with pytest.raises(Unsupported, match="7 are taken and this tag takes 2"):
        world.attach("vhost-pmem", world.make(SIZE))
    taken.append(world.attach("ivshmem", world.make(SIZE)))
    empty = world.make(RAM_SIZE, loaded=False)
    for way in ("pmem", "nvdimm", "dimm", "virtio-mem", "ivshmem"):
        with pytest.raises(Unsupported, match="8 are taken, 6 of them by windows"):
            world.attach(way, empty)
    world.run(world.vm.pause())
    world.run(world.vm.resume())
    for one in taken[:3]:
        world.run(world.windows.mapped(one.device, 20 * SECOND))
        world.poke(one, 0, b"after")
        assert world.read(one.tagged, 0, 5) == b"after"
    for one in taken:
        leave(world, one)


def test_a_guest_that_looks_before_it_is_mapped_gets_it_anew(world: World) -> None:
    """QEMU's thread is kept waiting, as on a host with too much to do."""
    world.sockets.late = 1
    tagged = world.make(SIZE)
    world.write(tagged, 0, b"in time")
    # Its agent has the kernel look once more.
    shown = world.attach("vhost-pmem", tagged)
    assert world.sockets.late == 0
    assert world.peek(shown, 0, 7) == b"in time"
    leave(world, shown, wipe=False)
    world.sockets.late = 2
    with world.without_agent():
        shown = world.attach("vhost-pmem", tagged)
    assert world.sockets.late == 0
    told = world.run(world.seek(shown))
    assert world.peek(msgspec.structs.replace(shown, guest_path=told.path), 0, 7) == b"in time"
    leave(world, shown)


SLOTTED = [way for way in LEAVING if way in ("vhost-pmem", "pmem", "ivshmem")]


def test_no_slot_is_left(world: World) -> None:
    taken = [world.attach("ivshmem", world.make(2 * MIB)) for _ in range(SLOTS)]
    tagged = world.make(SIZE)
    before = world.run(world.vm.facts()).devices
    for way in SLOTTED:
        with pytest.raises(Unsupported, match=f"all {SLOTS} slots are taken"):
            world.attach(way, tagged)
    assert world.run(world.vm.facts()).devices == before
    assert not world.run(world.vm.holds([tagged.pieces[0].path]))
    for one in taken:
        leave(world, one)
    leave(world, world.attach("vhost-pmem", tagged))


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_size_is_refused_before_qemu_is_asked(world: World, way: str) -> None:
    """QEMU aborts on some of them."""
    tagged = world.make(3 * MIB, loaded=False)
    with pytest.raises(Unsupported, match="size"):
        world.attach(way, tagged)
    assert not world.vm.gone
    assert not world.run(world.vm.holds([tagged.pieces[0].path]))


@pytest.mark.parametrize("way", LEAVING)
def test_the_guest_reboots_and_finds_it_again(world: World, way: str) -> None:
    shown = world.attach(way, world.make(SIZE))
    world.poke(shown, 0, b"before the reboot")
    world.run(world.reboot())
    told = world.run(world.find(shown))
    if WAYS[way].describe().tag_in_band:
        assert told is not None
        assert world.peek(shown, 0, 17) == b"before the reboot"
    assert world.read(shown.tagged, 0, 17) == b"before the reboot"
    leave(world, shown)


@pytest.mark.parametrize("way", RAM)
def test_what_is_ram_to_the_guest_is_refused_unless_it_may_be_wiped(world: World, way: str) -> None:
    loaded = world.make(RAM_SIZE)
    world.write(loaded, 0, b"precious")
    with pytest.raises(Unsupported, match="overwrite"):
        world.attach(way, loaded)
    assert world.read(loaded, 0, 8) == b"precious"
    empty = world.make(RAM_SIZE, loaded=False)
    shown = world.attach(way, empty)
    assert shown.warning
    world.run(world.vm.pause())
    kept = world.detach(shown, seconds=2, force=True)
    assert not kept.done
    assert "paused" in kept.reason
    assert world.run(world.vm.holds([empty.pieces[0].path]))
    world.run(world.vm.resume())
    gone = world.detach(shown, seconds=20)
    held = world.run(world.vm.holds([empty.pieces[0].path]))
    assert gone.done is not bool(held), gone
    assert gone.done or gone.reason


@pytest.mark.parametrize("way", LEAVING)
def test_wiped_in_between_the_next_vm_reads_zero(world: World, older: World, way: str) -> None:
    """What the first could reach is cut to nothing; the next tag has a file of its own."""
    tagged = world.make(SIZE)
    shown = world.attach(way, tagged)
    world.poke(shown, 0, b"secret of the first")
    seen = world.witness(tagged)
    assert b"secret of the first" in seen.read_bytes()
    leave(world, shown)
    assert seen.stat().st_size == 0
    again = world.make(SIZE)
    there = older.attach("ivshmem" if way == "ivshmem" else "pmem", again)
    assert older.peek(there, 0, 32) == bytes(32)
    older.poke(there, 0, b"of the second")
    assert world.read(again, 0, 13) == b"of the second"
    assert seen.stat().st_size == 0
    leave(older, there, wipe=False)


def test_an_older_qemu_says_what_is_missing(older: World) -> None:
    facts = older.run(older.vm.facts())
    assert facts.qemu < (11, 0, 0)
    assert any("nothing is guaranteed" in line for line in survey.missing(facts))
    tagged = older.make(SIZE)
    assert choose(WAYS, Request(tagged), facts).presenter == "pmem"
    with pytest.raises(Unsupported, match="QEMU must be"):
        older.attach("vhost-pmem", tagged)
    shown = older.attach("pmem", tagged)
    assert "stopping the VM" in shown.warning
    leave(older, shown)


def test_no_force_takes_an_nvdimm_and_a_reboot_leaves_it(older: World) -> None:
    shown = older.attach("nvdimm", older.make(SIZE))
    older.poke(shown, 0, b"before the reboot")
    path = shown.tagged.pieces[0].path
    older.hold(shown)
    for force in (False, True):
        assert not older.detach(shown, seconds=3, force=force).done
    older.run(older.silence(6))
    assert not older.detach(shown, seconds=1, force=True).done
    older.run(older.answering())
    older.run(older.vm.pause())
    assert not older.detach(shown, seconds=1, force=True).done
    older.run(older.vm.resume())
    older.run(older.reboot())
    assert older.run(older.find(shown)) is not None
    assert older.peek(shown, 0, 17) == b"before the reboot"
    assert older.run(older.vm.holds([path]))


def test_an_nvdimm_stays_until_the_vm_ends(older: World) -> None:
    shown = older.attach("nvdimm", older.make(SIZE))
    older.poke(shown, 0, b"in an nvdimm")
    assert older.read(shown.tagged, 0, 12) == b"in an nvdimm"
    reading = older.make(SIZE)
    older.write(reading, 0, b"of its writer")
    read_only = older.attach("nvdimm", msgspec.structs.replace(reading, read_only=True))
    older.poke(read_only, 0, b"of the reader")
    assert older.peek(read_only, 0, 13) == b"of its writer"
    assert older.read(reading, 0, 13) == b"of its writer"
    kept = older.detach(shown, seconds=3, force=True)
    assert not kept.done
    assert "cannot be unplugged" in kept.reason
    ended = older.detach(shown, seconds=3, force=True, may_stop_vm=True)
    assert ended.done
    assert ended.rung == "stop-vm"
    assert older.vm.gone


def test_by_force_from_a_panicked_guest_and_from_a_killed_qemu(world: World) -> None:
    """Last: the guest does not live through it."""
    guaranteed = world.attach("vhost-pmem", world.make(SIZE))
    left = [world.attach(way, world.make(SIZE)) for way in LEAVING]
    world.run(world.panic())
    taken = world.detach(guaranteed, seconds=1, force=True)
    assert taken.done, taken
    assert taken.rung == "revoke"
    assert not world.run(world.vm.holds([guaranteed.tagged.pieces[0].path]))
    for one in left:
        if WAYS[one.presenter].describe().guaranteed:
            continue
        kept = world.detach(one, seconds=1, force=True)
        assert not kept.done
        assert world.run(world.vm.holds([one.tagged.pieces[0].path]))
    world.run(world.guest.kill())
    for one in left:
        gone = world.detach(one, seconds=1)
        assert gone.done
        assert gone.reason == "QEMU has ended"
