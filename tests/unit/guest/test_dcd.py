"""The driver in user space against a simulated device with QEMU's faults, and its structures
against the golden vectors."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import Conflict, InvalidInput, TagmemError, Unsupported
from tagmem.base.ids import NIL_TAG
from tagmem.guest import dcd
from tagmem.guest.dcd import Decoders, Driver, Extent, Mailbox, Offer, ReleaseAsked
from tagmem.guest.mmio import Mapped, Registers, perform
from tagmem.testing import type3
from tagmem.testing.type3 import QemuAborted, Type3
from tagmem.wire import generic, memdev
from tagmem.wire.extent import UpdatedExtent, WireExtent

MIB = 1 << 20
TAG = bytes.fromhex("5be13bceae344a77b6c316df975fcf1a")
VECTORS = Path(__file__).parents[2] / "vectors"


class Bench:
    """A driver on a device."""

    def __init__(self, device: Type3 | None = None) -> None:
        self.device = device or Type3()
        self.driver = self.again()

    def spaces(self) -> dict[str, Registers]:
        return {"device": self.device.device, "component": self.device.component}

    def do(self, steps: Any) -> Any:
        spaces = self.spaces()
        return perform(steps, spaces, lambda _: None)

    def again(self) -> Driver:
        """A driver that knows nothing, as after a reboot or a crash."""
        self.driver = Driver(self.do(Mailbox.find(0, type3.DEVICE_BYTES)))
        return self.driver

    def poll(self) -> list[Any]:
        events: list[Any] = self.do(self.driver.poll())
        return events

    def start(self) -> list[Any]:
        events: list[Any] = self.do(self.driver.start())
        return events


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.start()
    return made


# ---- finding


def test_registers_are_found_where_configuration_space_says() -> None:
    locator = dcd.locate(Type3.config())
    assert locator.blocks == {1: (0, 0), 3: (2, 0)}
    assert locator.dvsecs == {0: 0x10C, 8: 0x148}


@pytest.mark.parametrize("config", [b"", bytes(64), bytes(4096), Type3.config()[:256]])
def test_what_is_no_cxl_device_is_refused(config: bytes) -> None:
    with pytest.raises(Unsupported, match="no CXL device registers"):
        dcd.locate(config)


@given(st.binary(max_size=64), st.integers(0x100, 0x1C0))
def test_any_configuration_space_comes_to_an_end(junk: bytes, at: int) -> None:
    config = bytearray(Type3.config())
    config[at : at + len(junk)] = junk
    try:
        dcd.locate(bytes(config))
    except TagmemError:
        return


def test_the_firmware_tells_bridges_and_windows() -> None:
    bridges, windows = dcd.read_cedt(type3.cedt())
    assert bridges == {12: 0xA80000000}
    assert windows == [dcd.Window(0xA90000000, 4 << 30, (12,))]
    assert dcd.read_cedt(type3.cedt()[:50])[1] == []


def test_a_device_without_a_mailbox_is_refused() -> None:
    class Nothing:
        def read(self, offset: int, width: int) -> int:
            return (1 << 8 * width) - 1

        def write(self, offset: int, width: int, value: int) -> None:
            raise AssertionError("nothing may be written")

    with pytest.raises(Unsupported, match="no primary mailbox"):
        perform(Mailbox.find(0, 4096), {"device": Nothing()})


# ---- offers


def test_regions_and_extents_are_read(bench: Bench) -> None:
    assert [(r.base, r.length, r.block) for r in bench.driver.regions] == [
        (0, 512 * MIB, 2 * MIB),
        (512 * MIB, 512 * MIB, 2 * MIB),
    ]
    assert bench.driver.held == {}


def test_an_offer_is_accepted(bench: Bench) -> None:
    bench.device.offer((256 * MIB, 64 * MIB), (0, 2 * MIB))
    [offer] = bench.poll()
    assert offer.extents == (Extent(256 * MIB, 64 * MIB), Extent(0, 2 * MIB))
    assert bench.driver.why_not(offer) == ""
    bench.do(bench.driver.answer(offer, accept=True))
    assert [e.start_dpa for e in bench.device.accepted] == [256 * MIB, 0]
    assert (bench.device.log, list(bench.device.pending)) == ([], [])
    assert sorted(bench.driver.held) == [0, 256 * MIB]


def test_an_offer_is_refused(bench: Bench) -> None:
    bench.device.offer((0, 2 * MIB))
    [offer] = bench.poll()
    bench.do(bench.driver.answer(offer, accept=False))
    assert (bench.device.accepted, bench.device.log, list(bench.device.pending)) == ([], [], [])


def test_the_log_is_looked_at_by_one_register(bench: Bench) -> None:
    before = list(bench.device.commands)
    assert bench.poll() == []
    assert bench.device.commands == before


def test_an_offer_waits_in_the_log_until_it_is_answered(bench: Bench) -> None:
    bench.device.offer((0, 2 * MIB))
    [offer] = bench.poll()
    assert bench.poll() == []
    assert len(bench.device.log) == 1
    bench.again()
    [found] = bench.start()
    assert found.extents == offer.extents


def test_offers_are_answered_once_and_in_order(bench: Bench) -> None:
    bench.device.offer((0, 2 * MIB))
    bench.device.offer((2 * MIB, 2 * MIB))
    first, second = bench.poll()
    with pytest.raises(Conflict, match="to be answered next"):
        bench.do(bench.driver.answer(second, accept=True))
    bench.do(bench.driver.answer(first, accept=False))
    with pytest.raises(Conflict, match="to be answered next"):
        bench.do(bench.driver.answer(first, accept=False))
    bench.do(bench.driver.answer(second, accept=True))
    with pytest.raises(Conflict, match="to be answered next"):
        bench.do(bench.driver.answer(second, accept=False))
    assert list(bench.driver.held) == [2 * MIB]


def test_nothing_is_ever_answered_unasked(bench: Bench) -> None:
    """The device aborts when it is; the driver does not get so far."""
    bench.device.offer((0, 2 * MIB))
    bench.device.ask_release((0, 2 * MIB))
    bench.poll()
    made_up = Offer(99, (Extent(0, 2 * MIB),))
    for accept in (True, False):
        with pytest.raises(Conflict):
            bench.do(bench.driver.answer(made_up, accept=accept))
    assert 0x4802 not in bench.device.commands
    with pytest.raises(QemuAborted):
        Type3().execute(0x4802, bytes(8))


def interrupted(bench: Bench, steps: Any, accesses: int) -> None:
    """The driver dies after so many accesses."""
    answer = 0
    access = next(steps)
    for _ in range(accesses):
        space = bench.spaces()[access.space]
        if isinstance(access, dcd.Read):
            answer = space.read(access.offset, access.width)
        else:
            space.write(access.offset, access.width, access.value)
        access = steps.send(answer)


@pytest.mark.parametrize("accept", [True, False])
def test_a_driver_may_die_at_any_access_of_its_answer(accept: bool) -> None:
    """Whoever comes next neither answers twice nor loses what was accepted."""
    for accesses in range(1, 60):
        bench = Bench()
        bench.start()
        bench.device.offer((0, 2 * MIB))
        [offer] = bench.poll()
        try:
            interrupted(bench, bench.driver.answer(offer, accept=accept), accesses)
        except StopIteration:
            assert accesses > 15
            return  # It got to the end before it could be interrupted: all places were tried.
        bench.device.device.write(type3.MAILBOX + 4, 4, 0)
        bench.again()
        for event in bench.start():
            assert isinstance(event, Offer)
            bench.do(bench.driver.answer(event, accept=accept))
        if accept:
            assert [e.start_dpa for e in bench.device.accepted] == [0]
            assert list(bench.driver.held) == [0]
        bench.device.offer((8 * MIB, 2 * MIB))
        [following] = bench.poll()
        bench.do(bench.driver.answer(following, accept=True))
        assert list(bench.device.pending) == []
        assert 8 * MIB in bench.driver.held
    raise AssertionError("an answer takes fewer accesses")


def test_an_offer_longer_than_the_log_can_only_be_refused(bench: Bench) -> None:
    bench.device.offer(*[(n * 4 * MIB, 2 * MIB) for n in range(12)])
    [offer] = bench.poll()
    assert (offer.whole, len(offer.extents)) == (False, 8)
    with pytest.raises(Conflict, match="end of the offer was lost"):
        bench.do(bench.driver.answer(offer, accept=True))
    bench.do(bench.driver.answer(offer, accept=False))
    assert (bench.device.log, list(bench.device.pending)) == ([], [])
    bench.device.offer((0, 2 * MIB))
    [after] = bench.poll()
    bench.do(bench.driver.answer(after, accept=True))


def test_an_offer_longer_than_one_answer_of_the_log_is_whole() -> None:
    """On a device with a longer log than QEMU's: 15 records fit into one payload."""
    bench = Bench(Type3(log_max=100))
    bench.start()
    bench.device.offer(*[(n * 4 * MIB, 2 * MIB) for n in range(40)])
    [offer] = bench.poll()
    assert (offer.whole, len(offer.extents)) == (True, 40)
    bench.do(bench.driver.answer(offer, accept=True))
    assert len(bench.device.accepted) == 40


