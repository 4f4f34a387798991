"""The comparison's row of specific-purpose memory, which a VM has from its start or not at all.

No presenter can attach it, so there is none; the guest is booted with the tag's file as the memory
of a node of its own, told to the guest's firmware as soft reserved, and the questions that make
sense for what cannot come and go are put to it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime

from tagmem.base.errors import TagmemError
from tagmem.base.units import MIB, SECOND
from tagmem.lab import experiments as ex
from tagmem.lab.bench import Bench
from tagmem.lab.boot import Lab
from tagmem.lab.errors import LabFailed
from tagmem.lab.experiments import Answers, Question, Trial, short
from tagmem.lab.packages import Report
from tagmem.lab.report import Cell, Row
from tagmem.lab.spec import GuestSpec
from tagmem.presenter import common
from tagmem.presenter.contract import (
    Command,
    Description,
    Plan,
    Presentation,
    Request,
    Step,
    Tagged,
    VmFacts,
)
from tagmem.presenter.driver import Planned
from tagmem.wire import guest as wire

NAME = "sp-mem"
DEVICE = "sp1"
SIZE = 256 * MIB
FIND_NS = 40 * SECOND
WARNING = "it is in the VM from its start to its end: neither attach nor detach exist"

RESERVED = """
import glob, os, time
end = time.monotonic() + 20
while time.monotonic() < end:
    for path in glob.glob('/sys/bus/dax/devices/*'):
        if '/hmem' in os.path.realpath(path):
            print(int(open(path + '/resource').read(), 16))
            raise SystemExit
    time.sleep(0.1)
raise SystemExit('the kernel makes no DAX device of soft-reserved memory')
"""
"""Where the memory is. Newer kernels keep such ranges out of /proc/iomem until they are claimed."""


class SpMem(Planned):
    """What the questions need to know of it; it refuses to attach."""

    description = Description(
        name=NAME,
        summary="soft-reserved memory of a NUMA node, at boot",
        guaranteed=False,
        removal="never",
        dax=True,
        ram=False,
        tag_in_band=False,
        granularity_bytes=2 * MIB,
        minimum_bytes=2 * MIB,
        pieces=False,
        read_only=False,
        header_bytes=0,
        migration="stays",
        stock_kernel=True,
        guest_code="name by side channel",
        qemu_min=(11, 1, 0),
        setup=(
            "-object memory-backend-file,id=MEM,share=on -numa node,nodeid=1",
            "-device sp-mem,memdev=MEM,node=1 and firmware of edk2 2026.08 or later",
        ),
        warning=WARNING,
    )

    def can(self, request: Request, vm: VmFacts) -> str | None:
        """Never, once a VM runs."""
        return WARNING

    def plan(self, request: Request, vm: VmFacts) -> Plan:
        """Nothing."""
        return Plan(NAME, DEVICE, (), request.tagged.size_bytes, warning=WARNING)

    def unplan(self, presentation: Presentation, rung: str) -> tuple[Step, ...]:
        """The guest may be asked to stop using it; QEMU keeps it."""
        if rung in ("ask", "insist"):
            return (common.let_go(presentation, rung),)
        if rung == "unplug":
            return (Command("device_del", {"id": DEVICE}),)
        return ()


def spec(name: str, tagged: Tagged) -> GuestSpec:
    """The guest whose second node is the tag."""
    piece = tagged.pieces[0]
    memory = f"memory-backend-file,id=m1,mem-path={piece.path},size={piece.length},share=on"
    return GuestSpec(
        name=f"sp-mem-{name.replace('.', '-')}",
        qemu=name,
        firmware="edk2",
        memory_bytes=512 * MIB,
        cpus=1,
        root_ports=0,
        modules=("dax_hmem", "device_dax"),
        numa=("node,nodeid=1",),
        objects=(f"{memory},offset={piece.offset}",),
        devices=(f"sp-mem,memdev=m1,node=1,id={DEVICE}",),
    )


async def ask_attach(trial: Trial) -> Answers:
    """Whether it can come and go after all; QEMU's own words."""
    vm = trial.bench.vm
    memory = {"qom-type": "memory-backend-memfd", "id": "m2", "size": SIZE, "share": True}
    await vm.execute("object-add", memory)
    answers: Answers = {}
    added = {"driver": NAME, "memdev": "m2", "node": 1, "id": "sp2"}
    for keys, command, arguments in (
        (("attach", "bare"), "device_add", added),
        (("detach",), "device_del", {"id": DEVICE}),
    ):
        try:
            await vm.execute(command, arguments)
        except TagmemError as error:
            cell = Cell("impossible", f"{command}: {error}", "impossible")
        else:
            cell = Cell(f"not measured: {command} was accepted", "", "not-measured")
        answers |= dict.fromkeys(keys, cell)
    await vm.execute("object-del", {"id": "m2"})
    return answers


