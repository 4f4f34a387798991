"""Every bound in one place, with its precedent, so that a reader can check how they relate."""

from __future__ import annotations

from tagmem.base.units import GIB, KIB, MIB, SECOND

REGIONS_MAX = 8
"""DC regions per logical device (CXL r3.1 9.13.3)."""
HOSTS_PER_APPLIANCE_MAX = 256
"""Bits in the 5608h reference bitmap (32 bytes)."""
CCI_TAGS_MAX = 256
"""The CCI message tag is 8 bits wide, so no more requests can be outstanding on one session."""
CCI_OUTSTANDING_MAX = 64
"""Requests a session keeps in flight; well below the tag space so that a late answer is never taken
for a young request's."""
CCI_PAYLOAD_BYTES_MAX = 64 * KIB
"""Largest CCI payload we send or accept. The field allows 1 MiB (20 bits); QEMU's mailbox has 2
KiB.
"""
EXTENTS_PER_ADD_MAX = 1024
"""Extents in one prescriptive 5604h; must fit in one CCI payload (32 + 40 n bytes)."""
EXTENTS_PER_CAPACITY_MAX = 256
"""Extents of one tag; one add group, so also bounded by a host's event log."""
DC_EVENT_LOG_RECORDS_MAX = 1024
"""Records kept in one dynamic capacity event log (QEMU keeps 8)."""
EXTENTS_PER_LD_MAX = 65_536
TAGS_PER_APPLIANCE_MAX = 65_536

REGION_GRANULARITY_BYTES = 256 * MIB
"""Base and decode length of a DC region are multiples of this (CXL r3.1 9.13.3)."""
BLOCK_BYTES_MIN = 64
DAX_ALIGN_BYTES = 2 * MIB
"""Device-DAX maps in PMD units on x86; Linux refuses smaller extents."""

REQUEST_BODY_BYTES_MAX = 64 * KIB
LIST_PAGE_MAX = 10_000
ENGINE_QUEUE_MAX = 8_192
"""Events waiting for one machine; a submitter beyond it is told to come back later."""
ENGINE_BATCH_MAX = 512
"""Events that share one commit."""
HISTORY_RETENTION = 100_000
"""Entries of the history that a store keeps unless configured otherwise."""
HISTORY_PRUNE_ROWS = 1_024
"""Rows that one commit removes from the history's old end, at most."""
COMMAND_ARGUMENTS_MAX = 256
COMMAND_BYTES_MAX = 32 * KIB
WORKLOAD_LOG_BYTES_MAX = 1 * GIB

SHARED_OBJECTS_MAX = 1 << 20
"""Objects of one catalogue in shared memory: 256 MiB of log, which a reader goes through once."""

VHOST_MEMORY_SLOTS_MAX = 256
"""Regions of guest memory that a vhost-user front-end may tell (QEMU's own bound on x86)."""
WINDOW_PIECES_MAX = 128
"""Runs of bytes that a guest's window is made of. Each is a memory slot of the hypervisor, and QEMU
tells a back-end of at most 256, its RAM among them."""

FM_REQUEST_DEADLINE_NS = 5 * SECOND
MAILBOX_REQUEST_DEADLINE_NS = 5 * SECOND
"""Linux gives a mailbox command 2 s; sockets get a little more."""
PEER_BYTES_MAX = 64 * KIB
"""Of one call from host to host, and of its answer; a WebSocket message has four times the room."""
PEER_CALLS_MAX = 16
"""Calls that one host has made, and calls that one host is to answer, at a time."""
PEER_CALL_NS = 150 * SECOND
"""A call from host to host may start a QEMU, whose guest takes its time on a loaded machine."""
EXPECT_GRACE_NS = 2 * SECOND
"""How long an agent holds an offer whose tag it was not told to expect before refusing it."""

if HISTORY_PRUNE_ROWS < ENGINE_BATCH_MAX:
    raise ValueError("history must be pruned faster than it grows")
if CCI_TAGS_MAX < 4 * CCI_OUTSTANDING_MAX:
    raise ValueError("a late answer could be taken for a young request's")
if 32 + 40 * EXTENTS_PER_ADD_MAX > CCI_PAYLOAD_BYTES_MAX:
    raise ValueError("the largest prescriptive add must fit in one CCI payload")
if min(EXTENTS_PER_ADD_MAX, DC_EVENT_LOG_RECORDS_MAX) < EXTENTS_PER_CAPACITY_MAX:
    raise ValueError("a capacity's extents must fit in one add and in one host's event log")
if 2 * WINDOW_PIECES_MAX > VHOST_MEMORY_SLOTS_MAX:
    raise ValueError("a window must leave memory slots for the guest's RAM")
