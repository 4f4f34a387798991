"""`tagmem shared` on a host that has the tag: what it lists, and what it says is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.unit.client.tags import TAG, surface

from tagmem import shared
from tagmem.cli.main import invoke


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    surface(tmp_path)
    return tmp_path


def test_objects_are_listed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with shared.create(TAG, run_dir=run_dir) as writer:
        writer.put("motto", b"lent by name")
        writer.put("numbers", np.arange(1000))
    arguments = ["shared", "list", TAG, "--run-dir", str(run_dir)]
    assert invoke([*arguments, "-o", "wide"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["NAME", "KIND", "SIZE", "OFFSET", "CRC-32"]
    assert out[1].split()[:4] == ["motto", "bytes", "12", "B"]
    assert out[2].split()[:2] == ["numbers", "array"]
    assert invoke(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["generation"], told["coherence"]) == (1, "software-coherent")
    assert [entry["name"] for entry in told["objects"]] == ["motto", "numbers"]


def test_memory_without_a_catalogue_is_not_found(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["shared", "list", TAG, "--run-dir", str(run_dir)]) == 3
    assert "there is no catalogue" in capsys.readouterr().err


def test_famfs_is_not_promised_to_an_emulated_tag(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shared", "famfs", TAG, "--run-dir", str(run_dir)]
    assert invoke([*arguments, "-o", "table"]) == 0
    out = capsys.readouterr().out
    assert "emulated appliance's tag is a file" in out
    assert "daxctl reconfigure-device --mode=famfs" in out
    assert invoke([*arguments, "--prepare"]) == 1
    assert "cannot have" in capsys.readouterr().err
