"""appliance.toml: every key known, every value checked, before anything starts.

name = "z1"
state_dir = "/var/lib/tagmem/z1"
media_dir = "/dev/shm/tagmem-z1"      # default: /dev/shm/tagmem/<name>
layout = "by-tag"                     # or "by-dpa"
hugetlbfs = false                     # media_dir must be (on) a hugetlbfs
head_room = 0                         # by-tag: left in front of each tag's bytes, for VMs: "2MiB"
fm_socket = "/run/tagmem/z1/fm.sock"

[[region]]                            # region 0
size = "1GiB"
block_size = "2MiB"
sharable = false
hardware_coherent = false
read_only = false
sanitise_on_release = true
# stale_caches = 42                   # software-coherent: hosts' caches lie, from this seed

[[region]]                            # region 1: a read-only window on region 0's media
of = 0
read_only = true

[[host]]                              # LD 0: `ld`, if written, is the place in the list
name = "w1"
socket = "/run/tagmem/z1/w1.sock"
directory = "/dev/shm/tagmem-z1/hosts/w1"
order = "identity"                    # or "mirrored": other addresses in another order
event_log_records = 1024
mailbox_payload = "64KiB"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_name
from tagmem.base.limits import (
    CCI_PAYLOAD_BYTES_MAX,
    DC_EVENT_LOG_RECORDS_MAX,
    HOSTS_PER_APPLIANCE_MAX,
    REGIONS_MAX,
)
from tagmem.base.units import GIB, KIB, MIB, Bytes, is_power_of_two, parse_size
from tagmem.domain.device_records import DeviceSpec, LdSpec, RegionSpec

Size = str | int
Records = Annotated[int, Meta(ge=1, le=DC_EVENT_LOG_RECORDS_MAX)]
DEFAULT_MEDIA_DIR = "/dev/shm/tagmem"  # noqa: S108 - a tmpfs; what is made in it is 0700
BLOCK_BYTES_MIN = 4 * KIB
"""A page: less cannot be wiped by taking pages away."""
HUGE_PAGE_BYTES = 2 * MIB
SOCKET_PATH_BYTES_MAX = 107
"""Of a Unix socket's address (108 bytes with its end)."""
MAILBOX_BYTES_MIN = 512
"""Holds an event record and its header (CXL r3.1 8.2.8.4.3 has 256 to 1 MiB)."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of the file; an unknown key is an error."""


class RegionSection(_Section, frozen=True):
    """One DC region of every LD."""

    size: Size = ""
    block_size: Size = ""
    sharable: bool = False
    hardware_coherent: bool = False
    read_only: bool = False
    sanitise_on_release: bool = True
    stale_caches: Annotated[int, Meta(ge=0, lt=1 << 62)] | None = None
    """A seed: each host has a view of its own, which lies. docs/coherence.md."""
    of: int | None = None
    """The region whose media this one shows; then size and block size are its own where not
    given."""


class HostSection(_Section, frozen=True):
    """One host, which is one LD behind one head."""

    name: str
    socket: str
    ld: int | None = None
    directory: str = ""
    order: Literal["identity", "mirrored"] = "identity"
    event_log_records: Records = DC_EVENT_LOG_RECORDS_MAX
    mailbox_payload: Size = CCI_PAYLOAD_BYTES_MAX


