"""Golden vectors: fields and hex that were written from the specification, not by the codec.

Each file in tests/vectors is read whole, one byte at a time, with trailing bytes, and truncated at
every length; and every structure that is declared must have one.
"""

from __future__ import annotations

import importlib
import tomllib
import types
from enum import IntEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from tagmem.wire import catalogue, cdat, nd_pfn, vhost_user, virtio_pmem, vring
from tagmem.wire.cci import Category, CciMessage, MessageType
from tagmem.wire.commands import COMMANDS, decode_request, decode_response
from tagmem.wire.layout import STRUCTURES, WireStruct, WrongSize
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpMessage, MctpStream

DECLARING = (catalogue, cdat, nd_pfn, vhost_user, virtio_pmem, vring)
"""Modules of structures that no CCI command carries: they are declared once imported."""
VECTORS = Path(__file__).parents[2] / "vectors"
FILES = {path.stem: tomllib.loads(path.read_text()) for path in sorted(VECTORS.glob("*.toml"))}
PAYLOADS = {name: data for name, data in FILES.items() if "structure" in data}
FRAMES = {name: data for name, data in FILES.items() if data.get("kind") == "frame"}


def hex_bytes(text: str) -> bytes:
    return bytes.fromhex("".join(line.split("#")[0] for line in text.splitlines()))


def structure(data: dict[str, Any]) -> type[WireStruct]:
    kind = getattr(importlib.import_module(f"tagmem.wire.{data['module']}"), data["structure"])
    assert isinstance(kind, type)
    assert issubclass(kind, WireStruct)
    return kind


def build(kind: Any, value: Any) -> Any:
    """The Python value for a TOML value of a field of this type."""
    if isinstance(kind, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if isinstance(value, dict) and "structure" in value:
            named = {option.__name__: option for option in options}
            rest = {key: item for key, item in value.items() if key != "structure"}
            return build(named[value["structure"]], rest)
        return build(options[0], value)
    if get_origin(kind) is tuple:
        return tuple(build(get_args(kind)[0], item) for item in value)
    if kind is bytes:
        return bytes.fromhex(value)
    if issubclass(kind, IntEnum):
        return kind[value]
    if issubclass(kind, WireStruct):
        hints = get_type_hints(kind)
        return kind(**{name: build(hints[name], item) for name, item in value.items()})
    assert type(value) is kind
    return value


def load(name: str) -> tuple[type[WireStruct], WireStruct, bytes]:
    data = PAYLOADS[name]
    kind = structure(data)
    value = build(kind, data["fields"])
    assert isinstance(value, kind)
    return kind, value, hex_bytes(data["hex"])


def reserved_bits(kind: type[WireStruct], data: bytes) -> int:
    """Bits that may be turned over without a change of the decoded value."""
    value = kind.decode(data)
    same = 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                same += kind.decode(changed) == value
            except ValueError:
                continue
    return same


@pytest.mark.parametrize("name", PAYLOADS)
def test_encodes_and_decodes(name: str) -> None:
    kind, value, data = load(name)
    assert value.encode().hex(" ") == data.hex(" ")
    assert kind.decode(data) == value
    assert kind.decode(bytearray(data)) == value
    assert kind.decode(memoryview(data)) == value
    assert kind.LAYOUT.reserved_nonzero(data) == ()


@pytest.mark.parametrize("name", PAYLOADS)
def test_decodes_one_byte_at_a_time(name: str) -> None:
    kind, value, data = load(name)
    sender, receiver = MctpStream(FM_EID, DEVICE_EID), MctpStream(DEVICE_EID, FM_EID)
    message = CciMessage(Category.REQUEST, 7, 0xFFFF, data)
    frames = sender.frame(MctpMessage(MessageType.CCI, message.encode()))
    found = [item for byte in frames for item in receiver.feed(bytes((byte,)))]
    assert len(found) == 1
    assert isinstance(found[0], MctpMessage)
    assert kind.decode(CciMessage.decode(found[0].payload).payload) == value


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("more", [b"\0", b"\xff", bytes(3), bytes(64)], ids=len)
def test_refuses_trailing_bytes(name: str, more: bytes) -> None:
    kind, value, data = load(name)
    if PAYLOADS[name].get("open_ended"):
        assert kind.decode(data + more).encode() == data + more
        return
    if PAYLOADS[name].get("grows_to", 0) >= len(data + more):
        assert kind.decode(data + more) != value
        return
    with pytest.raises(WrongSize) as caught:
        kind.decode(data + more)
    assert caught.value.value == len(data + more)
    if not PAYLOADS[name].get("grows_to"):
        assert kind.decode_prefix(data + more) == (value, len(data))


@pytest.mark.parametrize("name", PAYLOADS)
def test_refuses_every_truncation(name: str) -> None:
    kind, _, data = load(name)
    legal = PAYLOADS[name].get("legal_truncations", [])
    for length in range(len(data)):
        if length in legal or PAYLOADS[name].get("open_ended"):
            assert kind.decode(data[:length]).encode() == data[:length]
            continue
        with pytest.raises(WrongSize) as caught:
            kind.decode(data[:length])
        assert caught.value.field
        assert caught.value.limit


@pytest.mark.parametrize("name", PAYLOADS)
def test_set_reserved_bits_are_accepted_and_reported(name: str) -> None:
    kind, _, data = load(name)
    reported = 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                offsets = kind.LAYOUT.reserved_nonzero(changed)
            except ValueError:
                continue
            if offsets:
                assert offsets == (at,)
                assert kind.decode(changed) == kind.decode(data)
                reported += 1
    assert reported == reserved_bits(kind, data)


@pytest.mark.parametrize("name", [n for n, d in PAYLOADS.items() if "opcode" in d])
def test_the_command_table_finds_the_class(name: str) -> None:
    kind, value, data = load(name)
    command = COMMANDS[int(PAYLOADS[name]["opcode"].rstrip("h"), 16)]
    assert name.startswith(f"{command.opcode:04x}") or kind not in (
        command.request,
        command.response,
    )
    if kind is command.request:
        assert decode_request(command.opcode, data) == value
    elif kind is command.response:
        assert decode_response(command.opcode, data) == value


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str) -> None:
    fields = FRAMES[name]["fields"]
    data = hex_bytes(FRAMES[name]["hex"])
    message = MctpMessage(
        fields["message_type"],
        bytes.fromhex(fields["payload"]),
        fields["tag"],
        fields["tag_owner"],
    )
    sender = MctpStream(fields["eid"], fields["peer_eid"])
    assert sender.frame(message).hex(" ") == data.hex(" ")
    assert MctpStream(fields["peer_eid"], fields["eid"]).feed(data) == [message]
    receiver = MctpStream(fields["peer_eid"], fields["eid"])
    assert [item for byte in data for item in receiver.feed(bytes((byte,)))] == [message]


def test_every_structure_has_a_vector() -> None:
    ours = [kind for kind in STRUCTURES if kind.__module__.startswith("tagmem.")]
    declared = {f"{kind.__module__}.{kind.__name__}" for kind in ours}
    covered = {f"tagmem.wire.{d['module']}.{d['structure']}" for d in PAYLOADS.values()}
    assert declared == covered


def test_every_vector_cites_its_clause() -> None:
    for name, data in FILES.items():
        assert data["clause"], name
    assert len(PAYLOADS) + len(FRAMES) == len(FILES)


def test_every_command_has_its_vectors() -> None:
    covered = {structure(data) for data in PAYLOADS.values()}
    for command in COMMANDS.values():
        assert command.request in covered
        assert command.response in covered
