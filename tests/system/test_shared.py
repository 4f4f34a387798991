"""Objects in shared memory between real processes, each a host with a run directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.system.waiting import wait_until
from tests.unit.client.tags import MIB, TAG, surface

from tagmem import shared
from tagmem.base.errors import Conflict

ROOT = Path(__file__).parent.parent.parent
SECONDS = 100

WRITER = """
import sys, numpy as np
from tagmem import shared
tag, count = sys.argv[1], int(sys.argv[2])
with shared.create(tag, replace=True) as catalogue:
    for number in range(count):
        catalogue.put(f"object {number}", np.full(1000 + number, number))
        print(number, flush=True)
"""

READER = """
import sys
from tagmem import shared
tag, count = sys.argv[1], int(sys.argv[2])
catalogue = shared.open(tag)
sum_of_all = 0
seen = 0
while seen < count:
    for name in catalogue.refresh() if seen else catalogue.names():
        array = catalogue.get(name)
        number = int(name.split()[1])
        assert number == seen and array.shape == (1000 + number,) and (array == number).all()
        sum_of_all += int(array.sum())
        seen += 1
print(sum_of_all)
"""


def host(folder: Path, media: Path, *, read_only: bool) -> Path:
    """A run directory whose device is the same memory as another host's."""
    mine = surface(folder, media.stat().st_size, read_only=read_only)
    mine.unlink()
    mine.hardlink_to(media)
    return folder


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Path, Path]:
    """Run directories of a host that may write, and of one that may read."""
    media = surface(tmp_path / "w1", 8 * MIB)
    return tmp_path / "w1", host(tmp_path / "w2", media, read_only=True)


def python(run_dir: Path, script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TAGMEM_RUN_DIR": str(run_dir)},
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_readers_follow_a_writer_that_goes_on_writing(hosts: tuple[Path, Path]) -> None:
    count = 200
    writer = python(hosts[0], WRITER, TAG, count)
    assert line_of(writer) == "0\n"
    readers = [python(hosts[1], READER, TAG, count) for _ in range(2)]
    told, errors = writer.communicate(timeout=SECONDS)
    assert writer.returncode == 0, errors
    assert told.splitlines()[-1] == str(count - 1)
    expected = sum(number * (1000 + number) for number in range(count))
    for reader in readers:
        told, errors = reader.communicate(timeout=SECONDS)
        assert (reader.returncode, told) == (0, f"{expected}\n"), errors


def test_a_writer_that_is_killed_leaves_whole_objects_and_can_be_taken_over(
    hosts: tuple[Path, Path],
) -> None:
    writer = python(hosts[0], WRITER, TAG, 100_000)
    for _ in range(3):
        assert line_of(writer)
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=SECONDS)
    with shared.open(TAG, run_dir=hosts[1]) as reader:
        names = reader.names()
        assert len(names) >= 3
        for number, name in enumerate(names):
            assert (reader.get(name) == number).all()
        with pytest.raises(Conflict, match="take_over"):
            shared.open(TAG, run_dir=hosts[0], writable=True)
        with shared.open(TAG, run_dir=hosts[0], writable=True, take_over=True) as heir:
            heir.put("after", np.arange(3))
        assert reader.get("after").tolist() == [0, 1, 2]


def test_readers_notice_a_writer_that_began_anew(hosts: tuple[Path, Path]) -> None:
    first = python(hosts[0], WRITER, TAG, 3)
    first.communicate(timeout=SECONDS)
    with shared.open(TAG, run_dir=hosts[1]) as reader:
        assert len(reader) == 3
        again = python(hosts[0], WRITER, TAG, 1)
        again.communicate(timeout=SECONDS)
        with pytest.raises(shared.Reinitialised):
            reader.get("object 0")
    with shared.open(TAG, run_dir=hosts[1]) as reader:
        assert (reader.generation, reader.names()) == (2, ("object 0",))


def test_a_table_of_one_host_is_queried_on_another_where_it_lies(tmp_path: Path) -> None:
    """The example, on a running system: an orchestrator, an appliance and two hosts."""
    script = ROOT / "examples" / "02-one-table-two-hosts" / "one-table.sh"
    ended = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "TMPDIR": str(tmp_path),
        },
    )
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr
    for line in (
        "sharing     software-coherent",
        "wrote 200000 orders",
        "found 200000 orders; 3 of 3 buffers are in the tag",
        "Arrow allocated 0 bytes to read them",
        "ada       50000   6225000.00",
    ):
        assert line in told, line
    wait_until(lambda: not list(tmp_path.iterdir()), "its folder is still there")
