"""What virtio-mem lacks for memory with a tag, measured: the figures of docs/virtio-mem-tags.md.

The presenter refuses what would lose bytes, so QEMU is driven here without it, on the same bench.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from tagmem.base.errors import TagmemError
from tagmem.base.units import MIB, SECOND, Bytes
from tagmem.lab import programs
from tagmem.lab.bench import Bench
from tagmem.lab.boot import Lab
from tagmem.lab.errors import LabFailed
from tagmem.lab.packages import Report, silent
from tagmem.lab.spec import GuestSpec
from tagmem.presenter import common
from tagmem.presenter.contract import Tagged

CONTENT = 64 * MIB
LENT = 256 * MIB
SPARE = 96 * MIB
"""What is left to a guest whose memory is filled."""
SETTLE_SECONDS = 20.0
IDLE_SECONDS = 20.0
FREED_SECONDS = 120.0
"""The guest's driver tries again 50 s after it failed, whatever became free meanwhile."""
PERIPHERAL = "/machine/peripheral"

AVAILABLE = """
for line in open('/proc/meminfo'):
    if line.startswith('MemAvailable'):
        print(int(line.split()[1]) * 1024)
"""
PLACES = """
import glob, os, sys
at, size = int(sys.argv[1]), int(sys.argv[2])
for line in open('/proc/iomem'):
    start, end = (int(word, 16) for word in line.split(' : ')[0].split('-'))
    if at <= start and end < at + size:
        print('iomem', hex(start), hex(end), line.split(' : ')[1].strip())
block = int(open('/sys/devices/system/memory/block_size_bytes').read(), 16)
for number in range(at // block, (at + size) // block):
    folder = '/sys/devices/system/memory/memory%d' % number
    if os.path.isdir(folder):
        nodes = [os.path.basename(p) for p in glob.glob(folder + '/node*')]
        zone = open(folder + '/valid_zones').read().strip()
        print('block', number, block, *nodes, open(folder + '/state').read().strip(), zone)
"""
"""What the guest says of a stretch of its physical addresses."""


class Finding(msgspec.Struct, frozen=True):
    """One figure of the gap."""

    what: str
    seen: str
    value: float | None = None
    unit: str = ""


async def plug(bench: Bench, tagged: Tagged, requested: Bytes) -> str:
    """Add the device on the tag's file; its id."""
    device = common.device_id(tagged.tag)
    memory = common.memory_file(tagged.tag, tagged.pieces[0], reserve=False)
    await bench.vm.execute(memory.execute, memory.arguments)
    facts = await bench.vm.facts()
    slot = common.free_slot(facts)
    if isinstance(slot, str):
        raise LabFailed(slot)
    arguments = {
        "driver": "virtio-mem-pci",
        "id": device,
        "memdev": common.memory_id(tagged.tag),
        "bus": slot.bus,
        "requested-size": requested,
    }
    await bench.vm.execute("device_add", arguments)
    return device


async def unplug(bench: Bench, tagged: Tagged) -> None:
    """Take an empty device out."""
    device = common.device_id(tagged.tag)
    await bench.vm.execute("device_del", {"id": device})
    if not await bench.vm.deleted(device, 10 * SECOND):
        raise LabFailed(f"{device} does not leave")
    await bench.vm.execute("object-del", {"id": common.memory_id(tagged.tag)})


async def request(bench: Bench, device: str, size: Bytes) -> None:
    """Say how large it should be."""
    where = {"path": f"{PERIPHERAL}/{device}", "property": "requested-size", "value": size}
    await bench.vm.execute("qom-set", where)


async def settled(bench: Bench, device: str, size: Bytes, seconds: float) -> tuple[Bytes, float]:
    """(what is plugged, after how many seconds): when it is as wanted, or the time is over."""
    begun = time.perf_counter()
    while True:
        plugged = await bench.vm.size_of(device)
        took = time.perf_counter() - begun
        if plugged == size or took > seconds:
            return plugged, took
        await asyncio.sleep(0.02)


def resident(tagged: Tagged) -> Bytes:
    """What the file of the media occupies; its holes are not counted."""
    return os.stat(tagged.pieces[0].path).st_blocks * 512


def whole(tagged: Tagged, pattern: bytes) -> Bytes:
    """How many bytes of the tag still are the pattern's."""
    piece = tagged.pieces[0]
    with open(piece.path, "rb") as file:
        file.seek(piece.offset)
        return file.read(piece.length).count(pattern) * len(pattern)