async def ask_shape(trial: Trial) -> Answers:
    """What it takes at boot, and the size that was used."""
    lines = trial.way.describe().setup
    one = Cell(
        "not measured: each size is a boot", f"{SIZE // MIB} MiB was used", status="not-measured"
    )
    words = Cell("4 + firmware", f"at boot (declared): {'; '.join(lines)}", value=4.0)
    return {"lines": words, "granularity": one, "minimum": one}


QUESTIONS: tuple[tuple[tuple[str, ...], Question], ...] = (
    (("attach", "bare", "detach"), ask_attach),
    (("lines", "granularity", "minimum"), ask_shape),
    (("tag",), ex.ask_tag),
    (("dax",), ex.ask_dax),
    (("stock",), ex.ask_stock),
    (("bandwidth",), ex.ask_bandwidth),
    (("traps",), ex.ask_traps),
    (("holder",), ex.ask_holder),
    (("silent",), ex.ask_silent),
    (("migration",), ex.ask_migration),
    (("paused",), ex.ask_paused),
)

Put = Callable[[Trial, tuple[str, ...], Question], Awaitable[None]]


async def _find(bench: Bench, tagged: Tagged) -> Presentation:
    """The tag in the guest, named by its address; its front read there. Raises LabFailed."""
    resource = int(await bench.python(RESERVED))
    told = wire.Told(tagged.tag, resource=resource)
    request = wire.Attach(0, tagged.tag, FIND_NS // 1_000_000, told)
    answer = await bench.channel.ask(request, FIND_NS + 5 * SECOND)
    if not isinstance(answer, wire.Attached):
        raise LabFailed(f"no DAX device at {resource:#x}: {answer!r:.200}")
    return Presentation(
        tagged, bench.guest.spec.name, NAME, DEVICE, "attached",
        device_bytes=tagged.size_bytes, guest_path=answer.memory.path, told=told,
    )  # fmt: skip


async def row(lab: Lab, name: str, put: Put, report: Report) -> Row:
    """Boot it and ask; a QEMU that does not have it makes a row that says so."""
    bench = Bench(lab, GuestSpec(name="sp-mem"))
    tagged = bench.make(SIZE)
    bench.write(tagged, 0, ex.SENTINEL)
    bench.guest = lab.guest(spec(name, tagged))
    trial = Trial(bench, SpMem(), at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))
    kernel = ""
    before = round(os.getloadavg()[0], 2)
    try:
        try:
            kernel = (await bench.boot()).kernel
            trial.standing = await _find(bench, tagged)
        except TagmemError as error:
            report(f"{NAME} on QEMU {name}: {error}")
            reason = short(_qemus_words(str(error)), 300)
            asked = [key for keys, _ in QUESTIONS for key in keys]
            for key in (*asked, "panicked", "guaranteed", "code"):
                trial.cells[key] = Cell("impossible", reason, "impossible")
        else:
            for keys, question in QUESTIONS:
                await put(trial, keys, question)
            await bench.panic()
            await put(trial, ("panicked",), ex.ask_panicked)
            trial.cells |= ex.conclude(trial.cells)
    finally:
        with suppress(asyncio.CancelledError):
            await bench.end()
    what = trial.way.describe()
    load = (before, round(os.getloadavg()[0], 2))
    return Row(
        what.name, what.summary, name, bench.guest.accel, kernel, dict(trial.cells), load, trial.at
    )


def _qemus_words(error: str) -> str:
    """The line that QEMU wrote, out of a report on a guest that did not start."""
    said = [line for line in error.splitlines() if not line.startswith("---")]
    lines = [line for line in said if NAME in line and "qemu" in line.lower()]
    return lines[-1] if lines else error
