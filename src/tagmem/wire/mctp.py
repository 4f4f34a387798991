"""MCTP messages over a byte stream, so that CXL commands can pass over sockets and serial lines
alike.

Two layers of the DMTF in one sans-I/O object: the serial binding (DSP0253), which frames a packet
as

    7E | revision 01 | byte count | packet, with 7E and 7D escaped | FCS high | FCS low | 7E

and MCTP packets (DSP0236), which carry at most 251 bytes of a message behind a header of 4. The
byte count is that of the packet before escaping. Only the packet is escaped: the count and the FCS
may be 7E. The FCS is RFC 1662's 16-bit CRC over revision, count and the packet before escaping. As
Linux's `mctp-serial` and OpenBMC's libmctp do, it starts at FFFFh, is not complemented, and travels
high byte first.

Garbage never raises: it yields FramingFault values, and the next frame that is whole is read again.
"""

from __future__ import annotations

from binascii import crc_hqx

import msgspec

from tagmem.base.limits import CCI_PAYLOAD_BYTES_MAX
from tagmem.wire.fields import BadValue, Buffer

FLAG = 0x7E
ESCAPE = 0x7D
REVISION = 0x01
HEADER_VERSION = 0x01

_FLAG = b"\x7e"
_ESCAPE = b"\x7d"
_FLAG_ESCAPED = b"\x7d\x5e"
_ESCAPE_ESCAPED = b"\x7d\x5d"

PACKET_BYTES_MAX = 255
"""What an 8-bit byte count can say."""
PACKET_HEADER_BYTES = 4
PACKET_PAYLOAD_BYTES_MAX = PACKET_BYTES_MAX - PACKET_HEADER_BYTES
CCI_HEADER_BYTES = 12
MESSAGE_BYTES_MAX = CCI_HEADER_BYTES + CCI_PAYLOAD_BYTES_MAX
"""Largest message, without its type byte, that is sent or put together."""
FAULTS_CONSECUTIVE_MAX = 16
"""After so many faults without one whole message between them the peer does not speak this
protocol.
"""
SKIPPED_BYTES_PER_FAULT = 1024
"""Garbage of this length counts as one more fault, so that it cannot go on for ever."""

FM_EID = 8
DEVICE_EID = 9
"""Endpoint ids that both ends of a point-to-point stream assume (0 to 7 are special in DSP0236)."""

_SOM = 0x80
_EOM = 0x40
_SEQUENCE_SHIFT = 4
_TAG_OWNER = 0x08
_KEY_MASK = 0x0F
_INTEGRITY_CHECK = 0x80

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def fcs16(data: bytes | bytearray) -> bytes:
    """The two bytes of the frame check sequence, in the order in which they travel.

    RFC 1662's CRC takes the lowest bit of each byte first, `crc_hqx` the highest; so the bits of
    each byte are turned round before and after, which runs at C speed.
    """
    return crc_hqx(data.translate(_REVERSED), 0xFFFF).to_bytes(2, "little").translate(_REVERSED)


class MctpMessage(msgspec.Struct, frozen=True, gc=False):
    """A whole message. `tag` is MCTP's (3 bits); `tag_owner` is set on requests and clear on
    responses.
    """

    message_type: int
    payload: bytes
    tag: int = 0
    tag_owner: bool = True


class FramingFault(msgspec.Struct, frozen=True, gc=False):
    """Bytes that were no frame, or a packet that fits no message; what was wrong with them."""

    reason: str


class _Assembly:
    """A message of which some packets are still missing."""

    __slots__ = ("body", "sequence")

    def __init__(self, body: bytearray, sequence: int) -> None:
        self.body = body
        self.sequence = sequence


