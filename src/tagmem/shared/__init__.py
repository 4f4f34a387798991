"""Objects in memory that several hosts have: what makes a shared tag useful to a program.

Nothing is imported before a name is asked for, as in `tagmem` itself.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tagmem.shared.catalogue import Catalogue as Catalogue
    from tagmem.shared.catalogue import Corrupt as Corrupt
    from tagmem.shared.catalogue import Full as Full
    from tagmem.shared.catalogue import Initialising as Initialising
    from tagmem.shared.catalogue import NoCatalogue as NoCatalogue
    from tagmem.shared.catalogue import OtherVersion as OtherVersion
    from tagmem.shared.catalogue import Overtaken as Overtaken
    from tagmem.shared.catalogue import Reinitialised as Reinitialised
    from tagmem.shared.coherence import HardwareCoherent as HardwareCoherent
    from tagmem.shared.coherence import SoftwareCoherent as SoftwareCoherent
    from tagmem.shared.coherence import publish as publish
    from tagmem.shared.coherence import refresh as refresh
    from tagmem.shared.lines import NoLines as NoLines
    from tagmem.shared.lines import cpu_lines as cpu_lines
    from tagmem.shared.memory import MappedMemory as MappedMemory
    from tagmem.shared.objects import Shared as Shared
    from tagmem.shared.objects import create as create
    from tagmem.shared.objects import open as open  # noqa: A004 - goes with `tagmem.open`
    from tagmem.shared.stale import lines_of as lines_of

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
    "Shared": ("tagmem.shared.objects", "Shared"),
    "cpu_lines": ("tagmem.shared.lines", "cpu_lines"),
    "lines_of": ("tagmem.shared.stale", "lines_of"),
    "create": ("tagmem.shared.objects", "create"),
    "publish": ("tagmem.shared.coherence", "publish"),
    "refresh": ("tagmem.shared.coherence", "refresh"),
    "open": ("tagmem.shared.objects", "open"),
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
