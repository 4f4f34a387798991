"""One table of every command, so that server, client and the Command Effects Log cannot disagree.

From here: the class of a payload by opcode, the opcode of a request by class, effects, message
type.
"""

from __future__ import annotations

import msgspec

from tagmem.wire import fmapi, generic, memdev, vendor
from tagmem.wire.cci import Effect, MessageType, NoPayload, Opcode
from tagmem.wire.fields import Buffer
from tagmem.wire.layout import WireStruct


class Unsupported(msgspec.Struct, frozen=True, gc=False):
    """An opcode that this side does not know: a value to answer, not an error to raise."""

    opcode: int


class Command(msgspec.Struct, frozen=True):
    """One line of the table."""

    opcode: Opcode
    request: type[WireStruct]
    response: type[WireStruct]
    effects: Effect = Effect.NONE
    """As in the Command Effects Log (CXL r3.1 8.2.9.5.2.1)."""
    message_type: MessageType = MessageType.CCI
    """The MCTP message type that carries it: 7 on the fabric-manager port, 8 for component
    commands.
    """
    response_may_be_empty: bool = False
    """Peers exist that send no payload where the specification has one."""

    @property
    def name(self) -> str:
        """The command's name in lower case, such as `initiate dc add`."""
        return self.opcode.name.lower().replace("_", " ")


_FM = MessageType.FM_API
_CONFIGURATION_AND_DATA = (
    Effect.CONFIGURATION_AFTER_COLD_RESET
    | Effect.CONFIGURATION_IMMEDIATE
    | Effect.DATA_IMMEDIATE
    | Effect.RESET_BITS_VALID
    | Effect.CONFIGURATION_AFTER_CONVENTIONAL_RESET
    | Effect.CONFIGURATION_AFTER_CXL_RESET
)