class MctpStream:
    """One end of a byte stream that carries MCTP messages between two endpoints.

    Memory is bounded: one frame that is not whole, and per MCTP tag one message of
    `message_bytes_max`.
    """

    def __init__(
        self,
        eid: int,
        peer_eid: int,
        *,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        faults_max: int = FAULTS_CONSECUTIVE_MAX,
    ) -> None:
        for name, value in (("eid", eid), ("peer_eid", peer_eid)):
            if not 8 <= value <= 254:
                raise BadValue(name, "8 to 254", value)
        self.eid = eid
        self.peer_eid = peer_eid
        self.faults = 0
        """Faults so far."""
        self._faults_consecutive = 0
        self._faults_max = faults_max
        self._message_bytes_max = message_bytes_max
        self._addresses = bytes((HEADER_VERSION, eid, peer_eid))
        self._buffer = bytearray()
        self._skipping = False
        self._skipped_bytes = 0
        self._assemblies: dict[int, _Assembly] = {}
        self._header = bytes((HEADER_VERSION, peer_eid, eid))

    @property
    def broken(self) -> bool:
        """Too many consecutive faults: nothing more is read, and the connection should be
        closed.
        """
        return self._faults_consecutive >= self._faults_max

    # -- sending -----------------------------------------------------------------------------------

    def frame(self, message: MctpMessage) -> bytes:
        """The frames of a message. Raises BadValue if it is too large or its type or tag is not
        MCTP's.
        """
        payload = message.payload
        if len(payload) > self._message_bytes_max:
            raise BadValue("message bytes", f"at most {self._message_bytes_max}", len(payload))
        if not 0 <= message.message_type < _INTEGRITY_CHECK:
            raise BadValue("message_type", "0 to 127", message.message_type)
        if not 0 <= message.tag <= 7:
            raise BadValue("tag", "0 to 7", message.tag)
        key = message.tag | (_TAG_OWNER if message.tag_owner else 0)
        body = bytes((message.message_type,)) + payload
        if len(body) <= PACKET_PAYLOAD_BYTES_MAX:
            return self._frame_packet(_SOM | _EOM | key, body)
        frames = []
        last = len(body) - PACKET_PAYLOAD_BYTES_MAX
        for number, at in enumerate(range(0, len(body), PACKET_PAYLOAD_BYTES_MAX)):
            bits = key | (number & 3) << _SEQUENCE_SHIFT
            bits |= _SOM if at == 0 else 0
            bits |= _EOM if at >= last else 0
            frames.append(self._frame_packet(bits, body[at : at + PACKET_PAYLOAD_BYTES_MAX]))
        return b"".join(frames)

    def _frame_packet(self, bits: int, chunk: bytes) -> bytes:
        packet = b"%b%c%b" % (self._header, bits, chunk)
        head = bytes((REVISION, len(packet)))
        fcs = fcs16(head + packet)
        if _FLAG in packet or _ESCAPE in packet:
            # The escape itself first: the other replacement brings in new ones.
            packet = packet.replace(_ESCAPE, _ESCAPE_ESCAPED).replace(_FLAG, _FLAG_ESCAPED)
        return b"\x7e%b%b%b\x7e" % (head, packet, fcs)

    # -- receiving ---------------------------------------------------------------------------------

    def feed(self, data: Buffer) -> list[MctpMessage | FramingFault]:
        """Take bytes from the peer; the messages that they complete and the faults that they
        show.
        """
        found: list[MctpMessage | FramingFault] = []
        if self.broken:
            return found
        buffer = self._buffer
        buffer += data
        at = 0
        while self._faults_consecutive < self._faults_max:
            start = buffer.find(FLAG, at)
            if start != at and len(buffer) > at:
                start = len(buffer) if start < 0 else start
                self._skip(start - at, found)
                at = start
                continue
            packet, end = self._next_packet(at)
            if packet is None:
                if end == at:
                    break
                at = end
            elif isinstance(packet, FramingFault):
                found.append(packet)
                self._skipping = True
                self._skipped_bytes = 0
                # Look for a frame from the next byte on: nothing whole behind the fault is lost.
                at = end
            else:
                self._skipping = False
                at = end
                self._take(packet, found)
        if self._faults_consecutive >= self._faults_max:
            buffer.clear()
            self._assemblies.clear()
        else:
            del buffer[:at]
        return found

    def _skip(self, size: int, found: list[MctpMessage | FramingFault]) -> None:
        """Pass over bytes that are no frame: one fault per run, more if the run does not end."""
        if not self._skipping:
            self._skipping = True
            self._skipped_bytes = 0
            found.append(self._fault("bytes outside a frame"))
        self._skipped_bytes += size
        while self._skipped_bytes >= SKIPPED_BYTES_PER_FAULT and not self.broken:
            self._skipped_bytes -= SKIPPED_BYTES_PER_FAULT
            found.append(self._fault("bytes outside a frame"))

    def _fault(self, reason: str) -> FramingFault:
        self.faults += 1
        self._faults_consecutive += 1
        return FramingFault(reason)

    def _next_packet(self, at: int) -> tuple[bytes | FramingFault | None, int]:
        """The packet of the frame whose flag is at `at`, and where to go on.

        None at the same place: more bytes are needed. None further on: a flag that opened nothing.
        """
        buffer = self._buffer
        size = len(buffer)
        if size - at < 2:
            return None, at
        if buffer[at + 1] == FLAG:
            return None, at + 1
        if buffer[at + 1] != REVISION:
            # Mostly the closing flag of a frame that was given up; then the fault is known already.
            if self._skipping:
                return None, at + 1
            return self._fault(f"revision {buffer[at + 1]:#04x} instead of 0x01"), at + 1
        if size - at < 3:
            return None, at
        count = buffer[at + 2]
        if count <= PACKET_HEADER_BYTES:
            return self._fault(f"byte count {count} leaves no message"), at + 1
        begin = at + 3
        end = begin + count
        escapes = 0
        while True:
            if buffer.find(FLAG, begin, end) >= 0:
                return self._fault("a flag inside a packet"), at + 1
            if end > size:
                return None, at
            # Each escape means one more byte, which may be the next escape.
            more = buffer.count(ESCAPE, begin, end)
            if more == escapes:
                break
            escapes = more
            end = begin + count + escapes
        if size - end < 3:
            return None, at
        packet = bytes(buffer[begin:end])
        if escapes:
            packet = packet.replace(_FLAG_ESCAPED, _FLAG).replace(_ESCAPE_ESCAPED, _ESCAPE)
            if len(packet) != count:
                return self._fault("an escape that stands for nothing"), at + 1
        if buffer[end + 2] != FLAG:
            return self._fault("no flag at the end of a frame"), at + 1
        if fcs16(bytes((REVISION, count)) + packet) != buffer[end : end + 2]:
            return self._fault("frame check sequence"), at + 1
        return packet, end + 3

    def _take(self, packet: bytes, found: list[MctpMessage | FramingFault]) -> None:
        """Add a packet to its message."""
        if packet[:3] != self._addresses:
            found.append(self._fault(f"packet header {packet[:3].hex()} is not for this stream"))
            return
        bits = packet[3]
        key = bits & _KEY_MASK
        sequence = bits >> _SEQUENCE_SHIFT & 3
        assembly = self._assemblies.pop(key, None)
        if bits & _SOM:
            if assembly is not None:
                found.append(self._fault("a message began before the last one ended"))
            if bits & _EOM:
                self._deliver(key, packet[PACKET_HEADER_BYTES:], found)
                return
            body = bytearray(packet[PACKET_HEADER_BYTES:])
        elif assembly is None:
            found.append(self._fault("a packet of no message"))
            return
        elif sequence != assembly.sequence:
            found.append(self._fault("a packet of a message is missing"))
            return
        else:
            body = assembly.body
            body += packet[PACKET_HEADER_BYTES:]
        if len(body) > self._message_bytes_max + 1:
            found.append(self._fault(f"a message larger than {self._message_bytes_max} bytes"))
        elif bits & _EOM:
            self._deliver(key, bytes(body), found)
        else:
            self._assemblies[key] = _Assembly(body, sequence + 1 & 3)

    def _deliver(self, key: int, body: bytes, found: list[MctpMessage | FramingFault]) -> None:
        if body[0] & _INTEGRITY_CHECK:
            found.append(self._fault("a message with an integrity check, which CXL's do not have"))
            return
        self._faults_consecutive = 0
        found.append(MctpMessage(body[0], body[1:], key & 7, bool(key & _TAG_OWNER)))
