"""Framing: the check sequence, special bytes, packets that do not fit, and what garbage does."""

from __future__ import annotations

import pytest

from tagmem.wire.mctp import (
    DEVICE_EID,
    FAULTS_CONSECUTIVE_MAX,
    FM_EID,
    MESSAGE_BYTES_MAX,
    PACKET_PAYLOAD_BYTES_MAX,
    SKIPPED_BYTES_PER_FAULT,
    FramingFault,
    MctpMessage,
    MctpStream,
    fcs16,
)


def pair() -> tuple[MctpStream, MctpStream]:
    return MctpStream(FM_EID, DEVICE_EID), MctpStream(DEVICE_EID, FM_EID)


def packet(bits: int, chunk: bytes, *, to: int = DEVICE_EID, source: int = FM_EID) -> bytes:
    """A frame around any packet, also one that no sender of ours would send."""
    body = bytes((1, to, source, bits)) + chunk
    head = bytes((1, len(body)))
    escaped = body.replace(b"\x7d", b"\x7d\x5d").replace(b"\x7e", b"\x7d\x5e")
    return b"\x7e" + head + escaped + fcs16(head + body) + b"\x7e"


def test_fcs_has_the_published_check_value() -> None:
    # RFC 1662's CRC of "123456789" is 906Eh after the complement that PPP makes and MCTP does not.
    assert int.from_bytes(fcs16(b"123456789"), "big") == 0x906E ^ 0xFFFF


@pytest.mark.parametrize("size", [0, 1, 249, 250, 251, 252, 501, 502, 4096, MESSAGE_BYTES_MAX])
def test_every_size_comes_back(size: int) -> None:
    sender, receiver = pair()
    message = MctpMessage(8, bytes(i * 7 & 0xFF for i in range(size)), 3, False)
    frames = sender.frame(message)
    assert receiver.feed(frames) == [message]
    packets = -(-(size + 1) // PACKET_PAYLOAD_BYTES_MAX)
    assert len(frames) >= size + 1 + packets * 10


@pytest.mark.parametrize("byte", [0x7E, 0x7D, 0x5E, 0x5D])
def test_special_bytes_come_back(byte: int) -> None:
    sender, receiver = pair()
    for size in range(1, 300):
        message = MctpMessage(7, bytes((byte,)) * size)
        assert receiver.feed(sender.frame(message)) == [message]


def test_too_large_a_message_is_refused_by_the_sender() -> None:
    sender, _ = pair()
    with pytest.raises(ValueError, match="message bytes"):
        sender.frame(MctpMessage(8, bytes(MESSAGE_BYTES_MAX + 1)))
    with pytest.raises(ValueError, match="message_type"):
        sender.frame(MctpMessage(128, b""))
    with pytest.raises(ValueError, match="tag"):
        sender.frame(MctpMessage(8, b"", 8))


def test_endpoint_ids_are_checked() -> None:
    with pytest.raises(ValueError, match="peer_eid"):
        MctpStream(8, 255)


def test_too_large_a_message_is_dropped_by_the_receiver() -> None:
    sender = MctpStream(FM_EID, DEVICE_EID)
    receiver = MctpStream(DEVICE_EID, FM_EID, message_bytes_max=1000)
    big = sender.frame(MctpMessage(8, bytes(1001)))
    fits = MctpMessage(8, bytes(1000))
    found = receiver.feed(big + sender.frame(fits))
    assert found[-1] == fits
    assert isinstance(found[0], FramingFault)
    assert "larger than 1000" in found[0].reason


@pytest.mark.parametrize("at", range(1, 20))
def test_a_damaged_frame_costs_one_message_and_one_fault(at: int) -> None:
    sender, receiver = pair()
    good = MctpMessage(8, b"good")
    frame = bytearray(sender.frame(MctpMessage(8, b"0123456789ab")))
    frame[at] ^= 0x20
    found = receiver.feed(bytes(frame) + sender.frame(good) + sender.frame(good))
    assert [item for item in found if isinstance(item, MctpMessage)] == [good, good]
    assert 1 <= sum(isinstance(item, FramingFault) for item in found) <= 2


def test_a_truncated_frame_does_not_swallow_the_next() -> None:
    sender, _ = pair()
    good = MctpMessage(8, b"good")
    whole = sender.frame(MctpMessage(8, bytes(40)))
    for cut in range(1, len(whole) - 1):
        receiver = MctpStream(DEVICE_EID, FM_EID)
        found = receiver.feed(whole[:cut]) + receiver.feed(sender.frame(good))
        assert [item for item in found if isinstance(item, MctpMessage)] == [good], cut


def test_frames_may_share_a_flag() -> None:
    sender, receiver = pair()
    message = MctpMessage(8, b"one")
    frame = sender.frame(message)
    assert receiver.feed(frame + frame[:-1])[0] == message
    shared = MctpStream(DEVICE_EID, FM_EID).feed(frame[:-1] + frame)
    assert [item for item in shared if isinstance(item, MctpMessage)][-1] == message


def test_flags_between_frames_are_nothing() -> None:
    sender, receiver = pair()
    message = MctpMessage(8, b"x")
    assert receiver.feed(b"\x7e" * 50 + sender.frame(message) + b"\x7e" * 50) == [message]
    assert receiver.feed(sender.frame(message)) == [message]
    assert receiver.faults == 0


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (packet(0xC8, b"\x08hi", to=77), "not for this stream"),
        (packet(0xC8, b"\x08hi", source=77), "not for this stream"),
        (packet(0x48, b"\x08hi"), "of no message"),
        (packet(0x88, b"\x08hi") + packet(0x68, b"hi"), "is missing"),
        (packet(0x88, b"\x08hi") + packet(0xC8, b"\x08hi"), "before the last one ended"),
        (packet(0xC8, b"\x88hi"), "integrity check"),
        (b"\x7e\x02", "revision"),
        (b"\x7e\x01\x04", "byte count 4"),
        (b"\x7e\x01\x06\x01\x09\x08\xc8\x7d\x41\x08", "escape"),
        (b"\x7e\x01\x06\x01\x09\x08\x7e", "flag inside"),
        (b"\x7e\x01\x05\x01\x09\x08\xc8\x08\x00\x00\x7e", "frame check sequence"),
        (b"\x7e\x01\x05\x01\x09\x08\xc8\x08\x00\x00\x00", "no flag at the end"),
        (b"GET / HTTP/1.1\r\n", "outside a frame"),
    ],
)
def test_what_fits_nothing_is_a_fault_with_a_reason(frames: bytes, reason: str) -> None:
    receiver = MctpStream(DEVICE_EID, FM_EID)
    found = receiver.feed(frames + b"\0" * 4)
    assert any(reason in item.reason for item in found if isinstance(item, FramingFault))


