"""RAM from a tag: which tags, how the machine is made, and how the VM gives it back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG, FakeMachine, tagged

from tagmem.base.errors import Conflict, InvalidInput, Unsupported
from tagmem.base.units import GIB, MIB
from tagmem.presenter import ram
from tagmem.presenter.contract import Detached, Piece, Request, Tagged, VmFacts
from tagmem.presenter.machine import MemoryNode, VmSpec, argv
from tagmem.wire import guest

FROM = ram.MemoryFrom(TAG, latency_ns=300, bandwidth_bytes=8 * GIB)


def detach(machine: FakeMachine, *, force: bool = False, may_stop_vm: bool = False) -> Detached:
    shown = ram.presentation(tagged(), "vm1", ram.nodes(FROM, tagged(), 1))
    way = ram.Ram().detach(
        shown, machine, deadline_ns=1_000_000, force=force, may_stop_vm=may_stop_vm
    )
    return asyncio.run(way)


def state(of: str) -> VmFacts:
    return msgspec.structs.replace(ROOMY, state=of)


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        (tagged(read_only=True), "read-only"),
        (tagged(shared=True), "other hosts share it"),
        (tagged(size=2 * MIB), "at least"),
        (tagged(pieces=tuple(Piece("/m", 2 * MIB * n, 2 * MIB) for n in range(9))), "8 pieces"),
        (tagged(pieces=(Piece("/m", 4096, 128 * MIB),)), "multiples of 2 MiB"),
    ],
)
def test_not_every_tag_can_be_ram(tag: Tagged, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        ram.nodes(FROM, tag, 1)


@pytest.mark.parametrize(
    "wanted",
    [
        ram.MemoryFrom(TAG, latency_ns=0),
        ram.MemoryFrom(TAG, bandwidth_bytes=1),
        ram.MemoryFrom(TAG, bandwidth_bytes=8192 * GIB),
    ],
)
def test_figures_that_no_table_can_hold_are_refused(wanted: ram.MemoryFrom) -> None:
    with pytest.raises(InvalidInput, match=r"_ns|_bytes"):
        ram.check(wanted)


def test_each_piece_is_a_node_with_its_figures() -> None:
    pieces = (Piece("/m/1", 2 * MIB, 64 * MIB), Piece("/m/2", 0, 64 * MIB))
    nodes = ram.nodes(FROM, tagged(128 * MIB, pieces=pieces), 1)
    line = argv(VmSpec("vm1", "/run/vm1", memory_bytes=512 * MIB, cpus=2, nodes=nodes))
    text = " ".join(line)
    assert "q35,hmat=on" in text
    assert "memory-backend=ram0" not in text
    assert "id=ram0,size=512M,share=on" in text
    assert "-m 640M," in text
    assert "node,nodeid=0,cpus=0-1,memdev=ram0,initiator=0" in text
    assert f"id=tm-{TAG}-m1,size={64 * MIB},mem-path=/m/2,offset=0,share=on" in text
    assert f"node,nodeid=2,initiator=0,memdev=tm-{TAG}-m1" in text
    assert "initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=300" in text
    assert "target=2,hierarchy=memory,data-type=access-bandwidth,bandwidth=8192M" in text
    assert text.index("id=ram0") < text.index(f"id=tm-{TAG}-m")


def test_specific_purpose_memory_is_beside_the_ram() -> None:
    wanted = msgspec.structs.replace(FROM, specific_purpose=True)
    nodes = ram.nodes(wanted, tagged(), 1)
    spec = VmSpec("vm1", "/run/vm1", nodes=nodes, firmware=("/f/code", "/f/variables"))
    text = " ".join(argv(spec))
    assert "-m 1024M," in text
    assert f"sp-mem,id=tm-{TAG}-m-sp,memdev=tm-{TAG}-m,node=1" in text
    assert "if=pflash,format=raw,readonly=on,file=/f/code" in text
    assert "if=pflash,format=raw,readonly=off,file=/f/variables" in text


def test_more_than_the_machine_has_room_for_is_refused() -> None:
    node = MemoryNode(1, "m", TAG, "/m", 0, 40 * GIB, 100, GIB)
    with pytest.raises(InvalidInput, match="memory"):
        argv(VmSpec("vm1", "/run/vm1", nodes=(node,)))
    odd = msgspec.structs.replace(node, path="/a,b", size_bytes=GIB)
    with pytest.raises(InvalidInput, match="commas"):
        argv(VmSpec("vm1", "/run/vm1", nodes=(odd,)))


def test_content_is_seen_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "media"
    with path.open("wb") as media:
        media.truncate(8 * MIB)
    whole = tagged(size=4 * MIB, pieces=(Piece(str(path), 2 * MIB, 4 * MIB),))
    with path.open("r+b") as media:
        media.write(b"a header in front of it")
        media.seek(6 * MIB)
        media.write(b"what follows it")
        media.seek(3 * MIB)
        media.write(b"\0")
    ram.check_content(FROM, whole)
    with path.open("r+b") as media:
        media.seek(6 * MIB - 1)
        media.write(b"x")
    with pytest.raises(Conflict, match="--overwrite"):
        ram.check_content(FROM, whole)
    ram.check_content(msgspec.structs.replace(FROM, overwrite=True), whole)
    missing = tagged(pieces=(Piece(str(tmp_path / "none"), 0, 2 * MIB),))
    with pytest.raises(Conflict, match="No such file"):
        ram.check_content(FROM, missing)


def test_it_is_never_attached_to_a_vm_that_runs() -> None:
    way = ram.Ram()
    request = Request(tagged())
    assert way.can(request, ROOMY) == ram.GIVEN_AT_START
    with pytest.raises(Unsupported, match="--memory-from"):
        way.plan(request, ROOMY)
    with pytest.raises(Unsupported, match="--memory-from"):
        asyncio.run(way.attach(request, FakeMachine()))


def test_a_guest_is_asked_by_its_agent_or_by_its_power_button() -> None:
    machine = FakeMachine(ROOMY, guest.Done(1))
    machine.ends = True
    assert detach(machine) == Detached(done=True, rung="ask")
    assert machine.guest is not None
    assert isinstance(machine.guest.asked[0], guest.Shutdown)
    assert machine.log == []
    for silent in (FakeMachine(ROOMY, None), FakeMachine(ROOMY, guest.Failed(1, "x", "no"))):
        ended = detach(silent)
        assert not ended.done
        assert "does not shut down" in ended.reason
        assert silent.log == ["system_powerdown"]


@pytest.mark.parametrize("of", ["paused", "guest-panicked"])
def test_a_guest_that_cannot_hear_is_ended_where_that_is_allowed(of: str) -> None:
    machine = FakeMachine(state(of))
    asked = detach(machine)
    assert not asked.done
    assert f"the guest is {of}" in asked.reason
    assert asked.presentation is not None
    assert machine.log == []
    ended = detach(machine, force=True, may_stop_vm=True)
    assert (ended.done, ended.rung) == (True, "stop-vm")
    assert machine.log == ["stop-vm"]


def test_force_alone_takes_nothing() -> None:
    machine = FakeMachine(ROOMY)
    ended = detach(machine, force=True)
    assert not ended.done
    assert machine.log == []


def test_one_that_has_ended_has_let_go() -> None:
    assert detach(FakeMachine(state("gone"))).done
