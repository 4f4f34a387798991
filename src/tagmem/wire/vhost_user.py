"""The vhost-user messages that a hypervisor and the owner of a device's memory exchange.

Source: the vhost-user protocol of QEMU (docs/interop/vhost-user), with shared-memory regions as
QEMU 11.1 speaks them. Here are the tables and the cutting of a byte stream into messages; what a
back-end does with them is in `vhost_backend`. Numbers are in native byte order, which is
little-endian on every machine that tagmem runs on.

File descriptors travel beside the bytes. A receiver of a Unix stream is given them with the piece
of the stream that ends where the sender's call ended, so they belong to the message that the last
byte of that piece lies in, however the sender cuts its messages.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from tagmem.wire.fields import (
    array,
    bit,
    bits,
    blob,
    count,
    flag,
    nested,
    repeat,
    reserved,
    u8,
    u32,
    u64,
)
from tagmem.wire.layout import WireStruct, wire

VERSION = 1
HEADER_BYTES = 12
PAYLOAD_BYTES_MAX = 4096
"""Of a message that is taken; the largest that is known has 2,056 (GET_SHMEM_CONFIG's reply)."""
DESCRIPTORS_MAX = 8
"""Beside one message (VHOST_MEMORY_BASELINE_NREGIONS)."""
TABLE_REGIONS_MAX = 8
"""In one SET_MEM_TABLE."""
CONFIG_BYTES_MAX = 256
"""Of a device's configuration space (VHOST_USER_MAX_CONFIG_SIZE)."""
SHMEM_REGIONS = 256


class FrontRequest(IntEnum):
    """What a front-end (QEMU) asks of a back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackRequest(IntEnum):
    """What a back-end asks of a front-end, on the channel that SET_BACKEND_REQ_FD gave it."""

    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntEnum):
    """Bits of GET_PROTOCOL_FEATURES."""

    MQ = 0
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    BACKEND_SEND_FD = 10
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    SHMEM = 22


VIRTIO_F_VERSION_1 = 1 << 32
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
VRING_INDEX_MASK = 0xFF
VRING_NO_DESCRIPTOR = 1 << 8
"""In the number of SET_VRING_KICK, CALL and ERR: no descriptor comes with it."""


@wire(
    u32(0x00, "request"),
    bits(0x04, 4, bit("version", 0, 2), flag("reply", 2), flag("need_reply", 3)),
    u32(0x08, "size_bytes"),
    size=HEADER_BYTES,
)
class MessageHeader(WireStruct, frozen=True, gc=False):
    """Header of each message, 12 bytes (vhost-user, Message Specification)."""

    request: int
    version: int = VERSION
    reply: bool = False
    need_reply: bool = False
    size_bytes: int = 0


@wire(u64(0x00, "value"), size=8)
class Number(WireStruct, frozen=True, gc=False):
    """A single 64-bit integer: features, status, and the answer to need_reply (0 is success)."""

    value: int


@wire(u32(0x00, "index"), u32(0x04, "num"), size=8)
class VringState(WireStruct, frozen=True, gc=False):
    """A vring state description."""

    index: int
    num: int


@wire(
    u32(0x00, "index"),
    u32(0x04, "flags"),
    u64(0x08, "descriptors"),
    u64(0x10, "used"),
    u64(0x18, "available"),
    u64(0x20, "log"),
    size=40,
)
class VringAddress(WireStruct, frozen=True, gc=False):
    """A vring address description; addresses of the ring are the front-end's own (user)
    addresses.
    """

    index: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int = 0


@wire(
    u64(0x00, "guest_address"),
    u64(0x08, "size_bytes"),
    u64(0x10, "user_address"),
    u64(0x18, "file_offset"),
    size=32,
)
class MemoryRegion(WireStruct, frozen=True, gc=False):
    """A run of guest memory, and where the file beside the message has it."""

    guest_address: int
    size_bytes: int
    user_address: int
    file_offset: int


@wire(
    count(0x00, 4, "regions"),
    reserved(0x04, 4),
    array(0x08, "regions", MemoryRegion),
    size=8,
)
class MemoryTable(WireStruct, frozen=True):
    """Memory regions description (SET_MEM_TABLE): one descriptor beside it for each."""

    regions: tuple[MemoryRegion, ...]


@wire(reserved(0x00, 8), nested(0x08, "region", MemoryRegion), size=40)
class SingleRegion(WireStruct, frozen=True, gc=False):
    """Single memory region description (ADD_MEM_REG, REM_MEM_REG)."""

    region: MemoryRegion


@wire(
    u32(0x00, "offset"),
    count(0x04, 4, "content"),
    u32(0x08, "flags"),
    blob(0x0C, "content", size_max=CONFIG_BYTES_MAX),
    size=12,
)
class ConfigSpace(WireStruct, frozen=True):
    """Virtio device config space (GET_CONFIG, SET_CONFIG)."""

    offset: int
    flags: int
    content: bytes


@wire(
    u32(0x00, "region_count"),
    reserved(0x04, 4),
    repeat(0x08, "sizes_bytes", 8, SHMEM_REGIONS),
    size=2056,
)
class SharedMemoryConfig(WireStruct, frozen=True):
    """Reply to GET_SHMEM_CONFIG: the device's shared-memory regions, by id."""

    region_count: int
    sizes_bytes: tuple[int, ...]


@wire(
    u8(0x00, "region"),
    reserved(0x01, 7),
    u64(0x08, "file_offset"),
    u64(0x10, "region_offset"),
    u64(0x18, "length_bytes"),
    bits(0x20, 8, flag("writable", 0)),
    size=40,
)
class SharedMemoryMap(WireStruct, frozen=True, gc=False):
    """SHMEM_MAP (with a descriptor) and SHMEM_UNMAP (without; only region, offset and length
    count).
    """

    region: int
    file_offset: int
    region_offset: int
    length_bytes: int
    writable: bool


def message(
    request: int, payload: bytes = b"", *, reply: bool = False, need_reply: bool = False
) -> bytes:
    """One message. A payload over the limit is a mistake of the caller's, and raises BadValue."""
    header = MessageHeader(request, VERSION, reply, need_reply, len(payload))
    return header.encode() + payload


class Message(msgspec.Struct, frozen=True):
    """A message as it came, with the descriptors that belong to it."""

    header: MessageHeader
    payload: bytes
    descriptors: tuple[int, ...]


class Unframed(msgspec.Struct, frozen=True):
    """Bytes that no message can start with; nothing after them can be read."""

    reason: str
    descriptors: tuple[int, ...]


class Framer:
    """Cuts a byte stream into messages, and gives each the descriptors that are its own.

    Every descriptor that is fed comes out exactly once, in a Message, in an Unframed, or from
    `end`.
    """

    def __init__(self) -> None:
        self._data = b""
        self._descriptors: list[int] = []
        self._broken = False

    def feed(self, data: bytes, descriptors: list[int]) -> list[Message | Unframed]:
        """The messages that are complete with this piece of the stream."""
        if self._broken or not data:
            return [Unframed("after the end", tuple(descriptors))] if descriptors else []
        whole = self._data + data
        found: list[Message | Unframed] = []
        at = 0
        while len(whole) - at >= HEADER_BYTES:
            header = MessageHeader.decode(whole[at : at + HEADER_BYTES])
            reason = _unreadable(header)
            if reason:
                return [*found, self._give_up(reason, descriptors)]
            end = at + HEADER_BYTES + header.size_bytes
            if end > len(whole):
                break
            own, self._descriptors = self._descriptors, []
            if end == len(whole):
                own, descriptors = own + descriptors, []
            if len(own) > DESCRIPTORS_MAX:
                self._descriptors = own
                return [*found, self._give_up(_too_many(len(own)), descriptors)]
            found.append(Message(header, whole[at + HEADER_BYTES : end], tuple(own)))
            at = end
        self._data = whole[at:]
        self._descriptors += descriptors
        if len(self._descriptors) > DESCRIPTORS_MAX:
            found.append(self._give_up(_too_many(len(self._descriptors)), []))
        return found

    def end(self) -> tuple[int, ...]:
        """Descriptors of a message that will not become complete; nothing is read any more."""
        left, self._descriptors = tuple(self._descriptors), []
        self._data = b""
        self._broken = True
        return left

    def _give_up(self, reason: str, descriptors: list[int]) -> Unframed:
        return Unframed(reason, (*self.end(), *descriptors))


def _unreadable(header: MessageHeader) -> str:
    if header.version != VERSION:
        return f"version: must be {VERSION}, got {header.version}"
    if header.size_bytes > PAYLOAD_BYTES_MAX:
        return f"payload bytes: must be at most {PAYLOAD_BYTES_MAX}, got {header.size_bytes}"
    return ""


def _too_many(number: int) -> str:
    return f"descriptors of one message: must be at most {DESCRIPTORS_MAX}, got {number}"
