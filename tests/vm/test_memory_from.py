"""`tagmem vm start --memory-from`: the VM as the application, whose RAM lies in the appliance.

One system and one guest for most of it: what the guest sees, where its bytes are, what is refused,
an agent that is killed, and at last the release, which is the guest's own shutdown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.waiting import wait_until
from tests.vm.test_host_vms import TAGMEM, System

from tagmem.demo.layout import Layout

MIB = 1 << 20
SIZE = 192 * MIB
NODE = "/sys/devices/system/node/node1"
PATTERN = b"this guest's memory is lent. "
PRESENT = """
zones = open("/proc/zoneinfo").read().split("Node ")
words = [zone.split() for zone in zones if zone.startswith("1,")]
print(sum(int(zone[zone.index("present") + 1]) for zone in words))
"""
# Pages of a process that are bound to the node (mbind, 237 on x86-64).
FILL = """
import ctypes, mmap, sys, time, os
libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 32 << 20)
mask = ctypes.c_ulong(2)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
size = ctypes.c_ulong(32 << 20)
bind = libc.syscall(237, ctypes.c_void_p(at), size, 2, ctypes.byref(mask), 64, 0)
assert bind == 0, ctypes.get_errno()
text = sys.argv[1].encode()
memory[:] = (text * (len(memory) // len(text) + 1))[: len(memory)]
lines = [line for line in open("/proc/self/numa_maps") if "bind:1" in line]
print(" ".join(lines), flush=True)
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("memory"))
    system.up()
    try:
        yield system
    finally:
        system.down()


@pytest.fixture(scope="module")
def tag(system: System) -> str:
    return made(system)


def made(system: System) -> str:
    words = ("capacity", "create", "--size", str(SIZE), "--host", "w1", "-o", "json")
    told = system.tagmem(*words)
    return str((told[0] if isinstance(told, list) else told)["tag"])


def start(system: System, name: str, tag: str, *words: str) -> Any:
    begin = ("vm", "start", name, "--memory", "512M", "--cpus", "2", "--memory-from", tag)
    return system.tagmem(*begin, *words, "-o", "json")


def show(system: System, tag: str) -> Any:
    return system.tagmem("capacity", "show", tag, "-o", "json")


@pytest.fixture(scope="module")
def started(system: System, tag: str) -> Any:
    return start(system, "db1", tag, "--latency-ns", "400", "--bandwidth", "16G")


def media(system: System, tag: str) -> Path:
    """The appliance's own file."""
    return Layout.of(system.state).bytes / tag


def test_a_tag_with_content_is_refused(system: System, tag: str) -> None:
    by_tag = Path(system.environment["TAGMEM_RUN_DIR"]) / "by-tag" / tag
    with by_tag.open("r+b") as dax:
        dax.seek(SIZE - 4096)
        dax.write(b"x")
    words = ("vm", "start", "db1", "--memory", "512M", "--memory-from", tag)
    assert "--overwrite" in system.tagmem(*words, code=4)
    assert system.tagmem("vm", "list", "-o", "json") == []
    with by_tag.open("r+b") as dax:
        dax.seek(SIZE - 4096)
        dax.write(b"\0")


def test_the_guest_has_a_node_with_its_figures(system: System, started: Any, tag: str) -> None:
    assert started["nodes"] == [
        {
            "node": 1,
            "tag": tag,
            "size_bytes": SIZE,
            "latency_ns": 400,
            "bandwidth_bytes": 16 << 30,
            "specific_purpose": False,
        }
    ]
    assert [(shown["tag"], shown["as"]) for shown in started["tags"]] == [(tag, "ram")]
    # The kernel's own count; the firmware keeps its tables at the top of it.
    present = int(system.run_in_guest("python3", "-c", PRESENT)) * 4096
    assert SIZE - MIB < present <= SIZE
    assert "node1" in system.run_in_guest("ls", str(Path(NODE).parent))
    figures = f"{NODE}/access0/initiators"
    assert system.run_in_guest("cat", f"{figures}/read_latency") == "400"
    assert system.run_in_guest("cat", f"{figures}/read_bandwidth") == str(16 << 10)
    assert system.run_in_guest("cat", f"{figures}/write_bandwidth") == str(16 << 10)
    local = "/sys/devices/system/node/node0/access0/initiators/read_latency"
    assert system.run_in_guest("cat", local) == "100"
    assert "node0" in system.run_in_guest("ls", figures)


def test_what_the_guest_writes_in_its_ram_is_in_the_media(
    system: System, started: Any, tag: str
) -> None:
    maps = system.run_in_guest("python3", "-c", FILL, PATTERN.decode())
    assert "N1=" in maps
    data = media(system, tag).read_bytes()
    assert data.count(PATTERN) > 10_000


def test_the_tag_is_the_vms_alone_while_it_runs(system: System, started: Any, tag: str) -> None:
    refused = system.tagmem("vm", "detach", "db1", tag, code=4)
    assert "has its RAM in tag" in refused
    assert "vm stop db1" in refused
    assert "is in VM db1 already" in system.tagmem("vm", "attach", "db1", tag, code=4)
    words = ("vm", "start", "db2", "--memory", "512M", "--memory-from", tag, "--overwrite")
    assert "is in VM db1" in system.tagmem(*words, code=4)


def test_another_tag_is_attached_beside_it(system: System, started: Any) -> None:
    other = system.capacity()
    assert system.tagmem("vm", "attach", "db1", other, "-o", "json")["as"] == "vhost-pmem"
    system.tagmem("vm", "detach", "db1", other, "-o", "json")
    system.tagmem("capacity", "release", other, "-o", "json")


def test_an_agent_that_is_killed_finds_it_again(system: System, started: Any, tag: str) -> None:
    killed = system.agent_pid()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: system.agent_pid() not in (0, killed), "a new agent")

    def found() -> Any:
        ran = subprocess.run(
            [*TAGMEM, "vm", "show", "db1", "-o", "json"],
            env=system.environment,
            capture_output=True,
            timeout=30,
        )
        return ran.returncode == 0

    wait_until(found, "the VM under the new agent")
    after = system.tagmem("vm", "show", "db1", "-o", "json")
    assert after["nodes"] == started["nodes"]
    assert after["pid"] == started["pid"]


