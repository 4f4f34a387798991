"""`tagmem vm migrate` through the whole system: an appliance, an orchestrator, two agents that
reach each other through it alone, and a real guest with an application that counts in the tag.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.waiting import wait_until
from tests.vm.hosts import COUNT
from tests.vm.test_host_vms import SIZE, System

from tagmem.demo.layout import Layout
from tagmem.lab.programs import HOLD

HEAD_BYTES = 2 << 20


@pytest.fixture(scope="module")
def own_processes() -> Iterator[tuple[str, ...]]:
    """A PID namespace, so that each of its processes can be read: while another host has a shared
    tag mapped, a release is proved by looking at all of them, and a machine may hide its first.
    """
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"]
    with subprocess.Popen(words) as outer:
        try:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            inner = wait_until(
                lambda: children.read_text().split() or None, "the namespace is there"
            )
            comm = Path(f"/proc/{inner[0]}/comm")
            wait_until(lambda: comm.read_text() == "sleep\n", "its /proc is mounted")
            yield ("nsenter", "--target", inner[0], "--pid", "--mount", "--")
        finally:
            outer.kill()


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory, own_processes: tuple[str, ...]
) -> Iterator[System]:
    """Its media leave room for a header, so that a tag can travel as `pmem`."""
    state = tmp_path_factory.mktemp("moving")
    made = System(state)
    made.within = own_processes
    made.up("--head-room", str(HEAD_BYTES))
    del made.environment["TAGMEM_RUN_DIR"]  # Who has the VM is found.
    try:
        made.tagmem("vm", "start", "db1", "--memory", "512M", "--cpus", "2", "-o", "json")
        yield made
    finally:
        made.down()


def create(system: System, share: str = "software-coherent") -> str:
    words = ("capacity", "create", "--size", str(SIZE), "--host", "w1", "--share", share)
    told = system.tagmem(*words, "-o", "json")
    return str((told[0] if isinstance(told, list) else told)["tag"])


def hosts_of(system: System, tag: str) -> dict[str, str]:
    """Where the tag is, and how it stands there."""
    shown = system.tagmem("capacity", "show", tag, "-o", "json")
    return {a["host"]: a["state"] for a in shown["attachments"] if a["state"] != "released"}


def only_on(system: System, tag: str, host: str) -> None:
    wait_until(
        lambda: hosts_of(system, tag) == {host: "attached"},
        f"only {host} has it",
    )


def vms(system: System, host: str) -> Any:
    return system.tagmem("vm", "--host", host, "list", "-o", "json")


def count(system: System, tag: str) -> int:
    with (Layout.of(system.state).bytes / tag).open("rb") as media:
        media.seek(HEAD_BYTES)
        return int.from_bytes(media.read(8), "little")


def test_a_tag_that_cannot_be_shared_is_refused_before_anything_is_done(system: System) -> None:
    tag = create(system, "none")
    system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    refused = system.tagmem("vm", "migrate", "db1", "--to-host", "w2", code=4)
    assert "created without --share" in refused
    assert f"tagmem vm detach db1 {tag}" in refused
    assert hosts_of(system, tag) == {"w1": "attached"}
    system.tagmem("vm", "detach", "db1", tag, "-o", "json")
    system.tagmem("capacity", "release", tag, "-o", "json")


def test_a_vm_whose_tag_is_held_stays_and_nothing_is_left_on_the_target(system: System) -> None:
    tag = create(system)
    shown = system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    told = system.tagmem("vm", "migrate", "db1", "--to-host", "w2", "--dry-run", "-o", "json")
    assert told["from_host"] == "w1"
    assert told["to_attach"] == [tag]
    assert [(move["tag"], move["form"]) for move in told["tags"]] == [(tag, "switch")]
    assert hosts_of(system, tag) == {"w1": "attached"}
    held = system.run_in_guest("python3", "-c", HOLD, shown["guest_path"], str(SIZE), "120")
    words = ("vm", "migrate", "db1", "--to-host", "w2", "--form", "remove-all")
    stayed = system.tagmem(*words, code=4)
    assert "VM db1 stays on this host" in stayed
    assert f"process {held}" in stayed
    assert "is being released there" in stayed
    only_on(system, tag, "w1")
    assert [vm["state"] for vm in vms(system, "w1")] == ["running"]
    assert vms(system, "w2") == []
    system.tagmem("vm", "detach", "db1", tag, "--force", "-o", "json")
    system.tagmem("capacity", "release", tag, "-o", "json")


def test_a_vm_moves_and_its_application_counts_on(system: System) -> None:
    tag = create(system)
    shown = system.tagmem("vm", "attach", "db1", tag, "--as", "pmem", "-o", "json")
    system.run_in_guest("python3", "-c", COUNT, shown["guest_path"], str(SIZE))
    wait_until(lambda: count(system, tag) > 1, "it counts")
    told = system.tagmem("vm", "migrate", "db1", "--to-host", "w2", "-o", "json")
    reached = count(system, tag)
    assert told["to_host"] == "w2"
    assert [(moved["tag"], moved["form"]) for moved in told["tags"]] == [(tag, "stays")]
    assert told["on_source"] == []
    assert vms(system, "w1") == []
    (vm,) = vms(system, "w2")
    assert (vm["name"], vm["state"]) == ("db1", "running")
    assert [(one["tag"], one["as"]) for one in vm["tags"]] == [(tag, "pmem")]
    only_on(system, tag, "w2")
    wait_until(lambda: count(system, tag) > reached, "it counts on", 60)
    system.tagmem("vm", "stop", "db1", "-o", "json")
    released = system.tagmem("capacity", "release", tag, "-o", "json")
    assert released["state"] == "released"
