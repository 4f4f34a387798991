"""The library that applications import: a tag in, memory out.

Standard library only, and only the parts of it that mapping a tag needs: an application pays for
NumPy, Arrow or the API's session when it asks for them, and who only talks to the API does not pay
for mapping.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tagmem.client.locate import Device as Device
    from tagmem.client.locate import OfferRefused as OfferRefused
    from tagmem.client.locate import TagAbsent as TagAbsent
    from tagmem.client.mapping import Capacity as Capacity
    from tagmem.client.mapping import open as open  # noqa: A004 - `tagmem.open` reads best

# What there is, and where: module, name in it.
_PUBLIC: dict[str, tuple[str, str]] = {
    "Capacity": ("tagmem.client.mapping", "Capacity"),
    "Device": ("tagmem.client.locate", "Device"),
    "OfferRefused": ("tagmem.client.locate", "OfferRefused"),
    "TagAbsent": ("tagmem.client.locate", "TagAbsent"),
    "open": ("tagmem.client.mapping", "open"),
}


def __getattr__(name: str) -> object:
    """The public name, imported from its module on first use and kept."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tagmem.client' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
