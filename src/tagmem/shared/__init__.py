"""Objects in memory that several hosts have: what makes a shared tag useful to a program.

Nothing is imported before a name is asked for, as in `tagmem` itself.
"""

# What there is, and where: module, name in it.
_PUBLIC: dict[str, tuple[str, str]] = {
    "HardwareCoherent": ("tagmem.shared.coherence", "HardwareCoherent"),
    "MappedMemory": ("tagmem.shared.memory", "MappedMemory"),
    "SoftwareCoherent": ("tagmem.shared.coherence", "SoftwareCoherent"),
}


def __getattr__(name: str) -> object:
    """The public name, imported from its module on first use and kept."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tagmem.shared' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