def test_tags_are_believed_while_there_are_any() -> None:
    bench = Bench(Type3(tags=True))
    bench.start()
    bench.device.offer((0, 2 * MIB), (4 * MIB, 2 * MIB), tag=TAG)
    [offer] = bench.poll()
    assert {e.tag for e in offer.extents} == {"5be13bce-ae34-4a77-b6c3-16df975fcf1a"}
    assert [e.sequence for e in offer.extents] == [0, 1]
    bench.do(bench.driver.answer(offer, accept=True))
    bench.do(bench.driver.read_extents())
    assert [e.tag for e in bench.driver.held.values()] == [offer.extents[0].tag] * 2
    bench.again()
    bench.start()
    assert [e.tag for e in bench.driver.held.values()] == [NIL_TAG] * 2, "QEMU forgets them"


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        ([Extent(MIB, 2 * MIB)], "not aligned"),
        ([Extent(0, MIB)], "not aligned"),
        ([Extent(0, 0)], "not aligned"),
        ([Extent(2048 * MIB, 2 * MIB)], "in no region"),
        ([Extent(510 * MIB, 4 * MIB)], "in no region"),
        ([Extent(0, 4 * MIB), Extent(2 * MIB, 2 * MIB)], "overlap"),
        ([Extent(100 * MIB, 2 * MIB)], "overlap"),
        ([Extent(0, 2 * MIB), Extent(4 * MIB, 2 * MIB, NIL_TAG, 2)], "gaps"),
    ],
)
def test_offers_are_judged_as_linux_judges_them(
    bench: Bench, extents: list[Extent], reason: str
) -> None:
    bench.driver.held[100 * MIB] = Extent(100 * MIB, 2 * MIB)
    assert reason in bench.driver.why_not(Offer(1, tuple(extents)))


