"""tagmem lends memory by name: `tagmem.open(tag)` maps capacity that this host was lent.

This file exists so that `import tagmem` is the whole of what an application writes, and stays
light: nothing of the package is imported before a name of it is asked for, so that daemons, tools
and `--help` do not pay for the client.
"""

from importlib import import_module

__version__ = "0.1.0"

# What applications may use, and where it lives.
_PUBLIC: dict[str, str] = {
    "open": "tagmem.client",
}


def __getattr__(name: str) -> object:
    """The public name, imported from its module on first use and kept."""
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'tagmem' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
