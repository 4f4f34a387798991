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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tagmem.base.errors import Conflict, NotFound, TagmemError
from tagmem.base.ids import parse_tag
from tagmem.base.units import MIB, SECOND, Nanoseconds
from tagmem.io import stream
from tagmem.presenter.broker import Broker
from tagmem.presenter.choose import AUTO, all_presenters, pick
from tagmem.presenter.contract import Piece, Presentation, Presenter, Request, Tagged
from tagmem.presenter.machine import VmSpec
from tagmem.presenter.qemu import Vm
from tagmem.wire import guest

RUN_DIR = "/run/tagmem"
KVM = "/dev/kvm"
BOOT_SECONDS = 600.0
"""Without KVM a guest is emulated by an emulated processor, and boots in minutes."""
CPUS = {"kvm": "host", "tcg": "max,phys-bits=46"}
TIMEOUT_SECONDS = 4.0
"""Less than what a detach from outside, of ten seconds, leaves this process to end by itself."""
STOP_NS = 10 * SECOND

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
    spec: VmSpec,
    tagged: Tagged,
    way_name: str,
    argv: Sequence[str],
    tell: Tell,
    deadline_ns: Nanoseconds,
) -> None:
    """Start the VM, present the tag to it, run a command in it, and wait for SIGTERM or the VM's
    end; then take the tag back, whatever runs there, and end the VM. Raises TagmemError.

    `deadline_ns` is for taking it back, before the VM's end does so.
    """
    leave = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave.set)
    broker = Broker(stream, Path(spec.directory))
    try:
        vm = await Vm.start(spec, broker.windows(spec.name))
        vm.on_gone = leave.set
        tell({"event": "started", "pid": vm.pid, "accel": spec.accel})
        try:
            await _answering(vm, leave)
            if leave.is_set():
                return
            way, shown = await _attach(vm, tagged, way_name, tell)
            running = asyncio.ensure_future(_run(vm, tagged.tag, argv, tell))
            try:
                await leave.wait()
            finally:
                await _take_back(vm, way, shown, tell, deadline_ns)
                running.cancel()
        finally:
            await vm.stop(STOP_NS)
            await vm.close()
    finally:
        broker.close()


async def _answering(vm: Vm, leave: asyncio.Event) -> None:
    """Booting is not worth waiting for once this is to leave."""
    assert vm.guest is not None
    greeted = asyncio.ensure_future(vm.guest.greeted(int(BOOT_SECONDS * SECOND)))
    leaving = asyncio.ensure_future(leave.wait())
    done, left = await asyncio.wait({greeted, leaving}, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    if greeted in done:
        greeted.result()


async def _attach(
    vm: Vm, tagged: Tagged, way_name: str, tell: Tell
) -> tuple[Presenter, Presentation]:
    way, choice = pick(all_presenters(), Request(tagged), await vm.facts(), way_name)
    shown = await way.attach(Request(tagged), vm)
    event = {"event": "presented", "as": shown.presenter, "path": shown.guest_path}
    tell({**event, "why": choice.why})
    return way, shown


async def _run(vm: Vm, tag: str, argv: Sequence[str], tell: Tell) -> None:
    """As long as it takes: it is ended, if by nothing else, when the tag is taken back."""
    if not argv:
        return
    assert vm.guest is not None

    def said(answer: guest.Answer) -> None:
        if isinstance(answer, guest.Output):
            text = answer.data.decode(errors="replace")
            tell({"event": "output", "stream": answer.stream, "text": text})

    try:
        ended = await vm.guest.stream(guest.Exec(0, tuple(argv), tag=tag), said, None)
    except TagmemError as error:
        tell({"event": "ran", "reason": str(error)})
        return
    if isinstance(ended, guest.Exited):
        tell({"event": "ran", "code": ended.code})
    else:
        tell({"event": "ran", "reason": str(ended)})


async def _take_back(
    vm: Vm, way: Presenter, shown: Presentation, tell: Tell, deadline_ns: Nanoseconds
) -> None:
    """By asking first; whoever ended us has decided that the tag leaves, so the VM's end is the
    last rung. Raises Conflict when its QEMU still has it.
    """
    ended = await way.detach(shown, vm, deadline_ns=deadline_ns, force=True, may_stop_vm=True)
    tell({"event": "taken", "done": ended.done, "rung": ended.rung, "reason": ended.reason})
    if not ended.done:
        raise Conflict(f"tag {shown.tagged.tag} stays in VM {vm.name}: {ended.reason}")


def _tell(event: dict[str, Any]) -> None:
    """Whoever reads it is another program: one write per line."""
    os.write(1, json.dumps(event).encode() + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tagmem vm within", description=__doc__)
    parser.add_argument("tag", help="a tag that this guest has")
    parser.add_argument("--run-dir", default=RUN_DIR)
    parser.add_argument("--as", dest="way", default=AUTO, help="the presenter (%(default)s)")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initrd", default="")
    parser.add_argument("--append", default="")
    parser.add_argument("--memory", type=int, default=256, help="MiB (%(default)s)")
    parser.add_argument("--accel", default=AUTO, help="auto: kvm if it opens, else tcg")
    parser.add_argument("--cpu", default="", help="the model; else the widest that there is")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_SECONDS, help="s (%(default)s) until the VM is "
        "ended rather than asked"
    )  # fmt: skip
    parser.add_argument("argv", nargs="*", help="a command to run in it; {dax} is the tag there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python3 -m tagmem.presenter.within`; `tagmem vm within` has the same options."""
    given = _parser().parse_args(arguments)
    if given.accel == AUTO:
        given.accel = "kvm" if os.access(KVM, os.R_OK | os.W_OK) else "tcg"
    cpu = given.cpu or CPUS.get(given.accel, CPUS["tcg"])
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
                cpu=cpu,
                ports=2,
                port_bytes=2 * _power_of_two(tagged.size_bytes + 2 * MIB) + 2 * MIB,
                memory_slots=2,
                memory_max_bytes=given.memory * MIB + 2 * tagged.size_bytes,
            )
            timeout_ns = int(given.timeout * SECOND)
            asyncio.run(present(spec, tagged, given.way, given.argv, _tell, timeout_ns))
    except (TagmemError, OSError) as error:
        _tell({"event": "failed", "reason": str(error)})
        return 1
    return 0


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


if __name__ == "__main__":
    sys.exit(main())
