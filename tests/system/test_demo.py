"""The commands that a newcomer types: `tagmem demo`, `tagmem up`, `tagmem down`, as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.system.waiting import wait_until

from tagmem.base.units import MIB
from tagmem.client.session import Client
from tagmem.demo import system
from tagmem.demo.chaos import kill, running
from tagmem.demo.layout import DAEMONS, HOSTS, Layout

ROOT = Path(__file__).parent.parent.parent
DEMO_SECONDS = 100


def tagmem(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, with its output."""
    return subprocess.run(
        [sys.executable, "-m", "tagmem", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        env={**os.environ, **environment},
    )


@contextmanager
def a_system(state: Path, *options: str) -> Iterator[Layout]:
    """`tagmem up`, and afterwards `tagmem down`, whatever the test did."""
    layout = Layout.of(state)
    try:
        ended = tagmem("up", "--state-dir", state, *options)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield layout
    finally:
        tagmem("down", "--state-dir", state)
        system.stop(layout)
        system.remove_volatile(layout)


def assert_nothing_left(layout: Layout) -> None:
    assert not system.is_running(layout)
    assert not system.strays(layout)
    assert not layout.volatile.exists()


def pid_other_than(layout: Layout, name: str, old: int) -> bool:
    return running(layout).get(name, 0) not in (0, old)


def test_the_demo_shows_real_records_given_back_wiped_and_offered_again(tmp_path: Path) -> None:
    ended = tagmem("demo", "--state-dir", tmp_path)
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr

    loaded = re.search(r"read back\s+([\d,]+) of \1 equal", told)
    assert loaded, told
    assert int(loaded[1].replace(",", "")) >= 200_000
    assert f"{loaded[1]} of {loaded[1]} found in the tag's extents" in told

    # The records' own addresses lie inside the extents that were accepted.
    spans = re.findall(r"accepted\s+DPA (0x[0-9a-f]+) to (0x[0-9a-f]+)", told)
    addresses = re.findall(r"DPA (0x[0-9a-f]+) \(pool byte", told)
    assert spans
    assert addresses
    for address in addresses:
        assert any(int(a, 16) <= int(address, 16) < int(b, 16) for a, b in spans)

    # The second host was offered the very same bytes of the pool.
    offered, again = re.findall(r"extent\s+(pool bytes \S+ to \S+)", told)
    assert offered == again
    assert f"{128 * MIB:,} bytes through tagmem.open, all zero" in told
    assert "no process maps the bytes or has them open" in told
    for step in ("decide", "offer", "accept", "launch", "load", "give back", "wipe", "re-offer"):
        assert re.search(rf"^ ?\d {step} +\d+\.\d\d\d  \S", told, re.MULTILINE), step
    assert "\x1b" not in told, "colours in a pipe"
    assert_nothing_left(Layout.of(tmp_path))


def test_up_leaves_head_room_where_it_is_asked_for_and_never_two_kinds(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    odd = tagmem("up", "--state-dir", tmp_path, "--head-room", "3MiB")
    assert odd.returncode == 1
    assert "multiple of 2 MiB" in odd.stdout + odd.stderr
    with a_system(tmp_path, "--head-room", "2MiB"):
        tag = str(uuid.uuid4())
        words = ("capacity", "create", "--size", "4MiB", "--host", "w2", "--tag", tag)
        made = tagmem(*words, "--state-dir", tmp_path)
        assert made.returncode == 0, made.stderr
        assert (layout.bytes / tag).stat().st_size == 6 * MIB
        for size in ("0", "4MiB"):
            other = tagmem("up", "--state-dir", tmp_path, "--head-room", size)
            assert other.returncode == 1
            assert "was written with head_room 2 MiB" in other.stdout + other.stderr
        assert tagmem("up", "--state-dir", tmp_path).returncode == 0
        listed = tagmem("vm", "--state-dir", tmp_path, "list", "-o", "json")
        assert (listed.returncode, listed.stdout.strip()) == (0, "[]"), listed.stderr
    assert_nothing_left(layout)


def test_ctrl_c_ends_the_demo_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tagmem", "demo"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as demo:
        assert demo.stdout is not None
        seen = next((line for line in demo.stdout if "memcached" in line and "pid" in line), "")
        assert seen, "it never got as far as memcached"
        [state] = folder.glob("tagmem-demo-*")
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        assert demo.wait(DEMO_SECONDS) == 130, rest
    assert not list(folder.iterdir())
    assert_nothing_left(Layout.of(state))


def test_a_reader_that_goes_away_ends_the_demo_in_order(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tagmem", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        assert demo.stdout.readline()
        demo.stdout.close()
        assert demo.stderr.read() == ""
        assert demo.wait(DEMO_SECONDS) == 130
    assert not list(tmp_path.iterdir())


def test_up_runs_until_down_and_twice_is_fine(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with a_system(state) as layout:
        pids = running(layout)
        assert set(pids) == set(DAEMONS)
        again = tagmem("up", "--state-dir", state)
        assert again.returncode == 0, again.stdout
        assert "running already" in again.stdout
        assert running(layout) == pids

        with Client(system.url(layout)) as client:
            assert client.health().hosts_connected == len(HOSTS)
            regions = client.appliance("a0").regions
            assert len(regions) == 4
            assert [region.sharable for region in regions] == [False, True, True, True]

        ended = tagmem("down", "--state-dir", state)
        assert ended.returncode == 0, ended.stdout
        assert_nothing_left(layout)
        assert layout.config("w1").exists(), "the state stays"

        # Hand edits live.
        edited = layout.config("orchestrator").read_text() + "# edited by hand\n"
        layout.config("orchestrator").write_text(edited)
        assert tagmem("up", "--state-dir", state).returncode == 0
        assert layout.config("orchestrator").read_text() == edited

    purged = tagmem("down", "--state-dir", state, "--purge")
    assert purged.returncode == 0, purged.stdout + purged.stderr
    assert not state.exists()


def test_down_gives_back_what_is_held(tmp_path: Path) -> None:
    with a_system(tmp_path) as layout:
        environment = {"TAGMEM_STATE_DIR": str(tmp_path)}
        created = tagmem("capacity", "create", "--size", "4M", "--host", "w1", **environment)
        assert created.returncode == 0, created.stdout + created.stderr
        ended = tagmem("down", "--state-dir", tmp_path)
        assert ended.returncode == 0, ended.stdout
        assert "1 of 1 capacities" in ended.stdout
        assert_nothing_left(layout)

        assert tagmem("up", "--state-dir", tmp_path).returncode == 0
        with Client(system.url(layout)) as client:
            assert not list(client.capacities())
            assert all(r.free_bytes == r.size_bytes for r in client.appliance("a0").regions)


def test_a_daemon_that_dies_is_started_again(tmp_path: Path) -> None:
    with a_system(tmp_path) as layout:
        for name in DAEMONS:
            before = running(layout)[name]
            assert kill(layout, name)
            wait_until(partial(pid_other_than, layout, name, before), f"{name} is started again")
        system.wait_ready(layout)
        assert tagmem("up", "--state-dir", tmp_path).returncode == 0


def test_a_killed_supervisor_loses_nothing(tmp_path: Path) -> None:
    with a_system(tmp_path) as layout:
        environment = {"TAGMEM_STATE_DIR": str(tmp_path)}
        tag = str(uuid.uuid4())
        create = ("capacity", "create", "--size", "4M", "--host", "w1", "--tag", tag)
        assert tagmem(*create, **environment).returncode == 0
        ran = tagmem("run", "--detach", tag, "--", "sleep", "1000", **environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        before = system.strays(layout)

        supervisor = json.loads(layout.status.read_text())["supervisor"]
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not system.is_running(layout), "the supervisor is gone")
        again = tagmem("up", "--state-dir", tmp_path)
        assert again.returncode == 0, again.stdout
        with Client(system.url(layout)) as client:
            [held] = client.capacities()
            assert held.tag == tag
            workload = held.attachments[0].workload
        assert workload is not None
        assert workload.state == "running"
        kept = {stray.pid for stray in before} & {stray.pid for stray in system.strays(layout)}
        assert workload.pid in kept, "the workload went on while the daemons were started anew"
        assert len(system.strays(layout, workloads=False)) == len(DAEMONS)


def test_the_example_script_does_what_it_says(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ended = subprocess.run(
        ["bash", str(ROOT / "examples" / "01-seven-steps" / "seven-steps.sh")],
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORT": str(port),
            "TMPDIR": str(tmp_path),
        },
    )
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr
    for line in (
        "a0 region 0, in one extent",
        "host        w1: attached, ready",
        "STORED\nVALUE motto 0 21\nmemory, lent by name.\nEND\n1\n",
        "host        w2: attached, ready",
        "all zero",
        "capacity proved",
    ):
        assert line in told, line
    assert told.count("extents     0: 0x0 64 MiB") == 2, "the same bytes, twice"
    assert not list(tmp_path.iterdir()), "its folder is still there"


def test_a_daemon_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    system.prepare(layout)
    layout.config("w1").write_text("no_such_key = 1\n")
    ended = tagmem("up", "--state-dir", tmp_path)
    assert ended.returncode == 1, ended.stdout
    assert "w1 does not stay up" in ended.stdout
    assert "no_such_key" in ended.stdout
    system.remove_volatile(layout)
    assert_nothing_left(layout)


def test_down_without_up_says_so(tmp_path: Path) -> None:
    ended = tagmem("down", "--state-dir", tmp_path / "never")
    assert ended.returncode == 0
    assert "was not running" in ended.stdout
    assert not (tmp_path / "never").exists()


def test_a_shell_that_names_the_run_directory_is_not_ours(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    named = {"TAGMEM_RUN_DIR": str(layout.run_dir("w1"))}
    marked = {**named, "TAGMEM_WORKLOAD": "one"}
    with (
        subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, env=named) as shell,
        subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, env=marked) as workload,
    ):
        wait_until(lambda: bool(system.strays(layout)), "the workload is not seen")
        assert [stray.pid for stray in system.strays(layout)] == [workload.pid]
        assert shell.poll() is None
        for process in (shell, workload):
            process.kill()
