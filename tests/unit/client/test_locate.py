"""Finding a tag: by the run directory, by the kernel's devices, and the reasons when neither has
it.
"""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest
from tests.unit.client.tags import MIB, OTHER, TAG, kernel_device, surface

from tagmem.base.errors import InvalidInput
from tagmem.client.locate import OfferRefused, TagAbsent, find, wait_for


def absent(run_dir: Path, **where: str) -> str:
    with pytest.raises(TagAbsent) as caught:
        wait_for(TAG, timeout=0, run_dir=str(run_dir), **where)
    return str(caught.value)


def test_a_tag_is_found_by_name_with_its_attributes(tmp_path: Path) -> None:
    path = surface(tmp_path, 4 * MIB, read_only=True)
    device = wait_for(uuid.UUID(TAG), timeout=0, run_dir=str(tmp_path))
    assert (device.tag, device.path) == (TAG, str(path))
    assert (device.size_bytes, device.align, device.read_only) == (4 * MIB, 2 * MIB, True)
    assert device.pieces == ((0, 4 * MIB),)


def test_the_run_directory_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surface(tmp_path)
    monkeypatch.setenv("TAGMEM_RUN_DIR", str(tmp_path))
    assert wait_for(TAG.upper(), timeout=0).tag == TAG


def test_the_kernels_own_devices_are_looked_at_too(tmp_path: Path) -> None:
    sysfs, dev = tmp_path / "sys", tmp_path / "dev"
    kernel_device(sysfs, dev, "dax0.0", tag=OTHER, size=2 * MIB)
    path = kernel_device(sysfs, dev, "dax1.0", tag=TAG.upper(), size=4 * MIB)
    device = wait_for(TAG, timeout=0, run_dir=str(tmp_path), sysfs=str(sysfs), dev=str(dev))
    assert (device.path, device.size_bytes, device.emulated) == (str(path), 4 * MIB, False)


def test_a_kernel_device_without_its_extents_is_not_there_yet(tmp_path: Path) -> None:
    sysfs = tmp_path / "sys"
    kernel_device(sysfs, tmp_path / "dev", "dax0.0", tag=TAG, size=0)
    assert "no DAX device of the kernel has it" in absent(tmp_path, sysfs=str(sysfs))


def test_it_comes_while_it_is_waited_for(tmp_path: Path) -> None:
    timer = threading.Timer(0.01, surface, (tmp_path,))
    timer.start()
    assert wait_for(TAG, timeout=10, run_dir=str(tmp_path)).tag == TAG
    timer.join()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda run: None, "has no by-tag directory"),
        (lambda run: run.rmdir(), "does not exist"),
        (lambda run: (run / "by-tag").mkdir(), "is empty: nothing is attached"),
        (lambda run: surface(run, tag=OTHER), f"has {OTHER}, not this one"),
        (lambda run: (surface(run).parent / "size").unlink(), "attributes (size, align)"),
    ],
)
def test_why_it_did_not_come(tmp_path: Path, prepare: object, said: str) -> None:
    assert callable(prepare)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    prepare(run_dir)
    message = absent(run_dir, sysfs=str(tmp_path))
    assert TAG in message
    assert said in message
    assert "the kernel has no DAX devices" in message


def test_an_absent_tag_is_a_timeout_as_well(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not come in 0\.01 s"):
        wait_for(TAG, timeout=0.01, run_dir=str(tmp_path))


def test_a_refused_offer_ends_the_wait_with_the_agents_reason(tmp_path: Path) -> None:
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / TAG).write_text("no free slot (limit 16)\n")
    with pytest.raises(OfferRefused, match=r"no free slot \(limit 16\)"):
        wait_for(TAG, timeout=None, run_dir=str(tmp_path))


@pytest.mark.parametrize("tag", ["", "x", "00000000-0000-0000-0000-000000000000", 7])
def test_what_is_no_tag_is_refused(tmp_path: Path, tag: object) -> None:
    with pytest.raises(InvalidInput, match=r"^tag: must be "):
        wait_for(tag, timeout=0, run_dir=str(tmp_path))


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_negative_timeout_is_refused(tmp_path: Path, timeout: float) -> None:
    with pytest.raises(InvalidInput, match=r"^timeout: "):
        wait_for(TAG, timeout=timeout, run_dir=str(tmp_path))


@pytest.mark.parametrize("extents", ["[]", "{", '[{"offset": 0, "length": 1}]', '[{"at": 1}]'])
def test_extents_that_do_not_make_the_size_are_not_believed(tmp_path: Path, extents: str) -> None:
    path = surface(tmp_path, pieces=[(0, 2 * MIB)])
    (path.parent / "extents").write_text(extents)
    assert "cannot be read" in absent(tmp_path)


def test_find_looks_once(tmp_path: Path) -> None:
    from tagmem.base.ids import parse_tag

    assert find(parse_tag(TAG), str(tmp_path)) is None