class ApplianceConfig(_Section, frozen=True):
    """appliance.toml."""

    name: str
    state_dir: str
    fm_socket: str
    region: Annotated[tuple[RegionSection, ...], Meta(min_length=1, max_length=REGIONS_MAX)]
    host: Annotated[tuple[HostSection, ...], Meta(min_length=1, max_length=HOSTS_PER_APPLIANCE_MAX)]
    media_dir: str = ""
    layout: Literal["by-tag", "by-dpa"] = "by-tag"
    hugetlbfs: bool = False
    head_room: Size = 0
    fm_event_log_records: Records = DC_EVENT_LOG_RECORDS_MAX
    extents_max: Annotated[int, Meta(ge=1, le=1 << 24)] = 262_144
    tags_max: Annotated[int, Meta(ge=1, le=1 << 20)] = 65_536

    @property
    def media_path(self) -> Path:
        """Where the bytes are."""
        return Path(self.media_dir or f"{DEFAULT_MEDIA_DIR}/{self.name}")

    @property
    def head_bytes(self) -> Bytes:
        """The head room of each tag's file."""
        return _size(self.head_room, "head_room")

    def host_directory(self, ld: int) -> str:
        """Where one host finds its tags."""
        host = self.host[ld]
        return host.directory or str(self.media_path / "hosts" / host.name)

    @property
    def host_directories(self) -> tuple[str, ...]:
        """Those of all hosts, by LD."""
        return tuple(self.host_directory(ld) for ld in range(len(self.host)))

    def payload_bytes(self, ld: int) -> Bytes:
        """The mailbox payload of one host."""
        return _size(self.host[ld].mailbox_payload, f"host[{ld}].mailbox_payload")

    def spec(self) -> DeviceSpec:
        """The device. Raises InvalidInput for what no device can be."""
        regions: list[RegionSpec] = []
        for index, section in enumerate(self.region):
            regions.append(self._region(index, section, regions))
        lds = tuple(
            LdSpec(host.name, host.order == "mirrored", host.event_log_records)
            for host in self.host
        )
        return DeviceSpec(
            tuple(regions), lds, self.extents_max, self.tags_max, self.fm_event_log_records
        )

    def _region(self, index: int, section: RegionSection, before: list[RegionSpec]) -> RegionSpec:
        field = f"region[{index}]"
        size, block, pool = section.size, section.block_size, index
        if section.of is not None:
            if not 0 <= section.of < index or before[section.of].pool != section.of:
                raise InvalidInput(f"{field}.of", "an earlier region with own media", section.of)
            pool = section.of
            size = size or before[pool].size_bytes
            block = block or before[pool].block_bytes
        size_bytes = _size(size, f"{field}.size")
        block_bytes = _size(block or 2 * MIB, f"{field}.block_size")
        low = HUGE_PAGE_BYTES if self.hugetlbfs else BLOCK_BYTES_MIN
        if not is_power_of_two(block_bytes) or not low <= block_bytes <= GIB:
            limit = f"a power of two from {low} to {GIB}"
            raise InvalidInput(f"{field}.block_size", limit, block_bytes)
        if size_bytes <= 0 or size_bytes % block_bytes or size_bytes >= 1 << 50:
            limit = f"a multiple of its block size {block_bytes}, below 1 PiB"
            raise InvalidInput(f"{field}.size", limit, size_bytes)
        if pool != index and size_bytes != before[pool].size_bytes:
            limit = f"that of region {pool} ({before[pool].size_bytes})"
            raise InvalidInput(f"{field}.size", limit, size_bytes)
        if section.stale_caches is not None and (
            not section.sharable
            or section.hardware_coherent
            or section.read_only
            or self.layout != "by-tag"
        ):
            limit = "only where sharable, software-coherent, writable, and by tag"
            raise InvalidInput(f"{field}.stale_caches", limit, section.stale_caches)
        return RegionSpec(
            pool,
            size_bytes,
            block_bytes,
            section.sharable,
            section.hardware_coherent,
            section.read_only,
            section.sanitise_on_release,
        )

    def check(self) -> None:
        """Raise InvalidInput for the first key whose value cannot be."""
        parse_name(self.name, "name")
        self.spec()
        if self.head_bytes % (2 * MIB) or self.head_bytes > GIB:
            raise InvalidInput("head_room", "a multiple of 2 MiB up to 1 GiB", self.head_room)
        if self.head_bytes and self.layout != "by-tag":
            raise InvalidInput("head_room", "0 where the layout is by-dpa", self.head_room)
        names: set[str] = set()
        sockets = {self.fm_socket}
        _socket(self.fm_socket, "fm_socket")
        _absolute(self.state_dir, "state_dir")
        if self.media_dir:
            _absolute(self.media_dir, "media_dir")
        for index, host in enumerate(self.host):
            field = f"host[{index}]"
            if parse_name(host.name, f"{field}.name") in names:
                raise InvalidInput(f"{field}.name", "a name that no other host has", host.name)
            if host.ld not in (None, index):
                raise InvalidInput(f"{field}.ld", f"its place in the list, {index}", host.ld)
            if host.socket in sockets:
                raise InvalidInput(f"{field}.socket", "a path that nobody else has", host.socket)
            _socket(host.socket, f"{field}.socket")
            if host.directory:
                _absolute(host.directory, f"{field}.directory")
            names.add(host.name)
            sockets.add(host.socket)
            payload = self.payload_bytes(index)
            if not MAILBOX_BYTES_MIN <= payload <= CCI_PAYLOAD_BYTES_MAX:
                limit = f"{MAILBOX_BYTES_MIN} to {CCI_PAYLOAD_BYTES_MAX}"
                raise InvalidInput(f"{field}.mailbox_payload", limit, payload)
        if len(set(self.host_directories)) != len(self.host):
            raise InvalidInput("host.directory", "another one for each host", "the same twice")


def _absolute(path: str, field: str) -> None:
    if not os.path.isabs(path):
        raise InvalidInput(field, "an absolute path", path)


def _socket(path: str, field: str) -> None:
    _absolute(path, field)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise InvalidInput(field, f"a path of at most {SOCKET_PATH_BYTES_MAX} bytes", path)


def _size(value: Size, field: str) -> Bytes:
    if isinstance(value, int):
        return value
    return parse_size(value, field)


def load(path: Path) -> ApplianceConfig:
    """The configuration in a file. Raises InvalidInput that names the file and the key."""
    import tomllib

    try:
        given: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidInput("config", "a readable file", f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidInput("config", "a TOML file", f"{path}: {error}") from None
    try:
        config = msgspec.convert(given, ApplianceConfig)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{path}", "an appliance's configuration", str(error)) from None
    try:
        config.check()
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error.field}", error.limit, error.value) from None
    return config
