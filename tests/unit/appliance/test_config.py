"""appliance.toml: what it may say, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagmem.appliance import config
from tagmem.base.errors import InvalidInput
from tagmem.base.units import GIB, MIB

GOOD = """\
name = "z1"
state_dir = "/s"
fm_socket = "/r/fm"
[[region]]
size = "1GiB"
[[region]]
of = 0
read_only = true
[[host]]
name = "w1"
socket = "/r/w1"
[[host]]
name = "w2"
ld = 1
socket = "/r/w2"
order = "mirrored"
mailbox_payload = "2KiB"
"""


def load(tmp_path: Path, text: str) -> config.ApplianceConfig:
    path = tmp_path / "appliance.toml"
    path.write_text(text)
    return config.load(path)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    spec = found.spec()
    assert [(r.pool, r.size_bytes, r.block_bytes) for r in spec.regions] == [
        (0, GIB, 2 * MIB),
        (0, GIB, 2 * MIB),
    ]
    assert spec.regions[1].read_only
    assert [ld.mirrored for ld in spec.lds] == [False, True]
    assert found.host_directories == ("/dev/shm/tagmem/z1/hosts/w1", "/dev/shm/tagmem/z1/hosts/w2")
    assert found.payload_bytes(1) == 2048


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "z1"', 'name = "z1"\ncolour = 1', "colour"),
        ('name = "z1"', 'name = "Z 1"', "name"),
        ('order = "mirrored"', 'order = "odd"', "order"),
        ('size = "1GiB"', 'size = "1GB"', "region[0].size"),
        ('size = "1GiB"', 'size = "3MiB"', "region[0].size"),
        ('size = "1GiB"', "size = 0", "region[0].size"),
        ('size = "1GiB"', 'size = "1GiB"\nblock_size = "3MiB"', "block_size"),
        ('size = "1GiB"', 'size = "1GiB"\nblock_size = 64', "block_size"),
        ("of = 0", "of = 1", "region[1].of"),
        ("of = 0", 'of = 0\nsize = "2GiB"', "region[1].size"),
        ("ld = 1", "ld = 7", "host[1].ld"),
        ('name = "w2"', 'name = "w1"', "host[1].name"),
        ("/r/w2", "/r/w1", "host[1].socket"),
        ("/r/w2", "w2", "host[1].socket"),
        ("/r/w2", "/" + "r" * 120, "host[1].socket"),
        ("/s", "s", "state_dir"),
        ("2KiB", "1MiB", "host[1].mailbox_payload"),
        ("[[host]]", "[host]", "host"),
        ('name = "z1"', "name = z1", "TOML"),
    ],
)
def test_what_cannot_be_is_named_with_its_file(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(InvalidInput, match=r"appliance\.toml") as found:
        load(tmp_path, GOOD.replace(old, new))
    assert said in str(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.toml"):
        config.load(tmp_path / "nowhere.toml")
