"""A stand-in for QEMU: the front-end of vhost-user, with real memory, in a process of its own.

It asks what QEMU 11.1 asks, in QEMU's order, and maps what it is told to map (mmap with MAP_FIXED
into a window that it has reserved), so that tests see with their own eyes, and with the kernel's,
whether bytes are there or were taken back. It is a process of its own because release is proved by
looking at a process. Told to, it misbehaves: refuses, keeps what it was told to give up, says
nothing, or sends whatever it is given.

A test drives it with JSON lines over a socket (`Driver`); the child's half is `main`.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tagmem.wire.vhost_user import (
    HEADER_BYTES,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    BackRequest,
    FrontRequest,
    MemoryRegion,
    MemoryTable,
    MessageHeader,
    Number,
    ProtocolFeature,
    SharedMemoryConfig,
    SharedMemoryMap,
    SingleRegion,
    VringAddress,
    VringState,
    message,
)
from tagmem.wire.virtio_pmem import PMEM_F_SHMEM_REGION, REQUEST_FLUSH, PmemRequest
from tagmem.wire.vring import NEXT, WRITE, Descriptor, RingHead

RAM_BYTES = 1 << 20
RAM_AT = 1 << 20
"""Guest-physical."""
USER_AT = 0x7F00_0000_0000
"""Where the front-end says that it has the guest's RAM; nobody looks there."""
DESCRIPTORS_AT, AVAILABLE_AT, USED_AT, REQUEST_AT, RESPONSE_AT = 0, 0x1000, 0x2000, 0x3000, 0x4000
ENTRIES = 64
PATIENCE_SECONDS = 10.0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
"""Not in Python 3.11's mmap module."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip


class FrontEnd:
    """One connection to a back-end."""

    def __init__(self, path: str) -> None:
        self.sock, self.channel = _connected(path)
        self.has_channel = False
        self.has_slots = False
        self.refuse = False
        """Answer SHMEM_MAP with failure."""
        self.keep = False
        """Answer SHMEM_UNMAP with success, and keep the memory."""
        self.mute = False
        """Answer nothing on the channel."""
        self.mapped: dict[int, int] = {}
        """Window offset to length."""
        self._window = 0
        self.window_bytes = 0
        self._ram = os.memfd_create("ram")
        os.ftruncate(self._ram, RAM_BYTES)
        self._kick = os.eventfd(0, os.EFD_NONBLOCK)
        self._call = os.eventfd(0, os.EFD_NONBLOCK)
        self._made = 0

    # -- requests ----------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes, fds: Sequence[int], *, ack: bool) -> None:
        """One message, its descriptors beside it."""
        socket.send_fds(self.sock, [message(request, payload, need_reply=ack)], list(fds))

    def receive(self) -> tuple[MessageHeader, bytes]:
        """The next answer."""
        header = MessageHeader.decode(_exactly(self.sock, HEADER_BYTES))
        return header, _exactly(self.sock, header.size_bytes)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """The payload of a request's own reply."""
        self.send(request, payload, (), ack=False)
        return self.receive()[1]

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The verdict on a request that has none of its own."""
        self.send(request, payload, fds, ack=True)
        return Number.decode(self.receive()[1]).value

    def connect(self) -> dict[str, Any]:
        """What QEMU does when the device is plugged in."""
        features = Number.decode(self.ask(FrontRequest.GET_FEATURES)).value
        protocol = Number.decode(self.ask(FrontRequest.GET_PROTOCOL_FEATURES)).value
        self.send(FrontRequest.SET_PROTOCOL_FEATURES, Number(protocol).encode(), (), ack=False)
        queues = Number.decode(self.ask(FrontRequest.GET_QUEUE_NUM)).value
        slots = 0
        self.has_slots = bool(protocol >> ProtocolFeature.CONFIGURE_MEM_SLOTS & 1)
        if self.has_slots:
            slots = Number.decode(self.ask(FrontRequest.GET_MAX_MEM_SLOTS)).value
        self._give_channel()
        self.send(FrontRequest.SET_OWNER, b"", (), ack=False)
        config = SharedMemoryConfig.decode(self.ask(FrontRequest.GET_SHMEM_CONFIG))
        if not self._window:
            self._reserve(config.sizes_bytes[0])
        return {
            "features": features,
            "protocol": protocol,
            "queues": queues,
            "slots": slots,
            "window": self.window_bytes,
        }

    def _give_channel(self) -> None:
        self.channel.close()
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.tell(FrontRequest.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        self.has_channel = True

    def again(self, path: str) -> dict[str, Any]:
        """Connect to another back-end, as a character device with `reconnect` does; what is mapped
        stays.
        """
        self.sock.close()
        self.channel.close()
        self.sock, self.channel = _connected(path)
        return self.connect()

    def start(self) -> None:
        """What QEMU does when the guest's driver is ready."""
        wanted = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | PMEM_F_SHMEM_REGION
        self.tell(FrontRequest.SET_FEATURES, Number(wanted).encode())
        self.tell(FrontRequest.SET_STATUS, Number(8).encode())
        region = MemoryRegion(RAM_AT, RAM_BYTES, USER_AT, 0)
        if self.has_slots:
            self.tell(FrontRequest.ADD_MEM_REG, SingleRegion(region).encode(), [self._ram])
        else:
            table = MemoryTable((region,))
            self.tell(FrontRequest.SET_MEM_TABLE, table.encode(), [self._ram])
        self.tell(FrontRequest.SET_VRING_NUM, VringState(0, ENTRIES).encode())
        self.tell(FrontRequest.SET_VRING_BASE, VringState(0, self._made).encode())
        address = VringAddress(
            0, 0, USER_AT + DESCRIPTORS_AT, USER_AT + USED_AT, USER_AT + AVAILABLE_AT
        )
        self.tell(FrontRequest.SET_VRING_ADDR, address.encode())
        self.tell(FrontRequest.SET_VRING_KICK, Number(0).encode(), [self._kick])
        self.tell(FrontRequest.SET_VRING_CALL, Number(0).encode(), [self._call])
        self.tell(FrontRequest.SET_VRING_ENABLE, VringState(0, 1).encode())

    def stop(self, *, drop: bool) -> int:
        """What QEMU does when the VM is paused, or (`drop`) the driver is unbound; the ring's
        base.
        """
        self.tell(FrontRequest.SET_VRING_ENABLE, VringState(0, 0).encode())
        base = VringState.decode(self.ask(FrontRequest.GET_VRING_BASE, VringState(0, 0).encode()))
        self.send(FrontRequest.SET_STATUS, Number(0).encode(), (), ack=False)
        if self.has_slots:
            region = SingleRegion(MemoryRegion(RAM_AT, RAM_BYTES, USER_AT, 0))
            self.tell(FrontRequest.REM_MEM_REG, region.encode())
        if drop:
            for at in tuple(self.mapped):
                self._unmap(at)
        return base.num

    # -- the window --------------------------------------------------------------------------------

    def _reserve(self, size_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._window = _checked(
            _LIBC.mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        )
        self.window_bytes = size_bytes

    def _map(self, what: SharedMemoryMap, fd: int) -> None:
        if any(
            at < what.region_offset + what.length_bytes and what.region_offset < at + length
            for at, length in self.mapped.items()
        ):
            raise OSError(17, "overlaps")
        if what.region_offset + what.length_bytes > self.window_bytes:
            raise OSError(22, "outside")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if what.writable else 0)
        where = self._window + what.region_offset
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _checked(_LIBC.mmap(where, what.length_bytes, protection, flags, fd, what.file_offset))
        self.mapped[what.region_offset] = what.length_bytes

    def _unmap(self, at: int) -> None:
        """Zeros that anybody may write on, and nobody keeps: a hole."""
        length = self.mapped.pop(at)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        _checked(_LIBC.mmap(self._window + at, length, protection, flags, -1, 0))

    def read(self, at: int, size_bytes: int) -> bytes:
        """What the guest would read."""
        return ctypes.string_at(self._window + at, size_bytes)

    def write(self, at: int, data: bytes) -> None:
        """What the guest would write."""
        ctypes.memmove(self._window + at, data, len(data))

    def serve(self) -> None:
        """Answer one request of the back-end's."""
        data, fds, _, _ = socket.recv_fds(self.channel, HEADER_BYTES, 8)
        if not data:
            self.has_channel = False
            return
        header = MessageHeader.decode(data)
        what = SharedMemoryMap.decode(_exactly(self.channel, header.size_bytes))
        verdict = 0
        try:
            if header.request == BackRequest.SHMEM_MAP:
                if self.refuse or self._overlaps(what):
                    raise OSError(1, "refused")
                self._map(what, fds[0])
            elif what.region_offset not in self.mapped:
                raise OSError(2, "not mapped")
            elif not self.keep:
                self._unmap(what.region_offset)
        except OSError:
            verdict = 1
        finally:
            for fd in fds:
                os.close(fd)
        if not self.mute:
            answer = message(header.request, Number(verdict).encode(), reply=True)
            self.channel.sendall(answer)

    def _overlaps(self, what: SharedMemoryMap) -> bool:
        """QEMU refuses a mapping over another one."""
        start, end = what.region_offset, what.region_offset + what.length_bytes
        return any(at < end and start < at + length for at, length in self.mapped.items())

    # -- the queue ---------------------------------------------------------------------------------

    def flush(self) -> int:
        """Ask for a flush as the guest's driver does; its result, -1 without an answer."""
        slot = self._made % ENTRIES
        self._put(REQUEST_AT, PmemRequest(REQUEST_FLUSH).encode())
        self._put(RESPONSE_AT, b"\xff" * 4)
        self._put(DESCRIPTORS_AT, Descriptor(RAM_AT + REQUEST_AT, 4, NEXT, 1).encode())
        self._put(DESCRIPTORS_AT + 16, Descriptor(RAM_AT + RESPONSE_AT, 4, WRITE, 0).encode())
        self._put(AVAILABLE_AT + 4 + 2 * slot, bytes(2))
        self._made += 1
        self._put(AVAILABLE_AT, RingHead(0, self._made & 0xFFFF).encode())
        os.eventfd_write(self._kick, 1)
        if not select.select([self._call], [], [], PATIENCE_SECONDS)[0]:
            return -1
        os.eventfd_read(self._call)
        used = RingHead.decode(os.pread(self._ram, 4, USED_AT))
        if used.index != self._made & 0xFFFF:
            return -1
        return int.from_bytes(os.pread(self._ram, 4, RESPONSE_AT), "little")

    def break_ring(self) -> None:
        """Say that more requests wait than there are entries."""
        self._put(AVAILABLE_AT, RingHead(0, (self._made + ENTRIES + 1) & 0xFFFF).encode())
        os.eventfd_write(self._kick, 1)

    def _put(self, at: int, data: bytes) -> None:
        os.pwrite(self._ram, data, at)


