"""The questions of the comparison, each put by experiment: one function per question.

A question is asked of one option in one guest, and its answer has what was seen. Nothing is taken
from a description but what is to be tried; a question that cannot be put raises the reason.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tagmem.base.errors import RemoteError, TagmemError, Unsupported
from tagmem.base.units import MIB, SECOND, Bytes
from tagmem.lab import programs
from tagmem.lab.bench import Bench, Metered, Program
from tagmem.lab.errors import LabFailed
from tagmem.lab.report import Cell
from tagmem.presenter import common, migrate
from tagmem.presenter.contract import (
    AskGuest,
    Command,
    Detached,
    Machine,
    Presentation,
    Presenter,
    Request,
    Tagged,
)
from tagmem.presenter.driver import carry_out

SIZE = 64 * MIB
RAM_SIZE = 256 * MIB
HOLD_BYTES = 96 * MIB
COPY_BYTES = 64 * MIB
EXTENT_SIZE = 16 * MIB
"""Where each access is emulated, so that a copy of it ends in time."""
UNIT_TRIED = 256 * MIB
TRIED_UNITS = tuple(n * MIB for n in (64, 256, 384, 512))
TRIED = tuple(n * MIB for n in (2, 4, 6, 10))
TRIED_RAM = tuple(n * MIB for n in (2, 64, 128, 130, 192, 256))
REPEATS = 3
TRIES = 3
WATCH_SECONDS = 4.0
WARNED = 512
"""The kernel's taint of a warning, which decoders that are taken back cost inside a VM."""
SENTINEL = b"tagmem!\n"
SHORT_NS = 2 * SECOND
DETACH_NS = 12 * SECOND


@dataclass
class Trial:
    """One option in one guest, and what is known of it so far."""

    bench: Bench
    way: Presenter
    cells: dict[str, Cell] = field(default_factory=dict)
    left: list[Presentation] = field(default_factory=list)
    """In the VM, as far as known."""
    standing: Presentation | None = None
    """One that can never be taken out again serves every question."""
    notes: list[str] = field(default_factory=list)
    """What went wrong on the way and was overcome."""
    load: tuple[float, ...] = ()
    at: str = ""

    @property
    def ram(self) -> bool:
        """Whether it is RAM to the guest."""
        return self.way.describe().ram

    @property
    def size(self) -> Bytes:
        """What is attached unless another size is the question."""
        if self.ram:
            return RAM_SIZE
        return EXTENT_SIZE if self.by_dpa else max(SIZE, self.way.describe().minimum_bytes)

    @property
    def by_dpa(self) -> bool:
        """Whether it shows parts of an appliance's pool instead of files of their own."""
        return self.way.describe().name == "cxl"

    @property
    def tried(self) -> tuple[Bytes, ...]:
        """Sizes to be tried, from small to large."""
        if self.way.describe().minimum_bytes >= UNIT_TRIED:
            return TRIED_UNITS
        return TRIED_RAM if self.ram else TRIED

    @property
    def how(self) -> str:
        """How the guest sees that it came; see programs.WATCH."""
        if self.ram:
            return "ram"
        what = self.way.describe()
        return "dax" if what.tag_in_band else "new" if what.dax else "bar"

    @property
    def stays(self) -> bool:
        """Whether trying to take it out costs a slot for good."""
        return self.way.describe().removal == "never"

    def tag(self, size: Bytes = 0) -> Tagged:
        """A new one, with known bytes at its front."""
        size = size or self.size
        loaded = not self.ram
        tagged = self.bench.extent(size) if self.by_dpa else self.bench.make(size, loaded=loaded)
        if not self.ram:
            self.bench.write(tagged, 0, SENTINEL)
        return tagged

    async def present(self) -> Presentation:
        """The option's tag in the VM; the one that is there where it cannot leave."""
        if self.standing is not None:
            return self.standing
        shown = await self.attached(self.bench.vm)
        if self.stays:
            self.standing = shown
        if shown.guest_path:
            await self.bench.python(programs.THERE, shown.guest_path)
        return shown

    async def attached(self, vm: Machine) -> Presentation:
        """A new tag in the VM. An attach that QEMU refuses is tried again, and noted."""
        for left in range(TRIES - 1, -1, -1):
            tagged = self.tag()
            try:
                shown = await self.way.attach(Request(tagged), vm)
            except RemoteError as error:
                self.notes.append(f"attach refused: {error}")
                if not left:
                    raise
            else:
                self.left.append(shown)
                return shown
        raise LabFailed("it was never tried")

    async def hold(self, shown: Presentation) -> int:
        """A process in the guest has it and is not the agent's; its number."""
        path, size = (shown.guest_path, shown.tagged.size_bytes)
        if self.ram:
            path, size = "-", HOLD_BYTES
        if not path:
            raise LabFailed("the guest has no path for it")
        return int(await self.bench.python(programs.HOLD, path, size, 30.0))

    async def tidy(self) -> None:
        """What an experiment left in the VM goes, as far as it can."""
        if self.bench.vm.gone:
            self.left, self.standing = [], None
            return
        leaving = [] if self.stays else self.left
        kept = await self.bench.tidy(self.way, leaving)
        for shown in leaving:
            if shown in kept and self.way.describe().removal == "vm-end":
                continue  # QEMU has the bytes, the guest has not: the next one is put beside it
            if shown in kept:
                self.standing = shown
                self.notes.append("it could not be taken out at once")
                continue
            if self.standing is shown:
                self.standing = None
            with suppress(TagmemError):  # It is gone where the presenter itself removed it.
                memory = {"id": common.memory_id(shown.tagged.tag)}
                await self.bench.vm.execute("object-del", memory)
            with suppress(TagmemError, OSError):
                self.bench.drop(shown.tagged)
        if not self.stays:
            self.left = [] if self.way.describe().removal == "vm-end" else kept


