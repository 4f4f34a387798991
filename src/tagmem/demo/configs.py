"""The configuration files of the demo's system, as text with comments: they are there to be edited.

Everything is written out that a reader might want to change; what is left out has its default.
"""

from __future__ import annotations

import socket
import tempfile
import tomllib
from pathlib import Path

from tagmem.base.errors import Conflict, InvalidInput
from tagmem.base.units import GIB, MIB, Bytes, format_size, parse_size
from tagmem.demo.layout import APPLIANCE, HOSTS, ORCHESTRATOR, Layout

PORT = 7070
"""Where the API listens if nobody else does; systems in temporary directories, which come and go
side by side, take any port that is free.
"""


def config_texts(layout: Layout, *, tcp: bool, head_room: Bytes = 0) -> dict[Path, str]:
    """The text of each daemon's file. `tcp`: the API also listens on a port of this machine;
    `head_room`: what the appliance leaves in front of each tag's bytes. Raises InvalidInput.
    """
    if head_room % (2 * MIB) or head_room > GIB:
        raise InvalidInput("head-room", "a multiple of 2 MiB up to 1 GiB", head_room)
    listen = f'"http://127.0.0.1:{_free_port(layout)}"' if tcp else "[]"
    return {
        layout.config(APPLIANCE): _appliance(layout, head_room),
        layout.config(ORCHESTRATOR): _orchestrator(layout, listen),
    } | {layout.config(host): _host(layout, host, head_room) for host in HOSTS}


def check_head_room(layout: Layout, wanted: Bytes) -> None:
    """Raises Conflict where the files that are there say something else: the media are made so."""
    path = layout.config(APPLIANCE)
    try:
        has = parse_size(str(tomllib.loads(path.read_text(encoding="utf-8")).get("head_room", 0)))
    except (OSError, ValueError) as error:
        raise InvalidInput(path.name, "a readable TOML file", str(error)) from error
    if has != wanted:
        raise Conflict(
            f"{path} was written with head_room {format_size(has)}, not {format_size(wanted)}: "
            "take another --state-dir, or `tagmem down --purge` first"
        )


def api_url(layout: Layout) -> str:
    """Where the orchestrator's file says that it listens: the first address, else its socket.

    Raises InvalidInput when the file cannot be read.
    """
    path = layout.config(ORCHESTRATOR)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("orchestrator.toml", "a readable TOML file", str(error)) from error
    listen = given.get("listen", [])
    addresses = [listen] if isinstance(listen, str) else [str(each) for each in listen]
    if given.get("socket"):
        addresses.append(f"unix:{given['socket']}")
    if not addresses:
        raise InvalidInput("orchestrator.toml: listen", "at least one address", listen)
    return addresses[0]


def _free_port(layout: Layout) -> int:
    """A port of this machine that nobody listens on."""
    temporary = layout.state.is_relative_to(Path(tempfile.gettempdir()).resolve())
    for port in (0,) if temporary else (PORT, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise InvalidInput("listen", "a free port of 127.0.0.1", "none")


def _orchestrator(layout: Layout, listen: str) -> str:
    links = "".join(
        f"\n[hosts.{host}]\nlinks = {{ {APPLIANCE} = {ld} }}\n" for ld, host in enumerate(HOSTS)
    )
    return f"""\
# The orchestrator: who may hold what. Its database is in state_dir.
state_dir = "{layout.data(ORCHESTRATOR)}"
listen = {listen}
socket = "{layout.api_socket}"

# How long each rung of a release may take; the other rungs have their defaults.
[ladder]
ask_seconds = 10
stop_seconds = 5

# The appliance's fabric-manager port.
[appliances.{APPLIANCE}]
address = "unix:{layout.fm_socket}"

# The hosts, and the LD under which the appliance knows each of them.
{links.lstrip()}"""


def _appliance(layout: Layout, head_room: Bytes) -> str:
    hosts = "".join(
        f'''
[[host]]
name = "{host}"
socket = "{layout.port_socket(host)}"
directory = "{layout.exposed(host)}"
'''
        for host in HOSTS
    )
    return f"""\
# An emulated memory appliance: a multi-headed Dynamic Capacity Device with real bytes on tmpfs.
name = "{APPLIANCE}"
state_dir = "{layout.data(APPLIANCE)}"
media_dir = "{layout.media}"
layout = "by-tag"
fm_socket = "{layout.fm_socket}"
# Left in front of each tag's bytes, where the header goes that shows a guest a DAX device with the
# tag ("2MiB"); then the bytes have no file of their own that an unmodified program could take.
head_room = {head_room}

# Region 0: a tag goes to one host.
[[region]]
size = "512MiB"
block_size = "2MiB"
sanitise_on_release = true

# Region 1: a tag may be shared between hosts, whose programs keep their caches apart themselves.
[[region]]
size = "4GiB"
block_size = "2MiB"
sharable = true
sanitise_on_release = true

# Region 2: the same bytes, for those who may only read what was published.
[[region]]
of = 1
size = "4GiB"
block_size = "2MiB"
sharable = true
read_only = true
sanitise_on_release = true

# Region 3: shared, and the hardware keeps the hosts' caches coherent.
[[region]]
size = "2GiB"
block_size = "2MiB"
sharable = true
hardware_coherent = true
sanitise_on_release = true

# The hosts, LD 0 first: the port of each, and where it finds the bytes that it has accepted.
{hosts.lstrip()}"""


def _host(layout: Layout, host: str, head_room: Bytes) -> str:
    return f"""\
# The agent of host {host}: answers offers, surfaces DAX devices, runs workloads, proves release.
name = "{host}"
run = "{layout.run_dir(host)}"
state = "{layout.data(host)}"
orchestrator = "unix:{layout.api_socket}"

# Its port on the appliance, and where the appliance links the bytes that it has accepted.
[[appliance]]
name = "{APPLIANCE}"
socket = "{layout.port_socket(host)}"
ld = {HOSTS.index(host)}
directory = "{layout.exposed(host)}"
# What the appliance leaves in front of a tag's bytes: as in its own file.
head_room = {head_room}

# What it accepts; an offer outside is refused, with the reason.
[limits]
align = "2MiB"

# Which hosts may move a running VM here: true for all of them, or a list of names.
[vms]
accept_migrations = true
"""
