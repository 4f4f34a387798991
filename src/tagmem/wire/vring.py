"""A split virtqueue (VIRTIO 1.3, 2.7) read by the device's side, out of memory that a hostile guest
owns.

Pure: the caller gives a Memory that checks each address. Every number that the guest wrote is
checked before it is used, a chain is followed for a bounded number of steps, indirect descriptors
are not offered and therefore refused. A guest that breaks a rule breaks its queue, nothing else.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from tagmem.base.units import is_power_of_two
from tagmem.wire.fields import u16, u32, u64
from tagmem.wire.layout import WireStruct, wire

RING_ENTRIES_MAX = 1024
"""Of a queue that is taken; QEMU makes its generic devices' queues of 64."""
CHAIN_MAX = 16
"""Descriptors of one request; a flush has two."""
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
_INDEX = 1 << 16


class QueueBroken(Exception):
    """The guest's ring contradicts itself, or lies outside its memory."""


class Memory(Protocol):
    """Guest memory by guest-physical address. Both raise QueueBroken outside of it."""

    def read(self, address: int, size_bytes: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


@wire(
    u64(0x00, "address"),
    u32(0x08, "length_bytes"),
    u16(0x0C, "flags"),
    u16(0x0E, "next"),
    size=16,
)
class Descriptor(WireStruct, frozen=True, gc=False):
    """virtq_desc (VIRTIO 1.3, 2.7.5)."""

    address: int
    length_bytes: int
    flags: int
    next: int


@wire(u16(0x00, "flags"), u16(0x02, "index"), size=4)
class RingHead(WireStruct, frozen=True, gc=False):
    """The first two fields of virtq_avail and virtq_used (2.7.6, 2.7.8)."""

    flags: int
    index: int


@wire(u32(0x00, "id"), u32(0x04, "length_bytes"), size=8)
class UsedElement(WireStruct, frozen=True, gc=False):
    """virtq_used_elem (2.7.8)."""

    id: int
    length_bytes: int


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A run of guest memory that belongs to a request."""

    address: int
    length_bytes: int


class Chain(msgspec.Struct, frozen=True):
    """One request: what the device may read, and then what it may write."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


class SplitRing:
    """One queue, its addresses guest-physical.

    Raises QueueBroken for a size that no ring has.
    """

    def __init__(
        self, memory: Memory, num: int, descriptors: int, available: int, used: int, base: int
    ) -> None:
        if not is_power_of_two(num) or num > RING_ENTRIES_MAX:
            raise QueueBroken(f"size: must be a power of two up to {RING_ENTRIES_MAX}, got {num}")
        self._memory = memory
        self._num = num
        self._descriptors = descriptors
        self._available = available
        self._used = used
        self._taken = base % _INDEX
        self.completed = base % _INDEX
        """Where a device that takes over would go on: requests before it were answered."""

    def take(self) -> list[Chain]:
        """The requests that wait. Raises QueueBroken."""
        head = RingHead.decode(self._memory.read(self._available, RingHead.LAYOUT.size))
        waiting = (head.index - self._taken) % _INDEX
        if waiting > self._num:
            raise QueueBroken(f"waiting requests: must be at most {self._num}, got {waiting}")
        found = []
        for _ in range(waiting):
            entry = self._available + 4 + 2 * (self._taken % self._num)
            found.append(self._chain(int.from_bytes(self._memory.read(entry, 2), "little")))
            self._taken = (self._taken + 1) % _INDEX
        return found

    def answer(self, chain: Chain, response: bytes) -> None:
        """Write the response and hand the request back. Raises QueueBroken."""
        left = response
        for segment in chain.writable:
            part, left = left[: segment.length_bytes], left[segment.length_bytes :]
            if part:
                self._memory.write(segment.address, part)
        entry = self._used + 4 + 8 * (self.completed % self._num)
        used = UsedElement(chain.head, len(response) - len(left))
        self._memory.write(entry, used.encode())
        self.completed = (self.completed + 1) % _INDEX
        # The index last: with it the guest takes the entry.
        self._memory.write(self._used + 2, self.completed.to_bytes(2, "little"))

    def wants_interrupt(self) -> bool:
        """Whether the driver asked to be told (2.7.7)."""
        head = RingHead.decode(self._memory.read(self._available, RingHead.LAYOUT.size))
        return not head.flags & NO_INTERRUPT

    def read(self, chain: Chain, size_bytes: int) -> bytes:
        """The first bytes of what a request carries; fewer when it has fewer."""
        data = b""
        for segment in chain.readable:
            wanted = min(size_bytes - len(data), segment.length_bytes)
            if wanted:
                data += self._memory.read(segment.address, wanted)
        return data

    def _chain(self, head: int) -> Chain:
        readable: list[Segment] = []
        writable: list[Segment] = []
        at = head
        for _ in range(min(CHAIN_MAX, self._num)):
            if at >= self._num:
                raise QueueBroken(f"descriptor: must be below {self._num}, got {at}")
            item = Descriptor.decode(self._memory.read(self._descriptors + 16 * at, 16))
            if item.flags & INDIRECT:
                raise QueueBroken("an indirect descriptor, which was not offered")
            segment = Segment(item.address, item.length_bytes)
            if item.flags & WRITE:
                writable.append(segment)
            elif writable:
                raise QueueBroken("a descriptor to read after one to write")
            else:
                readable.append(segment)
            if not item.flags & NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            at = item.next
        raise QueueBroken(f"a request of more than {CHAIN_MAX} descriptors")
