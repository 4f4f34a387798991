"""Opcodes to events and back: what each port answers, and what it cuts to its payload."""

from __future__ import annotations

from typing import Any

import pytest

from tagmem.appliance.dispatch import Ask, FmDispatch, HostDispatch, Identity, Immediate
from tagmem.base.ids import Tag, tag_to_bytes
from tagmem.base.units import MIB
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_records import Adopt, DeviceSpec, LdSpec, RegionSpec
from tagmem.ports import Loaded
from tagmem.wire import fmapi, generic, memdev, vendor
from tagmem.wire.cci import Opcode, ReturnCode
from tagmem.wire.commands import COMMANDS, Unsupported, command_of
from tagmem.wire.exchange import Malformed
from tagmem.wire.extent import UpdatedExtent
from tagmem.wire.layout import WireStruct

B = 2 * MIB
T1 = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")
SPEC = DeviceSpec(
    (RegionSpec(0, 64 * B, B), RegionSpec(1, 64 * B, B, sharable=True, hardware_coherent=True)),
    (LdSpec("w1"), LdSpec("w2", mirrored=True)),
)


class Device:
    def __init__(self) -> None:
        identity = Identity("z1", "0.1.0", SPEC)
        self.hosts = tuple(HostDispatch(identity, ld, 2048) for ld in range(2))
        self.fm = FmDispatch(identity, self.hosts)
        self.machine = DeviceMachine(SPEC)
        self.machine.restore(Loaded((), (), 0))
        self.machine.step(Adopt("m"), 0)

    def ask(self, port: HostDispatch | FmDispatch, request: WireStruct) -> tuple[int, Any]:
        command = command_of(request)
        plan = port.plan(command.opcode, request)
        if isinstance(plan, Immediate):
            code, body = plan.code, plan.body
        else:
            code, body = plan.said(self.machine.step(plan.event, 1).reply)
        if code == ReturnCode.SUCCESS and body is not None:
            assert isinstance(body, command.response)
            assert command.response.decode(body.encode()) == body
        return code, body

    def add(self, blocks: int, tag: Tag = T1) -> int:
        free = fmapi.SelectionPolicy.FREE
        request = fmapi.InitiateDcAddRequest(0, free, 0, blocks * B, tag_to_bytes(tag))
        return self.ask(self.fm, request)[0]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.mark.parametrize(
    "request_",
    [
        generic.IdentifyRequest(),
        generic.GetEventRecordsRequest(generic.EventLog.FATAL),
        generic.GetEventInterruptPolicyRequest(),
        generic.SetEventInterruptPolicyRequest(1, 1, 1, 1, 1),
        generic.GetSupportedLogsRequest(),
        fmapi.GetLdInfoRequest(),
        fmapi.GetLdAllocationsRequest(),
        fmapi.GetMultiHeadedInfoRequest(),
        fmapi.GetHeadInfoRequest(0, 5),
        fmapi.GetDcdInfoRequest(),
        fmapi.GetHostDcRegionConfigurationRequest(1),
        fmapi.SetDcRegionConfigurationRequest(0, B, True),
        fmapi.GetDcRegionExtentListsRequest(1, 10),
        fmapi.DcListTagsRequest(0, 10),
        vendor.GetSanitiseRecordRequest(tag_to_bytes(T1)),
        vendor.GetPoolMapRequest(1),
        vendor.FenceRequest(0, tag_to_bytes(T1)),
    ],
)
def test_the_fabric_manager_is_answered(device: Device, request_: WireStruct) -> None:
    assert device.ask(device.fm, request_)[0] == ReturnCode.SUCCESS


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (generic.IdentifyMemoryDeviceRequest(), 0),
        (memdev.GetDcConfigurationRequest(), 0),
        (memdev.GetDcConfigurationRequest(8, 2), ReturnCode.INVALID_INPUT),
        (memdev.GetDcExtentListRequest(5), 0),
        (memdev.GetDcExtentListRequest(5, 1), ReturnCode.INVALID_INPUT),
        (memdev.AddDcResponseRequest(()), ReturnCode.INVALID_INPUT),
        (memdev.ReleaseDcRequest((UpdatedExtent(0, B),)), ReturnCode.INVALID_PHYSICAL_ADDRESS),
        (vendor.GetExtentMediaRequest(tag_to_bytes(T1)), ReturnCode.INVALID_INPUT),
        (generic.GetLogRequest(bytes(16), 0, 4), ReturnCode.INVALID_LOG),
        (generic.GetLogRequest(generic.CEL_UUID, 0, 4), 0),
        (generic.GetLogRequest(generic.CEL_UUID, 0, 4000), ReturnCode.INVALID_INPUT),
        (fmapi.GetDcdInfoRequest(), ReturnCode.UNSUPPORTED),
    ],
)
def test_a_host_is_answered(device: Device, request_: WireStruct, code: int) -> None:
    assert device.ask(device.hosts[0], request_)[0] == code