async def ask_content(bench: Bench) -> list[Finding]:
    """A tag with content, and a device that has plugged nothing of it."""
    tagged = bench.make(CONTENT)
    pattern = bytes(range(1, 256)) + b"\xff"
    for at in range(0, CONTENT, MIB):
        bench.write(tagged, at, pattern * (MIB // len(pattern)))
    before, blocks = whole(tagged, pattern), resident(tagged)
    await plug(bench, tagged, 0)
    after, left = whole(tagged, pattern), resident(tagged)
    await unplug(bench, tagged)
    bench.drop(tagged)
    seen = (
        f"{before // MIB} MiB of content before device_add with requested-size=0, "
        f"{after // MIB} MiB after it; resident {blocks // MIB} and {left // MIB} MiB"
    )
    return [Finding("content kept by device_add", seen, after / MIB, "MiB")]


async def ask_identity(bench: Bench) -> list[Finding]:
    """What tells this memory from other memory, inside and outside."""
    tagged = bench.make(LENT, loaded=False)
    device = await plug(bench, tagged, LENT)
    plugged, took = await settled(bench, device, LENT, SETTLE_SECONDS)
    devices = await bench.vm.execute("query-memory-devices", {})
    told: dict[str, Any] = next(d["data"] for d in devices if d["data"].get("id") == device)
    searched = await bench.python(programs.SEARCH, tagged.tag)
    places = await bench.python(PLACES, told["memaddr"], LENT)
    await request(bench, device, 0)
    left, idle = await settled(bench, device, 0, IDLE_SECONDS)
    gone = resident(tagged)
    if not left:
        await unplug(bench, tagged)
    return [
        Finding("plug 256 MiB", f"{plugged // MIB} MiB after {took * 1000:.0f} ms", took, "s"),
        Finding("tag in the guest", searched.replace("\n", "; ")),
        Finding("place, told by QEMU", ", ".join(f"{k}={told[k]}" for k in sorted(told))),
        Finding("place, seen in the guest", places.replace("\n", "; ")),
        Finding("unplug, idle", f"{left // MIB} MiB left after {idle * 1000:.0f} ms", idle, "s"),
        Finding("resident after unplug", f"{gone // MIB} MiB", gone / MIB, "MiB"),
    ]


async def ask_used(bench: Bench) -> list[Finding]:
    """A guest that uses what it has is asked to give it back."""
    tagged = bench.make(LENT, loaded=False)
    device = await plug(bench, tagged, LENT)
    await settled(bench, device, LENT, SETTLE_SECONDS)
    available = int(await bench.python(AVAILABLE))
    pid = int(await bench.python(programs.HOLD, "-", available - SPARE, 60.0))
    await request(bench, device, 0)
    kept, _ = await settled(bench, device, 0, SETTLE_SECONDS)
    held = resident(tagged)
    try:
        await bench.vm.execute("device_del", {"id": device})
        refused = "device_del was accepted"
    except TagmemError as error:
        refused = str(error)
    await bench.python("import os, sys; os.kill(int(sys.argv[1]), 9)", pid)
    left, took = await settled(bench, device, 0, FREED_SECONDS)
    if not left:
        await unplug(bench, tagged)
    return [
        Finding(
            "unplug, in use",
            f"{kept // MIB} of {LENT // MIB} MiB kept after {SETTLE_SECONDS:g} s, "
            f"{held // MIB} MiB resident; {refused}",
            kept / MIB,
            "MiB",
        ),
        Finding("unplug, freed later", f"{left // MIB} MiB left after {took:.1f} s", took, "s"),
    ]


QUESTIONS: tuple[Callable[[Bench], Awaitable[list[Finding]]], ...] = (
    ask_content,
    ask_identity,
    ask_used,
)


async def gap(lab: Lab, qemu: str = "11.1", report: Report = silent) -> list[Finding]:
    """Measure it in one guest. Raises LabFailed, TagmemError."""
    spec = GuestSpec(name="virtio-mem", qemu=qemu, memory_bytes=768 * MIB, root_ports=4)
    bench = Bench(lab, spec)
    found: list[Finding] = []
    try:
        await bench.boot()
        await bench.python(programs.ONLINE, "online_movable")
        for question in QUESTIONS:
            answers = await question(bench)
            found += answers
            for finding in answers:
                report(f"virtio-mem: {finding.what}: {finding.seen}")
    finally:
        await bench.end()
    return found