# ---- release


def test_a_release_is_asked_for_and_answered(bench: Bench) -> None:
    bench.device.offer((0, 2 * MIB))
    [offer] = bench.poll()
    bench.do(bench.driver.answer(offer, accept=True))
    bench.device.ask_release((0, 2 * MIB))
    [asked] = bench.poll()
    assert asked == ReleaseAsked((Extent(0, 2 * MIB),))
    assert bench.device.log == []
    bench.do(bench.driver.release(asked.extents))
    assert (bench.device.accepted, bench.driver.held) == ([], {})


def test_only_what_is_held_is_released(bench: Bench) -> None:
    with pytest.raises(Conflict, match="is not held"):
        bench.do(bench.driver.release([Extent(0, 2 * MIB)]))
    with pytest.raises(InvalidInput):
        bench.do(bench.driver.release([]))


def test_many_extents_are_read_in_pages() -> None:
    bench = Bench()
    bench.device.accepted = [WireExtent(n * 2 * MIB, 2 * MIB) for n in range(120)]
    bench.start()
    assert len(bench.driver.held) == 120


def test_a_refusal_of_the_device_has_its_code(bench: Bench) -> None:
    with pytest.raises(dcd.CommandFailed, match="4803h") as failed:
        bench.do(bench.driver._mailbox.command(0x4803, bytes(8)))
    assert failed.value.code == 2


