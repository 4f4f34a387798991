"""Where the demo's system keeps what: one state directory, and one volatile directory in memory.

The state directory is the user's: configuration files to edit, logs, the daemons' databases. The
volatile one is on tmpfs because media are memory, and because sockets and the links to media have
to be beside them; its short name also keeps Unix socket paths below their limit of 107 bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the tmpfs that every Linux has
APPLIANCE = "a0"
ORCHESTRATOR = "orchestrator"
HOSTS = ("w1", "w2", "w3")
DAEMONS = (APPLIANCE, ORCHESTRATOR, *HOSTS)
"""In the order in which they start; they stop in the opposite one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one system."""

    state: Path

    @classmethod
    def of(cls, state_dir: str | Path) -> Layout:
        """The layout of a state directory, given in any way that the shell allows."""
        return cls(Path(state_dir).expanduser().resolve())

    @property
    def volatile(self) -> Path:
        """What a reboot takes away: media, sockets, run directories."""
        name = hashlib.sha256(str(self.state).encode()).hexdigest()[:10]
        return SHARED_MEMORY / f"tagmem-{name}"

    @property
    def media(self) -> Path:
        """The appliance's media directory."""
        return self.volatile / "media"

    @property
    def bytes(self) -> Path:
        """Where in it the appliance keeps the bytes: one file per tag."""
        return self.media / "media"

    @property
    def witness(self) -> Path:
        """A second name that the demo gives to a tag's file, to see what becomes of its bytes."""
        return self.volatile / "witness"

    @property
    def fm_socket(self) -> Path:
        """The appliance's fabric-manager port."""
        return self.volatile / "fm.sock"

    def port_socket(self, host: str) -> Path:
        """The appliance's port of one host: that host's mailbox."""
        return self.volatile / f"{host}.sock"

    def exposed(self, host: str) -> Path:
        """Where the appliance links the tags that one host has accepted."""
        return self.volatile / "exposed" / host

    def run_dir(self, host: str) -> Path:
        """A host's run directory: its DAX devices, by number and by tag."""
        return self.volatile / "run" / host

    @property
    def api_socket(self) -> Path:
        """The orchestrator's API, where it listens on a Unix socket."""
        return self.volatile / "api.sock"

    def config(self, daemon: str) -> Path:
        """The configuration file of one daemon."""
        return self.state / ("appliance.toml" if daemon == APPLIANCE else f"{daemon}.toml")

    def data(self, daemon: str) -> Path:
        """The state directory of one daemon."""
        return self.state / daemon

    def log(self, daemon: str) -> Path:
        """What one daemon (or the supervisor) said."""
        return self.state / "log" / f"{daemon}.log"

    @property
    def url(self) -> Path:
        """The file with the API's address; the command line reads it."""
        return self.state / "url"

    @property
    def lock(self) -> Path:
        """Locked by the supervisor for as long as it lives, so that no pid need be trusted."""
        return self.state / "supervisor.lock"

    @property
    def status(self) -> Path:
        """What runs now, as the supervisor sees it."""
        return self.state / "running.json"
