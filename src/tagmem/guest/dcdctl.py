"""Runs the userspace DCD driver on a device of this guest by hand: one operation per start, JSON
out. The agent does the same by itself (`cxl`).

    python3 -m tagmem.guest.dcdctl list
    python3 -m tagmem.guest.dcdctl take --dpa 0x10000000 --length 0x10000000
    python3 -m tagmem.guest.dcdctl give --dpa 0x10000000 --length 0x10000000
    python3 -m tagmem.guest.dcdctl commit --length 0x10000000

It keeps nothing: what waits is in the device's log, what is held in its extent list, and which tag
lies where the host knows. `take` accepts the offer of exactly these ranges (`--dpa` and `--length`
are given once for each) and refuses those before it, commits the decoders (host bridge first, if it
has any, then the endpoint) over the whole window, and says where in guest physical memory the first
lies now. `give` wants the ranges unused. What the device asks back is told by each operation, and
stays in its log until it is released. `commit` is for devices with static capacity alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tagmem.base.errors import InvalidInput, TagmemError
from tagmem.guest.cxl import Device, Range, asked, give, take
from tagmem.guest.system import say


def show(device: Device) -> dict[str, Any]:
    """What is held and what waits."""
    waiting = device.news()
    return {
        "regions": [region._asdict() for region in device.driver.regions],
        "held": [extent._asdict() for extent in device.driver.held.values()],
        "waiting": [{"kind": type(event).__name__, **event._asdict()} for event in waiting],
    }


def run(operation: str, device: Device, ranges: Sequence[Range], length: int) -> dict[str, Any]:
    """One operation; what to say of it. Raises OSError, TagmemError."""
    if operation == "list":
        return show(device)
    if operation == "commit":
        if length <= 0:
            raise InvalidInput("length", "the device's capacity in bytes", length)
        return {"length": length, "resource": device.commit(length)}
    news = device.news()
    told: dict[str, Any] = {"ranges": [part._asdict() for part in ranges]}
    if operation == "take":
        take(device, news, ranges)
        told["resource"] = device.commit() + ranges[0].dpa
    else:
        give(device, news, ranges)
    return told | {"asked_back": [part._asdict() for part in asked(news)]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options, do it, and write one line of JSON."""
    parser = argparse.ArgumentParser("tagmem.guest.dcdctl")
    parser.add_argument("operation", choices=["list", "take", "give", "commit"])
    parser.add_argument("--device", default="", help="PCI address; needed when there are several")
    for name in ("--dpa", "--length"):
        parser.add_argument(
            name, type=lambda text: int(text, 0), action="append", default=[], help="of each range"
        )
    parser.add_argument("--modules", default="", help="kernel modules to load afterwards: a,b")
    given = parser.parse_args(arguments)
    try:
        if given.operation in ("take", "give") and not 0 < len(given.dpa) == len(given.length):
            raise InvalidInput("dpa", "one for each length", len(given.dpa))
        ranges = [Range(*pair) for pair in zip(given.dpa, given.length, strict=False)]
        device = Device(given.device)
        try:
            answer = run(given.operation, device, ranges, sum(given.length))
        finally:
            device.close()
        if given.modules:
            subprocess.run(["modprobe", "-a", *given.modules.split(",")], check=True)
    except (TagmemError, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    sys.stdout.writelines([json.dumps(answer), "\n"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