Answers = dict[str, Cell]
Question = Callable[[Trial], Awaitable[Answers]]


# ---- speed


async def _watching(trial: Trial, tagged: Tagged) -> Program:
    watch = trial.bench.start(
        programs.WATCH, trial.how, tagged.tag, tagged.size_bytes, WATCH_SECONDS
    )
    await watch.line(0)
    return watch


async def _first_byte(watch: Program, begun: float) -> tuple[float, str]:
    """Milliseconds until the guest read it, and what it said. Raises LabFailed."""
    at, said = await watch.line(1)
    if not said.startswith("seen"):
        raise LabFailed(f"nothing in the guest within {WATCH_SECONDS:g} s")
    if "/" in said and bytes.fromhex(said.split()[1]) != SENTINEL:
        raise LabFailed(f"the guest read other bytes: {said}")
    return (at - begun) * 1000, said


async def _attach_timed(trial: Trial, meter: Metered) -> tuple[Presentation, float, str]:
    for left in range(TRIES - 1, -1, -1):
        tagged = trial.tag()
        watch = await _watching(trial, tagged)
        begun = time.perf_counter()
        try:
            shown = await trial.way.attach(Request(tagged), meter)
            trial.left.append(shown)
            milliseconds, said = await _first_byte(watch, begun)
        except RemoteError as error:
            trial.notes.append(f"attach refused: {error}")
            if not left:
                raise
            meter.commands.clear()
        else:
            return shown, milliseconds, said
        finally:
            await watch.drop()
    raise LabFailed("it was never tried")


