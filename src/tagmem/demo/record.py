"""Asks the appliance itself for its record of a wipe: one fabric-manager command on a socket.

Beside the orchestrator, because the demo wants to hear it from the device. A port of the appliance
has one session: this one displaces the orchestrator's, which connects again and compares its books
with the device's lists, as after any broken connection.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tagmem.base.errors import OutcomeUnknown, RemoteError
from tagmem.base.ids import Tag, tag_to_bytes
from tagmem.base.units import SECOND
from tagmem.wire.cci import Opcode, ReturnCode
from tagmem.wire.exchange import Requester, Response
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream
from tagmem.wire.vendor import GetSanitiseRecordRequest, GetSanitiseRecordResponse

_ANSWER_SECONDS = 5.0
_READ_BYTES = 65_536


def sanitise_record(fm_socket: Path, tag: str) -> GetSanitiseRecordResponse:
    """Get Sanitise Record (C001h). Raises OutcomeUnknown (no answer), RemoteError (refused)."""
    requester = Requester(MctpStream(FM_EID, DEVICE_EID))
    now = time.monotonic_ns()
    request = GetSanitiseRecordRequest(tag_to_bytes(Tag(tag)))
    deadline = now + int(_ANSWER_SECONDS * SECOND)
    requester.request(Opcode.GET_SANITISE_RECORD, request, now, deadline)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_ANSWER_SECONDS)
            link.connect(str(fm_socket))
            link.sendall(requester.outgoing())
            while data := link.recv(_READ_BYTES):
                for item in requester.feed(data, time.monotonic_ns()):
                    if isinstance(item, Response):
                        return _body(item)
    except OSError as error:
        raise OutcomeUnknown(f"the appliance at {fm_socket} does not answer: {error}") from error
    raise OutcomeUnknown(f"the appliance at {fm_socket} closed the connection")


def _body(answer: Response) -> GetSanitiseRecordResponse:
    if answer.return_code != ReturnCode.SUCCESS:
        raise RemoteError("appliance", answer.return_code, "Get Sanitise Record was refused")
    assert isinstance(answer.body, GetSanitiseRecordResponse)
    return answer.body
