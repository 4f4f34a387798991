"""Who asked what and who answers: CCI requests and responses over an MctpStream, without I/O or a
clock.

A Requester matches responses to requests by the 8-bit CCI tag; a Responder decodes requests and
turns malformed ones into the return code that they deserve. Neither ends because of one bad
message; when the stream itself is beyond recovery a fatal Fault says so and the connection should
be closed.

What is not promised: order between requests (a device may answer as it likes), and that a request
whose deadline passed had no effect.
"""

from __future__ import annotations

import msgspec

from tagmem.base.errors import LocalError, Retry
from tagmem.base.limits import CCI_OUTSTANDING_MAX, CCI_TAGS_MAX
from tagmem.base.units import Nanoseconds
from tagmem.wire.cci import Category, CciMessage, MessageType, Opcode, ReturnCode
from tagmem.wire.commands import COMMANDS, Unsupported, decode_request, decode_response
from tagmem.wire.fields import BadValue, Buffer, DecodeError, WrongSize
from tagmem.wire.generic import EventNotification
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import CCI_HEADER_BYTES, FramingFault, MctpMessage, MctpStream

_MESSAGE_TYPES = frozenset(int(kind) for kind in MessageType)


class SessionFull(LocalError):
    """Too many requests of this session wait for an answer."""

    retry = Retry.LATER


class Fault(msgspec.Struct, frozen=True, gc=False):
    """Something that the peer should not have sent. `fatal`: nothing more will be read; close."""

    reason: str
    fatal: bool = False


class Response(msgspec.Struct, frozen=True):
    """The answer to the request that `request` returned `key` for.

    `body` is decoded when the return code is success; it is None otherwise, and when the payload
    was malformed, which `malformed` then explains. `raw` is the payload as it came.
    """

    key: int
    opcode: int
    return_code: int
    body: WireStruct | None = None
    raw: bytes = b""
    vendor_status: int = 0
    background: bool = False
    malformed: str | None = None


class Notification(msgspec.Struct, frozen=True, gc=False):
    """Event Notification (0106h) from the device: the event logs that have records, one bit per
    log.
    """

    events: int


class _Outstanding(msgspec.Struct, frozen=True, gc=False):
    key: int
    opcode: int
    deadline: Nanoseconds


