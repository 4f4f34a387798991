"""Somebody at an appliance's ports whom the orchestrator does not know: another fabric manager, or
a host without an agent of ours.

It speaks the same bytes as everybody, so what it does to the appliance is what a stranger can do.
"""

from __future__ import annotations

from collections.abc import Callable

from tagmem.base.ids import Tag, tag_to_bytes
from tagmem.base.units import SECOND, Bytes
from tagmem.domain.device_records import FM_PORT
from tagmem.testing.device import ApplianceProcess
from tagmem.testing.nodes import Connection
from tagmem.testing.sim import Simulation
from tagmem.wire.cci import Opcode, return_code_name
from tagmem.wire.exchange import Requester, Response
from tagmem.wire.extent import UpdatedExtent
from tagmem.wire.fmapi import InitiateDcAddRequest, SelectionPolicy
from tagmem.wire.generic import (
    ClearEventRecordsRequest,
    DcEventType,
    DynamicCapacityRecord,
    EventLog,
    GetEventRecordsRequest,
    GetEventRecordsResponse,
)
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream
from tagmem.wire.memdev import AddDcResponseRequest, ReleaseDcRequest

DEADLINE_NS = 5 * SECOND
Then = Callable[[Response], None]
Listen = Callable[[Connection, str], None]


class Rogue:
    """One stranger, with one session at a time."""

    def __init__(
        self, sim: Simulation, name: str, device: ApplianceProcess, opened: Listen
    ) -> None:
        self._sim = sim
        self._name = name
        self._device = device
        self._opened = opened
        self._wire: Connection | None = None
        self._requester = Requester(MctpStream(FM_EID, DEVICE_EID))
        self._waiting: dict[int, Then] = {}
        self._held: dict[int, tuple[UpdatedExtent, ...]] = {}

    def connect(self, port: int) -> None:
        """Take a port, displacing whoever has it."""
        self._requester = Requester(MctpStream(FM_EID, DEVICE_EID))
        self._wire = self._device.accept(port, self._receive, fifo=True)
        if self._wire is None:
            self._sim.say(f"{self._name}: nobody listens")
            return
        self._opened(self._wire, self._name)

    def _ask(self, opcode: Opcode, request: WireStruct, then: Then) -> None:
        if self._wire is None:
            return
        now = self._sim.now()
        key = self._requester.request(opcode, request, now, now + DEADLINE_NS)
        self._waiting[key] = then
        self._wire.up.send(self._requester.outgoing())

    def _receive(self, data: bytes) -> None:
        for item in self._requester.feed(data, self._sim.now()):
            if isinstance(item, Response):
                self._waiting.pop(item.key)(item)

    def _said(self, response: Response) -> None:
        self._sim.say(f"{self._name}: {return_code_name(response.return_code)}")

    def add(self, ld: int, tag: Tag, size_bytes: Bytes) -> None:
        """Have capacity offered to an LD (5604h), placed by the device."""
        self.connect(FM_PORT)
        request = InitiateDcAddRequest(
            ld,
            SelectionPolicy.CONTIGUOUS,
            length_bytes=size_bytes,
            tag=tag_to_bytes(tag),
        )
        self._ask(Opcode.INITIATE_DC_ADD, request, self._said)

    def accept(self, ld: int) -> None:
        """As the host of an LD: take the first offer (4802h)."""
        self.connect(ld)
        log = EventLog.DYNAMIC_CAPACITY

        def answer(response: Response) -> None:
            body = response.body
            assert isinstance(body, GetEventRecordsResponse)
            records = [
                record
                for record in body.records
                if isinstance(record, DynamicCapacityRecord)
                and record.type is DcEventType.ADD_CAPACITY
            ]
            held = tuple(
                UpdatedExtent(record.extent.start_dpa, record.extent.length_bytes)
                for record in records
            )
            self._held[ld] = held
            self._ask(Opcode.ADD_DC_RESPONSE, AddDcResponseRequest(held), self._said)
            handles = tuple(record.header.handle for record in records)
            clear = ClearEventRecordsRequest(log, handles)
            self._ask(Opcode.CLEAR_EVENT_RECORDS, clear, lambda _: None)

        self._ask(Opcode.GET_EVENT_RECORDS, GetEventRecordsRequest(log), answer)

    def give_back(self, ld: int) -> None:
        """As the host of an LD: release what was taken (4803h)."""
        request = ReleaseDcRequest(self._held.pop(ld, ()))
        self._ask(Opcode.RELEASE_DC, request, self._said)
