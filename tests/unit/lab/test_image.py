"""Which modules a guest gets, and what the cache says of what it has."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from tagmem.base.errors import InvalidInput
from tagmem.cli.main import invoke
from tagmem.lab import image, qemus


def module(tree: Path, name: str, depends: str = "", *, packed: bool = True) -> None:
    data = b"\x7fELF..license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"
    path = tree / f"{name}.ko{'.xz' if packed else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if packed else data)


def test_modules_come_with_all_that_they_depend_on(tmp_path: Path) -> None:
    module(tmp_path, "drivers/nvdimm/nd_virtio", "libnvdimm,dash-ed")
    module(tmp_path, "drivers/nvdimm/libnvdimm")
    module(tmp_path, "lib/dash_ed", "deeper", packed=False)
    module(tmp_path, "lib/deeper", "built_in")
    module(tmp_path, "drivers/gpu/drm", "deeper")
    module(tmp_path, "drivers/virtio/virtio_mem")
    names = [path.name.partition(".")[0] for path in image.choose_modules(tmp_path)]
    assert names == ["libnvdimm", "nd_virtio", "virtio_mem", "dash_ed", "deeper"]


def test_an_empty_cache_has_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAGMEM_CACHE", str(tmp_path))
    assert qemus.present("10.0") is None
    assert image.present() is None
    assert invoke(["lab", "guest", "list", "-o", "table"]) == 0
    out = capfd.readouterr().out
    assert out.count("not here") == 3
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_is_cut_off_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "qemu-10.0").mkdir()
    (tmp_path / "qemu-10.0" / "manifest.json").write_text('{"version": "1:10')
    assert qemus.present("10.0", tmp_path) is None
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "manifest.json").write_text("[]")
    assert image.present(tmp_path) is None


def test_another_qemu_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"10\.0, 11\.1"):
        qemus.present("8.2")
