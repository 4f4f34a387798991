"""The back-end's side of a vhost-user connection, without I/O: what each message of a front-end
leads to.

`VhostUserBackend.feed(bytes, descriptors)` returns actions, in order, that the caller carries out.
It is total: whatever comes, in whatever order, it answers as the protocol says, or ends the
session with a Fault. The session owns no descriptor: each one that is fed is handed out in exactly
one action, `Discard` where nobody wants it.

The device has phases, and memory may be mapped or unmapped in one of them only. QEMU 11.1 crashes
when it is asked before the device was started or after it was stopped, so the rule is part of the
state:

    IDLE --start--> STARTED --stop--> STOPPED --start--> STARTED      any --fault--> FAULTED

*start* is SET_FEATURES with the bit that says where the memory lies; *stop* is GET_VRING_BASE (the
guest unbound its driver, or the VM was paused), RESET_DEVICE, RESET_OWNER, a status of zero, or
SET_FEATURES without that bit.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import ClassVar

import msgspec

from tagmem.base.limits import VHOST_MEMORY_SLOTS_MAX
from tagmem.wire.fields import DecodeError
from tagmem.wire.layout import WireStruct
from tagmem.wire.vhost_user import (
    CONFIG_BYTES_MAX,
    SHMEM_REGIONS,
    TABLE_REGIONS_MAX,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    VRING_INDEX_MASK,
    VRING_NO_DESCRIPTOR,
    BackRequest,
    ConfigSpace,
    Framer,
    FrontRequest,
    MemoryRegion,
    MemoryTable,
    Message,
    Number,
    ProtocolFeature,
    SharedMemoryConfig,
    SharedMemoryMap,
    SingleRegion,
    Unframed,
    VringAddress,
    VringState,
    message,
)

PROTOCOL_FEATURES = sum(
    1 << feature
    for feature in (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ProtocolFeature.BACKEND_SEND_FD,
        ProtocolFeature.STATUS,
        ProtocolFeature.SHMEM,
    )
)
"""Always offered. CONFIGURE_MEM_SLOTS is offered where it is asked for: with it QEMU 11.1 crashes
when a device that had shared memory is started again after a reset (it looks up the memory that it
dropped, to tell that it is gone), and without it a front-end tells of 8 regions at most.
"""
_ADDRESSES = 1 << 64


class Phase(Enum):
    """Of the device, as this connection tells it."""

    IDLE = "idle"
    STARTED = "started"
    STOPPED = "stopped"
    FAULTED = "faulted"


class Trigger(Enum):
    """What changes the phase."""

    START = "start"
    STOP = "stop"
    FAULT = "fault"


TRANSITIONS: dict[tuple[Phase, Trigger], Phase] = {
    (Phase.IDLE, Trigger.START): Phase.STARTED,
    (Phase.IDLE, Trigger.STOP): Phase.IDLE,
    (Phase.IDLE, Trigger.FAULT): Phase.FAULTED,
    (Phase.STARTED, Trigger.START): Phase.STARTED,
    (Phase.STARTED, Trigger.STOP): Phase.STOPPED,
    (Phase.STARTED, Trigger.FAULT): Phase.FAULTED,
    (Phase.STOPPED, Trigger.START): Phase.STARTED,
    (Phase.STOPPED, Trigger.STOP): Phase.STOPPED,
    (Phase.STOPPED, Trigger.FAULT): Phase.FAULTED,
    (Phase.FAULTED, Trigger.START): Phase.FAULTED,
    (Phase.FAULTED, Trigger.STOP): Phase.FAULTED,
    (Phase.FAULTED, Trigger.FAULT): Phase.FAULTED,
}


# -- actions ---------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Bytes for the front-end."""

    data: bytes


class Discard(msgspec.Struct, frozen=True):
    """Close this descriptor: nobody wants it."""

    descriptor: int


class Channel(msgspec.Struct, frozen=True):
    """The back-end's own channel, a socket; it takes the place of an earlier one."""

    descriptor: int


class AddMemory(msgspec.Struct, frozen=True):
    """Guest memory, and the file that has it."""

    region: MemoryRegion
    descriptor: int


