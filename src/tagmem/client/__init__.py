"""The library that applications import: a tag in, memory out.

Standard library only, and only the parts of it that mapping a tag needs: an application pays for
NumPy, Arrow or the API's session when it asks for them.
"""

from tagmem.client.locate import Device, OfferRefused, TagAbsent, find, wait_for
from tagmem.client.mapping import Capacity, open_tag

open = open_tag  # noqa: A001 - `tagmem.open` is the name that people expect

__all__ = ["Capacity", "Device", "OfferRefused", "TagAbsent", "find", "open", "wait_for"]
