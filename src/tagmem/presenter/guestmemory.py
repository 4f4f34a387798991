"""A guest's RAM as a vhost-user front-end tells of it: descriptors, and where addresses lie in
them.

Guest memory is read and written with pread and pwrite, not mapped: whoever owns the file could
truncate it, and a mapping would then kill this process with SIGBUS. Queues are small and rarely
used. Only memory files (memfd, tmpfs) are taken, because the owner of another kind, FUSE for one,
could make a read last for ever; what is not taken is remembered by its addresses alone, and a queue
in it is broken. hugetlbfs can be read but not written so: guests with such RAM get no answer to
flush, which a DAX device never sends.

A front-end also tells of the very memory that the broker mapped for it. Those descriptors are
closed at once: this process must not hold a tag's bytes because a guest has them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection

from tagmem.presenter.procfs import Identity, identity_of
from tagmem.wire.vhost_user import MemoryRegion
from tagmem.wire.vring import QueueBroken

FILES_MAX = 16
"""Different files of one guest that are kept open; many regions share one."""


class GuestMemory:
    """Regions and the files behind them; a `vring.Memory`."""

    def __init__(self, own: Callable[[], Collection[Identity]]) -> None:
        self._own = own
        self._regions: dict[int, tuple[MemoryRegion, Identity | None]] = {}
        self._files: dict[Identity, int] = {}

    def add(self, region: MemoryRegion, descriptor: int) -> None:
        """Take a region, and its descriptor."""
        identity = self._keep(descriptor)
        self._regions[region.guest_address] = (region, identity)

    def remove(self, region: MemoryRegion) -> None:
        """Forget a region; its file is closed when no other lies in it."""
        _, identity = self._regions.pop(region.guest_address, (None, None))
        if identity is not None and all(held != identity for _, held in self._regions.values()):
            os.close(self._files.pop(identity))

    def close(self) -> None:
        """Forget everything."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._regions.clear()

    def _keep(self, descriptor: int) -> Identity | None:
        kept = False
        try:
            identity = identity_of(descriptor)
            if identity in self._own():
                return None
            # Answered by memory files only.
            fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if identity not in self._files:
                if len(self._files) >= FILES_MAX:
                    return None
                self._files[identity] = descriptor
                kept = True
            return identity
        except OSError:
            return None
        finally:
            if not kept:
                os.close(descriptor)

    def guest_address(self, user_address: int, size_bytes: int) -> int:
        """The guest-physical address of one of the front-end's own. Raises QueueBroken."""
        for region, _ in self._regions.values():
            offset = user_address - region.user_address
            if offset >= 0 and offset + size_bytes <= region.size_bytes:
                return region.guest_address + offset
        raise QueueBroken(f"{size_bytes} bytes at user address {user_address:#x}: not guest memory")

    def read(self, address: int, size_bytes: int) -> bytes:
        """See `vring.Memory`."""
        descriptor, offset = self._find(address, size_bytes)
        try:
            data = os.pread(descriptor, size_bytes, offset)
        except OSError as error:
            raise QueueBroken(f"guest memory at {address:#x}: {error.strerror}") from None
        if len(data) != size_bytes:
            raise QueueBroken(f"guest memory at {address:#x}: its file ends before")
        return data

    def write(self, address: int, data: bytes) -> None:
        """See `vring.Memory`."""
        descriptor, offset = self._find(address, len(data))
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            raise QueueBroken(f"guest memory at {address:#x}: {error.strerror}") from None
        if written != len(data):
            raise QueueBroken(f"guest memory at {address:#x}: its file is full")

    def _find(self, address: int, size_bytes: int) -> tuple[int, int]:
        for region, identity in self._regions.values():
            offset = address - region.guest_address
            if offset >= 0 and offset + size_bytes <= region.size_bytes:
                if identity is None:
                    break
                place = region.file_offset + offset
                if place + size_bytes > 1 << 63:
                    break
                return self._files[identity], place
        raise QueueBroken(f"{size_bytes} bytes at {address:#x}: not guest memory of ours")
