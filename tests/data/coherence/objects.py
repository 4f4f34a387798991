"""The library's own objects on two hosts: h1 puts, h2 looks until it has them all."""

import os
import sys

from tagmem import shared

NAMES = ("a", "b", "c")
TAG = os.environ["TAGMEM_TAG"]


def write() -> None:
    with shared.create(TAG) as catalogue:
        for name in NAMES:
            catalogue.put(name, name.encode() * 300)


def read() -> None:
    while True:
        try:
            catalogue = shared.open(TAG)
            break
        except (shared.NoCatalogue, shared.Initialising):
            continue
    with catalogue:
        while len(catalogue.names()) < len(NAMES):
            pass
        right = all(catalogue.get(name) == name.encode() * 300 for name in NAMES)
    sys.exit(0 if right else 3)


if os.environ["TAGMEM_HOST"] == "h1":
    write()
else:
    read()
