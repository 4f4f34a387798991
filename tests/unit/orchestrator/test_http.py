"""The server's half of HTTP/1.1: order, bounds, keep-alive, and what is no HTTP at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from tagmem.orchestrator.asgi import Message, Receive, Scope, Send
from tagmem.orchestrator.http import HEAD_BYTES_MAX, Connection
from tagmem.orchestrator.serving import Serving

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def _reply(send: Send, body: bytes, *, status: int = 200, length: bool = True) -> None:
    headers = [(b"content-length", b"%d" % len(body))] if length else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with method, path, query and body."""
    body = b""
    more = True
    while more:
        message: Message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    said = f"{scope['method']} {scope['path']} {scope['query_string'].decode()} ".encode()
    await _reply(send, said + body)


CLOSE = b"Connection: close\r\n\r\n"


def talk(directory: Path, data: bytes, app: App = echo, *, until: bytes = b"never") -> bytes:
    """Send `data`; everything that comes back until the end, or until it ends with `until`."""

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        serving = Serving(app, loop)
        path = str(directory / "s")
        server = await loop.create_unix_server(lambda: Connection(serving), path)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(data)
        received = b""
        async with asyncio.timeout(5):
            while more := await reader.read(65_536):
                received += more
                if received.endswith(until):
                    break
        writer.close()
        server.close()
        for task in tuple(serving.tasks):
            await task
        return received

    return asyncio.run(main())


def bodies(received: bytes) -> list[bytes]:
    return [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 ")[1:]]


def test_requests_in_one_piece_are_answered_in_order(tmp_path: Path) -> None:
    data = b"".join(b"GET /%d?q=%d HTTP/1.1\r\n\r\n" % (n, n) for n in range(40))
    received = talk(tmp_path, data, until=b"GET /39 q=39 ")
    assert bodies(received) == [b"GET /%d q=%d " % (n, n) for n in range(40)]


def test_a_body_may_come_byte_by_byte_and_the_path_escaped(tmp_path: Path) -> None:
    data = b"PUT /a%20b HTTP/1.1\r\nContent-Length: 5\r\n" + CLOSE + b"hello"
    assert bodies(talk(tmp_path, data)) == [b"PUT /a b  hello"]


def test_a_client_that_asks_for_the_end_gets_it(tmp_path: Path) -> None:
    data = b"GET /1 HTTP/1.1\r\nConnection: close\r\n\r\n"
    received = talk(tmp_path, data)
    assert b"connection: close\r\n" in received
    assert bodies(received) == [b"GET /1  "]


def test_head_has_no_body(tmp_path: Path) -> None:
    received = talk(tmp_path, b"HEAD / HTTP/1.1\r\n" + CLOSE)
    assert b"content-length: 8" in received
    assert bodies(received) == [b""]


def test_who_waits_for_leave_to_send_is_given_it(tmp_path: Path) -> None:
    head = b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert talk(tmp_path, head, until=b"100 Continue\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_garbage_is_refused_and_ends_the_connection(tmp_path: Path) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"):
        received = talk(tmp_path, garbage)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in received


def test_a_head_without_end_is_bounded(tmp_path: Path) -> None:
    data = b"GET / HTTP/1.1\r\nx: " + b"y" * (HEAD_BYTES_MAX + 1)
    assert talk(tmp_path, data).startswith(b"HTTP/1.1 431 ")


def test_a_stream_is_sent_in_chunks(tmp_path: Path) -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"one", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    received = talk(tmp_path, b"GET / HTTP/1.1\r\n" + CLOSE, stream)
    assert received.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


def test_what_a_handler_leaves_open_is_cut(tmp_path: Path) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    received = talk(tmp_path, b"GET / HTTP/1.1\r\n\r\n", half)
    assert received.endswith(b"4\r\nhalf\r\n")


def test_a_handlers_mistake_is_a_500(tmp_path: Path) -> None:
    async def mistaken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    received = talk(tmp_path, b"GET / HTTP/1.1\r\n\r\n", mistaken)
    assert received.startswith(b"HTTP/1.1 500 ")


def test_what_a_client_still_sends_is_not_taken_for_a_request(tmp_path: Path) -> None:
    async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
        await _reply(send, b"no", status=413)

    data = b"PUT / HTTP/1.1\r\nContent-Length: 100\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
    received = talk(tmp_path, data, hasty)
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in received


def test_a_client_that_goes_away_is_noticed(tmp_path: Path) -> None:
    seen: list[str] = []
    begun = asyncio.Event()

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        while not seen or seen[-1] != "http.disconnect":
            seen.append((await receive())["type"])
            begun.set()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        serving = Serving(patient, loop)
        path = str(tmp_path / "s")
        server = await loop.create_unix_server(lambda: Connection(serving), path)
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await writer.drain()
        await begun.wait()
        writer.transport.abort()
        async with asyncio.timeout(5):
            while serving.tasks:
                await asyncio.wait(serving.tasks)
        server.close()

    asyncio.run(main())
    assert seen == ["http.request", "http.disconnect"]