async def ask_speed(trial: Trial) -> Answers:
    """Attach to first byte, detach, the commands that QEMU was sent."""
    attached, detached, qmp, said, rungs = [], [], [], "", set()
    commands: list[tuple[str, str, float]] = []
    for _ in range(1 if trial.stays else REPEATS):
        meter = Metered(trial.bench.vm)
        shown, milliseconds, said = await _attach_timed(trial, meter)
        attached.append(milliseconds)
        commands = list(meter.commands)
        qmp.append(sum(seconds for _, _, seconds in commands) * 1000)
        begun = time.perf_counter()
        if trial.stays:
            trial.standing = shown
        gone = await trial.way.detach(shown, trial.bench.vm, deadline_ns=DETACH_NS)
        if gone.done:
            detached.append((time.perf_counter() - begun) * 1000)
        rungs.add(f"{gone.rung} {gone.reason}".strip())
        await trial.tidy()
    names = [" ".join(part for part in (name, what) if part) for name, what, _ in commands]
    middle = statistics.median(attached)
    answers = {
        "attach": Cell(
            f"{middle:.0f} ms",
            f"{_list(attached)} ms; of that in QMP commands {_list(qmp)} ms; guest: {said}",
            value=round(middle, 1),
        ),
        "lines": _lines(trial, names),
    }
    if detached:
        away = statistics.median(detached)
        answers["detach"] = Cell(
            f"{away:.0f} ms",
            f"{_list(detached)} ms; {', '.join(sorted(rungs))}",
            value=round(away, 1),
        )
    else:
        why = "; ".join(sorted(rungs))
        answers["detach"] = Cell("impossible", why, "impossible")
    return answers


def _lines(trial: Trial, commands: Sequence[str]) -> Cell:
    boot = [line for line in trial.way.describe().setup if line.startswith("-")]
    words = sum(line.count("-object ") + line.count("-device ") for line in boot)
    words += sum(part.startswith("-m") or part == "-cpu" for line in boot for part in line.split())
    text = f"{words} + {len(commands)} QMP"
    evidence = f"at boot (declared): {'; '.join(boot)}; seen at attach: {', '.join(commands)}"
    return Cell(text, evidence, value=float(words + len(commands)))


async def _bare_once(trial: Trial) -> tuple[float, str, str]:
    vm = trial.bench.vm
    tagged = trial.tag()
    request = Request(tagged)
    facts = await vm.facts()
    reason = trial.way.can(request, facts)
    if reason is not None:
        raise Unsupported(reason)
    plan = trial.way.plan(request, facts)
    steps = [step for step in plan.steps if not isinstance(step, AskGuest)]
    sent = ", ".join(step.execute for step in steps if isinstance(step, Command))
    watch = await _watching(trial, tagged)
    begun = time.perf_counter()
    try:
        await carry_out(steps, vm)
        shown = Presentation(
            tagged, facts.name, plan.presenter, plan.device, "attached", plan.slot,
            plan.device_bytes,
        )  # fmt: skip
        trial.left.append(shown)
        milliseconds, said = await _first_byte(watch, begun)
    finally:
        await watch.drop()
    return milliseconds, said, sent


async def _bare_in_vain(trial: Trial) -> Answers:
    """Of what the agent has to make: whether the guest has a DAX device without it."""
    try:
        milliseconds, said, sent = await _bare_once(trial)
    except LabFailed as error:
        why = f"without the agent: {error}"
        return {"bare": Cell("impossible: no DAX device by itself", why, "impossible")}
    finally:
        await trial.tidy()
    text = f"{milliseconds:.0f} ms"
    return {"bare": Cell(text, f"{text} for {sent}; guest: {said}", value=round(milliseconds, 1))}


async def ask_bare(trial: Trial) -> Answers:
    """The same commands to QEMU with neither survey nor agent; for a window with the broker."""
    times: list[float] = []
    said, sent, lost = "", "", 0
    if trial.how == "new":
        return await _bare_in_vain(trial)
    wanted = 1 if trial.stays else REPEATS
    while len(times) < wanted:
        try:
            milliseconds, said, sent = await _bare_once(trial)
        except (LabFailed, RemoteError) as error:
            lost += 1
            trial.notes.append(f"bare: {error}")
            if lost >= TRIES:
                raise
        else:
            times.append(milliseconds)
        finally:
            await trial.tidy()
    middle = statistics.median(times)
    evidence = f"{_list(times)} ms for {sent}; guest: {said}"
    answers = {"bare": Cell(f"{middle:.0f} ms", evidence, value=round(middle, 1))}
    if trial.how == "dax":
        answers["tag"] = Cell("yes", f"found by its UUID in sysfs, no agent asked: {said}")
    return answers