def _connected(path: str) -> tuple[socket.socket, socket.socket]:
    """Connected, and a socket that will be the channel."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_SECONDS)
    sock.connect(path)
    return sock, socket.socket(socket.AF_UNIX)


def _checked(address: int | None) -> int:
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def _exactly(sock: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        piece = sock.recv(size_bytes - len(data))
        if not piece:
            raise ConnectionError("the back-end closed")
        data += piece
    return data


# -- the child ------------------------------------------------------------------------------------


def _carry_out(front: FrontEnd, order: dict[str, Any]) -> Any:
    match order["do"]:
        case "connect":
            return front.connect()
        case "again":
            return front.again(order["path"])
        case "start":
            return front.start()
        case "stop":
            return front.stop(drop=order["drop"])
        case "read":
            return front.read(order["at"], order["size"]).hex()
        case "write":
            return front.write(order["at"], bytes.fromhex(order["data"]))
        case "flush":
            return front.flush()
        case "break":
            return front.break_ring()
        case "mapped":
            return sorted(front.mapped.items())
        case "raw":
            return front.sock.sendall(bytes.fromhex(order["data"]))
        case "hang up":
            return front.sock.close()
        case "close channel":
            front.has_channel = False
            return front.channel.close()
        case "be":
            for name, value in order["how"].items():
                setattr(front, name, value)
            return None
        case other:
            raise ValueError(f"no such order: {other}")


def main(path: str, control: int) -> None:
    """Carry orders out until there are no more; between them, answer the back-end."""
    orders = socket.socket(fileno=control)
    front = FrontEnd(path)
    pending = b""
    while True:
        watched = [orders] + ([front.channel] if front.has_channel else [])
        ready, _, _ = select.select(watched, [], [])
        if front.channel in ready:
            front.serve()
        if orders not in ready:
            continue
        data = orders.recv(1 << 16)
        if not data:
            return
        pending += data
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            try:
                said = {"ok": _carry_out(front, json.loads(line))}
            except (OSError, ValueError) as error:
                said = {"error": str(error)}
            orders.sendall(json.dumps(said).encode() + b"\n")


class Driver:
    """The test's half: starts the process, gives orders. Every order is answered."""

    def __init__(self, path: Path | str) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(2 * PATIENCE_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
        self._pending = b""

    @property
    def pid(self) -> int:
        """The front-end's process."""
        return self._process.pid

    def order(self, do: str, **more: Any) -> Any:
        """What the order came to. Raises RuntimeError with the child's words. Blocks."""
        self._sock.sendall(json.dumps({"do": do, **more}).encode() + b"\n")
        while b"\n" not in self._pending:
            data = self._sock.recv(1 << 16)
            if not data:
                raise RuntimeError("the front-end ended")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        said = json.loads(line)
        if "error" in said:
            raise RuntimeError(said["error"])
        return said["ok"]

    def read(self, at: int, size_bytes: int) -> bytes:
        """What the guest would read."""
        return bytes.fromhex(self.order("read", at=at, size=size_bytes))

    def kill(self) -> None:
        """End the process as a crash does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sock.close()
        self.kill()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