class RemoveMemory(msgspec.Struct, frozen=True):
    """Guest memory that was added goes away, and its descriptor with it."""

    region: MemoryRegion


class Line(Enum):
    """The eventfds of a queue."""

    KICK = "kick"
    CALL = "call"
    ERROR = "error"


class SetLine(msgspec.Struct, frozen=True):
    """A queue's eventfd (-1 for none) takes the place of the one before."""

    line: Line
    index: int
    descriptor: int


class RingSetup(msgspec.Struct, frozen=True):
    """Where a queue lies, in the front-end's own (user) addresses."""

    num: int
    descriptors: int
    available: int
    used: int
    base: int


class RingStart(msgspec.Struct, frozen=True):
    """Serve this queue from now on."""

    index: int
    setup: RingSetup


class RingStop(msgspec.Struct, frozen=True):
    """Do not touch this queue any more."""

    index: int


class Started(msgspec.Struct, frozen=True):
    """The device runs: memory may be mapped, and should be at once."""


class Stopped(msgspec.Struct, frozen=True):
    """The device stands still: nothing may be sent on the back-end's channel."""

    reason: str


class Fault(msgspec.Struct, frozen=True):
    """The connection is of no use any more; close it."""

    reason: str


Action = (
    Send
    | Discard
    | Channel
    | AddMemory
    | RemoveMemory
    | SetLine
    | RingStart
    | RingStop
    | Started
    | Stopped
    | Fault
)


class Refused(Exception):
    """This message cannot be carried out; the front-end is told so if it asked to be told."""


class _Rule(msgspec.Struct, frozen=True):
    """One line of the table of messages: who carries it out, what it brings, what it needs."""

    handler: Callable[..., bytes | None]
    body: type[WireStruct] | None = None
    replies: bool = False
    needs: ProtocolFeature | None = None
    descriptors_min: int = 0
    descriptors_max: int = 0


_P = ProtocolFeature
_F = FrontRequest


class _Ring:
    """What the front-end has said of one queue."""

    def __init__(self) -> None:
        self.num = 0
        self.address: VringAddress | None = None
        self.base = 0
        self.kick = False
        self.enabled = False
        self.running = False

    def setup(self) -> RingSetup | None:
        if not (self.num and self.address and self.kick and self.enabled):
            return None
        where = self.address
        return RingSetup(self.num, where.descriptors, where.available, where.used, self.base)