def test_a_mailbox_that_does_not_answer_is_given_up() -> None:
    bench = Bench()
    bench.device.device._ring = lambda: None  # type: ignore[method-assign]  # a dead device
    with pytest.raises(Unsupported, match="does not finish 4800h"):
        bench.start()


@given(st.data())
def test_no_output_of_a_device_hurts(data: st.DataObject) -> None:
    """A hostile device answers anything: errors of ours, and in bounded time."""
    bench = Bench()
    outputs = st.binary(max_size=400) | st.just(b"\xff" * 2048)

    def anything(opcode: int, payload: bytes) -> tuple[Any, bytes]:
        return 0, data.draw(outputs)

    bench.device.execute = anything  # type: ignore[method-assign]  # what it answers is drawn
    try:
        bench.start()
    except TagmemError:
        return


# ---- decoders


def decoders(bench: Bench) -> Decoders:
    found: Decoders = bench.do(Decoders.find("component", 0, type3.COMPONENT_BYTES))
    return found


def test_a_decoder_is_committed_and_taken_down(bench: Bench) -> None:
    found = decoders(bench)
    assert found.count == 4
    bench.do(found.program(0, 0xA90000000, 1 << 30, skip=256 * MIB))
    component = bench.device.component
    words = [component.read(type3.HDM + 0x10 + 4 * n, 4) for n in range(7)]
    assert words == [0x90000000, 0xA, 0x40000000, 0, 0x1600, 0x10000000, 0]
    bench.do(found.program(0, 0xA90000000, 1 << 30, skip=256 * MIB))
    with pytest.raises(Conflict, match="is committed for"):
        bench.do(found.program(0, 0xA90000000, 2 << 30))
    bench.do(found.tear_down(0))
    assert component.read(type3.HDM + 0x20, 4) == 0x1000
    bench.do(found.program(0, 0xA90000000, 2 << 30))


@pytest.mark.parametrize(
    ("number", "base", "size"), [(4, 0, 1 << 30), (0, 1 << 20, 1 << 30), (0, 0, 0), (0, 0, 4096)]
)
def test_what_a_decoder_cannot_do_is_not_written(
    bench: Bench, number: int, base: int, size: int
) -> None:
    with pytest.raises(InvalidInput):
        bench.do(decoders(bench).program(number, base, size))


def test_a_pass_through_bridge_needs_nothing() -> None:
    class PassThrough:
        def read(self, offset: int, width: int) -> int:
            return {0x1000: 1 | 1 << 24, 0x1004: 2}.get(offset, 0)

        def write(self, offset: int, width: int, value: int) -> None:
            raise AssertionError("nothing may be written")

    found = perform(Decoders.find("bridge", 0, 1 << 16), {"bridge": PassThrough()})
    assert found is None


# ---- accesses


def test_accesses_have_their_width_and_their_place(tmp_path: Path) -> None:
    path = tmp_path / "resource2"
    path.write_bytes(bytes(4096))
    registers = Mapped(str(path))
    registers.write(8, 8, 0x1122334455667788)
    registers.write(4, 4, 0xAABBCCDD)
    assert path.read_bytes()[4:16].hex() == "ddccbbaa8877665544332211"
    assert (registers.read(8, 4), registers.read(8, 8)) == (0x55667788, 0x1122334455667788)
    for offset, width in ((0, 1), (0, 2), (2, 4), (4, 8), (4096, 4), (4092, 8), (-4, 4)):
        with pytest.raises(InvalidInput, match="access"):
            registers.read(offset, width)
    registers.close()


def test_the_device_dies_of_a_byte() -> None:
    with pytest.raises(QemuAborted):
        Type3().device.write(type3.MAILBOX + 4, 1, 1)