# ---- what it is


async def ask_tag(trial: Trial) -> Answers:
    """Whether the guest's kernel shows the tag anywhere."""
    if "tag" in trial.cells:
        return {}
    shown = await trial.present()
    found = await trial.bench.python(programs.SEARCH, shown.tagged.tag)
    lines = [line for line in found.splitlines() if line.startswith("found")]
    if lines:
        return {"tag": Cell("yes", "; ".join(lines))}
    return {"tag": Cell("no", f"in none of the identities in /sys/devices ({found})")}


async def ask_dax(trial: Trial) -> Answers:
    """A device of the dax class, whose pages the kernel can get at."""
    shown = await trial.present()
    if trial.ram:
        memory = await trial.bench.found(shown)
        return {"dax": Cell("no: System RAM", f"the guest's agent finds {memory}")}
    said = await trial.bench.python(programs.PAGES, shown.guest_path, shown.tagged.size_bytes)
    node = await trial.bench.python(
        "import os,sys; print(os.path.realpath(sys.argv[1]))", shown.guest_path
    )
    good = os.path.basename(node).startswith("dax") and said.startswith("4096")
    evidence = f"{node}; process_vm_readv of a mapped page: {said}"
    if good:
        return {"dax": Cell("yes", evidence)}
    return {"dax": Cell(f"no: {short(said)}", evidence)}


async def ask_stock(trial: Trial) -> Answers:
    """The guest's kernel."""
    release, tainted, version = (await trial.bench.python(programs.KERNEL)).split("\n")[:3]
    text = "yes" if tainted == "0" and "Debian" in version else "no"
    if text == "no" and tainted == str(WARNED) and "Debian" in version:
        text = "yes; it warned meanwhile"
    return {"stock": Cell(text, f"{version}; tainted {tainted}; {release}")}


async def ask_bandwidth(trial: Trial) -> Answers:
    """A copy out of the tag against one out of the guest's own RAM, in one process."""
    if trial.ram:
        return await _ram_bandwidth(trial)
    shown = await trial.present()
    size = min(COPY_BYTES, shown.tagged.size_bytes)
    said = await trial.bench.python(programs.COPY, shown.guest_path, size)
    own, out, into, _ = (float(word) for word in said.split())
    return {
        "bandwidth": Cell(
            f"{100 * out / own:.0f} % ({out:.0f} / {own:.0f} MB/s)",
            f"{size // MIB} MiB, median of 7: RAM to RAM {own:.0f}, tag to RAM {out:.0f}, "
            f"RAM to tag {into:.0f} MB/s",
            value=round(100 * out / own, 1),
        )
    }


async def _ram_bandwidth(trial: Trial) -> Answers:
    """Pages of it are told by their physical address: all of the guest's own are below 4 GiB."""
    before = (await trial.bench.python(programs.COPY, "-", COPY_BYTES)).split()
    await trial.present()
    after = (await trial.bench.python(programs.COPY, "-", COPY_BYTES)).split()
    own, out, share = float(before[0]), float(after[0]), float(after[3])
    evidence = (
        f"before: {own:.0f} MB/s, {float(before[3]):.0%} of the pages above 4 GiB; "
        f"attached: {out:.0f} MB/s, {share:.0%} above 4 GiB"
    )
    if share < 0.9 or float(before[3]) > 0.1:
        why = "not measured: the kernel did not place the pages there"
        return {"bandwidth": Cell(why, evidence, "not-measured")}
    text = f"{100 * out / own:.0f} % ({out:.0f} / {own:.0f} MB/s)"
    return {"bandwidth": Cell(text, evidence, value=round(100 * out / own, 1))}


