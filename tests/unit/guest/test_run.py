"""The guest's own `tagmem run`, as a process: standard library, the host's words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.guest.trees import SIZE, plug
from tests.unit.guest.world import World

from tagmem.wire import guest as w

TAG = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"


def run(run_dir: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TAGMEM_RUN_DIR": str(run_dir)}
    return subprocess.run(
        [sys.executable, "-m", "tagmem.guest", *words],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )


def test_a_command_is_started_on_the_tag_that_the_agent_has_named(world: World) -> None:
    plug(world.base, "ivshmem")
    world.ask(w.Attach(0, TAG, told=w.Told(TAG, slot="7", size_bytes=SIZE)))
    path = f"{world.roots.run}/bar-0000:03:00.0/bar-0000:03:00.0"
    script = "echo $1 $TAGMEM_SIZE; exit 3"
    ended = run(world.roots.run, "run", TAG, "--", "/bin/sh", "-c", script, "x", "{dax}:{tag}")
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout == f"{path}:{TAG} {SIZE}\n"


def test_what_cannot_be_run_has_a_shells_codes(tmp_path: Path) -> None:
    absent = run(tmp_path, "run", "--timeout", "0", TAG, "--", "true")
    assert absent.returncode == 1
    assert TAG in absent.stderr
    assert run(tmp_path, "walk").returncode == 2