class Requester:
    """The side that asks: a fabric manager, or a host at its mailbox.

    At most `outstanding_max` requests wait at a time. The tag of a request that timed out is kept
    out of use until its late response comes, so that it can never answer a younger request.
    """

    def __init__(self, stream: MctpStream, *, outstanding_max: int = CCI_OUTSTANDING_MAX) -> None:
        if not 1 <= outstanding_max <= CCI_TAGS_MAX:
            raise BadValue("outstanding_max", f"1 to {CCI_TAGS_MAX}", outstanding_max)
        self._stream = stream
        self._outstanding_max = outstanding_max
        self._outstanding: dict[int, _Outstanding] = {}
        self._abandoned: set[int] = set()
        self._next_tag = 0
        self._next_key = 1
        self._out = bytearray()
        self._fatal_told = False
        self.ignored = 0
        """Responses that no request waits for: late, duplicate or made up."""

    @property
    def outstanding(self) -> int:
        """Requests that wait for their response."""
        return len(self._outstanding)

    def request(
        self, opcode: int, payload: WireStruct | bytes, now: Nanoseconds, deadline: Nanoseconds
    ) -> int:
        """Queue a request; a key that names it in Response and `expire`, never used again.

        Raises SessionFull when too many wait; BadValue for a deadline that has passed or a payload
        that is not this opcode's.
        """
        if deadline <= now:
            raise BadValue("deadline", f"later than {now}", deadline)
        command = COMMANDS.get(opcode)
        if isinstance(payload, WireStruct):
            if command is None or type(payload) is not command.request:
                raise BadValue("payload", f"the request of {opcode:04x}h", type(payload).__name__)
            payload = payload.encode()
        if len(self._outstanding) >= self._outstanding_max:
            raise SessionFull(f"{len(self._outstanding)} requests wait for an answer already")
        tag = self._free_tag()
        kind = MessageType.CCI if command is None else command.message_type
        message = CciMessage(Category.REQUEST, tag, opcode, payload)
        self._out += self._stream.frame(MctpMessage(kind, message.encode(), tag & 7, True))
        key = self._next_key
        self._next_key += 1
        self._next_tag = (tag + 1) % CCI_TAGS_MAX
        self._outstanding[tag] = _Outstanding(key, opcode, deadline)
        return key

    def _free_tag(self) -> int:
        # Round the whole tag space, so that a tag rests as long as it can before it is used again.
        for step in range(CCI_TAGS_MAX):
            tag = (self._next_tag + step) % CCI_TAGS_MAX
            if tag not in self._outstanding and tag not in self._abandoned:
                return tag
        raise SessionFull("every message tag waits for an answer; the session should be renewed")

    def outgoing(self) -> bytes:
        """The bytes to send now; they are handed over once."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def feed(self, data: Buffer, now: Nanoseconds) -> list[Response | Notification | Fault]:
        """Take bytes from the device: responses to requests, notifications, faults."""
        events: list[Response | Notification | Fault] = []
        for item in self._stream.feed(data):
            if isinstance(item, FramingFault):
                events.append(Fault(item.reason))
            else:
                self._take(item, events)
        if self._stream.broken and not self._fatal_told:
            self._fatal_told = True
            events.append(Fault("too many consecutive framing faults", fatal=True))
        return events

    def _take(self, item: MctpMessage, events: list[Response | Notification | Fault]) -> None:
        if item.message_type not in _MESSAGE_TYPES:
            events.append(Fault(f"MCTP message type {item.message_type}"))
            return
        try:
            message = CciMessage.decode(item.payload)
        except DecodeError as error:
            events.append(Fault(f"CCI message: {error}"))
            return
        if message.category == Category.RESPONSE:
            self._take_response(message, events)
        elif message.opcode == Opcode.EVENT_NOTIFICATION:
            try:
                events.append(Notification(EventNotification.decode(message.payload).events))
            except DecodeError as error:
                events.append(Fault(f"event notification: {error}"))
        else:
            events.append(Fault(f"a request, {message.opcode:04x}h, from the device"))

    def _take_response(
        self, message: CciMessage, events: list[Response | Notification | Fault]
    ) -> None:
        waiting = self._outstanding.get(message.tag)
        if waiting is None or waiting.opcode != message.opcode:
            self.ignored += 1
            if waiting is None:
                self._abandoned.discard(message.tag)
            return
        del self._outstanding[message.tag]
        body: WireStruct | None = None
        malformed = None
        if message.return_code == ReturnCode.SUCCESS:
            try:
                decoded = decode_response(message.opcode, message.payload)
                body = None if isinstance(decoded, Unsupported) else decoded
            except DecodeError as error:
                malformed = str(error)
        events.append(
            Response(
                waiting.key,
                message.opcode,
                message.return_code,
                body,
                message.payload,
                message.vendor_status,
                message.background,
                malformed,
            )
        )

    def next_deadline(self) -> Nanoseconds | None:
        """When `expire` should be called next; None while nothing waits."""
        return min((waiting.deadline for waiting in self._outstanding.values()), default=None)

    def expire(self, now: Nanoseconds) -> list[int]:
        """Give up the requests whose deadline is not after `now`; their keys. Their outcome is
        unknown.
        """
        late = [tag for tag, waiting in self._outstanding.items() if waiting.deadline <= now]
        self._abandoned.update(late)
        return [self._outstanding.pop(tag).key for tag in late]

    def abandon(self) -> list[int]:
        """Give up every request, for a session that ends; their keys. Their outcome is unknown."""
        keys = [waiting.key for waiting in self._outstanding.values()]
        self._abandoned.update(self._outstanding)
        self._outstanding.clear()
        return keys


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """A request that could not be decoded, and the return code that it gets."""

    return_code: ReturnCode
    reason: str


class Request(msgspec.Struct, frozen=True):
    """A request to be answered with `Responder.respond`, whatever its `body` is."""

    tag: int
    opcode: int
    message_type: int
    body: WireStruct | Unsupported | Malformed
    mctp_tag: int = 0


class Responder:
    """The side that answers: a device's port.

    A command that comes under the wrong MCTP message type, or one that this port does not take, is
    Unsupported here already.
    """

    def __init__(
        self,
        stream: MctpStream,
        *,
        message_types: frozenset[MessageType] = frozenset(MessageType),
    ) -> None:
        self._stream = stream
        self._message_types = message_types
        self._out = bytearray()
        self._fatal_told = False

    def feed(self, data: Buffer) -> list[Request | Fault]:
        """Take bytes from the requester: requests in the order in which they came, and faults."""
        events: list[Request | Fault] = []
        for item in self._stream.feed(data):
            if isinstance(item, FramingFault):
                events.append(Fault(item.reason))
            else:
                events.append(self._take(item))
        if self._stream.broken and not self._fatal_told:
            self._fatal_told = True
            events.append(Fault("too many consecutive framing faults", fatal=True))
        return events

    def _take(self, item: MctpMessage) -> Request | Fault:
        kind = item.message_type
        if kind not in self._message_types:
            return Fault(f"MCTP message type {kind}")
        data = item.payload
        if len(data) < CCI_HEADER_BYTES:
            return Fault(f"a CCI message of {len(data)} bytes")
        if data[0] & 0x0F != Category.REQUEST:
            return Fault(f"CCI message category {data[0] & 0x0F} to a responder")
        tag = data[1]
        opcode = data[3] | data[4] << 8
        return Request(tag, opcode, kind, _decode(kind, opcode, data), item.tag)

    def respond(
        self,
        request: Request,
        return_code: ReturnCode,
        body: WireStruct | None = None,
        *,
        vendor_status: int = 0,
        background: bool = False,
    ) -> None:
        """Queue the response to `request`. Raises BadValue if the body is larger than a message may
        be.
        """
        message = CciMessage(
            Category.RESPONSE,
            request.tag,
            request.opcode,
            b"" if body is None else body.encode(),
            return_code,
            vendor_status,
            background,
        )
        self._send(request.message_type, message, request.mctp_tag, owner=False)

    def notify(self, events: int) -> None:
        """Queue an Event Notification (0106h): one bit per event log. It gets no response."""
        body = EventNotification(events).encode()
        message = CciMessage(Category.REQUEST, 0, Opcode.EVENT_NOTIFICATION, body)
        self._send(MessageType.CCI, message, 0, owner=True)

    def _send(self, kind: int, message: CciMessage, mctp_tag: int, *, owner: bool) -> None:
        self._out += self._stream.frame(MctpMessage(kind, message.encode(), mctp_tag, owner))

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait in `outgoing`: a peer that does not read should not be answered for
        ever.
        """
        return len(self._out)

    def outgoing(self) -> bytes:
        """The bytes to send now; they are handed over once."""
        data = bytes(self._out)
        self._out.clear()
        return data


def _decode(kind: int, opcode: int, data: bytes) -> WireStruct | Unsupported | Malformed:
    command = COMMANDS.get(opcode)
    if command is None or command.message_type != kind:
        return Unsupported(opcode)
    try:
        message = CciMessage.decode(data)
        return decode_request(opcode, message.payload)
    except WrongSize as error:
        return Malformed(ReturnCode.INVALID_PAYLOAD_LENGTH, str(error))
    except DecodeError as error:
        return Malformed(ReturnCode.INVALID_INPUT, str(error))