async def ask_traps(trial: Trial) -> Answers:
    """What the address is in QEMU's flat view: RAM is reached without an exit, I/O with one."""
    shown = await trial.present()
    memory = await trial.bench.found(shown)
    view = str(
        await trial.bench.vm.execute("human-monitor-command", {"command-line": "info mtree -f"})
    )
    address = memory.resource if memory is not None else 0
    for line in view.splitlines():
        region = _region(line)
        if region is None:
            continue
        start, end, kind = region
        if start <= address <= end if address else shown.tagged.tag in line:
            text = "none (RAM)" if kind in ("ram", "nv-ram", "rom") else f"every one ({kind})"
            note = (
                "; exits were not counted: no KVM here" if trial.bench.guest.accel == "tcg" else ""
            )
            return {"traps": Cell(text, line.strip() + note)}
    why = "not measured: QEMU's map does not name it"
    return {"traps": Cell(why, f"address {address:#x}", "not-measured")}


def _region(line: str) -> tuple[int, int, str] | None:
    """`  0000000100000000-000000010fffffff (prio 0, ram): name`."""
    words = line.split()
    if len(words) < 4 or words[1] != "(prio" or "-" not in words[0]:
        return None
    start, _, end = words[0].partition("-")
    return int(start, 16), int(end, 16), words[3].rstrip("):")


async def ask_sizes(trial: Trial) -> Answers:
    """Sizes, from small to large: which are attached, and what is said of the others."""
    took: list[Bytes] = []
    said: list[str] = []
    for size in trial.tried:
        if trial.stays and len(took) == 3:
            break
        tagged = trial.tag(size)
        watch = await _watching(trial, tagged)
        try:
            shown = await trial.way.attach(Request(tagged), trial.bench.vm)
            trial.left.append(shown)
            await _first_byte(watch, 0.0)
        except TagmemError as error:
            said.append(f"{size // MIB} MiB: {short(str(error), 160)}")
        else:
            took.append(size)
            said.append(f"{size // MIB} MiB: attached and read")
        finally:
            await watch.drop()
        await trial.tidy()
    if not took:
        raise LabFailed("; ".join(said))
    evidence = "; ".join(said)
    return {
        "minimum": Cell(f"{took[0] // MIB} MiB", evidence, value=took[0] / MIB),
        "granularity": Cell(_granularity(took, trial), evidence),
    }


def _granularity(took: Sequence[Bytes], trial: Trial) -> str:
    if all(size & (size - 1) == 0 for size in took):
        whole = [size for size in trial.tried if size > took[0] and size % took[0] == 0]
        odd = [size for size in whole if size & (size - 1)]
        if odd and len(took) > 1:
            steps = {size - took[0] for size in took[1:]}
            if trial.ram and min(steps) == took[0]:
                return f"{took[0] // MIB} MiB"
            return "powers of two"
    gaps = [later - earlier for earlier, later in pairwise(took)]
    return f"{min(gaps, default=took[0]) // MIB} MiB"


# ---- taking it back


async def ask_holder(trial: Trial) -> Answers:
    """Somebody has it, and the guest is asked without force."""
    shown = await trial.present()
    pid = await trial.hold(shown)
    begun = time.perf_counter()
    gone = await trial.way.detach(shown, trial.bench.vm, deadline_ns=3 * SECOND)
    milliseconds = (time.perf_counter() - begun) * 1000
    held = await trial.bench.held(shown)
    evidence = f"process {pid} has it; {_told(gone)}; QEMU {'has' if held else 'has not'} the bytes"
    if gone.done and not held:
        return {"holder": Cell(f"left under it, {milliseconds:.0f} ms", evidence)}
    named = pid in [holder.pid for holder in gone.holders]
    text = "refused, holder named" if named else f"stays: {short(gone.reason)}"
    return {"holder": Cell(text, evidence)}


