"""What clients of the API do in benchmarks: pairs of reserve and free, and whole lives of a tag."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from bench.load import Client, Unexpected, request
from bench.placement import tag_of
from bench.system import BLOCK

_numbers = itertools.count(1 << 80)
_WAIT = "prefer: wait=30\r\n"


def _expect(status: int, *wanted: int, body: bytes) -> None:
    if status not in wanted:
        raise Unexpected(f"answered {status} instead of {wanted}: {body[:300]!r}")


def reserve(tag: str) -> bytes:
    """The request that sets one block aside for nobody yet."""
    return request("PUT", f"/v1/capacities/{tag}", b'{"size_bytes":%d}' % BLOCK)


def free(tag: str) -> bytes:
    return request("DELETE", f"/v1/capacities/{tag}")


def pair() -> Client:
    """Reserve and free: two durable changes."""
    tag = tag_of(next(_numbers))
    answer = yield reserve(tag)
    _expect(answer.status, 201, body=answer.body)
    answer = yield free(tag)
    _expect(answer.status, 204, body=answer.body)


def hold() -> Client:
    """Reserve, and keep."""
    answer = yield reserve(tag_of(next(_numbers)))
    _expect(answer.status, 201, body=answer.body)


def bare_pair() -> Client:
    """The same two requests to the floor's server."""
    yield reserve("bare")
    yield free("bare")


def offer(tag: str, host: str) -> bytes:
    """The request for one block on a host; answered when the host has it ready."""
    body = b'{"size_bytes":%d,"hosts":["%s"]}' % (BLOCK, host.encode())
    return request("PUT", f"/v1/capacities/{tag}", body, _WAIT)


def give_back(tag: str) -> bytes:
    """Its release; answered when the bytes are wiped and free."""
    return request("DELETE", f"/v1/capacities/{tag}", b"", _WAIT)


def lives(hosts: Sequence[str]) -> Callable[[], Client]:
    """Whole lives, on each host in turn."""

    def life() -> Client:
        number = next(_numbers)
        tag = tag_of(number)
        answer = yield offer(tag, hosts[number % len(hosts)])
        _expect(answer.status, 200, 201, body=answer.body)
        if b'"ready":true' not in answer.body:
            raise Unexpected(f"not ready: {answer.body[:300]!r}")
        answer = yield give_back(tag)
        _expect(answer.status, 204, body=answer.body)

    return life
