"""The field-table codec, so that every wire structure is one table and nobody writes a format
string by hand.

A structure is a frozen class under a `@wire(...)` table that looks like the table of the
specification:

    @wire(
        u64(0x00, "start_dpa"),
        u64(0x08, "length_bytes"),
        raw(0x10, "tag", 16),
        u16(0x20, "sequence"),
        reserved(0x22, 6),
        size=40,
    )
    class WireExtent(WireStruct, frozen=True): ...

Offsets and size are checked when the module is imported. What the table gives: `encode`, `decode`,
`decode_prefix`, range checks at construction, and `LAYOUT.reserved_nonzero(data)`. Everything is
little-endian. Reserved bytes and bits are written zero and ignored when read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from tagmem.wire.fields import (
    BadValue,
    Bits,
    Buffer,
    DecodeError,
    LayoutError,
    Part,
    Reserved,
    VariablePart,
    WrongSize,
)

__all__ = [
    "STRUCTURES",
    "BadValue",
    "Buffer",
    "DecodeError",
    "Layout",
    "LayoutError",
    "WireStruct",
    "WrongSize",
    "wire",
]

_T = TypeVar("_T", bound="WireStruct")


class WireStruct(msgspec.Struct, frozen=True):
    """A value with a table. Construction raises BadValue for anything that could not be encoded."""

    LAYOUT: ClassVar[Layout]

    def __post_init__(self) -> None:
        self.LAYOUT.check(self)

    def encode(self) -> bytes:
        """The bytes of this value."""
        return self.LAYOUT.encode(self)

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        """The value in exactly these bytes. Raises WrongSize or BadValue."""
        value, consumed = cls.LAYOUT.decode(cls, data)
        if consumed != len(data):
            raise WrongSize(f"{cls.__name__} bytes", f"exactly {consumed}", len(data))
        return value

    @classmethod
    def decode_prefix(cls, data: Buffer) -> tuple[Self, int]:
        """The value at the start of these bytes, and how many bytes it took."""
        return cls.LAYOUT.decode(cls, data)


# -- the compiled table ----------------------------------------------------------------------------


class _Fixed:
    """A run of fixed parts, compiled to one struct format."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.items = tuple(p for p in parts if not isinstance(p, Reserved))
        self.struct = struct.Struct("<" + "".join(p.fmt for p in parts))
        # Where the raw item is the attribute no method is called for it: None, and the name.
        self.converted = tuple(None if p.raw_ok else p for p in self.items)
        self.plan = tuple((p.names[0], None) if p.raw_ok else ("", p) for p in self.items)
        # Whole integers are range-checked together, by packing them.
        whole = [p for p in self.items if p.raw_ok and not p.fmt.endswith("s")]
        self.probe = struct.Struct("<" + "".join(p.fmt for p in whole))
        self.probed = attrgetter(*[p.names[0] for p in whole]) if len(whole) > 1 else None
        self.checked = tuple(p for p in self.items if self.probed is None or p not in whole)

    def read(self, data: memoryview, at: int, out: list[Any], counts: dict[str, int]) -> None:
        for part, item in zip(self.converted, self.struct.unpack_from(data, at), strict=True):
            if part is None:
                out.append(item)
            else:
                part.read(item, out, counts)

    def write(self, value: Any, counts: Mapping[str, int]) -> bytes:
        return self.struct.pack(
            *[
                getattr(value, name) if part is None else part.write(value, counts)
                for name, part in self.plan
            ]
        )

    def check(self, value: Any) -> None:
        for part in self.checked:
            part.check(value)
        if self.probed is not None:
            try:
                self.probe.pack(*self.probed(value))
            except struct.error:
                for part in self.items:
                    part.check(value)
                raise

    def reserved_in(self, data: memoryview, at: int) -> Iterator[int]:
        for part in self.parts:
            for offset in part.reserved_in(data[at : at + part.size]):
                yield at + offset
            at += part.size


