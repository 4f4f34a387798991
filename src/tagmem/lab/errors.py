"""What can go wrong in the lab, apart from the errors that it shares with everything else.

A type of its own, because a caller (a test, `tagmem lab compare`) tells "this machine could not
make or boot a guest" from whatever happens inside one.
"""

from __future__ import annotations

from tagmem.base.errors import Retry, TagmemError


class LabFailed(TagmemError):
    """A guest, or what it is made from, could not be had on this machine."""

    retry = Retry.LATER


class GuestDied(LabFailed):
    """A guest's QEMU ended, or did not become ready; the message names its logs."""