# ---- the same structures as wire's


def golden(name: str) -> bytes:
    text = tomllib.loads((VECTORS / f"{name}.toml").read_text())["hex"]
    lines = (line.partition("#")[0] for line in text.splitlines())
    return bytes.fromhex("".join(lines))


def test_the_structures_are_those_of_wire() -> None:
    record = golden("event-dynamic-capacity-add")
    fields = dcd.LAYOUTS["record"].unpack(record)
    known = generic.DynamicCapacityRecord.decode(record)
    assert fields["uuid"] == known.header.identifier
    assert (fields["handle"], fields["type"]) == (known.header.handle, known.type)
    assert (fields["dc_flags"] & 1, fields["extents_available"]) == (0, known.extents_available)
    extent = WireExtent.decode(fields["extent"])
    assert extent == known.extent
    assert dcd.LAYOUTS["record"].pack(**fields) == record
    assert dcd.LAYOUTS["record"].size == 128
    events = golden("0100-get-event-records-response")
    head = dcd.LAYOUTS["events"].unpack(events)
    assert head == {
        "flags": 3,
        "lost": 3,
        "first_ns": 0x0102030405060708,
        "last_ns": 0x1112131415161718,
        "count": 2,
    }
    assert dcd.LAYOUTS["events"].pack(**head) == events[: dcd.LAYOUTS["events"].size]
    for name in ("extent", "extent-shared"):
        parsed = WireExtent.decode(golden(name))
        ours = dcd.LAYOUTS["extent"].unpack(golden(name))
        assert ours == {f: getattr(parsed, f) for f in ours}
        assert dcd.LAYOUTS["extent"].pack(**ours) == golden(name)


def test_the_lists_are_those_of_wire() -> None:
    data = golden("4800-get-dc-configuration-response")
    known = memdev.GetDcConfigurationResponse.decode(data)
    assert dcd.LAYOUTS["configuration"].unpack(data) == {
        "available": known.regions_available,
        "returned": len(known.regions),
    }
    for number, region in enumerate(known.regions):
        ours = dcd.LAYOUTS["region"].unpack(data, 8 + 40 * number)
        assert (ours["base"], ours["length"]) == (region.base_dpa, region.length_bytes)
        assert ours["decode_units"] << 28 == region.decode_length_bytes
        assert (ours["block"], ours["dsmad"]) == (region.block_bytes, region.dsmad_handle)
        assert bool(ours["flags"] & 1) is region.sanitise_on_release
    assert dcd.LAYOUTS["counts"].unpack(data, 8 + 40 * 2)["extents"] == known.extents_supported
    listed = golden("4801-get-dc-extent-list-response")
    extents = memdev.GetDcExtentListResponse.decode(listed)
    assert dcd.LAYOUTS["extents"].unpack(listed) == {
        "returned": len(extents.extents),
        "total": extents.extents_total,
        "generation": extents.generation,
    }


def test_the_requests_are_those_of_wire() -> None:
    layouts = dcd.LAYOUTS
    one = layouts["updated"].pack(start_dpa=0x40000000, length_bytes=0x10000000)
    assert layouts["list"].pack(count=1) + one == golden("4802-add-dc-response-request")
    assert layouts["list"].pack() == golden("4802-add-dc-response-request-refused")
    assert UpdatedExtent.decode(one) == UpdatedExtent(0x40000000, 0x10000000)
    clear = layouts["clear-events"].pack(log=4, count=1) + b"\1\0"
    assert clear == golden("0101-clear-event-records-request")
    known = memdev.GetDcExtentListRequest(7, 9).encode()
    assert layouts["get-extents"].pack(wanted=7, first=9) == known
    asked = memdev.GetDcConfigurationRequest(8, 0).encode()
    assert layouts["get-configuration"].pack(wanted=8) == asked
    log = generic.GetEventRecordsRequest(generic.EventLog.DYNAMIC_CAPACITY).encode()
    assert layouts["get-events"].pack(log=4) == log
