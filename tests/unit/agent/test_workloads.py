"""Workloads are real processes here: started once, adopted by the next agent, ended whole."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tagmem.agent.workloads import Workloads, find_cgroup
from tagmem.wire.agentapi import Workload, WorkloadReport

TAG = "5be13bce-ae34-4a77-b6c3-16df975fcf1a"
STUBBORN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b"ready\\n")
signal.pause()
signal.pause()
"""


@pytest.fixture(params=["cgroup", "group"])
def workloads(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workloads]:
    cgroup = find_cgroup(f"tagmem-test-{os.getpid()}") if request.param == "cgroup" else None
    made = Workloads(tmp_path / "state", tmp_path / "run", cgroup)
    yield made
    for key in list(made._children):
        tag, name = key[:36], key[37:]
        made.stop(tag, name, "kill")
        until_ended(made, name)
    if cgroup is not None:
        cgroup.rmdir()


def run(workloads: Workloads, *command: str, name: str = "w1", **env: str) -> WorkloadReport:
    return workloads.launch(TAG, Workload(name, command, env), "/run/dax0.1/dax0.1", 4096)


def until_ended(workloads: Workloads, name: str = "w1") -> WorkloadReport:
    pidfd = workloads.watch(TAG, name)
    if pidfd is not None:
        readable, _, _ = select.select([pidfd], [], [], 10)
        os.close(pidfd)
        assert readable, "it has not ended"
    return workloads.look(TAG, name)


def ready(report: WorkloadReport) -> None:
    """Wait until the workload has written its first line."""
    while report.pid and b"\n" not in Path(report.log_path).read_bytes():
        pidfd = os.pidfd_open(report.pid)
        select.select([pidfd], [], [], 0.005)
        os.close(pidfd)


def test_placeholders_are_filled_in_and_output_is_kept(workloads: Workloads) -> None:
    script = "echo $1 $A $TAGMEM_TAG $TAGMEM_SIZE '{other}'; exit 3"
    report = run(workloads, "/bin/sh", "-c", script, "x", "{dax}:{size}:{else}", A="{tag}!")
    assert report.state == "running"
    ended = until_ended(workloads)
    assert (ended.state, ended.exit_code) == ("exited", 3)
    expected = f"/run/dax0.1/dax0.1:4096:{{else}} {TAG}! {TAG} 4096 {{other}}\n"
    assert Path(ended.log_path).read_text() == expected


def test_a_second_launch_starts_nothing(workloads: Workloads, tmp_path: Path) -> None:
    first = run(workloads, "/bin/sh", "-c", "echo once; exec sleep 100")
    ready(first)
    again = run(workloads, "/bin/sh", "-c", "echo twice")
    assert again.state == "running"
    assert again.pid == first.pid
    workloads.stop(TAG, "w1", "kill")
    assert until_ended(workloads).exit_code == 137
    later = run(workloads, "/bin/sh", "-c", "echo twice")
    assert later.state == "exited"
    assert "twice" not in Path(later.log_path).read_text()


def test_term_reaches_the_command_and_its_status_is_kept(workloads: Workloads) -> None:
    report = run(
        workloads, "/bin/sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done"
    )
    ready(report)
    workloads.stop(TAG, "w1", "term")
    assert until_ended(workloads).exit_code == 7


def test_one_that_ignores_term_is_killed_whole(workloads: Workloads) -> None:
    report = run(workloads, sys.executable, "-S", "-c", STUBBORN)
    ready(report)
    assert workloads.stop(TAG, "w1", "term").state == "running"
    workloads.stop(TAG, "w1", "kill")
    ended = until_ended(workloads)
    assert (ended.state, ended.exit_code) == ("exited", 137)


def test_the_next_agent_adopts_it(workloads: Workloads, tmp_path: Path) -> None:
    report = run(
        workloads, "/bin/sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done"
    )
    ready(report)
    children = dict(workloads._children)
    workloads._children.clear()
    successor = Workloads(tmp_path / "state", tmp_path / "run", workloads._cgroup)
    assert successor.adopt()[TAG].state == "running"
    assert successor.adopt()[TAG].pid == report.pid
    assert run(successor, "/bin/true").pid == report.pid
    successor.stop(TAG, "w1", "term")
    assert until_ended(successor).exit_code == 5
    assert [child.wait() for child in children.values()] == [0]
    assert successor.adopt()[TAG].exit_code == 5


def test_a_program_that_is_not_there(workloads: Workloads) -> None:
    report = run(workloads, "no-such-program-here")
    assert report.state == "failed"
    assert "no-such-program-here" in report.reason
    assert run(workloads, "no-such-program-here").state == "failed"


def test_stopped_before_it_was_started(workloads: Workloads) -> None:
    assert workloads.stop(TAG, "w1", "term").state == "failed"
    assert run(workloads, "/bin/true").state == "failed"
