"""Cache-line instructions: which one is chosen, which lines are covered, what never reaches C."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.shared.lines import (
    CpuLines,
    Instructions,
    NoLines,
    Way,
    choose,
    cpu_lines,
    instructions,
)

ROOT = Path(__file__).parents[3]
X86 = Way.CLFLUSH | Way.CLFLUSHOPT | Way.CLWB


def test_the_processor_says_what_it_has() -> None:
    here = instructions()
    assert here.ways
    assert here.write_back_way & here.ways
    assert here.invalidate_way & here.ways
    assert here.line_bytes >= 16


@pytest.mark.parametrize(
    ("ways", "write_back", "invalidate"),
    [
        (X86, Way.CLWB, Way.CLFLUSHOPT),
        (Way.CLFLUSH | Way.CLFLUSHOPT, Way.CLFLUSHOPT, Way.CLFLUSHOPT),
        (Way.CLFLUSH, Way.CLFLUSH, Way.CLFLUSH),
        (Way.ARM_DC, Way.ARM_DC, Way.ARM_DC),
    ],
)
def test_the_best_instruction_is_taken(ways: Way, write_back: Way, invalidate: Way) -> None:
    assert choose(ways, (Way.CLWB, Way.CLFLUSHOPT, Way.CLFLUSH, Way.ARM_DC)) is write_back
    assert choose(ways, (Way.CLFLUSHOPT, Way.CLFLUSH, Way.ARM_DC)) is invalidate


def test_a_processor_without_any_is_refused() -> None:
    with pytest.raises(Unsupported, match="CLWB, CLFLUSH"):
        choose(Way(0), (Way.CLWB, Way.CLFLUSH))


@given(st.integers(0, 4096), st.integers(0, 4096))
def test_exactly_the_covered_lines_are_gone_over(at: int, length: int) -> None:
    here = instructions()
    buffer = bytearray(12288)
    lines = cpu_lines(buffer)
    address = lines._address + at
    line = here.line_bytes
    covered = len(range(address // line, -(-(address + length) // line))) if length else 0
    assert here.write_back(address, length) == covered
    assert here.invalidate(address, length) == covered
    lines.release()


def test_every_instruction_that_is_here_keeps_the_bytes() -> None:
    here = instructions()
    for way in here.ways:
        with mmap.mmap(-1, 8192) as mapping:
            lines = CpuLines(mapping, here)
            mapping[100:5000] = b"x" * 4900
            here.write_back(lines._address + 100, 4900, way)
            here.fence()
            if way is not Way.CLWB:
                here.invalidate(lines._address, 8192, way)
            assert mapping[99:5001] == b"\0" + b"x" * 4900 + b"\0"
            lines.release()


def test_an_instruction_that_is_not_here_is_refused_before_it_runs() -> None:
    here = instructions()
    (foreign, *_) = [way for way in Way if not way & here.ways]
    for way in (foreign, Way(0x40), here.write_back_way | foreign):
        with pytest.raises(Unsupported):
            here.write_back(0, 64, way)
        with pytest.raises(Unsupported):
            here.invalidate(0, 64, way)


def test_write_back_alone_is_no_invalidation() -> None:
    with pytest.raises(Unsupported):
        instructions().invalidate(0, 64, Way.CLWB)


def test_read_only_mappings_can_be_refreshed(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"abcd" * 1024)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as mapping,
    ):
        lines = cpu_lines(mapping)
        lines.invalidate(0, 4096)
        lines.write_back(1, 1)
        lines.fence()
        assert mapping[:4] == b"abcd"
        lines.release()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 65), (65, 0), (1 << 70, 1)])
def test_bad_ranges_never_reach_an_instruction(offset: int, length: int) -> None:
    lines = cpu_lines(bytearray(64))
    for operation in (lines.write_back, lines.invalidate):
        with pytest.raises(InvalidInput):
            operation(offset, length)


def test_released_lines_have_no_range_left() -> None:
    buffer = bytearray(64)
    lines = cpu_lines(buffer)
    lines.release()
    buffer.append(0)
    with pytest.raises(InvalidInput):
        lines.write_back(0, 1)


def test_without_the_library_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="was not built"):
        Instructions(tmp_path / "absent.so")
    nothing = NoLines()
    assert not nothing.effective
    assert cpu_lines(bytearray(1)).effective


@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_has_the_library_where_there_is_a_compiler(tmp_path: Path, compiler: bool) -> None:
    project = tmp_path / "project"
    package = project / "src" / "tagmem"
    (package / "shared").mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copy(ROOT / "src/tagmem/__init__.py", package)
    shutil.copy(ROOT / "src/tagmem/shared/lines.c", package / "shared")
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin" if compiler else str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (wheel,) = (project / "dist").glob("*.whl")
    built = "tagmem/shared/liblines.so" in zipfile.ZipFile(wheel).namelist()
    assert built is compiler
    assert ("py3-none-linux" in wheel.name) is compiler
    assert ("without its C libraries" in done.stderr + done.stdout) is not compiler
