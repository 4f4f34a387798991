"""HTTP on the wire: what is cut, bounded, ordered and ended, over real sockets of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tagmem.orchestrator.http import HEAD_BYTES_MAX, PIPELINED_MAX, Connection
from tagmem.orchestrator.serving import Serving


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what was asked; some paths misbehave."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/raise":
        raise RuntimeError("a mistake")
    text = f"{scope['method']} {scope['path']}?{scope['query_string'].decode()} ".encode() + body
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        text = b""
    if scope["path"] != "/half":
        await send({"type": "http.response.body", "body": text})


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def talk(conversation: Talk) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        serving = Serving(echo, loop)
        server = await loop.create_server(lambda: Connection(serving), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(10):
                await conversation(reader, writer)
        finally:
            writer.close()
            server.close()
            for task in tuple(serving.tasks):
                task.cancel()

    asyncio.run(main())


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """One answer with a length, or chunked."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:-2])
    body = b""
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    return int(head[0].split()[1]), headers, body


def test_pipelined_requests_are_answered_in_order() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 3 * PIPELINED_MAX
        writer.writelines(b"GET /%d?q=1 HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(count))
        for number in range(count):
            assert (await answer(reader))[2] == b"GET /%d?q=1 " % number

    talk(conversation)


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_request_may_come_in_pieces(step: int) -> None:
    request = (
        b"PUT /%7Ea HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n"
    )

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(request), step):
            writer.write(request[at : at + step])
            await writer.drain()
        assert (await answer(reader))[2] == b"PUT /~a? abcde"
        assert (await answer(reader))[2] == b"GET /b? "

    talk(conversation)


def test_a_stream_is_chunked_and_the_connection_goes_on() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[2] == b"onetwo"
        assert (await answer(reader))[2] == b"GET /b? "

    talk(conversation)


def test_head_has_no_body() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 9\r\n" in head
        writer.write(b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[2] == b"GET /b? "

    talk(conversation)


def test_old_clients_get_the_end_of_the_connection() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /a HTTP/1.0\r\n\r\n")
        status, headers, body = await answer(reader)
        assert (status, headers["connection"], body) == (200, "close", b"GET /a? ")
        assert await reader.read() == b""

    talk(conversation)


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"PUT /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await answer(reader))[2] == b"PUT /a? hi"

    talk(conversation)


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost x\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"GET /" + b"a" * (HEAD_BYTES_MAX + 1), 431),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * (HEAD_BYTES_MAX + 1), 431),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (HEAD_BYTES_MAX // 4), 431),
    ],
)
def test_garbage_is_refused_and_the_connection_ends(garbage: bytes, status: int) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)
        got, headers, body = await answer(reader)
        assert got == status
        assert headers["connection"] == "close"
        assert b'"detail"' in body
        assert await reader.read() == b""

    talk(conversation)


def test_a_handlers_mistake_is_a_500_and_half_an_answer_is_cut() -> None:
    async def mistake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /raise HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[0] == 500
        assert await reader.read() == b""

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /half HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" not in await reader.read()

    talk(mistake)
    talk(half)


def test_an_offer_of_another_protocol_is_passed_over() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\n"
            b"upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n"
        )
        status, _, body = await answer(reader)
        assert (status, body) == (200, b"GET /a? ")

    talk(conversation)
