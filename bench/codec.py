"""Extents decoded per second, against a bare `struct` loop over the same bytes.

Lists of extents are what is long on the wire: a reconciliation reads every extent of an appliance.
"""

from __future__ import annotations

import struct

from bench.measure import interleave, rate
from bench.report import Figure, Report, compared
from tagmem.wire.extent import WireExtent
from tagmem.wire.memdev import GetDcExtentListResponse

COUNT = 10_000
_BARE = struct.Struct("<QQ16sH6x")


def run(*, quick: bool) -> Report:
    rounds = 5 if quick else 41
    extents = tuple(
        WireExtent(n << 28, 1 << 28, n.to_bytes(16, "big"), n & 0xFFFF) for n in range(COUNT)
    )
    message = GetDcExtentListResponse(extents, COUNT, 7)
    encoded = message.encode()
    assert GetDcExtentListResponse.decode(encoded) == message

    def bare_decode() -> list[tuple[int, int, bytes, int]]:
        found = []
        for start, length, tag, sequence in _BARE.iter_unpack(memoryview(encoded)[16:]):
            found.append((start, length, tag, sequence))
        return found

    def bare_encode() -> bytes:
        pack = _BARE.pack
        return b"".join([pack(e.start_dpa, e.length_bytes, e.tag, e.sequence) for e in extents])

    decoded = interleave(
        rate(COUNT, lambda: GetDcExtentListResponse.decode(encoded)),
        rate(COUNT, bare_decode),
        rounds,
    )
    written = interleave(rate(COUNT, message.encode), rate(COUNT, bare_encode), rounds)
    one = WireExtent(1 << 28, 1 << 28, bytes(range(16)), 1).encode()
    singly = interleave(
        rate(COUNT, lambda: [WireExtent.decode(one) for _ in range(COUNT)]),
        rate(COUNT, lambda: [_BARE.unpack(one) for _ in range(COUNT)]),
        rounds,
    )
    figures: tuple[Figure, ...] = (
        compared("extents decoded, one list of 10,000 (4801h)", decoded, "/s"),
        compared("extents encoded, one list of 10,000", written, "/s"),
        compared("extents decoded, one by one", singly, "/s"),
    )
    about = "Ours are checked, typed values; the floor is a `struct` loop that leaves bare tuples."
    return Report("codec", about, figures)