async def ask_silent(trial: Trial) -> Answers:
    """By force, while somebody has it and the guest's agent does not answer."""
    shown = await trial.present()
    pid = await trial.hold(shown)
    await trial.bench.silent(programs.SILENCE, 9.0)
    taken = await _by_force(trial, shown)
    await trial.bench.answering()
    return {"silent": Cell(taken.text, f"process {pid} has it; {taken.evidence}")}


async def ask_paused(trial: Trial) -> Answers:
    """By force, from a guest whose processors stand."""
    shown = await trial.present()
    pid = await trial.hold(shown)
    await trial.bench.vm.pause()
    try:
        taken = await _by_force(trial, shown)
    finally:
        if not trial.bench.vm.gone:
            await trial.bench.vm.resume()
    return {"paused": Cell(taken.text, f"process {pid} has it; {taken.evidence}")}


async def ask_panicked(trial: Trial) -> Answers:
    """By force, from a guest that panicked; `trial.standing` was attached before."""
    if trial.standing is None:
        raise LabFailed("it could not be attached before the panic")
    taken = await _by_force(trial, trial.standing)
    return {"panicked": taken}


async def _by_force(trial: Trial, shown: Presentation) -> Cell:
    """The presenter's ladder up to revoking; where that fails QEMU is told bluntly, and seen."""
    begun = time.perf_counter()
    gone = await trial.way.detach(shown, trial.bench.vm, deadline_ns=SHORT_NS, force=True)
    milliseconds = (time.perf_counter() - begun) * 1000
    evidence = _told(gone)
    held = await trial.bench.held(shown)
    if gone.done and not held:
        return Cell(f"yes, {milliseconds:.0f} ms", f"{evidence}; QEMU's process has no map of it")
    vm = trial.bench.vm
    try:
        if trial.by_dpa:
            await trial.bench.force_release(shown)
        else:
            await vm.execute("device_del", {"id": shown.device})
        left = not trial.by_dpa and await vm.deleted(shown.device, SHORT_NS)
        blunt = "the device left" if left else "accepted, and the device did not leave in 2 s"
    except TagmemError as error:
        blunt = str(error)
    if vm.gone:
        return Cell("no: QEMU ended", f"{evidence}; device_del: {blunt}")
    held = await trial.bench.held(shown)
    evidence += f"; device_del: {blunt}; QEMU {'still maps' if held else 'does not map'} the bytes"
    if not held:
        return Cell("yes", evidence)
    return Cell(f"no: {short(gone.reason or blunt)}", evidence)


def _told(gone: Detached) -> str:
    who = ", ".join(f"{holder.pid} {holder.name}" for holder in gone.holders)
    words = f"{'done' if gone.done else 'not done'} at rung {gone.rung}"
    return "; ".join(part for part in (words, who and f"holders {who}", gone.reason) if part)


async def ask_migration(trial: Trial) -> Answers:
    """Whether QEMU can migrate with the tag attached, and which forms follow from what the way
    says of itself; a way that says *stays* and is refused here contradicts itself.
    """
    answers = await _migrate_to_file(trial)
    what = trial.way.describe()
    seen = answers["migration"]
    evidence = f"{what.name} says: {what.migration}; {seen.text}; tests/vm/test_migrate.py moves it"
    text = migrate.in_short(what)
    if what.migration == "stays" and not seen.text.startswith("leaves"):
        text = f"contradicted: said to stay, and {seen.text}"
    return answers | {"forms": Cell(text, evidence)}


