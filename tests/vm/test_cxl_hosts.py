"""Dynamic capacity the whole way of a user: an appliance with media by DPA, the orchestrator, a
host's agent, and `tagmem vm start --cxl-window`; one system and one guest, in the order of a day.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.system.waiting import wait_until
from tests.vm.test_host_vms import SIZE, TAGMEM, System

from tagmem.demo.configs import config_texts
from tagmem.demo.layout import APPLIANCE, Layout
from tagmem.wire.cdat import performance

FIGURES = ("--cxl-latency-ns", "350", "--cxl-bandwidth", "20G")
# The stock drivers, as far as they go with a device whose capacity is all dynamic.
TABLE = """
import glob, subprocess, time
subprocess.run(["modprobe", "-a", "cxl_acpi", "cxl_port", "cxl_mem", "cxl_pci"], check=True)
end = time.monotonic() + 30
while not (found := glob.glob("/sys/bus/cxl/devices/endpoint*/CDAT")):
    assert time.monotonic() < end, "the driver makes no endpoint"
    time.sleep(0.1)
print(open(found[0], "rb").read().hex())
"""
READ = "import sys, tagmem; print(bytes(tagmem.open(sys.argv[1]).view[:14]).decode())"
WRITE = "import sys, tagmem; tagmem.open(sys.argv[1]).view[:14] = b'from the guest'"


class Pooled(System):
    """Its appliance has its bytes by DPA, in one file, which is a VM's window."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.layout = Layout.of(state)
        path = self.layout.config(APPLIANCE)
        text = config_texts(self.layout, tcp=False)[path]
        path.write_text(text.replace('layout = "by-tag"', 'layout = "by-dpa"'))

    @property
    def pool(self) -> Path:
        return self.layout.bytes / "pool0"

    def place(self, tag: str) -> int:
        """Where in the pool a tag lies, as its host knows."""
        run = Path(self.environment["TAGMEM_RUN_DIR"])
        [device] = [d for d in run.glob("dax*") if (d / "uuid").read_text().strip() == tag]
        return int((device / "extents").read_text().partition(":")[2].partition(",")[0])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooled]:
    made = Pooled(tmp_path_factory.mktemp("cxl"))
    made.up()
    try:
        words = ("--memory", "512M", "--cxl-window", str(made.pool), *FIGURES)
        made.tagmem("vm", "start", "db1", *words, "-o", "json")
        yield made
    finally:
        made.down()


def test_the_stock_driver_shows_the_figures_of_the_window(system: Pooled) -> None:
    """And the guest is told of the way there, which is a node without memory."""
    table = bytes.fromhex(system.run_in_guest("python3", "-c", TABLE))
    assert table == performance([system.pool.stat().st_size], 350, 20 << 30)
    words = ("cat", "/sys/devices/system/node/node0/access0/initiators/read_latency")
    assert system.run_in_guest(*words) == "100"


@pytest.fixture(scope="module")
def tag(system: Pooled) -> str:
    return system.capacity()


@pytest.fixture(scope="module")
def shown(system: Pooled, tag: str) -> Any:
    return system.tagmem("vm", "attach", "db1", tag, "--as", "cxl", "-o", "json")


def test_the_guest_has_the_bytes_of_the_pool_and_the_pool_the_guests(
    system: Pooled, tag: str, shown: Any
) -> None:
    assert shown["as"] == "cxl"
    assert shown["guaranteed"] is False
    with system.pool.open("r+b", buffering=0) as pool:
        pool.seek(system.place(tag))
        pool.write(b"from the host\n")
        assert system.run_in_guest("python3", "-c", READ, tag) == "from the host"
        system.run_in_guest("python3", "-c", WRITE, tag)
        pool.seek(system.place(tag))
        assert pool.read(14) == b"from the guest"


def test_an_agent_that_is_killed_knows_what_lies_where(system: Pooled, tag: str) -> None:
    """The tag in the guest, and one that it has not given to a guest yet."""
    other = system.capacity()
    killed = system.agent_pid()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: system.agent_pid() not in (0, killed), "a new agent")

    def found() -> bool:
        words = [*TAGMEM, "vm", "show", "db1"]
        ran = subprocess.run(words, env=system.environment, capture_output=True, timeout=30)
        return ran.returncode == 0

    wait_until(found, "the VM under the new agent")
    assert "is in VM db1 already" in system.tagmem("vm", "attach", "db1", tag, code=4)
    there = system.tagmem("vm", "attach", "db1", other, "--as", "cxl", "-o", "json")
    assert there["guest_path"]
    system.run_in_guest("python3", "-c", WRITE, other)
    with system.pool.open("rb") as pool:
        pool.seek(system.place(other))
        assert pool.read(14) == b"from the guest"


def test_a_detach_takes_it_out_of_the_guest_and_says_what_qemu_keeps(
    system: Pooled, tag: str
) -> None:
    kept = system.tagmem("vm", "detach", "db1", tag, code=4)
    assert "QEMU still has" in kept
    assert "vm stop" in kept
    code = f"import glob; print(len(glob.glob('/run/tagmem/by-tag/{tag}')))"
    assert system.run_in_guest("python3", "-c", code) == "0"


def test_nothing_is_wiped_before_the_vm_ends(system: Pooled, tag: str) -> None:
    """Neither what a guest has, nor what it has given back and QEMU maps still."""
    words = ("-o", "json")
    [vm] = system.tagmem("vm", "list", *words)
    held = [shown["tag"] for shown in vm["tags"]]
    assert tag in held
    assert len(held) == 2
    places = {each: system.place(each) for each in held}

    def bytes_of(each: str, count: int) -> bytes:
        with system.pool.open("rb") as pool:
            pool.seek(places[each])
            return pool.read(count)

    def named(each: str) -> bool:
        return "VM db1" in json.dumps(system.tagmem("capacity", "show", each, *words))

    for each in held:
        release = ["capacity", "release", each, "--up-to", "ask", "--timeout", "3s"]
        line = [*TAGMEM, *release, "--rung-timeout", "ask=2s"]
        ran = subprocess.run(line, env=system.environment, capture_output=True, timeout=60)
        assert ran.returncode != 0
        wait_until(partial(named, each), "the holder to be named")
        assert bytes_of(each, 14) == b"from the guest"
    system.tagmem("vm", "stop", "db1", *words)

    def wiped(each: str) -> bool:
        return bytes_of(each, SIZE).count(0) == SIZE

    for each in held:  # What was asked for goes on by itself.
        wait_until(partial(wiped, each), "the bytes to be wiped")
