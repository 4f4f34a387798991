"""What the lab makes of apt's words, and what it tells apt."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tagmem.base.errors import InvalidInput
from tagmem.lab import packages
from tagmem.lab.errors import LabFailed

TARGETS = """\
MetaKey: main/binary-amd64/Packages
Codename: bookworm-security
Release: bookworm-security
Repo-URI: http://mirror.example/debian-security/

MetaKey: main/binary-amd64/Packages
Release: nodistro
Repo-URI: http://elsewhere.example/

MetaKey: main/binary-amd64/Packages
Release: bookworm-updates
Repo-URI: http://mirror.example/debian/
"""

URIS = """\
'http://mirror.example/p/libc6.deb' libc6_2.41-12_amd64.deb 28465 SHA256:00
'http://m.example/p/q_11.1.deb' qemu-system-x86_1%3a11.1.3+ds-1%7ebpo13+1_amd64.deb 10377056 MD5:0
"""


def test_the_mirror_is_the_machines_debian_archive() -> None:
    assert packages.debian_mirror(TARGETS) == "http://mirror.example/debian/"


def test_a_machine_without_a_debian_archive_is_told_so() -> None:
    with pytest.raises(LabFailed, match="no Debian archive"):
        packages.debian_mirror(TARGETS.partition("\n\nMetaKey: main/binary-amd64/Packages\nR")[0])


def test_what_apt_lists_becomes_packages_with_their_epochs() -> None:
    libc, qemu = packages.parse_uris(URIS)
    assert (libc.name, libc.version, libc.size_bytes) == ("libc6", "2.41-12", 28465)
    assert qemu.version == "1:11.1.3+ds-1~bpo13+1"
    assert qemu.file.startswith("qemu-system-x86_1%3a11.1.3")


@pytest.mark.parametrize("printed", ["", "E: nothing\n", "'u' nonsense.deb 12 SHA256:0\n"])
def test_an_answer_without_packages_is_a_failure(printed: str) -> None:
    with pytest.raises(LabFailed):
        packages.parse_uris(printed)


def test_versions_are_compared_as_their_projects_number_them() -> None:
    assert packages.upstream_version("1:10.0.2+ds-2+deb13u1~bpo12+1") == (10, 0)
    assert packages.upstream_version("11.1.3-1") > (10, 2)
    with pytest.raises(InvalidInput, match="version"):
        packages.upstream_version("none")


def test_apt_is_kept_within_its_folder_and_runs_no_hook_of_the_machine(tmp_path: Path) -> None:
    text = packages.apt_configuration(tmp_path, has_main=True)
    lines = text.splitlines()
    assert lines[0].startswith("#include")
    assert f'Dir::State "{tmp_path}/state";' in lines
    assert "#clear APT::Update::Post-Invoke;" in lines
    assert "#include" not in packages.apt_configuration(tmp_path, has_main=False)


def test_a_failed_program_is_told_with_its_last_words() -> None:
    with pytest.raises(LabFailed, match=r"(?s)ended with 3:.*no room"):
        packages.run(["sh", "-c", "echo no room >&2; exit 3"], seconds=10)
    with pytest.raises(LabFailed, match="is not on this machine"):
        packages.run(["no-such-program-at-all"], seconds=10)


def test_keys_that_are_not_installed_are_named(tmp_path: Path) -> None:
    with pytest.raises(LabFailed, match="debian-archive-keyring"):
        packages.keyring(tmp_path)
    (tmp_path / "debian-archive-keyring.pgp").touch()
    assert packages.keyring(tmp_path).name == "debian-archive-keyring.pgp"


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAGMEM_CACHE", str(tmp_path))
    assert packages.cache_dir() == tmp_path / "lab"
    monkeypatch.delenv("TAGMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert packages.cache_dir() == tmp_path / "x" / "tagmem" / "lab"


def test_a_package_is_unpacked_into_a_tree_with_merged_usr(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    (source / "DEBIAN" / "control").write_text(control)
    for name in ("lib/thing.so", "usr/bin/tool", "usr/share/doc/p/copyright"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    for folder, _, _ in os.walk(source):
        os.chmod(folder, 0o755)
    deb = tmp_path / "p_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(source), str(deb)],
        check=True, capture_output=True,
    )  # fmt: skip
    root = tmp_path / "root"
    packages.unpack([deb], root)
    assert (root / "lib").is_symlink()
    assert (root / "usr/lib/thing.so").read_text() == "lib/thing.so"
    assert (root / "usr/bin/tool").exists()
    assert not (root / "usr/share/doc").exists()
    assert packages.tree_bytes(root) >= len("lib/thing.so")
    deb.write_bytes(b"damaged")
    with pytest.raises(LabFailed, match=r"p_1_all\.deb cannot be unpacked"):
        packages.unpack([deb], root)


def test_a_cache_is_filled_by_one_process_at_a_time(tmp_path: Path) -> None:
    said: list[str] = []
    with packages.locked(tmp_path, said.append):
        assert (tmp_path / "lock").exists()
    with packages.locked(tmp_path, said.append):
        pass
    assert said == []
