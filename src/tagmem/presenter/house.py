"""What a migration may do with the VMs of its host, so that both halves of it are written without
the rest of the hypervisor, and tested with a house that has no QEMU.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tagmem.base.errors import Unsupported
from tagmem.base.units import Nanoseconds
from tagmem.presenter.contract import Detached, Machine, Presentation, Presenter, Tagged, Value
from tagmem.presenter.migrate import Build, Later

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Site:
    """Where this host is, as another must know it to send a VM here."""

    boot_id: str
    """Two hosts' agents with the same one run on one machine, and can use its Unix sockets."""
    migration_address: str = ""
    """What QEMU listens at for VMs from other machines; empty: none can come."""


def this_site(migration_address: str = "") -> Site:
    """The machine that we run on."""
    return Site(_BOOT_ID.read_text().strip(), migration_address)


class Alone:
    """`ports.Peers` of a host that knows no other."""

    async def call(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nobody can be asked."""
        raise Unsupported(f"host {host}: this host has no way to the hypervisors of others")


class MovingVm(Machine, Protocol):
    """One VM as a migration sees it."""

    @property
    def gone(self) -> bool:
        """Whether QEMU's process has ended."""
        ...

    @property
    def name(self) -> str:
        """Of the VM, on either host."""
        ...

    async def news(self, deadline_ns: Nanoseconds) -> None:
        """Return when QEMU has told something more, or after so many nanoseconds."""


@dataclass(frozen=True)
class House:
    """The hypervisor's own functions. All that take a name raise NotFound for no such VM."""

    site: Site
    ways: Mapping[str, Presenter]
    vm: Callable[[str], MovingVm]
    """Raises OutcomeUnknown while it cannot be reached."""
    build: Callable[[str], Build]
    """Raises Unsupported for a machine that another host could not make again."""
    shown: Callable[[str], list[Presentation]]
    occupy: Callable[[str, str], Awaitable[None]]
    """Waits for what is under way in the VM; then whatever would change it is refused with this
    reason, until it is occupied with none.
    """
    attach: Callable[[str, Later], Awaitable[Presentation]]
    take: Callable[[Presentation, Nanoseconds, bool], Awaitable[Detached]]
    """(what, deadline, whether to insist)"""
    show: Callable[[Presentation], Awaitable[None]]
    launch: Callable[[str, Build, tuple[str, ...]], Awaitable[MovingVm]]
    """Start a QEMU that waits for a VM, on record before it is; with further arguments."""
    ended: Callable[[str], Awaitable[None]]
    """QEMU has ended: nothing of the VM is left on record. Idempotent."""
    vacant: Callable[[str, tuple[str, ...]], None]
    """Raises Conflict for a name that is taken here, or a tag that is in a VM."""
    tagged: Callable[[str], Tagged]
    """Raises NotFound for a tag that this host does not have."""
    keep: Callable[[str, Value | None], Awaitable[None]]
    """Durable when it returns."""
    directory: Path
    """Of the VMs' own folders."""