_TABLE = (
    Command(Opcode.IDENTIFY, generic.IdentifyRequest, generic.IdentifyResponse),
    Command(
        Opcode.GET_EVENT_RECORDS, generic.GetEventRecordsRequest, generic.GetEventRecordsResponse
    ),
    Command(
        Opcode.CLEAR_EVENT_RECORDS,
        generic.ClearEventRecordsRequest,
        NoPayload,
        Effect.LOG_IMMEDIATE,
    ),
    Command(
        Opcode.GET_EVENT_INTERRUPT_POLICY,
        generic.GetEventInterruptPolicyRequest,
        generic.GetEventInterruptPolicyResponse,
    ),
    Command(
        Opcode.SET_EVENT_INTERRUPT_POLICY,
        generic.SetEventInterruptPolicyRequest,
        NoPayload,
        Effect.POLICY_IMMEDIATE,
    ),
    Command(Opcode.EVENT_NOTIFICATION, generic.EventNotification, NoPayload),
    Command(
        Opcode.GET_SUPPORTED_LOGS, generic.GetSupportedLogsRequest, generic.GetSupportedLogsResponse
    ),
    Command(Opcode.GET_LOG, generic.GetLogRequest, generic.GetLogResponse),
    Command(
        Opcode.IDENTIFY_MEMORY_DEVICE,
        generic.IdentifyMemoryDeviceRequest,
        generic.IdentifyMemoryDeviceResponse,
    ),
    Command(
        Opcode.GET_DC_CONFIGURATION,
        memdev.GetDcConfigurationRequest,
        memdev.GetDcConfigurationResponse,
    ),
    Command(
        Opcode.GET_DC_EXTENT_LIST, memdev.GetDcExtentListRequest, memdev.GetDcExtentListResponse
    ),
    Command(Opcode.ADD_DC_RESPONSE, memdev.AddDcResponseRequest, NoPayload, Effect.DATA_IMMEDIATE),
    Command(Opcode.RELEASE_DC, memdev.ReleaseDcRequest, NoPayload, Effect.DATA_IMMEDIATE),
    Command(Opcode.TUNNEL, fmapi.TunnelRequest, fmapi.TunnelResponse, message_type=_FM),
    Command(Opcode.GET_LD_INFO, fmapi.GetLdInfoRequest, fmapi.GetLdInfoResponse, message_type=_FM),
    Command(
        Opcode.GET_LD_ALLOCATIONS,
        fmapi.GetLdAllocationsRequest,
        fmapi.GetLdAllocationsResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.GET_MULTI_HEADED_INFO,
        fmapi.GetMultiHeadedInfoRequest,
        fmapi.GetMultiHeadedInfoResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.GET_HEAD_INFO,
        fmapi.GetHeadInfoRequest,
        fmapi.GetHeadInfoResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.GET_DCD_INFO, fmapi.GetDcdInfoRequest, fmapi.GetDcdInfoResponse, message_type=_FM
    ),
    Command(
        Opcode.GET_HOST_DC_REGION_CONFIGURATION,
        fmapi.GetHostDcRegionConfigurationRequest,
        fmapi.GetHostDcRegionConfigurationResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.SET_DC_REGION_CONFIGURATION,
        fmapi.SetDcRegionConfigurationRequest,
        fmapi.SetDcRegionConfigurationResponse,
        _CONFIGURATION_AND_DATA,
        _FM,
        response_may_be_empty=True,
    ),
    Command(
        Opcode.GET_DC_REGION_EXTENT_LISTS,
        fmapi.GetDcRegionExtentListsRequest,
        fmapi.GetDcRegionExtentListsResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.INITIATE_DC_ADD,
        fmapi.InitiateDcAddRequest,
        NoPayload,
        _CONFIGURATION_AND_DATA,
        _FM,
    ),
    Command(
        Opcode.INITIATE_DC_RELEASE,
        fmapi.InitiateDcReleaseRequest,
        NoPayload,
        _CONFIGURATION_AND_DATA,
        _FM,
    ),
    Command(Opcode.DC_ADD_REFERENCE, fmapi.DcAddReferenceRequest, NoPayload, message_type=_FM),
    # The last reference frees and may wipe the memory; the specification's text names no effect.
    Command(
        Opcode.DC_REMOVE_REFERENCE,
        fmapi.DcRemoveReferenceRequest,
        NoPayload,
        Effect.DATA_IMMEDIATE,
        _FM,
    ),
    Command(
        Opcode.DC_LIST_TAGS, fmapi.DcListTagsRequest, fmapi.DcListTagsResponse, message_type=_FM
    ),
    Command(Opcode.GET_EXTENT_MEDIA, vendor.GetExtentMediaRequest, vendor.GetExtentMediaResponse),
    Command(
        Opcode.GET_SANITISE_RECORD,
        vendor.GetSanitiseRecordRequest,
        vendor.GetSanitiseRecordResponse,
        message_type=_FM,
    ),
    Command(
        Opcode.GET_POOL_MAP,
        vendor.GetPoolMapRequest,
        vendor.GetPoolMapResponse,
        message_type=_FM,
    ),
    Command(Opcode.FENCE, vendor.FenceRequest, NoPayload, Effect.CONFIGURATION_IMMEDIATE, _FM),
)

COMMANDS: dict[int, Command] = {int(command.opcode): command for command in _TABLE}
"""Every command by its opcode."""

_BY_REQUEST: dict[type[WireStruct], Command] = {command.request: command for command in _TABLE}


def command_of(request: WireStruct) -> Command:
    """The command that a request structure belongs to. Raises KeyError for other structures."""
    return _BY_REQUEST[type(request)]


def decode_request(opcode: int, payload: Buffer) -> WireStruct | Unsupported:
    """The request in a CCI payload. Raises WrongSize or BadValue; an unknown opcode is a value."""
    command = COMMANDS.get(opcode)
    return Unsupported(opcode) if command is None else command.request.decode(payload)


def decode_response(opcode: int, payload: Buffer) -> WireStruct | Unsupported:
    """The response in the CCI payload of a success. Raises WrongSize or BadValue."""
    command = COMMANDS.get(opcode)
    if command is None:
        return Unsupported(opcode)
    if not payload and command.response_may_be_empty:
        return NoPayload()
    return command.response.decode(payload)
