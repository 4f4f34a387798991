"""Runs the comparison: every option that exists, on real guests, one guest at a time.

One guest per QEMU serves all options; what a guest does not live through comes last, and a guest
that died early is replaced. A question without an answer is answered with what was in the way.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from msgspec import structs

from tagmem.base.errors import TagmemError
from tagmem.base.units import MIB
from tagmem.lab import bootonly, programs
from tagmem.lab import experiments as ex
from tagmem.lab.bench import Bench
from tagmem.lab.boot import Lab
from tagmem.lab.experiments import Answers, Question, Trial, short
from tagmem.lab.packages import Report, silent
from tagmem.lab.report import Cell, Comparison, Row, merged
from tagmem.lab.spec import GuestSpec
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import Presenter, Request

ORDER = (
    *("vhost-pmem", "pmem", "ivshmem", "virtio-mem", "dimm", "nvdimm", "cxl", "cxl-static"),
    bootonly.NAME,
)
"""An NVDIMM stays, and one of an odd size spoils the alignment of DIMMs after it."""
QEMUS = ("11.1", "10.0")
CXL_PORTS = 4
EXPERIMENT_SECONDS = 40.0
"""At most for one question; an answer that takes longer is `not measured`."""


# ---- running them

QUESTIONS: tuple[tuple[tuple[str, ...], Question], ...] = (
    (("attach", "detach", "lines"), ex.ask_speed),
    (("bare",), ex.ask_bare),
    (("tag",), ex.ask_tag),
    (("dax",), ex.ask_dax),
    (("stock",), ex.ask_stock),
    (("bandwidth",), ex.ask_bandwidth),
    (("traps",), ex.ask_traps),
    (("granularity", "minimum"), ex.ask_sizes),
    (("holder",), ex.ask_holder),
    (("silent",), ex.ask_silent),
    (("migration", "forms"), ex.ask_migration),
    ((), ex.ask_default_policy),
    (("paused",), ex.ask_paused),
)


async def ask(trial: Trial, keys: Sequence[str], question: Question, report: Report) -> None:
    """Put one question; what keeps it from being answered is its answer."""
    name = trial.way.describe().name
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(EXPERIMENT_SECONDS):
            answers = await question(trial)
    except TimeoutError:
        answers = _unanswered(keys, f"took longer than {EXPERIMENT_SECONDS:g} s")
    except (TagmemError, OSError, ValueError) as error:
        answers = _unanswered(keys, short(str(error), 300))
    trial.cells |= answers
    if trial.notes:
        noted, trial.notes = "; ".join(trial.notes), []
        answers = {
            key: structs.replace(found, evidence=f"{found.evidence}; on the way: {noted}")
            for key, found in answers.items()
        }
        report(f"{name}: on the way: {noted}")
    seconds = time.perf_counter() - begun
    for key, found in answers.items():
        report(f"{name}: {key}: {found.text} ({seconds:.1f} s)")


def _unanswered(keys: Sequence[str], why: str) -> Answers:
    return {key: Cell(f"not measured: {short(why)}", why, "not-measured") for key in keys}


async def one_option(bench: Bench, way: Presenter, columns: Sequence[str], report: Report) -> Trial:
    """All questions (those for some columns, if any are named) but the panic."""
    trial = Trial(bench, way, at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))
    before = os.getloadavg()[0]
    facts = await bench.vm.facts()
    reason = way.can(Request(trial.tag()), facts)
    if reason is not None:
        asked = [key for keys, _ in QUESTIONS for key in keys]
        for key in (*asked, "panicked", "guaranteed", "code"):
            trial.cells[key] = Cell("impossible", reason, "impossible")
        report(f"{way.describe().name}: impossible: {reason}")
        return trial
    for keys, question in QUESTIONS:
        if columns and not set(keys) & set(columns):
            continue
        if bench.vm.gone:
            trial.cells |= _unanswered(keys, "QEMU had ended in an earlier experiment")
            continue
        await ask(trial, keys, question, report)
        with suppress(TagmemError, TimeoutError):
            async with asyncio.timeout(EXPERIMENT_SECONDS):
                await trial.tidy()
    trial.load = (round(before, 2), round(os.getloadavg()[0], 2))
    return trial


async def panicked(bench: Bench, trials: Sequence[Trial], report: Report) -> list[Trial]:
    """Last: what could be attached together, then the guest's kernel panics. Those that are left
    need another guest: QEMU can tell its back-ends of few memory regions (8).
    """
    standing: list[Trial] = []
    left: list[Trial] = []
    for trial in trials:
        trial.bench = bench
        try:
            trial.standing = await trial.present()
            standing.append(trial)
        except TagmemError as error:
            trial.cells |= _unanswered(("panicked",), f"before the panic: {error}")
            left.append(trial)
    await bench.panic()
    for trial in standing:
        await ask(trial, ("panicked",), ex.ask_panicked, report)
    return left if standing else []


def spec(name: str) -> GuestSpec:
    """The guest of the comparison: what every option needs of a machine, and nothing else."""
    return GuestSpec(
        name=f"compare-{name.replace('.', '-')}",
        qemu=name,
        memory_bytes=768 * MIB,
        memory_slots=24,
        root_ports=6,
        machine=("nvdimm=on",),
    )


async def on_qemu(
    lab: Lab,
    name: str,
    wanted: Sequence[str],
    columns: Sequence[str],
    report: Report,
    keep: Callable[[list[Row]], None],
) -> None:
    """All options on one QEMU. `keep` is given the rows as they grow."""
    ways = {n: way for n, way in all_presenters().items() if n in wanted}
    trials: list[Trial] = []
    bench: Bench | None = None
    kernel = ""
    try:
        for option in sorted(ways, key=_place):
            if bench is None or bench.vm.gone:
                bench, kernel = await _anew(lab, name, bench, trials)
                report(f"QEMU {name}: guest booted under {bench.guest.accel.upper()}")
            trials.append(await one_option(bench, ways[option], columns, report))
            keep([_row(trial, kernel) for trial in trials])
        # While a window is there, QEMU plugs in little other memory: windows come last.
        left = sorted(trials, key=lambda trial: trial.way.describe().guaranteed)
        left = [t for t in left if t.cells.get("attach", Cell("")).text != "impossible"]
        while left and (not columns or "panicked" in columns):
            if bench is None or bench.vm.gone or "Kernel panic" in bench.guest.console():
                bench, kernel = await _anew(lab, name, bench, trials)
            try:
                left = await panicked(bench, left, report)
            except TagmemError as error:
                for trial in left:
                    trial.cells |= _unanswered(("panicked",), str(error))
                left = []
    finally:
        if bench is not None:
            await bench.end()
    for trial in trials:
        if not columns and trial.cells.get("attach", Cell("")).text != "impossible":
            trial.cells |= ex.conclude(trial.cells)
    keep([_row(trial, kernel) for trial in trials])


async def _anew(
    lab: Lab, name: str, before: Bench | None, trials: Sequence[Trial]
) -> tuple[Bench, str]:
    """A guest to go on with, the one before it ended; its kernel."""
    if before is not None:
        await before.end()
        for trial in trials:
            trial.left, trial.standing = [], None
    bench = Bench(lab, spec(name), cxl_ports=CXL_PORTS)
    kernel = (await bench.boot()).kernel
    await bench.python(programs.ONLINE, "online_movable")
    return bench, kernel


def _row(trial: Trial, kernel: str) -> Row:
    what, guest = trial.way.describe(), trial.bench.guest
    return Row(
        what.name, what.summary, guest.spec.qemu, guest.accel, kernel,
        dict(trial.cells), trial.load, trial.at,
    )  # fmt: skip


def _completed(row: Row, before: Comparison) -> Row:
    """With the cells of an earlier run that were not asked for anew, and what follows from all."""
    same = [old for old in before.rows if (old.option, old.qemu) == (row.option, row.qemu)]
    cells = (same[0].cells if same else {}) | row.cells
    load = (*(same[0].load if same else ()), *row.load)
    return structs.replace(row, cells=cells | ex.conclude(cells), load=load)


def _place(option: str) -> int:
    return ORDER.index(option) if option in ORDER else len(ORDER)


def machine_facts(lab: Lab, names: Sequence[str]) -> dict[str, str]:
    """What the figures were measured on."""
    facts = {"machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}"}
    for name in names:
        facts[f"QEMU {name}"] = lab.qemu(name).version
    facts["guest kernel"] = lab.image().release
    return facts


async def compare(
    wanted: Sequence[str],
    names: Sequence[str],
    columns: Sequence[str],
    before: Comparison | None,
    keep: Callable[[Comparison], None],
    report: Report = silent,
) -> Comparison:
    """Run it; `keep` is given what there is after each option. Raises LabFailed, TagmemError."""
    lab = Lab(report=report)
    facts = await asyncio.to_thread(machine_facts, lab, QEMUS)
    built = all_presenters()
    made = merged(before, facts, [], ORDER)

    earlier = made

    def grown(rows: list[Row]) -> None:
        nonlocal made
        if columns:
            rows = [_completed(row, earlier) for row in rows]
        made = merged(made, facts, rows, ORDER)
        keep(made)

    keep(made)
    for name in names:
        if any(option in built for option in wanted):
            await on_qemu(lab, name, wanted, columns, report, grown)
        if bootonly.NAME in wanted and not columns:

            async def put(trial: Trial, keys: Sequence[str], question: Question) -> None:
                await ask(trial, keys, question, report)

            grown([await bootonly.row(lab, name, put, report)])
    return made
