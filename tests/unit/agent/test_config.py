"""host.toml: what is wrong is named."""

from __future__ import annotations

import pytest

from tagmem.agent.config import parse
from tagmem.base.errors import InvalidInput
from tagmem.base.units import MIB

GOOD = """
name = "w1"
run = "/run/tagmem"
state = "/var/lib/tagmem"
orchestrator = "unix:/run/tagmem/api.sock"
[[appliance]]
name = "a0"
socket = "/run/a0/w1.sock"
ld = 0
[limits]
align = "4MiB"
expect_grace_ms = 100
"""


def test_a_whole_file() -> None:
    config = parse(GOOD)
    assert config.appliance[0].name == "a0"
    assert config.policy().align_bytes == 4 * MIB
    assert config.policy().expect_grace_ns == 100_000_000


def test_nobody_may_move_a_vm_here_unless_said() -> None:
    assert parse(GOOD).vms.accept_migrations is False
    told = parse(GOOD + '[vms]\naccept_migrations = ["w2"]').vms
    assert told.accept_migrations == ("w2",)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ld = 0", "ld = 0\ncolour = 3", "colour"),
        ("ld = 0", "ld = -1", "0 to 65534"),
        ("ld = 0", "", "ld"),
        ('"w1"', '"W 1"', "name"),
        ('"4MiB"', '"4MB"', "4MiB"),
        ('"4MiB"', '"3MiB"', "a power of two"),
        ("[limits]", "[limits", "TOML"),
        ("expect_grace_ms = 100", "devices = 0", "at least 1"),
        ("[limits]", '[vms]\naccept_migrations = ["W 1"]\n[limits]', "vms.accept_migrations"),
        ("[limits]", '[vms]\naccept_migrations = "w1"\n[limits]', "accept_migrations"),
        ("[limits]", '[[appliance]]\nname="a0"\nsocket="x"\nld=1\n[limits]', "given once"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse(GOOD.replace(old, new))
