"""What becomes of each tag when a VM moves, judged from facts; and the words between hosts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG, tagged

from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown, Unsupported
from tagmem.base.units import MIB
from tagmem.presenter import common
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import Piece, Presentation, Slot, Tagged
from tagmem.presenter.machine import VmSpec
from tagmem.presenter.migrate import (
    ADDRESSED,
    About,
    Incoming,
    Move,
    Seat,
    TargetTag,
    Waiting,
    Wish,
    address,
    arguments,
    arrival,
    forms,
    headers,
    in_short,
    judge,
    later,
    seats,
)
from tagmem.presenter.requests import (
    Start,
    VmRecord,
    build_of,
    read,
    rebuildable,
    same_machine,
    spec_of,
)

WAYS = all_presenters()
NAMES = sorted(WAYS)
STAYING = [name for name in NAMES if WAYS[name].describe().migration == "stays"]
SIZE = 128 * MIB


def shown(way: str, what: Tagged | None = None, **changes: Any) -> Presentation:
    what = what or tagged(SIZE)
    device = common.device_id(what.tag)
    made = Presentation(what, "vm1", way, device, "attached", "tmp1", SIZE + 2 * MIB)
    return msgspec.structs.replace(made, **changes)


def there(**changes: Any) -> dict[str, TargetTag]:
    return {TAG: msgspec.structs.replace(TargetTag(TAG, SIZE, 1, 2 * MIB, False), **changes)}


def one(way: str, target: dict[str, TargetTag], form: Any = "auto", **facts: Any) -> Move:
    occupied = Slot("rp1", 8 << 30, common.device_id(TAG))
    vm = msgspec.structs.replace(ROOMY, **{"slots": (occupied,), **facts})
    return judge([shown(way)], target, WAYS, vm, Wish(form), "w2")[0]


@pytest.mark.parametrize("way", NAMES)
def test_each_way_has_a_form_or_says_why_it_has_none(way: str) -> None:
    have = forms(WAYS[way].describe())
    stuck = None not in (have.stays, have.switch, have.remove_all)
    assert (in_short(WAYS[way].describe()) == "none: the VM stays") is stuck
    assert (have.stays is None) == (WAYS[way].describe().migration == "stays")
    assert have.prepopulate == ("device" if None in (have.stays, have.switch) else "host")


@pytest.mark.parametrize("way", NAMES)
def test_auto_disturbs_as_little_as_it_can(way: str) -> None:
    have = forms(WAYS[way].describe())
    tried = (("stays", have.stays), ("switch", have.switch), ("remove-all", have.remove_all))
    expected = next((form for form, no in tried if no is None), "")
    if not expected:
        with pytest.raises(Unsupported, match=str(have.remove_all)):
            one(way, there())
        return
    move = one(way, there())
    assert move.form == expected
    assert move.travels_as == {"stays": way, "switch": "pmem", "remove-all": ""}[expected]
    assert move.why


def test_without_head_room_there_the_switch_falls_back_to_removing_all() -> None:
    move = one("vhost-pmem", there(head_room_bytes=0))
    assert move.form == "remove-all"
    assert "leave no room for its header" in move.why


def test_without_room_for_device_memory_here_it_falls_back_too() -> None:
    move = one("vhost-pmem", there(), memory_free_bytes=0)
    assert move.form == "remove-all"
    assert "maxmem" in move.why


def test_what_stays_needs_no_switch() -> None:
    assert one("pmem", there(), "switch").form == "stays"


def test_the_slot_of_what_leaves_is_the_travellers() -> None:
    move = one("vhost-pmem", there())
    assert (move.form, move.travels_as) == ("switch", "pmem")


def test_two_switches_do_not_count_the_same_room_twice() -> None:
    second = tagged(SIZE, tag=TAG.replace("5be13bce", "5be13bcf"))
    tags = {**there(), second.tag: msgspec.structs.replace(there()[TAG], tag=second.tag)}
    slots = (Slot("rp1", 8 << 30, common.device_id(TAG)), Slot("rp2", 8 << 30, "x"))
    vm = msgspec.structs.replace(ROOMY, slots=slots, memory_free_bytes=SIZE + 4 * MIB)
    both = [shown("vhost-pmem"), shown("vhost-pmem", second)]
    moves = judge(both, tags, WAYS, vm, Wish(), "w2")
    assert [move.form for move in moves] == ["switch", "remove-all"]


@pytest.mark.parametrize(
    ("target", "form", "changes", "reason"),
    [
        ({}, "auto", {}, "host w2 does not have it; attach it there first"),
        (there(size_bytes=SIZE * 2), "auto", {}, "has 268435456 bytes of it"),
        (there(), "stays", {"presenter": "ivshmem"}, "does not survive a migration"),
        (there(), "remove-all", {"presenter": "nvdimm"}, "cannot be unplugged"),
        (there(pieces=2), "stays", {}, "in 2 pieces"),
        (there(read_only=True), "stays", {}, "read-only"),
        (there(), "auto", {"state": "revoked"}, "it is revoked; detach it first"),
    ],
)
def test_what_cannot_move_is_said_before(
    target: dict[str, TargetTag], form: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        judge([shown("pmem", **changes)], target, WAYS, ROOMY, Wish(form), "w2")


def test_asked_for_a_tag_may_be_left_to_be_attached_later() -> None:
    move = one("pmem", {}, "remove-all")
    assert (move.form, move.attach, move.travels_as) == ("remove-all", False, "")
    assert later((move,), back=True) == ()


def test_what_was_switched_is_switched_back_where_that_is_wanted() -> None:
    moves = (one("vhost-pmem", there()), one("pmem", there()))
    assert [todo.way for todo in later(moves, back=True)] == ["vhost-pmem"]
    assert later(moves, back=False) == ()


# ---- the machine, made again


@pytest.mark.parametrize("way", STAYING)
def test_a_device_is_made_again_in_its_seat(way: str) -> None:
    what = tagged(SIZE)
    device_bytes = SIZE + WAYS[way].describe().header_bytes
    seat = Seat(TAG, way, device_bytes, 1 << 32, 3, "tmp2")
    plan = arrival(WAYS[way], what, seat, "vm1")
    words = arguments(plan, seat)
    assert words[::2] == ("-object", "-device")
    memory, device = json.loads(words[1]), json.loads(words[3])
    assert memory["share"] is True
    assert memory["qom-type"] == "memory-backend-file", "QEMU copies shared memory with no name"
    assert device["id"] == common.device_id(TAG)
    assert device["memdev"] == memory["id"]
    name, slotted = ADDRESSED[device["driver"]]
    assert device[name] == 1 << 32
    assert device.get("slot") == (3 if slotted else None)
    assert len(headers(plan)) == (1 if WAYS[way].describe().header_bytes else 0)


def test_a_seat_is_where_qemu_says() -> None:
    device = common.device_id(TAG)
    told = [{"type": "virtio-pmem", "data": {"id": device, "memaddr": 1 << 32, "size": 1}}]
    move = Move(TAG, "pmem", "stays", "pmem", "")
    (seat,) = seats([shown("pmem")], told, [move])
    assert (seat.address, seat.slot, seat.device_bytes) == (1 << 32, "tmp1", SIZE + 2 * MIB)
    with pytest.raises(OutcomeUnknown, match="does not say where"):
        seats([shown("pmem")], [], [move])


def test_a_tag_that_is_other_on_the_target_is_no_arrival() -> None:
    seat = Seat(TAG, "pmem", SIZE, 1 << 32, -1, "tmp1")
    with pytest.raises(Conflict, match="its device has"):
        arrival(WAYS["pmem"], tagged(SIZE), seat, "vm1")
    pieces = (Piece("/a", 2 * MIB, SIZE // 2), Piece("/b", 0, SIZE // 2))
    with pytest.raises(Unsupported, match="in 2 pieces"):
        arrival(WAYS["pmem"], tagged(SIZE, pieces=pieces), seat, "vm1")
    with pytest.raises(Unsupported, match="QEMU refuses"):
        arrival(WAYS["vhost-pmem"], tagged(SIZE), seat, "vm1")


@pytest.mark.parametrize(
    ("only_here", "why"),
    [
        ({"kernel": "/boot/vmlinuz"}, "of this host alone"),
        ({"qemu": "/usr/bin/qemu-system-x86_64"}, "of this host alone"),
        ({"forwards": ((8080, 80),)}, "of this host alone"),
        ({"append": "two\nlines"}, "of this host alone"),
    ],
)
def test_a_machine_with_what_only_this_host_has_stays(only_here: dict[str, Any], why: str) -> None:
    spec = VmSpec("vm1", "/run/vm/vm1")
    build = build_of(Start("vm1"), spec)
    assert build is not None
    again = same_machine(build, "vm1", spec.directory, ())
    assert again == msgspec.structs.replace(spec, incoming=True)
    record = VmRecord("vm1", "qmp", directory="/run/vm/vm1")
    stuck = build_of(Start("vm1", **only_here), spec)
    with pytest.raises(Unsupported, match=why):
        rebuildable(msgspec.structs.replace(record, build=stuck))
    with pytest.raises(Unsupported, match="by somebody else"):
        rebuildable(VmRecord("vm1", "qmp"))


# ---- the other host is not believed

INCOMING: dict[str, Any] = {
    "id": TAG,
    "name": "db1",
    "boot_id": "x",
    "build": {"qemu": "11.1", "memory_bytes": 512 * MIB},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../etc"},
        {"name": "x" * 64},
        {"build": {"qemu": "/tmp/evil", "memory_bytes": 512 * MIB}},
        {"build": {"qemu": "11.1", "memory_bytes": 1}},
        {"build": {"qemu": "11.1", "memory_bytes": 512 * MIB, "append": "a\nb"}},
        {"build": {"qemu": "11.1", "memory_bytes": 512 * MIB, "cpus": 65}},
        {"seats": [{"tag": TAG, "presenter": "pmem", "device_bytes": -1, "address": 0}]},
        {
            "seats": [
                {"tag": TAG, "presenter": "pmem", "device_bytes": 1, "address": 0, "slot": "a,b=c"}
            ]
        },
        {"later": [{"tag": TAG, "way": "x"}] * 257},
        {"deadline_ns": 1 << 62},
    ],
)
def test_what_another_host_asks_is_bounded(changes: dict[str, Any]) -> None:
    read(INCOMING, Incoming)
    with pytest.raises(InvalidInput, match="request"):
        read({**INCOMING, **changes}, Incoming)


def test_a_stream_goes_to_a_socket_of_a_vm_or_a_port_and_never_to_a_command() -> None:
    unix = Waiting("q35", "tcg", path="/run/w2/vm/db1/incoming")
    assert address(unix, "db1")["path"] == unix.path
    port = Waiting("q35", "tcg", address="192.0.2.7", port=4711)
    assert address(port, "db1") == {
        "transport": "socket", "type": "inet", "host": "192.0.2.7", "port": "4711",
    }  # fmt: skip
    for wrong in (Waiting("q35", "tcg"), Waiting("q35", "tcg", path="/run/docker.sock")):
        with pytest.raises(InvalidInput):
            address(wrong, "db1")
    for field, value in (("path", "exec:rm"), ("address", "exec:rm -rf"), ("port", 70_000)):
        with pytest.raises(InvalidInput):
            read({"machine": "q35", "accel": "tcg", field: value}, Waiting)
    with pytest.raises(InvalidInput):
        read({"id": "x" * 36}, About)


@pytest.mark.parametrize("given", [{"cxl_ports": 1}, {"cxl_window": "pool"}])
def test_a_vm_with_cxl_is_refused_before_anything_moves(given: Any, tmp_path: Path) -> None:
    """QEMU says that it has migrated, and the devices are dead afterwards."""
    if "cxl_window" in given:
        pool = tmp_path / "pool"
        pool.touch()
        os.truncate(pool, 256 * MIB)
        given = {"cxl_window": str(pool)}
    request = Start("vm1", **given)
    build = build_of(request, spec_of(request, "/run/vm1", ()))
    with pytest.raises(Unsupported, match="CXL devices, which QEMU does not migrate"):
        rebuildable(VmRecord("vm1", "/run/vm1/qmp", directory="/run/vm1", build=build))


def test_a_pool_that_is_no_window_is_refused(tmp_path: Path) -> None:
    small = tmp_path / "pool"
    small.write_bytes(b"")
    for path, said in ((small, "at least"), (tmp_path / "none", "No such file")):
        with pytest.raises(InvalidInput, match=said):
            spec_of(Start("vm1", cxl_window=str(path)), "/run/vm1", ())
