"""The table of commands: complete, without contradictions, and total over opcodes."""

from __future__ import annotations

import pytest

from tagmem.wire.cci import (
    CciMessage,
    Effect,
    MessageType,
    NoPayload,
    Opcode,
    ReturnCode,
    return_code_name,
)
from tagmem.wire.commands import (
    COMMANDS,
    Unsupported,
    command_of,
    decode_request,
    decode_response,
)
from tagmem.wire.fmapi import GetDcdInfoRequest, SetDcRegionConfigurationResponse
from tagmem.wire.layout import WrongSize


def test_every_opcode_has_a_command() -> None:
    assert sorted(COMMANDS) == sorted(Opcode)
    requests = [command.request for command in COMMANDS.values()]
    assert len(set(requests)) == len(requests)


@pytest.mark.parametrize("opcode", [op for op in range(0x10000) if op not in COMMANDS][::97])
def test_unknown_opcodes_are_values(opcode: int) -> None:
    assert decode_request(opcode, b"anything") == Unsupported(opcode)
    assert decode_response(opcode, b"anything") == Unsupported(opcode)


def test_requests_know_their_command() -> None:
    assert command_of(GetDcdInfoRequest()).opcode is Opcode.GET_DCD_INFO
    with pytest.raises(KeyError):
        command_of(NoPayload())


def test_the_fabric_manager_set_travels_under_type_7() -> None:
    # Of tagmem's own commands only Get Extent Media belongs to a host's port.
    for opcode, command in COMMANDS.items():
        fabric = 0x5300 <= opcode < 0x5700 or opcode > Opcode.GET_EXTENT_MEDIA
        assert command.message_type is (MessageType.FM_API if fabric else MessageType.CCI)


def test_effects_are_those_of_the_specification() -> None:
    assert COMMANDS[Opcode.GET_DC_CONFIGURATION].effects == Effect.NONE
    assert COMMANDS[Opcode.ADD_DC_RESPONSE].effects == Effect.DATA_IMMEDIATE
    for opcode in (0x5602, 0x5604, 0x5605):
        assert COMMANDS[opcode].effects == 0x0E07


def test_an_empty_answer_to_5602_is_accepted() -> None:
    answer = SetDcRegionConfigurationResponse(1, 64)
    assert decode_response(0x5602, b"") == NoPayload()
    assert decode_response(0x5602, answer.encode()) == answer
    with pytest.raises(WrongSize):
        decode_response(0x5600, b"")


def test_names() -> None:
    assert COMMANDS[0x5604].name == "initiate dc add"
    assert return_code_name(ReturnCode.INVALID_EXTENT_LIST) == "invalid extent list"
    assert return_code_name(0x1234) == "unknown return code 0x1234"
    assert CciMessage.LAYOUT.size == 12
