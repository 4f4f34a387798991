"""The orchestrator's configuration: one TOML file, every key known, every value checked before
anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_name
from tagmem.base.units import SECOND, Nanoseconds
from tagmem.domain.ladder import DEADLINES_NS
from tagmem.orchestrator.problems import from_decoding

Seconds = Annotated[float, Meta(ge=0, le=86_400)]
SOCKET_PATH_BYTES_MAX = 107
"""Of a Unix socket's address (108 bytes with its end)."""

_HTTP = re.compile(r"(?:http://)?(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]/:]+)):([0-9]{1,5})/?")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of the file; an unknown key is an error."""


class Ladder(_Section, frozen=True):
    """How long each rung of a release may take, where the request does not say."""

    ask_seconds: Seconds = DEADLINES_NS["ask"] / SECOND
    stop_seconds: Seconds = DEADLINES_NS["stop"] / SECOND
    detach_seconds: Seconds = DEADLINES_NS["detach"] / SECOND
    restart_seconds: Seconds = DEADLINES_NS["restart"] / SECOND
    fence_seconds: Seconds = DEADLINES_NS["fence"] / SECOND
    force_seconds: Seconds = DEADLINES_NS["force"] / SECOND

    def deadlines_ns(self) -> dict[str, Nanoseconds]:
        """Those that differ from the built-in ones, by rung."""
        given = {rung: int(getattr(self, f"{rung}_seconds") * SECOND) for rung in DEADLINES_NS}
        return {rung: given[rung] for rung in given if given[rung] != DEADLINES_NS[rung]}


class ApplianceSection(_Section, frozen=True):
    """An appliance that is registered at start."""

    address: Annotated[str, Meta(min_length=1, max_length=1024)]


class HostSection(_Section, frozen=True):
    """A host that is registered at start."""

    links: dict[str, Annotated[int, Meta(ge=0, le=65_535)]]


class OrchestratorConfig(_Section, frozen=True):
    """orchestrator.toml."""

    state_dir: str = "/var/lib/tagmem/orchestrator"
    listen: str | tuple[str, ...] = "http://127.0.0.1:7070"
    """`http://HOST:PORT`, `HOST:PORT` or `unix:/PATH`; several in a list; none in an empty one."""
    socket: str = ""
    """The path of a Unix socket to listen on as well."""
    self_registration: bool = True
    """Whether an agent's Hello may register its host."""
    ladder: Ladder = Ladder()
    appliances: dict[str, ApplianceSection] = {}
    hosts: dict[str, HostSection] = {}

    def endpoints(self) -> tuple[TcpEndpoint | UnixEndpoint, ...]:
        """Where to listen. Raises InvalidInput for what is no address."""
        texts = (self.listen,) if isinstance(self.listen, str) else self.listen
        found = [parse_endpoint(text, "listen") for text in texts]
        if self.socket:
            found.append(_unix(self.socket, "socket"))
        if not found:
            raise InvalidInput("listen", "at least one address, here or in socket", "none")
        return tuple(found)


class TcpEndpoint(msgspec.Struct, frozen=True):
    """Where to listen for TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class UnixEndpoint(msgspec.Struct, frozen=True):
    """Where to listen on a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def parse_endpoint(text: str, field: str) -> TcpEndpoint | UnixEndpoint:
    """`http://HOST:PORT`, `HOST:PORT` or `unix:/PATH`. Raises InvalidInput for anything else."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:").removeprefix("//"), field)
    match = _HTTP.fullmatch(text)
    if match is None:
        raise InvalidInput(field, "http://HOST:PORT or unix:/PATH", text)
    port = int(match.group(3))
    if port > 65_535:
        raise InvalidInput(f"{field}: port", "0 to 65535", port)
    return TcpEndpoint(match.group(1) or match.group(2), port)


def parse_address(text: str, field: str) -> str:
    """An appliance's address, `unix:/PATH` for now. Raises InvalidInput for anything else."""
    if not text.startswith("unix:") or not text.isprintable():
        raise InvalidInput(field, "unix:/PATH of a fabric-manager port", text)
    _unix(text.removeprefix("unix:"), field)
    return text


def _unix(path: str, field: str) -> UnixEndpoint:
    if not path.startswith("/"):
        raise InvalidInput(field, "an absolute path of a socket", path)
    size = len(path.encode())
    if size > SOCKET_PATH_BYTES_MAX:
        raise InvalidInput(field, f"a path of at most {SOCKET_PATH_BYTES_MAX} bytes", path)
    return UnixEndpoint(path)


def load(path: Path | None, overrides: Mapping[str, Any]) -> OrchestratorConfig:
    """The configuration in `path` (None: all built-in), with `overrides` by key.

    Raises InvalidInput, naming the key, for a file that cannot be read or a value that cannot be.
    """
    given: dict[str, Any] = {}
    if path is not None:
        import tomllib

        try:
            with path.open("rb") as file:
                given = tomllib.load(file)
        except OSError as error:
            raise InvalidInput("config", "a readable file", f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput("config", "a TOML file", f"{path}: {error}") from None
    if "listen" in overrides:
        given.pop("socket", None)
    given.update(overrides)
    try:
        config = msgspec.convert(given, OrchestratorConfig)
    except msgspec.ValidationError as error:
        reply = from_decoding(error, msgspec.json.encode(given)).reply
        field = reply.field or "config"
        raise InvalidInput(f"{path or 'options'}: {field}", reply.limit, reply.value) from None
    for name, section in config.appliances.items():
        parse_name(name, "appliances")
        parse_address(section.address, f"appliances.{name}.address")
    for name, host in config.hosts.items():
        parse_name(name, "hosts")
        for appliance in host.links:
            parse_name(appliance, f"hosts.{name}.links")
    config.endpoints()
    return config