def test_a_release_has_the_guest_shut_down_and_its_bytes_are_wiped(
    system: System, started: Any, tag: str
) -> None:
    path = media(system, tag)
    console = Path(started["qmp"]).parent / "console.log"
    assert PATTERN in path.read_bytes()
    released = system.tagmem("capacity", "release", tag, "-o", "json")
    assert released["state"] == "released"
    assert b"Power down" in console.read_bytes(), "it was asked, and shut down by itself"
    assert not Path(f"/proc/{started['pid']}").exists()
    assert not path.exists() or PATTERN not in path.read_bytes()
    assert system.tagmem("vm", "list", "-o", "json") == []


def test_a_panicked_guest_is_named_and_then_ended(system: System) -> None:
    tag = made(system)
    pid = start(system, "db2", tag)["pid"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [*TAGMEM, "vm", "exec", "db2", "--", "sh", "-c", "echo c > /proc/sysrq-trigger"],
            env=system.environment,
            timeout=5,
        )
    words = ["capacity", "release", tag, "--up-to", "ask", "--rung-timeout", "ask=4s"]
    subprocess.run(
        [*TAGMEM, *words, "--timeout", "3s"], env=system.environment, capture_output=True
    )
    wait_until(
        lambda: "VM db2 has its RAM in it" in json.dumps(show(system, tag)), "the holder is named"
    )
    assert Path(f"/proc/{pid}").exists()
    assert media(system, tag).stat().st_size >= SIZE, "nothing is freed while QEMU lives"
    words = ["capacity", "release", tag, "--up-to", "stop", "--rung-timeout", "ask=2s"]
    assert system.tagmem(*words, "-o", "json")["state"] == "released"
    assert not Path(f"/proc/{pid}").exists()


def test_specific_purpose_memory_is_a_dax_device_of_the_guests(system: System) -> None:
    tag = made(system)
    words = ("vm", "start", "db3", "--memory", "512M", "--memory-from", tag, "--specific-purpose")
    assert "sp-mem" in system.tagmem(*words, "--qemu", "10.0", code=None)
    start(system, "db3", tag, "--specific-purpose")
    code = "import glob; print([open(p).read() for p in glob.glob('/sys/bus/dax/devices/*/size')])"
    assert str(SIZE) in system.run_in_guest("python3", "-c", code, vm="db3")
    system.tagmem("vm", "stop", "db3", "-o", "json")
    system.tagmem("capacity", "release", tag, "-o", "json")
