"""A load generator that leaves the machine to the daemons: one process, one epoll, raw keep-alive
sockets.

A client is a generator: it yields the bytes of a request and is sent the answer. What it yields
next is written at once, so that 64 clients cost one process's small share of one core.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

Client = Generator[bytes, "Answer", None]
"""One piece of work: requests out, answers in. When it returns, one piece is done."""
NewWork = Callable[[], Client]

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length: "
_RECEIVE_BYTES = 65_536


class Answer:
    """Status and body of one answer."""

    __slots__ = ("body", "status")

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body


class Unexpected(Exception):
    """The server's answer is not what the benchmark counts."""


def connect(address: str) -> socket.socket:
    """A blocking socket to `unix:/PATH` or `HOST:PORT`."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(address.removeprefix("unix:"))
        except OSError:
            made.close()
            raise
        return made
    host, _, port = address.removeprefix("http://").rpartition(":")
    made = socket.create_connection((host, int(port)))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def request(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """The bytes of one request; `headers` are whole lines."""
    length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nhost: bench\r\n{headers}{length}\r\n".encode() + body


def parse(data: bytes | bytearray) -> tuple[Answer, int] | None:
    """The answer at the start of `data` and its size; None while it is not whole."""
    end = data.find(_HEAD_END)
    if end < 0:
        return None
    status = int(data[9:12])
    at = data.find(_LENGTH, 0, end)
    length = 0
    if at >= 0:
        stop = data.find(b"\r", at)
        length = int(data[at + len(_LENGTH) : stop])
    whole = end + 4 + length
    if len(data) < whole:
        return None
    return Answer(status, bytes(data[end + 4 : whole])), whole


def ask(sock: socket.socket, data: bytes) -> Answer:
    """One request, one answer, on a blocking socket."""
    sock.sendall(data)
    received = bytearray()
    while True:
        found = parse(received)
        if found is not None:
            return found[0]
        more = sock.recv(_RECEIVE_BYTES)
        if not more:
            raise Unexpected("the server closed the connection")
        received += more


@dataclass(slots=True)
class _Session:
    sock: socket.socket
    work: Client
    begun: float
    received: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class Load:
    """What a run did: finished pieces, their times, and how long it took."""

    times: list[float]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.times) / self.seconds


def drive(address: str, clients: int, seconds: float, new_work: NewWork) -> Load:
    """Keep `clients` busy for `seconds`; work under way at the end is finished and not counted.

    Raises Unexpected when an answer is not what the work asks for, TimeoutError when one does not
    come.
    """
    poll = select.epoll()
    sessions: dict[int, _Session] = {}
    times: list[float] = []
    begun = time.perf_counter()
    until = begun + seconds
    for _ in range(clients):
        sock = connect(address)
        work = new_work()
        sessions[sock.fileno()] = _Session(sock, work, time.perf_counter())
        sock.sendall(next(work))
        poll.register(sock.fileno(), select.EPOLLIN)
    while sessions:
        ready = poll.poll(30.0)
        if not ready:
            raise TimeoutError(f"{len(sessions)} clients have had no answer for 30 s")
        for fd, _ in ready:
            session = sessions[fd]
            if not _advance(session, times, until, new_work):
                poll.unregister(fd)
                session.sock.close()
                del sessions[fd]
    poll.close()
    return Load(times, seconds)


def _advance(session: _Session, times: list[float], until: float, new_work: NewWork) -> bool:
    """Take what has come; False when this client has no more to do."""
    more = session.sock.recv(_RECEIVE_BYTES)
    if not more:
        raise Unexpected("the server closed the connection")
    session.received += more
    found = parse(session.received)
    if found is None:
        return True
    answer, size = found
    del session.received[:size]
    try:
        session.sock.sendall(session.work.send(answer))
    except StopIteration:
        now = time.perf_counter()
        if now >= until:
            return False
        times.append(now - session.begun)
        session.work = new_work()
        session.begun = now
        session.sock.sendall(next(session.work))
    return True
