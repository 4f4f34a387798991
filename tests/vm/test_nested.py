"""One level down: a tag in a VM is presented to a VM inside it, and leaves from the inside out.

Takes two minutes on a quiet machine, and up to ten on a busy one: the inner guest is emulated by an
emulated processor. One test, because the inner guest boots in it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.vm.world import WAYS, booted

from tagmem.base.units import MIB, SECOND
from tagmem.lab import nested
from tagmem.lab.boot import Lab
from tagmem.lab.spec import GuestSpec
from tagmem.wire import guest as wire

SIZE = 16 * MIB
BOOT_SECONDS = 600.0
PATTERN = b"written two machines down"
FROM_HERE = b"from the appliance"
APPEND = (
    "console=ttyS0 quiet audit=0 mitigations=off nokaslr no_timer_check random.trust_cpu=on "
    "lpj=10000000 tsc=reliable cryptomgr.notests init_on_alloc=0 kfence.sample_interval=0 "
    "apparmor=0 "
    "tagmem.modules=virtio_pmem,nd_pmem,device_dax,dax_pmem"
)
INNERMOST = f"""
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2]))
print(memory[4096:4096 + {len(FROM_HERE)}].decode())
memory[:{len(PATTERN)}] = {PATTERN!r}
"""


class Events:
    """What the inner host tells, line by line."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.errors = ""
        self.news = asyncio.Event()
        self._text = ""

    def said(self, answer: wire.Answer) -> None:
        if isinstance(answer, wire.Output):
            if answer.stream == 2:
                self.errors += answer.data.decode()
                return
            *lines, self._text = (self._text + answer.data.decode()).split("\n")
            self.heard += [json.loads(line) for line in lines]
            self.news.set()

    async def until(self, name: str) -> dict[str, Any]:
        while True:
            for event in self.heard:
                if event["event"] == name:
                    return event
                assert event["event"] != "failed", (event, self.errors)
            self.news.clear()
            await self.news.wait()


@pytest.mark.timeout(900)
def test_a_tag_reaches_a_vm_in_a_vm_and_leaves_from_the_inside_out(lab: Lab) -> None:
    spec = GuestSpec(name="outer", memory_bytes=1024 * MIB, root_ports=2, nested=True)
    with booted(spec) as world:
        tagged = world.make(SIZE)
        world.write(tagged, 4096, FROM_HERE)
        shown = world.attach("vhost-pmem", tagged)
        inner = ["python3", "-m", "tagmem.presenter.within", tagged.tag]
        inner += ["--qemu", f"/{nested.START}", "--append", APPEND]
        inner += ["--kernel", f"/{nested.KERNEL}", "--initrd", f"/{nested.INITRD}"]
        inner += ["--cpu", "qemu64,phys-bits=46"]
        inner += ["--memory", "320", "--", "python3", "-c", INNERMOST, "{dax}", "{size}"]
        events = Events()

        async def whole() -> None:
            channel = world.vm.guest
            assert channel is not None
            command = wire.Exec(0, tuple(inner), tag=tagged.tag)
            running = asyncio.ensure_future(channel.stream(command, events.said, None))
            ran = asyncio.ensure_future(events.until("ran"))
            async with asyncio.timeout(BOOT_SECONDS):
                await asyncio.wait({running, ran}, return_when=asyncio.FIRST_COMPLETED)
            assert not running.done(), (running.result(), events.heard, events.errors)
            assert ran.result()["code"] == 0, events.heard
            [output] = [event for event in events.heard if event["event"] == "output"]
            assert output["text"].strip() == FROM_HERE.decode()
            assert world.read(tagged, 0, len(PATTERN)) == PATTERN
            # The outer tag is taken as any is: its agent asks the holder, which is a host itself.
            ended = await WAYS["vhost-pmem"].detach(shown, world.vm, deadline_ns=120 * SECOND)
            assert (ended.done, ended.rung) == (True, "unplug"), (ended, events.heard)
            taken = await events.until("taken")
            assert taken["done"], taken
            exited = await running
            assert isinstance(exited, wire.Exited)
            assert exited.code == 0, events.errors
            assert await world.vm.holds([tagged.pieces[0].path]) == ()

        world.run(whole())
        world.shown.clear()