class VhostUserBackend:
    """One connection of one device with shared-memory regions of these sizes, and `queues` queues.

    `device_features` are the device's own feature bits; they are what *start* waits for.
    """

    def __init__(
        self,
        shared_bytes: tuple[int, ...],
        config: bytes,
        device_features: int,
        queues: int = 1,
        *,
        memory_slots: bool = False,
    ) -> None:
        if not 0 < len(config) <= CONFIG_BYTES_MAX:
            raise ValueError(f"config: must have 1 to {CONFIG_BYTES_MAX} bytes, got {len(config)}")
        self.phase = Phase.IDLE
        self.features = 0
        self.protocol_features = 0
        self.status = 0
        self.memory: dict[int, MemoryRegion] = {}
        """Guest memory by its guest-physical address."""
        self._device_features = device_features
        self._offered = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | device_features
        if not 0 < len(shared_bytes) <= SHMEM_REGIONS:
            raise ValueError(f"regions: must be 1 to {SHMEM_REGIONS}, got {len(shared_bytes)}")
        slots = 1 << ProtocolFeature.CONFIGURE_MEM_SLOTS
        self._protocol_offered = PROTOCOL_FEATURES | (slots if memory_slots else 0)
        self._shared_bytes = shared_bytes
        self._config = config
        self._rings = [_Ring() for _ in range(queues)]
        self._framer = Framer()
        self._actions: list[Action] = []

    def feed(self, data: bytes, descriptors: list[int]) -> list[Action]:
        """What these bytes, and the descriptors that came with them, lead to. Never raises for
        anything that came from outside.
        """
        if self._faulted():
            return [Discard(descriptor) for descriptor in descriptors]
        for item in self._framer.feed(data, descriptors):
            if isinstance(item, Message) and not self._faulted():
                self._message(item)
                continue
            self._actions += [Discard(descriptor) for descriptor in item.descriptors]
            if isinstance(item, Unframed):
                self._fault(item.reason)
        actions, self._actions = self._actions, []
        return actions

    def end(self) -> list[Action]:
        """The connection is gone: queues and memory go with it."""
        self._fault("the connection ended")
        actions, self._actions = self._actions, []
        return actions

    def completed(self, index: int, base: int) -> None:
        """How far a queue was served; a front-end that stops it is told."""
        self._rings[index].base = base

    @property
    def may_map(self) -> bool:
        """Whether SHMEM_MAP and SHMEM_UNMAP may be sent now."""
        return self.phase is Phase.STARTED

    # -- messages ----------------------------------------------------------------------------------

    def _message(self, item: Message) -> None:
        header = item.header
        rule = self.RULES.get(header.request)
        left = list(item.descriptors)
        reply: bytes | None = None
        refused = ""
        try:
            if rule is None:
                raise Refused(f"request {header.request} is not known")
            self._allowed(rule, item)
            body = None if rule.body is None else rule.body.decode(item.payload)
            reply = rule.handler(self, body, left)
        except (Refused, DecodeError) as error:
            refused = str(error)
        self._actions += [Discard(descriptor) for descriptor in left]
        if rule is not None and rule.replies:
            if refused:
                # The front-end waits for an answer that cannot be given.
                self._fault(f"{FrontRequest(header.request).name}: {refused}")
            elif reply is not None:
                self._send(header.request, reply)
        elif header.need_reply and self._has(ProtocolFeature.REPLY_ACK):
            self._send(header.request, Number(int(bool(refused))).encode())

    def _allowed(self, rule: _Rule, item: Message) -> None:
        if item.header.reply:
            raise Refused("a reply to nothing")
        if rule.needs is not None and not self._has(rule.needs):
            raise Refused(f"{rule.needs.name} was not negotiated")
        if rule.body is None and item.payload:
            raise Refused(f"payload bytes: must be 0, got {len(item.payload)}")
        if not rule.descriptors_min <= len(item.descriptors) <= rule.descriptors_max:
            limit = f"{rule.descriptors_min} to {rule.descriptors_max}"
            raise Refused(f"descriptors: must be {limit}, got {len(item.descriptors)}")

    def _faulted(self) -> bool:
        return self.phase is Phase.FAULTED

    def _has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    def _send(self, request: int, payload: bytes) -> None:
        self._actions.append(Send(message(request, payload, reply=True)))

    def _trigger(self, trigger: Trigger, reason: str = "") -> None:
        before, self.phase = self.phase, TRANSITIONS[self.phase, trigger]
        if before is self.phase:
            return
        if self.phase is Phase.STARTED:
            self._actions.append(Started())
        elif before is Phase.STARTED:
            self._actions.append(Stopped(reason))

    def _fault(self, reason: str) -> None:
        if self._faulted():
            return
        self._actions += [Discard(descriptor) for descriptor in self._framer.end()]
        for index in range(len(self._rings)):
            self._halt(index)
        self._trigger(Trigger.FAULT, reason)
        self._actions.append(Fault(reason))

    # -- handlers: each returns the payload of the reply, for requests that have one ---------------

    def _get_features(self, body: None, descriptors: list[int]) -> bytes:
        return Number(self._offered).encode()

    def _set_features(self, body: Number, descriptors: list[int]) -> None:
        _subset("features", body.value, self._offered)
        self.features = body.value
        if not body.value & VHOST_USER_F_PROTOCOL_FEATURES:
            # Without them there is no SET_VRING_ENABLE, and queues are enabled from the start.
            for index, ring in enumerate(self._rings):
                ring.enabled = True
                self._weigh(index)
        wanted = self._device_features | VIRTIO_F_VERSION_1
        if body.value & wanted == wanted:
            self._trigger(Trigger.START)
        else:
            self._trigger(Trigger.STOP, "the driver gave the device's features up")

    def _set_owner(self, body: None, descriptors: list[int]) -> None:
        pass

    def _reset(self, body: None, descriptors: list[int]) -> None:
        for index in range(len(self._rings)):
            self._halt(index)
            self._rings[index] = _Ring()
        self._trigger(Trigger.STOP, "the device was reset")

    def _get_protocol_features(self, body: None, descriptors: list[int]) -> bytes:
        return Number(self._protocol_offered).encode()

    def _set_protocol_features(self, body: Number, descriptors: list[int]) -> None:
        _subset("protocol features", body.value, self._protocol_offered)
        self.protocol_features = body.value

    def _get_queue_num(self, body: None, descriptors: list[int]) -> bytes:
        return Number(len(self._rings)).encode()

    def _get_config(self, body: ConfigSpace, descriptors: list[int]) -> bytes:
        end = body.offset + len(body.content)
        if end > len(self._config):
            # The protocol's way to say that there is no such configuration.
            return b""
        content = self._config[body.offset : end]
        return ConfigSpace(body.offset, body.flags, content).encode()

    def _set_config(self, body: ConfigSpace, descriptors: list[int]) -> None:
        raise Refused("the device's configuration cannot be written")

    def _get_status(self, body: None, descriptors: list[int]) -> bytes:
        return Number(self.status).encode()

    def _set_status(self, body: Number, descriptors: list[int]) -> None:
        self.status = body.value & 0xFF
        if not self.status:
            self._trigger(Trigger.STOP, "the driver reset the device")

    def _set_channel(self, body: None, descriptors: list[int]) -> None:
        self._actions.append(Channel(descriptors.pop(0)))

    def _get_shmem_config(self, body: None, descriptors: list[int]) -> bytes:
        sizes = self._shared_bytes + (0,) * (SHMEM_REGIONS - len(self._shared_bytes))
        return SharedMemoryConfig(len(self._shared_bytes), sizes).encode()

    # -- memory ------------------------------------------------------------------------------------

    def _get_slots(self, body: None, descriptors: list[int]) -> bytes:
        return Number(VHOST_MEMORY_SLOTS_MAX).encode()

    def _set_table(self, body: MemoryTable, descriptors: list[int]) -> None:
        if len(body.regions) > TABLE_REGIONS_MAX or len(body.regions) != len(descriptors):
            raise Refused(
                f"regions: must be at most {TABLE_REGIONS_MAX}, one for each of "
                f"{len(descriptors)} descriptors, got {len(body.regions)}"
            )
        table: dict[int, MemoryRegion] = {}
        for region in body.regions:
            _check_region(region, table)
            table[region.guest_address] = region
        self._actions += [RemoveMemory(region) for region in self.memory.values()]
        self.memory = table
        for region in body.regions:
            self._actions.append(AddMemory(region, descriptors.pop(0)))

    def _add_region(self, body: SingleRegion, descriptors: list[int]) -> None:
        if len(self.memory) >= VHOST_MEMORY_SLOTS_MAX:
            raise Refused(f"memory slots: must be at most {VHOST_MEMORY_SLOTS_MAX}")
        _check_region(body.region, self.memory)
        self.memory[body.region.guest_address] = body.region
        self._actions.append(AddMemory(body.region, descriptors.pop(0)))

    def _remove_region(self, body: SingleRegion, descriptors: list[int]) -> None:
        known = self.memory.get(body.region.guest_address)
        asked = body.region
        if known is None or (known.size_bytes, known.user_address) != (
            asked.size_bytes,
            asked.user_address,
        ):
            raise Refused(f"region: must be one that was added, got {asked.guest_address:#x}")
        del self.memory[asked.guest_address]
        self._actions.append(RemoveMemory(known))

    # -- queues ------------------------------------------------------------------------------------

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise Refused(f"queue: must be below {len(self._rings)}, got {index}")
        return self._rings[index]

    def _halt(self, index: int) -> None:
        if self._rings[index].running:
            self._rings[index].running = False
            self._actions.append(RingStop(index))

    def _weigh(self, index: int) -> None:
        """A queue runs when everything about it is known, and not before."""
        self._halt(index)
        setup = self._rings[index].setup()
        if setup is not None:
            self._rings[index].running = True
            self._actions.append(RingStart(index, setup))

    def _set_num(self, body: VringState, descriptors: list[int]) -> None:
        self._ring(body.index).num = body.num
        self._weigh(body.index)

    def _set_base(self, body: VringState, descriptors: list[int]) -> None:
        self._ring(body.index).base = body.num & 0xFFFF
        self._weigh(body.index)

    def _set_address(self, body: VringAddress, descriptors: list[int]) -> None:
        self._ring(body.index).address = body
        self._weigh(body.index)

    def _enable(self, body: VringState, descriptors: list[int]) -> None:
        self._ring(body.index).enabled = bool(body.num)
        self._weigh(body.index)

    def _get_base(self, body: VringState, descriptors: list[int]) -> bytes:
        ring = self._ring(body.index)
        self._halt(body.index)
        # A queue that is started again is given its eventfd again.
        if ring.kick:
            ring.kick = False
            self._actions.append(SetLine(Line.KICK, body.index, -1))
        self._trigger(Trigger.STOP, "the device was stopped: driver unbound, or VM paused")
        return VringState(body.index, ring.base).encode()

    def _set_kick(self, body: Number, descriptors: list[int]) -> None:
        index = self._set_line(Line.KICK, body, descriptors)
        self._rings[index].kick = not body.value & VRING_NO_DESCRIPTOR
        self._weigh(index)

    def _set_call(self, body: Number, descriptors: list[int]) -> None:
        self._set_line(Line.CALL, body, descriptors)

    def _set_error(self, body: Number, descriptors: list[int]) -> None:
        self._set_line(Line.ERROR, body, descriptors)

    def _set_line(self, line: Line, body: Number, descriptors: list[int]) -> int:
        index = body.value & VRING_INDEX_MASK
        self._ring(index)
        without = bool(body.value & VRING_NO_DESCRIPTOR)
        if without == bool(descriptors):
            raise Refused("descriptors: must be one, or none with the bit that says so")
        self._actions.append(SetLine(line, index, -1 if without else descriptors.pop(0)))
        return index

    # -- the table -------------------------------------------------------------------------------

    RULES: ClassVar[dict[int, _Rule]] = {
        _F.GET_FEATURES: _Rule(_get_features, replies=True),
        _F.SET_FEATURES: _Rule(_set_features, Number),
        _F.SET_OWNER: _Rule(_set_owner),
        _F.RESET_OWNER: _Rule(_reset),
        _F.SET_MEM_TABLE: _Rule(_set_table, MemoryTable, descriptors_max=TABLE_REGIONS_MAX),
        _F.SET_VRING_NUM: _Rule(_set_num, VringState),
        _F.SET_VRING_ADDR: _Rule(_set_address, VringAddress),
        _F.SET_VRING_BASE: _Rule(_set_base, VringState),
        _F.GET_VRING_BASE: _Rule(_get_base, VringState, replies=True),
        _F.SET_VRING_KICK: _Rule(_set_kick, Number, descriptors_max=1),
        _F.SET_VRING_CALL: _Rule(_set_call, Number, descriptors_max=1),
        _F.SET_VRING_ERR: _Rule(_set_error, Number, descriptors_max=1),
        _F.GET_PROTOCOL_FEATURES: _Rule(_get_protocol_features, replies=True),
        _F.SET_PROTOCOL_FEATURES: _Rule(_set_protocol_features, Number),
        _F.GET_QUEUE_NUM: _Rule(_get_queue_num, replies=True, needs=_P.MQ),
        _F.SET_VRING_ENABLE: _Rule(_enable, VringState),
        _F.SET_BACKEND_REQ_FD: _Rule(
            _set_channel, needs=_P.BACKEND_REQ, descriptors_min=1, descriptors_max=1
        ),
        _F.GET_CONFIG: _Rule(_get_config, ConfigSpace, replies=True, needs=_P.CONFIG),
        _F.SET_CONFIG: _Rule(_set_config, ConfigSpace, needs=_P.CONFIG),
        _F.RESET_DEVICE: _Rule(_reset),
        _F.GET_MAX_MEM_SLOTS: _Rule(_get_slots, replies=True, needs=_P.CONFIGURE_MEM_SLOTS),
        _F.ADD_MEM_REG: _Rule(
            _add_region,
            SingleRegion,
            needs=_P.CONFIGURE_MEM_SLOTS,
            descriptors_min=1,
            descriptors_max=1,
        ),
        # Some front-ends send the descriptor here as well; it is closed.
        _F.REM_MEM_REG: _Rule(
            _remove_region, SingleRegion, needs=_P.CONFIGURE_MEM_SLOTS, descriptors_max=1
        ),
        _F.SET_STATUS: _Rule(_set_status, Number, needs=_P.STATUS),
        _F.GET_STATUS: _Rule(_get_status, replies=True, needs=_P.STATUS),
        _F.GET_SHMEM_CONFIG: _Rule(_get_shmem_config, replies=True, needs=_P.SHMEM),
    }
    """Every message that is carried out. All others are refused: failure where REPLY_ACK asks, else
    nothing.
    """


