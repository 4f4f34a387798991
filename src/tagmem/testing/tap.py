"""Listens to a simulated connection: says which commands pass, and loses one when it is told to.

Only commands that move memory are said; what reads lists and logs would fill pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tagmem.base.ids import NIL_TAG, tag_from_bytes
from tagmem.testing.nodes import Connection
from tagmem.wire.cci import Category, CciMessage, Opcode, return_code_name
from tagmem.wire.commands import COMMANDS, decode_request
from tagmem.wire.fmapi import (
    DcAddReferenceRequest,
    DcRemoveReferenceRequest,
    InitiateDcAddRequest,
    InitiateDcReleaseRequest,
)
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpMessage, MctpStream
from tagmem.wire.memdev import AddDcResponseRequest, ReleaseDcRequest
from tagmem.wire.vendor import FenceRequest

TELLING = frozenset(
    {
        Opcode.INITIATE_DC_ADD,
        Opcode.INITIATE_DC_RELEASE,
        Opcode.ADD_DC_RESPONSE,
        Opcode.RELEASE_DC,
        Opcode.FENCE,
        Opcode.DC_ADD_REFERENCE,
        Opcode.DC_REMOVE_REFERENCE,
    }
)


class Loss:
    """What is to be lost next: one request, or one answer, of one command or of any."""

    def __init__(self) -> None:
        self.opcode: int | None = None
        self.answer = False
        self.armed = False

    def arm(self, opcode: int | None, *, answer: bool) -> None:
        """Lose the next one."""
        self.opcode, self.answer, self.armed = opcode, answer, True

    def takes(self, opcode: int, *, answer: bool) -> bool:
        """Whether this message is the one; then it is the last."""
        if not self.armed or self.answer != answer or self.opcode not in (None, opcode):
            return False
        self.armed = False
        return True


class Tap:
    """Both directions of one connection to a device."""

    def __init__(
        self, wire: Connection, client: str, device: str, loss: Loss, say: Callable[[str], None]
    ) -> None:
        self._client, self._device = client, device
        self._loss, self._say = loss, say
        self._listen(wire, MctpStream(DEVICE_EID, FM_EID), MctpStream(FM_EID, DEVICE_EID))

    def _listen(self, wire: Connection, up: MctpStream, down: MctpStream) -> None:
        take_up, take_down = wire.up.deliver, wire.down.deliver

        def arrived_up(data: Any) -> None:
            if self._pass(data, up):
                take_up(data)

        def arrived_down(data: Any) -> None:
            if self._pass(data, down):
                take_down(data)

        wire.up.deliver, wire.down.deliver = arrived_up, arrived_down

    def _pass(self, data: bytes, stream: MctpStream) -> bool:
        """Say what is in one delivery. False: it is lost, all of it."""
        kept = True
        for item in stream.feed(data):
            if not isinstance(item, MctpMessage):
                continue
            message = CciMessage.decode(item.payload)
            answer = message.category is Category.RESPONSE
            if self._loss.takes(message.opcode, answer=answer):
                kept = False
                self._say(f"{self._line(message)}  (lost)")
            elif message.opcode in TELLING and (not answer or message.return_code):
                self._say(self._line(message))
        return kept

    def _line(self, message: CciMessage) -> str:
        name = COMMANDS[message.opcode].name
        if message.category is Category.RESPONSE:
            code = return_code_name(message.return_code)
            return f"{self._device} -> {self._client}: {message.opcode:04x}h answered: {code}"
        about = _about(decode_request(message.opcode, message.payload))
        return f"{self._client} -> {self._device}: {message.opcode:04x}h {name}{about}"


def _about(request: object) -> str:
    """What a command is for, in a few words."""
    if isinstance(request, AddDcResponseRequest):
        count = len(request.extents)
        return f": takes {_extents(count)}" if count else ": takes nothing"
    if isinstance(request, ReleaseDcRequest):
        return f": gives back {_extents(len(request.extents))}"
    if isinstance(request, InitiateDcAddRequest):
        tag = request.extents[0].tag if request.extents else request.tag
        shared = ", shared" if request.policy == 3 else ""
        return f": {_tag(tag)} to LD {request.host_id}{shared}"
    if isinstance(request, InitiateDcReleaseRequest):
        forced = ", forced" if request.forced else ""
        return f": {_tag(request.tag)} from LD {request.host_id}{forced}"
    if isinstance(request, DcAddReferenceRequest | DcRemoveReferenceRequest):
        return f": {_tag(request.tag)}"
    if isinstance(request, FenceRequest):
        return f": {_tag(request.tag)} from LD {request.ld}"
    return ""


def _extents(count: int) -> str:
    return "1 extent" if count == 1 else f"{count} extents"


def _tag(raw: bytes) -> str:
    tag = tag_from_bytes(raw)
    return "untagged" if tag == NIL_TAG else tag
