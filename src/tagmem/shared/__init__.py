"""Objects in memory that several hosts have: what makes a shared tag useful to a program.

Nothing is imported before a name is asked for, as in `tagmem` itself.
"""

# What there is, and where: module, name in it.
_PUBLIC: dict[str, tuple[str, str]] = {
    "Catalogue": ("tagmem.shared.catalogue", "Catalogue"),
    "Corrupt": ("tagmem.shared.catalogue", "Corrupt"),
    "Full": ("tagmem.shared.catalogue", "Full"),
    "HardwareCoherent": ("tagmem.shared.coherence", "HardwareCoherent"),
    "Initialising": ("tagmem.shared.catalogue", "Initialising"),
    "MappedMemory": ("tagmem.shared.memory", "MappedMemory"),
    "NoLines": ("tagmem.shared.lines", "NoLines"),
    "NoCatalogue": ("tagmem.shared.catalogue", "NoCatalogue"),
    "OtherVersion": ("tagmem.shared.catalogue", "OtherVersion"),
    "Overtaken": ("tagmem.shared.catalogue", "Overtaken"),
    "Reinitialised": ("tagmem.shared.catalogue", "Reinitialised"),
    "SoftwareCoherent": ("tagmem.shared.coherence", "SoftwareCoherent"),
    "cpu_lines": ("tagmem.shared.lines", "cpu_lines"),
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
