"""`host.toml`, checked key by key: what is not known is an error, because it was meant to do
something.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from tagmem.agent.policy import Limits
from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_name
from tagmem.base.limits import DAX_ALIGN_BYTES
from tagmem.base.units import MILLISECOND, Bytes, Dpa, parse_size

_ADDRESS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.-")


class Appliance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[appliance]]`."""

    name: str
    ld: int
    socket: str = ""
    directory: str = ""
    """Where the appliance links the bytes that this host has accepted."""
    head_room: int | str = 0
    """What the appliance leaves in front of a tag's bytes in its file (its own `head_room`)."""

    def head_bytes(self) -> Bytes:
        """The head room in bytes."""
        return _size(self.head_room, "appliance.head_room")


class LimitsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[limits]`."""

    highest_address: int | str = (1 << 52) - 1
    align: int | str = DAX_ALIGN_BYTES
    devices: int = 65_536
    expect_grace_ms: int = 2_000


class VmsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[vms]`."""

    accept_migrations: bool | tuple[str, ...] = False
    """Whose agents may start a VM here and move one of theirs into it: nobody's unless said."""
    broker_death: Literal["reattach", "keep", "stop"] = "reattach"
    """When the process that serves guests' windows dies, nobody can take their bytes any more. Then
    tags that nobody in a guest holds are unplugged and plugged again (`reattach`), all stay as they
    are, told as not guaranteed (`keep`), or their VMs are stopped (`stop`).
    """
    migration_address: str = ""
    """Of this host, where QEMU listens (on a port that it chooses) for a VM from another machine;
    empty: none comes. Neither encrypted nor authenticated: an address in a network of the hosts."""


class HostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    name: str
    run: str
    state: str
    orchestrator: str
    """`http://HOST:PORT`, or `unix:PATH` for the API's Unix socket."""
    appliance: tuple[Appliance, ...] = ()
    limits: LimitsSection = LimitsSection()
    vms: VmsSection = VmsSection()
    use_cgroup: bool = True
    dax: Literal["emulated", "kernel"] = "emulated"
    """`kernel`: this machine's own driver has the appliance; `socket` of it is not used."""

    def policy(self) -> Limits:
        """The limits in the loop's units."""
        return Limits(
            highest_dpa=Dpa(_size(self.limits.highest_address, "limits.highest_address")),
            align_bytes=_size(self.limits.align, "limits.align"),
            devices_max=self.limits.devices,
            expect_grace_ns=self.limits.expect_grace_ms * MILLISECOND,
        )


def _size(value: int | str, field: str) -> int:
    return value if isinstance(value, int) else parse_size(value, field)


def parse(text: str, source: str = "host.toml") -> HostConfig:
    """Raises InvalidInput that names the key, the limit and the value."""
    try:
        config = msgspec.convert(tomllib.loads(text), HostConfig)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(source, f"TOML ({error})", text[:40]) from None
    except msgspec.ValidationError as error:
        raise InvalidInput(source, "a host configuration", str(error)) from None
    parse_name(config.name, f"{source}: name")
    seen: set[str] = set()
    for appliance in config.appliance:
        parse_name(appliance.name, f"{source}: appliance.name")
        if appliance.name in seen:
            raise InvalidInput(f"{source}: appliance.name", "given once", appliance.name)
        seen.add(appliance.name)
        if not appliance.socket and config.dax == "emulated":
            raise InvalidInput(f"{source}: appliance.socket", "a path", appliance.socket)
        if appliance.head_bytes() % DAX_ALIGN_BYTES:
            limit = f"a multiple of {DAX_ALIGN_BYTES} bytes"
            raise InvalidInput(f"{source}: appliance.head_room", limit, appliance.head_room)
        if not 0 <= appliance.ld < 0xFFFF:
            raise InvalidInput(f"{source}: appliance.ld", "0 to 65534", appliance.ld)
    if config.dax == "kernel" and len(config.appliance) > 1:
        value = len(config.appliance)
        raise InvalidInput(f"{source}: appliance", 'one where dax = "kernel"', value)
    align = config.policy().align_bytes
    if align <= 0 or align & (align - 1):
        raise InvalidInput(f"{source}: limits.align", "a power of two", align)
    if not isinstance(config.vms.accept_migrations, bool):
        for host in config.vms.accept_migrations:
            parse_name(host, f"{source}: vms.accept_migrations")
    if set(config.vms.migration_address) - _ADDRESS:
        limit, field = "an IP address or a host name", f"{source}: vms.migration_address"
        raise InvalidInput(field, limit, config.vms.migration_address)
    if config.limits.devices < 1:
        raise InvalidInput(f"{source}: limits.devices", "at least 1", config.limits.devices)
    return config


def load(path: Path) -> HostConfig:
    """Raises InvalidInput; also when the file cannot be read."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InvalidInput("config", f"a readable file ({error.strerror})", str(path)) from None
    return parse(text, path.name)
