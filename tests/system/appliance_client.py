"""A process of the appliance and blocking clients of its ports, for tests that want real sockets
and real kills."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

from tagmem.base.ids import Tag, tag_to_bytes
from tagmem.base.units import MIB, SECOND
from tagmem.wire import fmapi, generic, memdev, vendor
from tagmem.wire.commands import command_of
from tagmem.wire.exchange import Fault, Notification, Requester, Response
from tagmem.wire.extent import UpdatedExtent, WireExtent
from tagmem.wire.generic import EventLog
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream

B = 2 * MIB
DEADLINE = 10.0
T = TypeVar("T", bound=WireStruct)

CONFIG = """\
name = "z1"
state_dir = "{root}/state"
media_dir = "{media}"
layout = "{layout}"
fm_socket = "{root}/fm"

[[region]]
size = "64MiB"

[[region]]
size = "64MiB"
sharable = true

[[region]]
of = 1
sharable = true
read_only = true

[[host]]
name = "w1"
socket = "{root}/w1"

[[host]]
name = "w2"
socket = "{root}/w2"
order = "mirrored"
event_log_records = 16
"""


class Refused(Exception):
    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"return code {code:#x}")


class Client:
    """One session at one port; one request at a time unless `send` is used."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.requester = Requester(MctpStream(FM_EID, DEVICE_EID))
        self.notified = 0
        self.descriptors: list[int] = []

    def send(self, request: WireStruct) -> int:
        key = self.requester.request(command_of(request).opcode, request, 0, SECOND)
        self.socket.sendall(self.requester.outgoing())
        return key

    def receive(self) -> list[Response]:
        space = socket.CMSG_SPACE(16)
        data, ancillary, _, _ = self.socket.recvmsg(1 << 18, space)
        if not data:
            raise ConnectionResetError
        for _, _, raw in ancillary:
            found = array.array("i")
            found.frombytes(raw)
            self.descriptors += found
        responses: list[Response] = []
        for item in self.requester.feed(data, 0):
            assert not isinstance(item, Fault), item
            if isinstance(item, Notification):
                self.notified += 1
            else:
                responses.append(item)
        return responses

    def ask(self, request: WireStruct, kind: type[T]) -> T:
        key = self.send(request)
        while True:
            for response in self.receive():
                assert response.key == key
                if response.return_code:
                    raise Refused(response.return_code)
                assert response.malformed is None
                assert isinstance(response.body, kind), response.body
                return response.body

    def do(self, request: WireStruct) -> int:
        key = self.send(request)
        while True:
            for response in self.receive():
                assert response.key == key
                return response.return_code

    def wait_for_notification(self) -> None:
        while not self.notified:
            assert self.receive() == []
        self.notified = 0

    def records(self) -> list[generic.DynamicCapacityRecord]:
        found: list[generic.DynamicCapacityRecord] = []
        while True:
            get = generic.GetEventRecordsRequest(EventLog.DYNAMIC_CAPACITY)
            page = self.ask(get, generic.GetEventRecordsResponse)
            if not page.records:
                return found
            for record in page.records:
                assert isinstance(record, generic.DynamicCapacityRecord)
                found.append(record)
            handles = tuple(r.header.handle for r in page.records)
            for at in range(0, len(handles), 255):
                clear = generic.ClearEventRecordsRequest(
                    EventLog.DYNAMIC_CAPACITY, handles[at : at + 255]
                )
                assert self.do(clear) == 0

    def wait_for_records(self, count: int) -> list[generic.DynamicCapacityRecord]:
        found = self.records()
        while len(found) < count:
            self.wait_for_notification()
            found += self.records()
        return found

    # ---- fabric manager

    def add(self, ld: int, tag: Tag, blocks: int, region: int = 0) -> int:
        contiguous = fmapi.SelectionPolicy.CONTIGUOUS
        request = fmapi.InitiateDcAddRequest(ld, contiguous, region, blocks * B, tag_to_bytes(tag))
        return self.do(request)

    def share(self, ld: int, tag: Tag, region: int) -> int:
        policy = fmapi.SelectionPolicy.ENABLE_SHARED_ACCESS
        return self.do(fmapi.InitiateDcAddRequest(ld, policy, region, 0, tag_to_bytes(tag)))

    def release(self, ld: int, tag: Tag, blocks: int, *, forced: bool = False) -> int:
        request = fmapi.InitiateDcReleaseRequest(
            ld,
            fmapi.RemovalPolicy.TAG_BASED,
            forced,
            length_bytes=blocks * B,
            tag=tag_to_bytes(tag),
        )
        return self.do(request)

    def fence(self, ld: int, tag: Tag) -> int:
        return self.do(vendor.FenceRequest(ld, tag_to_bytes(tag)))

    def lists(self, lds: int = 2) -> Any:
        """All that a fabric manager can read."""
        found: list[Any] = []
        for ld in range(lds):
            request = fmapi.GetDcRegionExtentListsRequest(ld, 1000)
            found.append(self.ask(request, fmapi.GetDcRegionExtentListsResponse))
        tags = self.ask(fmapi.DcListTagsRequest(0, 700), fmapi.DcListTagsResponse)
        found.append(sorted(tags.tags, key=lambda t: t.tag))
        return found

    def sanitised(self, tag: Tag) -> vendor.GetSanitiseRecordResponse:
        request = vendor.GetSanitiseRecordRequest(tag_to_bytes(tag))
        return self.ask(request, vendor.GetSanitiseRecordResponse)

    # ---- host

    def extents(self) -> tuple[WireExtent, ...]:
        request = memdev.GetDcExtentListRequest(1000)
        return self.ask(request, memdev.GetDcExtentListResponse).extents

    def accept(self) -> tuple[WireExtent, ...]:
        """Take the next offer whole."""
        offered = tuple(record.extent for record in self.wait_for_records(1))
        assert self.do(memdev.AddDcResponseRequest(_updated(offered))) == 0
        return offered

    def give_back(self, extents: tuple[WireExtent, ...]) -> int:
        return self.do(memdev.ReleaseDcRequest(_updated(extents)))

    def media(self, tag: Tag) -> tuple[vendor.GetExtentMediaResponse, int]:
        request = vendor.GetExtentMediaRequest(tag_to_bytes(tag))
        response = self.ask(request, vendor.GetExtentMediaResponse)
        return response, self.descriptors.pop()

    def close(self) -> None:
        self.socket.close()


def _updated(extents: tuple[WireExtent, ...]) -> tuple[UpdatedExtent, ...]:
    return tuple(UpdatedExtent(e.start_dpa, e.length_bytes) for e in extents)


class Appliance:
    """The process, which may be killed and started again."""

    def __init__(self, root: Path, media: Path, layout: str = "by-tag") -> None:
        self.root = root
        self.media = media
        self.config = root / "appliance.toml"
        self.config.write_text(CONFIG.format(root=root, media=media, layout=layout))
        self.process: subprocess.Popen[str] | None = None
        self.clients: list[Client] = []
        self.log = root / "log"

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tagmem", "appliance", "--config", str(self.config)],
                stderr=log,
                text=True,
            )
        deadline = time.monotonic() + DEADLINE
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            try:
                self.client("fm").close()
            except (FileNotFoundError, ConnectionRefusedError):
                os.sched_yield()
            else:
                return

    def client(self, port: str) -> Client:
        client = Client(self.root / port)
        self.clients.append(client)
        return client

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._hang_up()

    def stop(self) -> int:
        """End it in order; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE)
        self._hang_up()
        return code

    def _hang_up(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._hang_up()
