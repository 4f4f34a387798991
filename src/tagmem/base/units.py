"""Units of the field: bytes, addresses that never mix, nanoseconds; and how people write sizes.

Sizes follow the ndctl family: `k m g t` are powers of 1024, `Ki` and `KiB` mean the same, decimal
units (`GB`) are refused with a hint because a silent factor of 1.07 is how capacity gets lost.
"""

from __future__ import annotations

import re
from typing import NewType

from tagmem.base.errors import InvalidInput

Bytes = int
Nanoseconds = int

Dpa = NewType("Dpa", int)
"""A device physical address, in one host's (LD's) view of one appliance."""
Hpa = NewType("Hpa", int)
"""A host physical address."""
Gpa = NewType("Gpa", int)
"""A guest physical address."""
MediaOffset = NewType("MediaOffset", int)
"""An offset in a pool of media, the same for every host that reaches the pool."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000

_SIZE = re.compile(r"\s*(0[xX][0-9a-fA-F]+|[0-9]+)\s*([kKmMgGtTpP]?)([iI]?[bB]?)\s*")
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}


def parse_size(text: str, field: str = "size") -> Bytes:
    """Bytes written as `4096`, `0x1000`, `4G`, `4Gi` or `4GiB`.

    Raises InvalidInput for anything else; for `4GB` the message offers `4GiB`.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidInput(field, "a size such as 4096, 64M or 4GiB", text)
    number, prefix, suffix = match.groups()
    if suffix in ("b", "B") and prefix:
        unit = prefix.upper()
        limit = f"a binary size (write {number}{unit}iB; {unit}B would mean powers of 1000)"
        raise InvalidInput(field, limit, text)
    if suffix.lower() in ("i", "ib") and not prefix:
        raise InvalidInput(field, "a size such as 4096, 64M or 4GiB", text)
    return int(number, 0 if number[:2].lower() == "0x" else 10) << _SHIFT[prefix.lower()]


def format_size(size_bytes: Bytes) -> str:
    """The shortest exact binary unit, as `2 MiB`, or with two decimals where none is exact."""
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= unit:
            whole, rest = divmod(size_bytes, unit)
            return f"{whole} {name}" if rest == 0 else f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} B"


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-dividend // divisor)


def align_up(value: int, alignment: int) -> int:
    """The next multiple of `alignment` that is not below `value`."""
    return ceil_div(value, alignment) * alignment


def is_power_of_two(value: int) -> bool:
    """Whether exactly one bit is set."""
    return value > 0 and value & (value - 1) == 0
