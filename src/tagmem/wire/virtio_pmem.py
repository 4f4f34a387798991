"""The virtio persistent-memory device (VIRTIO 1.3, 5.19) as a guest's stock driver sees it.

Memory lies in shared-memory region 0; the one queue carries flush requests.
"""

from __future__ import annotations

from tagmem.wire.fields import u32, u64
from tagmem.wire.layout import WireStruct, wire

DEVICE_ID = 27
PMEM_F_SHMEM_REGION = 1 << 0
"""The memory is shared-memory region 0, not a range of guest-physical addresses."""
REQUEST_FLUSH = 0
RESPONSE_OK = 0
RESPONSE_EIO = 1


@wire(u64(0x00, "start"), u64(0x08, "size_bytes"), size=16)
class PmemConfig(WireStruct, frozen=True, gc=False):
    """virtio_pmem_config; a driver that took PMEM_F_SHMEM_REGION asks for the region instead."""

    start: int
    size_bytes: int


@wire(u32(0x00, "type"), size=4)
class PmemRequest(WireStruct, frozen=True, gc=False):
    """virtio_pmem_req: what the driver asks for; 0 is flush."""

    type: int


@wire(u32(0x00, "result"), size=4)
class PmemResponse(WireStruct, frozen=True, gc=False):
    """virtio_pmem_resp: 0 when everything written before the request is on the medium."""

    result: int