def test_messages_of_different_tags_may_interleave() -> None:
    receiver = MctpStream(DEVICE_EID, FM_EID)
    found = receiver.feed(
        packet(0x88, b"\x08a") + packet(0x89, b"\x08x") + packet(0x58, b"b") + packet(0x59, b"y")
    )
    assert found == [MctpMessage(8, b"ab", 0), MctpMessage(8, b"xy", 1)]


def test_too_many_faults_in_a_row_break_the_stream() -> None:
    sender, receiver = pair()
    bad = packet(0xC8, b"\x08hi", to=77)
    good = MctpMessage(8, b"good")
    for _ in range(3):
        receiver.feed(bad * (FAULTS_CONSECUTIVE_MAX - 1))
        assert not receiver.broken
        assert receiver.feed(sender.frame(good)) == [good]
    found = receiver.feed(bad * 1000 + sender.frame(good))
    assert len(found) == FAULTS_CONSECUTIVE_MAX
    assert receiver.broken
    assert receiver.feed(sender.frame(good)) == []


def test_garbage_that_does_not_end_breaks_the_stream() -> None:
    receiver = MctpStream(DEVICE_EID, FM_EID)
    found = receiver.feed(b"A" * 100)
    assert len(found) == 1
    for _ in range(FAULTS_CONSECUTIVE_MAX):
        receiver.feed(b"\x7eA" + b"A" * SKIPPED_BYTES_PER_FAULT)
    assert receiver.broken