async def _migrate_to_file(trial: Trial) -> dict[str, Cell]:
    """QEMU is asked to migrate into a file, shared memory left out, with the tag attached."""
    shown = await trial.present()
    vm = trial.bench.vm
    marker = shown.tagged.tag.encode() * 2
    if not trial.ram:
        trial.bench.write(shown.tagged, MIB, marker)
    on = [{"capability": "x-ignore-shared", "state": True}]
    await vm.execute("migrate-set-capabilities", {"capabilities": on})
    target = trial.bench.folder / "migration"
    try:
        await vm.execute("migrate", {"uri": f"file:{target}"})
    except TagmemError as error:
        reason = str(error)
        blocked = (await vm.execute("query-migrate", {})).get("blocked-reasons", [])
        return {"migration": Cell(f"refused: {short(_bare(reason))}", f"{reason}; {blocked}")}
    state: dict[str, Any] = {}
    while state.get("status") not in ("completed", "failed", "cancelled"):
        await asyncio.sleep(0.05)
        state = await vm.execute("query-migrate", {})
    with suppress(TagmemError):
        await vm.resume()
    written = await asyncio.to_thread(target.read_bytes) if target.exists() else b""
    target.unlink(missing_ok=True)
    await trial.bench.answering()
    evidence = (
        f"migrate to a file with x-ignore-shared: {state.get('status')} "
        f"{state.get('error-desc', '')}; {len(written) / MIB:.1f} MiB written; "
        f"{_copied(trial, marker in written)}; "
        "the guest ran on afterwards; another QEMU was not tried"
    )
    if state.get("status") != "completed":
        return {"migration": Cell(f"no: {short(str(state.get('error-desc', '?')))}", evidence)}
    text = f"leaves, {_copied(trial, marker in written)}; arrival not tried"
    return {"migration": Cell(text, evidence)}


def _copied(trial: Trial, found: bool) -> str:
    if trial.ram:
        return "whether it is copied was not looked for"
    return "the tag's bytes are copied" if found else "the tag's bytes are not copied"


async def ask_default_policy(trial: Trial) -> Answers:
    """RAM only: taken on line as Debian's kernel does unless told otherwise."""
    if not trial.ram:
        return {}
    policy = await trial.bench.python(programs.ONLINE, "online")
    try:
        shown = await trial.present()
        gone = await trial.way.detach(shown, trial.bench.vm, deadline_ns=DETACH_NS)
    finally:
        await trial.bench.python(programs.ONLINE, "online_movable")
    before = trial.cells.get("holder", Cell("not measured"))
    word = "it left" if gone.done else f"it stayed: {gone.reason}"
    note = f"idle under policy {policy}: {word}"
    text = before.text if gone.done else f"{before.text}; Debian's default policy: stays"
    return {"holder": Cell(text, f"{before.evidence}; {note}", before.status)}


def conclude(cells: Mapping[str, Cell]) -> Answers:
    """What follows from the experiments alone: the guarantee, and the code that it takes."""
    hard = {key: cells[key] for key in ("silent", "paused", "panicked") if key in cells}
    failed = [key for key, found in hard.items() if found.text.startswith("no:")]
    missing = [
        k for k in ("silent", "paused", "panicked") if k not in hard or not answered(hard[k])
    ]
    if failed:
        sure = Cell(f"no ({', '.join(failed)})", "; ".join(hard[key].evidence for key in failed))
    elif missing:
        why = f"not measured: {', '.join(missing)} missing"
        sure = Cell(why, "", "not-measured")
    else:
        sure = Cell("yes", "; ".join(f"{key}: {found.text}" for key, found in hard.items()))
    find = (
        "" if "bare" in cells and cells.get("tag", sure).text == "yes" else "name by side channel"
    )
    quiet = cells.get("silent", Cell("")).text
    give = "" if quiet.startswith("yes") else "letting go"
    parts = [part for part in (find, give) if part]
    if not answered(cells.get("silent", sure)):
        return {"guaranteed": sure}
    evidence = "attached without the agent asked (bare); taken back from a silent one: " + quiet
    return {"guaranteed": sure, "code": Cell(", ".join(parts) or "none", evidence)}


def answered(found: Cell) -> bool:
    return found.status in ("measured", "impossible")


# ---- words


def _list(figures: Sequence[float]) -> str:
    return ", ".join(f"{figure:.0f}" for figure in figures)


def short(text: str, most: int = 60) -> str:
    """On one line, and no longer than that."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _bare(reason: str) -> str:
    """QEMU's words without ours in front of them."""
    return reason.rsplit(": ", 1)[-1] if ": " in reason else reason
