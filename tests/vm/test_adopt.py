"""`tagmem vm adopt`: a QEMU that somebody else started, with no agent's channel and a QMP socket of
its own, through the command line and the host's agent.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.waiting import wait_until
from tests.vm.test_host_vms import TAGMEM, System

from tagmem.lab.boot import Lab


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(tmp_path_factory.mktemp("adopted"))
    made.up()
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def foreign(system: System) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As libvirt would: root ports and room for memory, private RAM, nothing of ours."""
    folder = Path(tempfile.mkdtemp(prefix="tm-adopt-", dir="/dev/shm"))
    qemu = Lab().qemu("11.1")
    words = [
        *qemu.argv,
        *("-name", "theirs", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg", "-S", "-m", "128M,slots=2,maxmem=4G"),
        *("-device", "pcie-root-port,id=p1,bus=pcie.0,chassis=1,slot=1"),
        *("-qmp", f"unix:{folder}/monitor,server=on,wait=off"),
    ]
    with subprocess.Popen(words, env=os.environ | dict(qemu.environment)) as process:
        try:
            wait_until(lambda: (folder / "monitor").exists(), "its monitor listens")
            yield process, f"{folder}/monitor"
        finally:
            process.kill()
            (folder / "monitor").unlink(missing_ok=True)
            folder.rmdir()


def adopt(system: System, *words: str) -> tuple[int, str, str]:
    ran = subprocess.run(
        [*TAGMEM, "vm", "adopt", *words, "-o", "json"],
        env=system.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_what_is_missing_is_said(system: System, foreign: Any) -> None:
    process, monitor = foreign
    code, _, said = adopt(system, "theirs", "--qmp", monitor)
    assert code == 0, said
    for words in ("RAM is not shared", "no root port with pref64-reserve", "no guest agent"):
        assert words in said
    assert "no room for device memory" not in said
    shown = system.tagmem("vm", "show", "theirs", "-o", "json")
    assert shown["pid"] == process.pid
    assert shown["started_by_us"] is False
    assert shown["state"] == "prelaunch"
    again, _, why = adopt(system, "theirs", "--qmp", monitor)
    assert (again, "there is a VM theirs already" in why) == (4, True)


def test_what_it_cannot_do_is_refused_with_the_reason(system: System, foreign: Any) -> None:
    tag = system.capacity()
    refused = system.tagmem("vm", "attach", "theirs", tag, code=None)
    assert "vhost-pmem: VM theirs must be running, and is prelaunch" in refused
    words = ("vm", "exec", "theirs", "--", "true")
    assert "no channel to a guest agent" in system.tagmem(*words, code=4)
    moving = system.tagmem("vm", "migrate", "theirs", "--to-host", "w2", code=None)
    assert "started by somebody else" in moving
    system.tagmem("capacity", "release", tag, "-o", "json")


def test_nobody_there_is_no_vm(system: System, tmp_path: Path) -> None:
    code, _, why = adopt(system, "nobody", "--qmp", str(tmp_path / "none"))
    assert code == 3, why
    assert "nobody answers" in why


def test_one_that_its_owner_ends_is_forgotten(system: System, foreign: Any) -> None:
    process, _ = foreign
    process.kill()
    process.wait()
    wait_until(lambda: not system.tagmem("vm", "list", "-o", "json"), "it is forgotten")
