"""A VM inside a VM: run in a guest, on a tag that it has, this is the host of a VM of its own.

The tag's DAX device is to it what the appliance's media are to a host, and everything else is the
same: presenters, broker, ladder, proofs. It is a holder of its tag like any application, so that
whoever takes the tag from the outer guest has its agent ask this process (SIGTERM), which takes the
tag out of its VM, proves that its QEMU has nothing of it, and only then ends: the inner one first.

It tells what it does on stdout, one JSON object per line, for whoever started it from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from tagmem.base.errors import Conflict, NotFound, TagmemError
from tagmem.base.ids import parse_tag
from tagmem.base.units import MIB, SECOND
from tagmem.io import stream
from tagmem.presenter.broker import Broker
from tagmem.presenter.choose import AUTO, all_presenters, pick
from tagmem.presenter.contract import Piece, Presentation, Presenter, Request, Tagged
from tagmem.presenter.machine import VmSpec
from tagmem.presenter.qemu import Vm
from tagmem.wire import guest

RUN_DIR = "/run/tagmem"
BOOT_SECONDS = 600.0
"""A guest that is emulated by an emulated processor boots in minutes."""
DETACH_NS = 30 * SECOND
STOP_NS = 10 * SECOND
EXEC_NS = 300 * SECOND

Tell = Callable[[dict[str, Any]], None]


def tagged_here(tag: str, run_dir: str) -> Tagged:
    """A tag that this machine has by name, as a presenter wants it. Raises NotFound.

    It may have content. A VM of its own never has another tag's device in the place of this one's,
    so a stale mapping in it leads nowhere.
    """
    link = Path(run_dir, "by-tag", parse_tag(tag))
    try:
        size = int((link.parent.parent / Path(os.readlink(link)).parent.name / "size").read_text())
    except (OSError, ValueError):
        raise NotFound(f"tag {tag} has no name in {run_dir}") from None
    return Tagged(tag, size, (Piece(os.path.realpath(link), 0, size),), dead_end=True)


async def present(
    spec: VmSpec, tagged: Tagged, way_name: str, argv: Sequence[str], tell: Tell
) -> None:
    """Start the VM, present the tag to it, run a command in it, and wait for SIGTERM or its end;
    then take the tag back and end the VM. Raises TagmemError.
    """
    leave = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave.set)
    broker = Broker(stream, Path(spec.directory))
    try:
        vm = await Vm.start(spec, broker.windows(spec.name))
        vm.on_gone = leave.set
        tell({"event": "started", "pid": vm.pid})
        try:
            await _unless(leave, _serve(vm, tagged, way_name, argv, leave, tell))
        finally:
            await vm.stop(STOP_NS)
            await vm.close()
    finally:
        broker.close()


async def _unless(leave: asyncio.Event, work: Awaitable[None]) -> None:
    """Booting is not worth waiting for once this is to leave; what was presented is another's."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(leave.wait())
    await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    await task


async def _serve(
    vm: Vm, tagged: Tagged, way_name: str, argv: Sequence[str], leave: asyncio.Event, tell: Tell
) -> None:
    assert vm.guest is not None
    await _answering(vm, leave)
    if leave.is_set():
        return
    way, choice = pick(all_presenters(), Request(tagged), await vm.facts(), way_name)
    shown = await way.attach(Request(tagged), vm)
    tell(
        {
            "event": "presented",
            "as": shown.presenter,
            "path": shown.guest_path,
            "why": choice.why,
        }
    )
    try:
        if argv:
            await _run(vm, tagged.tag, argv, tell)
        await leave.wait()
    finally:
        await _take_back(vm, way, shown, tell)


async def _answering(vm: Vm, leave: asyncio.Event) -> None:
    assert vm.guest is not None
    greeted = asyncio.ensure_future(vm.guest.greeted(int(BOOT_SECONDS * SECOND)))
    leaving = asyncio.ensure_future(leave.wait())
    done, left = await asyncio.wait({greeted, leaving}, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    if greeted in done:
        greeted.result()


async def _run(vm: Vm, tag: str, argv: Sequence[str], tell: Tell) -> None:
    assert vm.guest is not None

    def said(answer: guest.Answer) -> None:
        if isinstance(answer, guest.Output):
            text = answer.data.decode(errors="replace")
            tell({"event": "output", "stream": answer.stream, "text": text})

    ended = await vm.guest.stream(guest.Exec(0, tuple(argv), tag=tag), said, EXEC_NS)
    tell({"event": "ran", "code": ended.code if isinstance(ended, guest.Exited) else str(ended)})


async def _take_back(vm: Vm, way: Presenter, shown: Presentation, tell: Tell) -> None:
    """By asking first; whoever ended us has decided that the tag leaves, so the VM's end is the
    last rung. Raises Conflict when its QEMU still has it.
    """
    ended = await way.detach(shown, vm, deadline_ns=DETACH_NS, force=True, may_stop_vm=True)
    tell({"event": "taken", "done": ended.done, "rung": ended.rung, "reason": ended.reason})
    if not ended.done:
        raise Conflict(f"tag {shown.tagged.tag} stays in VM {vm.name}: {ended.reason}")


def _tell(event: dict[str, Any]) -> None:
    """Whoever reads it is another program: one write per line."""
    os.write(1, json.dumps(event).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python3 -m tagmem.presenter.within`; `tagmem vm within` has the same options."""
    parser = argparse.ArgumentParser("tagmem vm within", description=__doc__)
    parser.add_argument("tag", help="a tag that this guest has")
    parser.add_argument("--run-dir", default=RUN_DIR)
    parser.add_argument("--as", dest="way", default=AUTO, help="the presenter (%(default)s)")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initrd", default="")
    parser.add_argument("--append", default="")
    parser.add_argument("--memory", type=int, default=256, help="MiB (%(default)s)")
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--cpu", default="max,phys-bits=46")
    parser.add_argument("argv", nargs="*", help="a command to run in it; {dax} is the tag there")
    given = parser.parse_args(arguments)
    try:
        tagged = tagged_here(given.tag, given.run_dir)
        with tempfile.TemporaryDirectory(prefix="tagmem-within-") as folder:
            spec = VmSpec(
                "inner",
                folder,
                qemu=(given.qemu,),
                memory_bytes=given.memory * MIB,
                kernel=given.kernel,
                initrd=given.initrd,
                append=given.append,
                accel=given.accel,
                cpu=given.cpu,
                ports=2,
                port_bytes=2 * _power_of_two(tagged.size_bytes + 2 * MIB) + 2 * MIB,
                memory_slots=2,
                memory_max_bytes=given.memory * MIB + 2 * tagged.size_bytes,
            )
            asyncio.run(present(spec, tagged, given.way, given.argv, _tell))
    except (TagmemError, OSError) as error:
        _tell({"event": "failed", "reason": str(error)})
        return 1
    return 0


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


if __name__ == "__main__":
    sys.exit(main())
