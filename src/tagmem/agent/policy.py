"""Whether an offer may be accepted: each rule once, with the sentence that the user sees when it is
broken.

The rules are those that Linux enforces on dynamic capacity (2 MiB alignment, dense sequence, one
device per tag), and that what is offered is what the orchestrator announced.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from tagmem.agent.records import Extent, Region, Span
from tagmem.base.limits import DAX_ALIGN_BYTES, EXPECT_GRACE_NS, EXTENTS_PER_CAPACITY_MAX
from tagmem.base.units import Bytes, Dpa, Nanoseconds, format_size
from tagmem.wire.agentapi import Desired


class Limits(msgspec.Struct, frozen=True):
    """What this host can take."""

    highest_dpa: Dpa = Dpa((1 << 52) - 1)
    """The highest address that this host's decoders reach."""
    align_bytes: Bytes = DAX_ALIGN_BYTES
    devices_max: int = 65_536
    """DAX devices at one time."""
    expect_grace_ns: Nanoseconds = EXPECT_GRACE_NS
    """How long an offer of an unannounced tag is held before it is refused."""


def in_sequence(extents: Sequence[Extent], wanted: Sequence[Span] = ()) -> tuple[Extent, ...]:
    """The extents of one tag in the order of its bytes.

    Sequence numbers order them; capacity that is not sharable has none (all 0) and then lies in the
    order that was announced, or else in which it was offered.
    """
    if all(extent.sequence == 0 for extent in extents):
        place = {tuple(span): index for index, span in enumerate(wanted)}
        return tuple(sorted(extents, key=lambda e: place.get((e.dpa, e.length), len(place))))
    return tuple(sorted(extents, key=lambda e: e.sequence))


def region_of(extent: Extent, regions: Sequence[Region]) -> int | None:
    """The region that has the whole extent."""
    for index, region in enumerate(regions):
        if region.base <= extent.dpa and extent.dpa + extent.length <= region.base + region.length:
            return index
    return None


def judge(
    extents: Sequence[Extent],
    desired: Desired,
    appliance: str,
    regions: Sequence[Region],
    limits: Limits,
    devices: int,
) -> str:
    """Why the offer of one tag's `extents` (in sequence) is refused; empty when it may be accepted.

    `devices` are the DAX devices that exist or are under way.
    """
    if desired.goal == "released":
        return f"tag {desired.tag} is being released on this host"
    if desired.appliance != appliance:
        return f"appliance must be {desired.appliance}, offered by {appliance}"
    if devices >= limits.devices_max:
        return f"DAX devices on this host must be at most {limits.devices_max}, all are in use"
    if len(extents) > EXTENTS_PER_CAPACITY_MAX:
        return f"extents must be at most {EXTENTS_PER_CAPACITY_MAX}, offered {len(extents)}"
    return _geometry(extents, regions, limits) or _sequence(extents) or _as_wanted(extents, desired)


def _geometry(extents: Sequence[Extent], regions: Sequence[Region], limits: Limits) -> str:
    """Where the extents lie."""
    first = region_of(extents[0], regions)
    for extent in extents:
        last = extent.dpa + extent.length - 1
        where = f"extent {extent.dpa:#x}+{extent.length:#x}"
        if last > limits.highest_dpa:
            return f"{where}: last address must be at most {limits.highest_dpa:#x}, got {last:#x}"
        region = region_of(extent, regions)
        if region is None:
            return f"{where}: must lie inside one region of the device, and does not"
        if region != first:
            return f"{where}: a tag must lie in one region, got regions {first} and {region}"
        align = max(limits.align_bytes, regions[region].block_bytes)
        for name, value in (("start", extent.dpa), ("length", extent.length)):
            if value % align or (name == "length" and value == 0):
                return f"{where}: {name} must be a multiple of {format_size(align)}, got {value:#x}"
    spans = sorted((extent.dpa, extent.length) for extent in extents)
    for (dpa, length), (above, _) in pairwise(spans):
        if dpa + length > above:
            return (
                f"extent {above:#x}: extents must not overlap, and it lies in {dpa:#x}+{length:#x}"
            )
    return ""


def _sequence(extents: Sequence[Extent]) -> str:
    numbers = [extent.sequence for extent in extents]
    if any(numbers) and numbers != list(range(len(numbers))):
        shown = ", ".join(map(str, numbers[:16]))
        return f"sequence numbers must be 0 to {len(numbers) - 1}, each once, got {shown}"
    return ""


def _as_wanted(extents: Sequence[Extent], desired: Desired) -> str:
    """Whether it is what the orchestrator announced."""
    size = sum(extent.length for extent in extents)
    if size != desired.size_bytes:
        return f"size must be {desired.size_bytes} bytes as announced, offered {size}"
    announced = [(dpa, length) for dpa, length in desired.extents]
    spans = [(extent.dpa, extent.length) for extent in extents]
    if announced and len(spans) != len(announced):
        return f"extents must be {len(announced)} as announced, offered {len(spans)}"
    for number, (wanted, got) in enumerate(zip(announced, spans, strict=False)):
        if wanted != got:
            return (
                f"extent {number} must be {wanted[0]:#x}+{wanted[1]:#x} as announced, "
                f"offered {got[0]:#x}+{got[1]:#x}"
            )
    return ""
