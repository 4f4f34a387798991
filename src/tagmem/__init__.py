"""tagmem lends memory by name: `tagmem.open(tag)` maps capacity that an appliance lent to this
host.

This file exists so that `import tagmem` is the whole of what an application writes, and stays
light: nothing of the package is imported before a name of it is asked for, so that daemons, tools
and `--help` do not pay for the client.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing itself would cost more than the rest of this file
if TYPE_CHECKING:
    from tagmem import shared as shared
    from tagmem.base.errors import TagmemError as TagmemError
    from tagmem.client import Capacity as Capacity
    from tagmem.client import OfferRefused as OfferRefused
    from tagmem.client import TagAbsent as TagAbsent
    from tagmem.client import open as open  # noqa: A004 - the name that people expect
    from tagmem.client.session import Client as Client

# What applications may use, and where it lives.
_PUBLIC: dict[str, str] = {
    "Capacity": "tagmem.client",
    "Client": "tagmem.client.session",
    "OfferRefused": "tagmem.client",
    "TagAbsent": "tagmem.client",
    "TagmemError": "tagmem.base.errors",
    "open": "tagmem.client",
}


def __getattr__(name: str) -> object:
    """The public name, imported from its module on first use and kept."""
    from importlib import import_module

    if name == "shared":
        return import_module("tagmem.shared")
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'tagmem' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "shared"])
