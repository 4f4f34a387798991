"""The CCI message that every command and response travels in, and the numbers that all sides must
agree on.

Source: CXL r3.1 7.6.3 (message format), 8.2.9 (opcodes, return codes).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from tagmem.base.limits import CCI_PAYLOAD_BYTES_MAX
from tagmem.wire.fields import bit, bits, blob, count_bits, flag, reserved, u8, u16
from tagmem.wire.layout import WireStruct, wire


class MessageType(IntEnum):
    """MCTP message types of CXL (DMTF DSP0239; bindings DSP0234 and DSP0281)."""

    FM_API = 7
    CCI = 8


class Category(IntEnum):
    """What a CCI message is."""

    REQUEST = 0
    RESPONSE = 1


class Opcode(IntEnum):
    """Opcodes that tagmem knows. An opcode on the wire is an int: one that is not here is a value
    too.
    """

    IDENTIFY = 0x0001
    GET_EVENT_RECORDS = 0x0100
    CLEAR_EVENT_RECORDS = 0x0101
    GET_EVENT_INTERRUPT_POLICY = 0x0102
    SET_EVENT_INTERRUPT_POLICY = 0x0103
    EVENT_NOTIFICATION = 0x0106
    GET_SUPPORTED_LOGS = 0x0400
    GET_LOG = 0x0401
    IDENTIFY_MEMORY_DEVICE = 0x4000
    GET_DC_CONFIGURATION = 0x4800
    GET_DC_EXTENT_LIST = 0x4801
    ADD_DC_RESPONSE = 0x4802
    RELEASE_DC = 0x4803
    TUNNEL = 0x5300
    GET_LD_INFO = 0x5400
    GET_LD_ALLOCATIONS = 0x5401
    GET_MULTI_HEADED_INFO = 0x5500
    GET_HEAD_INFO = 0x5501
    GET_DCD_INFO = 0x5600
    GET_HOST_DC_REGION_CONFIGURATION = 0x5601
    SET_DC_REGION_CONFIGURATION = 0x5602
    GET_DC_REGION_EXTENT_LISTS = 0x5603
    INITIATE_DC_ADD = 0x5604
    INITIATE_DC_RELEASE = 0x5605
    DC_ADD_REFERENCE = 0x5606
    DC_REMOVE_REFERENCE = 0x5607
    DC_LIST_TAGS = 0x5608
    GET_EXTENT_MEDIA = 0xC000
    GET_SANITISE_RECORD = 0xC001
    GET_POOL_MAP = 0xC002
    FENCE = 0xC003


class ReturnCode(IntEnum):
    """Return codes of CCI responses (CXL r3.1 8.2.9, table of return codes)."""

    SUCCESS = 0x00
    BACKGROUND_COMMAND_STARTED = 0x01
    INVALID_INPUT = 0x02
    UNSUPPORTED = 0x03
    INTERNAL_ERROR = 0x04
    RETRY_REQUIRED = 0x05
    BUSY = 0x06
    MEDIA_DISABLED = 0x07
    FW_TRANSFER_IN_PROGRESS = 0x08
    FW_TRANSFER_OUT_OF_ORDER = 0x09
    FW_AUTHENTICATION_FAILED = 0x0A
    INVALID_FW_SLOT = 0x0B
    ACTIVATION_FAILED_FW_ROLLED_BACK = 0x0C
    ACTIVATION_FAILED_COLD_RESET_REQUIRED = 0x0D
    INVALID_HANDLE = 0x0E
    INVALID_PHYSICAL_ADDRESS = 0x0F
    INJECT_POISON_LIMIT_REACHED = 0x10
    PERMANENT_MEDIA_FAILURE = 0x11
    ABORTED = 0x12
    INVALID_SECURITY_STATE = 0x13
    INCORRECT_PASSPHRASE = 0x14
    UNSUPPORTED_MAILBOX_OR_CCI = 0x15
    INVALID_PAYLOAD_LENGTH = 0x16
    INVALID_LOG = 0x17
    INTERRUPTED = 0x18
    UNSUPPORTED_FEATURE_VERSION = 0x19
    UNSUPPORTED_FEATURE_SELECTION_VALUE = 0x1A
    FEATURE_TRANSFER_IN_PROGRESS = 0x1B
    FEATURE_TRANSFER_OUT_OF_ORDER = 0x1C
    RESOURCES_EXHAUSTED = 0x1D
    INVALID_EXTENT_LIST = 0x1E
    TRANSFER_OUT_OF_ORDER = 0x1F
    REQUEST_ABORT_NOT_SUPPORTED = 0x20


class Effect(IntFlag):
    """Effects of a command as the Command Effects Log gives them (CXL r3.1 8.2.9.5.2.1).

    QEMU shifts the bits from 7 up by one; read nothing into those of a foreign device.
    """

    NONE = 0
    CONFIGURATION_AFTER_COLD_RESET = 1 << 0
    CONFIGURATION_IMMEDIATE = 1 << 1
    DATA_IMMEDIATE = 1 << 2
    POLICY_IMMEDIATE = 1 << 3
    LOG_IMMEDIATE = 1 << 4
    SECURITY_STATE = 1 << 5
    BACKGROUND = 1 << 6
    SECONDARY_MAILBOX = 1 << 7
    BACKGROUND_ABORT = 1 << 8
    RESET_BITS_VALID = 1 << 9
    CONFIGURATION_AFTER_CONVENTIONAL_RESET = 1 << 10
    CONFIGURATION_AFTER_CXL_RESET = 1 << 11


@wire(
    bits(0x00, 1, bit("category", 0, 4, Category)),
    u8(0x01, "tag"),
    reserved(0x02, 1),
    u16(0x03, "opcode"),
    bits(0x05, 3, count_bits("payload", 0, 20), flag("background", 23)),
    u16(0x08, "return_code"),
    u16(0x0A, "vendor_status"),
    blob(0x0C, "payload", size_max=CCI_PAYLOAD_BYTES_MAX),
    size=12,
)
class CciMessage(WireStruct, frozen=True, gc=False):
    """CCI message, 12 bytes and the payload (CXL r3.1 7.6.3, figure 7-19).

    `opcode` and `return_code` are ints because a peer may send numbers that are not in the
    enumerations. The payload is bounded by CCI_PAYLOAD_BYTES_MAX, well below the 1 MiB of the
    length field.
    """

    category: Category
    tag: int
    opcode: int
    payload: bytes = b""
    return_code: int = 0
    vendor_status: int = 0
    background: bool = False


@wire(size=0)
class NoPayload(WireStruct, frozen=True, gc=False):
    """The payload of a response that has none."""


def return_code_name(code: int) -> str:
    """The specification's name for a return code, in lower case; numbers it does not have are named
    so.
    """
    try:
        return ReturnCode(code).name.lower().replace("_", " ")
    except ValueError:
        return f"unknown return code {code:#06x}"