def _subset(name: str, value: int, offered: int) -> None:
    if value & ~offered:
        raise Refused(f"{name}: must be among {offered:#x}, got {value:#x}")


def _check_region(region: MemoryRegion, others: dict[int, MemoryRegion]) -> None:
    size = region.size_bytes
    if not size:
        raise Refused("region size: must not be 0")
    starts = (region.guest_address, region.user_address, region.file_offset)
    if max(starts) + size > _ADDRESSES:
        raise Refused("region: must end below 2^64")
    for other in others.values():
        for mine, its in (
            (region.guest_address, other.guest_address),
            (region.user_address, other.user_address),
        ):
            if mine < its + other.size_bytes and its < mine + size:
                raise Refused(f"region at {mine:#x}: overlaps one at {its:#x}")


# -- the back-end's own channel --------------------------------------------------------------------


class Verdict(msgspec.Struct, frozen=True):
    """The front-end's answer to the request that was outstanding; 0 is done."""

    value: int


class BackendChannel:
    """Requests of the back-end, one outstanding at a time. No I/O."""

    def __init__(self) -> None:
        self._framer = Framer()
        self.outstanding: BackRequest | None = None
        self.broken = ""

    def map(
        self, region_offset: int, length_bytes: int, file_offset: int, *, writable: bool
    ) -> bytes:
        """SHMEM_MAP into region 0; the file's descriptor goes beside it."""
        body = SharedMemoryMap(0, file_offset, region_offset, length_bytes, writable)
        return self._ask(BackRequest.SHMEM_MAP, body)

    def unmap(self, region_offset: int, length_bytes: int) -> bytes:
        """SHMEM_UNMAP of exactly what one SHMEM_MAP made."""
        body = SharedMemoryMap(0, 0, region_offset, length_bytes, False)
        return self._ask(BackRequest.SHMEM_UNMAP, body)

    def _ask(self, request: BackRequest, body: SharedMemoryMap) -> bytes:
        if self.outstanding is not None:
            raise RuntimeError(f"{self.outstanding.name} has not been answered yet")
        self.outstanding = request
        return message(request, body.encode(), need_reply=True)

    def feed(self, data: bytes, descriptors: list[int]) -> list[Verdict | Discard | Fault]:
        """Answers; anything else breaks the channel."""
        if self.broken:
            return [Discard(descriptor) for descriptor in descriptors]
        found: list[Verdict | Discard | Fault] = []
        for item in self._framer.feed(data, descriptors):
            found += [Discard(descriptor) for descriptor in item.descriptors]
            if self.broken:
                continue
            if isinstance(item, Unframed):
                self.broken = item.reason
            else:
                self._answer(item, found)
            if self.broken:
                found += [Discard(descriptor) for descriptor in self._framer.end()]
                found.append(Fault(self.broken))
        return found

    def end(self) -> list[Discard]:
        """The channel is gone."""
        self.broken = self.broken or "the channel ended"
        return [Discard(descriptor) for descriptor in self._framer.end()]

    def _answer(self, item: Message, found: list[Verdict | Discard | Fault]) -> None:
        header = item.header
        if not header.reply or self.outstanding is None or header.request != self.outstanding:
            self.broken = f"request {header.request}: not an answer to what was asked"
            return
        try:
            value = Number.decode(item.payload).value
        except DecodeError as error:
            self.broken = str(error)
            return
        self.outstanding = None
        found.append(Verdict(value))