class Layout:
    """A table compiled for one class: a fixed head, variable parts, a fixed tail."""

    def __init__(
        self, cls: type[WireStruct], lines: Sequence[Part | VariablePart], size: int
    ) -> None:
        first = next((i for i, x in enumerate(lines) if isinstance(x, VariablePart)), len(lines))
        last = max((i for i, x in enumerate(lines) if isinstance(x, VariablePart)), default=-1)
        head = [x for x in lines[:first] if isinstance(x, Part)]
        tail = [x for x in lines[last + 1 :] if isinstance(x, Part)] if last >= 0 else []
        self.variable = tuple(x for x in lines[first : last + 1] if isinstance(x, VariablePart))
        if len(head) + len(self.variable) + len(tail) != len(lines):
            raise LayoutError(f"{cls.__name__}: fixed parts between variable parts")
        self.name = cls.__name__
        self.head = _Fixed(head)
        self.tail = _Fixed(tail)
        self.struct = self.head.struct
        self.size = self.head.struct.size + self.tail.struct.size
        """Bytes of the fixed parts: the whole size, or the size with every array empty."""
        self._check_offsets(lines, size)
        self.names = tuple(name for line in lines for name in line.names)
        """Attributes in the order of the table."""
        fields = cls.__struct_fields__
        if set(self.names) != set(fields) or len(self.names) != len(fields):
            raise LayoutError(f"{self.name}: table has {self.names}, class has {fields}")
        self.order = None if self.names == fields else tuple(self.names.index(f) for f in fields)
        self.counted = tuple(
            c for part in (*head, *tail) if isinstance(part, Bits) for c in part.counted
        )
        self.plain = (
            self.order is None and not self.variable and all(p.raw_ok for p in self.head.items)
        )
        """Raw struct items are the attributes, in order: no conversion at all."""
        self.getter: Callable[[Any], tuple[Any, ...]] | None = (
            attrgetter(*self.names) if self.plain and len(self.names) > 1 else None
        )

    def _check_offsets(self, lines: Sequence[Part | VariablePart], size: int) -> None:
        at = 0
        behind_variable = False
        for line in lines:
            expected = None if behind_variable else at
            if line.offset != expected:
                raise LayoutError(
                    f"{self.name}: {line.names} at {line.offset}, should be {expected}"
                )
            if isinstance(line, VariablePart):
                behind_variable = True
            else:
                at += line.size
        if self.size != size:
            raise LayoutError(f"{self.name}: parts take {self.size} bytes, declared {size}")

    def check(self, value: Any) -> None:
        """Raise BadValue for the first attribute that cannot be encoded."""
        self.head.check(value)
        if self.variable:
            for variable in self.variable:
                variable.check(value)
            self.tail.check(value)
        for name, high in self.counted:
            if len(getattr(value, name)) > high:
                raise BadValue(f"{name} length", f"at most {high}", len(getattr(value, name)))

    def encode(self, value: Any) -> bytes:
        """The bytes of `value`, which was checked when it was made."""
        if self.getter is not None:
            return self.struct.pack(*self.getter(value))
        counts = {name: len(getattr(value, name)) for name, _ in self.counted}
        data = self.head.write(value, counts)
        if self.variable:
            middle = b"".join([part.write(value) for part in self.variable])
            return data + middle + self.tail.write(value, counts)
        return data

    def decode(self, cls: type[_T], data: Buffer) -> tuple[_T, int]:
        """The value at the start of `data` and its size in bytes. Raises WrongSize or BadValue."""
        view = memoryview(data)
        if len(view) < self.size:
            raise WrongSize(f"{self.name} bytes", f"at least {self.size}", len(view))
        if self.plain:
            return cls(*self.struct.unpack_from(view)), self.size
        out: list[Any] = []
        counts: dict[str, int] = {}
        self.head.read(view, 0, out, counts)
        at = self.struct.size
        if self.variable:
            at = self._read_variable(view, at, out, counts)
        if self.order is not None:
            return cls(*[out[i] for i in self.order]), at
        return cls(*out), at

    def _read_variable(
        self, view: memoryview, at: int, out: list[Any], counts: dict[str, int]
    ) -> int:
        head = dict(zip(self.names, out, strict=False))
        for part in self.variable:
            value, at = part.read(view, at, counts, head)
            out.append(value)
        tail_size = self.tail.struct.size
        if len(view) - at < tail_size:
            raise WrongSize(f"{self.name} bytes", f"at least {at + tail_size}", len(view))
        self.tail.read(view, at, out, counts)
        return at + tail_size

    def reserved_nonzero(self, data: Buffer) -> tuple[int, ...]:
        """Offsets of reserved bytes (or bytes with reserved bits) that are not zero: a peer of
        another revision.

        Raises WrongSize or BadValue like decode.
        """
        view = memoryview(data)
        if len(view) < self.size:
            raise WrongSize(f"{self.name} bytes", f"at least {self.size}", len(view))
        found = list(self.head.reserved_in(view, 0))
        out: list[Any] = []
        counts: dict[str, int] = {}
        self.head.read(view, 0, out, counts)
        head = dict(zip(self.names, out, strict=False))
        at = self.struct.size
        for part in self.variable:
            _, end = part.read(view, at, counts, head)
            found += part.reserved_in(view, at, end)
            at = end
        found += self.tail.reserved_in(view, at)
        return tuple(found)


def wire(*lines: Part | VariablePart, size: int) -> Callable[[type[_T]], type[_T]]:
    """Give a class its table. `size` is the size of the fixed parts. Raises LayoutError at
    import.
    """

    def attach(cls: type[_T]) -> type[_T]:
        cls.LAYOUT = Layout(cls, lines, size)
        STRUCTURES.append(cls)
        return cls

    return attach


STRUCTURES: list[type[WireStruct]] = []
"""Every structure with a table, in order of declaration; a test asks each for its golden vector."""