def test_what_cannot_be_read_gets_its_code(device: Device) -> None:
    unknown = device.fm.plan(0x1234, Unsupported(0x1234))
    assert isinstance(unknown, Immediate)
    assert unknown.code == ReturnCode.UNSUPPORTED
    bad = Malformed(ReturnCode.INVALID_PAYLOAD_LENGTH, "short")
    plan = device.fm.plan(Opcode.INITIATE_DC_ADD, bad)
    assert isinstance(plan, Immediate)
    assert plan.code == ReturnCode.INVALID_PAYLOAD_LENGTH


def test_every_command_has_a_port(device: Device) -> None:
    answered = {
        opcode
        for port in (device.fm, device.hosts[0])
        for opcode in COMMANDS
        if opcode in port._table
    }
    assert set(COMMANDS) - answered == {Opcode.EVENT_NOTIFICATION}


def test_pages_are_cut_to_the_payload(device: Device) -> None:
    for index in range(60):
        tag = Tag(f"00000000-0000-4000-8000-0000000000{index:02}")
        assert device.add(1, tag) == 0
    code, events = device.ask(
        device.hosts[0], generic.GetEventRecordsRequest(generic.EventLog.DYNAMIC_CAPACITY)
    )
    assert (code, len(events.records), events.more_records) == (0, 15, True)
    for record in list(device.machine.state.ports[0].records):
        accept = memdev.AddDcResponseRequest((UpdatedExtent(record.start, record.length),))
        assert device.ask(device.hosts[0], accept)[0] == 0
    _, page = device.ask(device.hosts[0], memdev.GetDcExtentListRequest(1000))
    assert (len(page.extents), page.extents_total) == (50, 60)
    _, whole = device.ask(device.fm, fmapi.GetDcRegionExtentListsRequest(0, 1000))
    assert len(whole.extents) == 60


def test_sharers_are_bits_of_the_map(device: Device) -> None:
    contiguous = fmapi.SelectionPolicy.CONTIGUOUS
    add = fmapi.InitiateDcAddRequest(0, contiguous, 1, B, tag_to_bytes(T1))
    assert device.ask(device.fm, add)[0] == 0
    share = fmapi.SelectionPolicy.ENABLE_SHARED_ACCESS
    again = fmapi.InitiateDcAddRequest(1, share, 1, 0, tag_to_bytes(T1))
    assert device.ask(device.fm, again)[0] == 0
    start = device.machine.state.ports[1].records[0].start
    accept = memdev.AddDcResponseRequest((UpdatedExtent(start, B),))
    assert device.ask(device.hosts[1], accept)[0] == 0
    _, listed = device.ask(device.fm, fmapi.DcListTagsRequest(0, 5))
    (entry,) = listed.tags
    assert (entry.reference_bitmap[0], entry.pending_bitmap[0]) == (0b10, 0b01)


def test_an_interrupt_policy_reads_back(device: Device) -> None:
    policy = generic.SetEventInterruptPolicyRequest(1, 0, 0, 1, 0)
    assert device.ask(device.hosts[0], policy)[0] == 0
    _, found = device.ask(device.hosts[0], generic.GetEventInterruptPolicyRequest())
    assert (found.informational, found.fatal, found.dynamic_capacity) == (1, 1, 0)
    plan = device.hosts[0].plan(
        Opcode.SET_EVENT_INTERRUPT_POLICY, generic.SetEventInterruptPolicyRequest(3, 0, 0, 0)
    )
    assert isinstance(plan, Ask)
    assert device.machine.step(plan.event, 1).reply.code == ReturnCode.INVALID_INPUT
