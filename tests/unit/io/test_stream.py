"""Streams over real Unix sockets: bytes, descriptors, back-pressure, addresses in use."""

# ruff: noqa: ASYNC240 - a test looks at the file system where it stands

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.io import stream


class Peer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.descriptors: list[int] = []
        self.reason = ""
        self.drains = 0
        self.changed = asyncio.Event()

    def received(self, data: bytes, descriptors: list[int]) -> None:
        self.data += data
        self.descriptors += descriptors
        self.changed.set()

    def drained(self) -> None:
        self.drains += 1
        self.changed.set()

    def closed(self, reason: str) -> None:
        self.reason = reason
        self.changed.set()

    async def until_bytes(self, count: int) -> None:
        while len(self.data) < count:
            await self.change()

    async def until_closed(self) -> None:
        while not self.reason:
            await self.change()

    async def change(self) -> None:
        self.changed.clear()
        await self.changed.wait()


@pytest.fixture
def path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tm"))
    yield directory / "sock"
    shutil.rmtree(directory)


Pair = tuple[stream.Connection, Peer, stream.Connection, Peer, stream.Listener]


async def pair(path: Path) -> Pair:
    arrived: asyncio.Future[stream.Connection] = asyncio.get_running_loop().create_future()
    listener = stream.listen(path, arrived.set_result)
    near = await stream.connect(path)
    far = await arrived
    peers = Peer(), Peer()
    near.attach(peers[0])
    far.attach(peers[1])
    return near, peers[0], far, peers[1], listener


def test_bytes_and_a_descriptor_arrive_together(path: Path) -> None:
    async def main() -> None:
        near, _, far, peer, listener = await pair(path)
        near.send(b"before")
        read, write = os.pipe()
        near.send(b"with it", write)
        await peer.until_bytes(13)
        (descriptor,) = peer.descriptors
        os.write(descriptor, b"through")
        assert os.read(read, 10) == b"through"
        os.close(descriptor)
        # Ours was closed when it had left, so the pipe ends with the other side's.
        assert os.read(read, 1) == b""
        os.close(read)
        near.close()
        await peer.until_closed()
        far.close()
        listener.close()
        assert not path.exists()

    asyncio.run(main())


def test_what_a_peer_does_not_read_is_counted(path: Path) -> None:
    async def main() -> None:
        near, peer, far, other, listener = await pair(path)
        far.pause_reading()
        size = 8 << 20
        near.send(bytes(size))
        assert near.pending_bytes > 0
        far.resume_reading()
        await other.until_bytes(size)
        while not peer.drains:
            await peer.change()
        assert near.pending_bytes == 0
        near.close()
        far.close()
        listener.close()

    asyncio.run(main())


def test_a_closed_connection_takes_no_more(path: Path) -> None:
    async def main() -> None:
        near, peer, far, _, listener = await pair(path)
        near.close("enough")
        near.close("again")
        assert peer.reason == "enough"
        read, write = os.pipe()
        near.send(b"late", write)
        assert os.read(read, 1) == b""
        os.close(read)
        far.close()
        listener.close()

    asyncio.run(main())


def test_addresses_that_cannot_be_had_are_named(path: Path) -> None:
    async def main() -> None:
        listener = stream.listen(path, lambda connection: connection.close())
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(Conflict, match="another process listens"):
            stream.listen(path, lambda connection: connection.close())
        listener.close()
        path.write_text("a file")
        with pytest.raises(Conflict, match="a file of that name"):
            stream.listen(path, lambda connection: connection.close())
        path.unlink()
        with pytest.raises(InvalidInput, match="107 bytes"):
            stream.listen(path.parent / ("x" * 120), lambda connection: connection.close())
        with pytest.raises(InvalidInput, match="socket"):
            stream.listen(path / "none" / "sock", lambda connection: connection.close())
        with pytest.raises(FileNotFoundError):
            await stream.connect(path)

    asyncio.run(main())


def test_a_socket_that_nobody_listens_at_is_taken_over(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def main() -> None:
        *ends, listener = await pair(path)
        for end in ends:
            if isinstance(end, stream.Connection):
                end.close()
        listener.close()

    asyncio.run(main())
