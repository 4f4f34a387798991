"""The lines that a wire structure's table is made of: what each kind of field reads, writes and
refuses.

`layout` compiles them; this module knows no structure. A line carries the offset that the
specification's table prints beside it, so that a reader can compare the two and the import can
check it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import starmap
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from tagmem.base.errors import InvalidInput

if TYPE_CHECKING:
    from tagmem.wire.layout import WireStruct

Buffer = bytes | bytearray | memoryview
FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


class DecodeError(InvalidInput, ValueError):
    """Bytes or values that the structure's table does not allow."""


class WrongSize(DecodeError):
    """Fewer or more bytes than the structure has (a CCI peer is answered Invalid Payload
    Length).
    """


class BadValue(DecodeError):
    """A field outside its range (a CCI peer is answered Invalid Input)."""


class LayoutError(Exception):
    """A table contradicts itself or its class: a mistake in this package, found at import."""


# -- parts of the fixed head: each is one item of the compiled struct format (or only padding) -----


class Part:
    """One line of a table. Subclasses say how its raw item becomes attributes and back."""

    fmt = ""
    size = 0
    names: tuple[str, ...] = ()
    raw_ok = False
    """The raw struct item is the attribute itself, so the whole table may skip `read` and
    `write`.
    """

    def __init__(self, offset: int | None) -> None:
        self.offset = offset

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        """Append the attributes made from the raw item. Raises BadValue."""

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        """The raw item for the structure `value`."""

    def check(self, value: Any) -> None:
        """Raise BadValue if an attribute of `value` cannot be encoded."""

    def reserved_in(self, data: memoryview) -> Iterator[int]:
        """Offsets inside this part of reserved bytes (or bytes with reserved bits) that are not
        zero.
        """
        return iter(())


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int):
        raise BadValue(name, "an integer", value)
    if not low <= value <= high:
        raise BadValue(name, f"{low} to {high}", value)


class _Integer(Part):
    def __init__(
        self,
        offset: int | None,
        name: str,
        width: int,
        kind: type[IntEnum] | None,
        low: int,
        high: int | None,
        scale: int,
    ) -> None:
        super().__init__(offset)
        self.names = (name,)
        self.name = name
        self.size = width
        self.fmt = FORMATS.get(width, f"{width}s")
        self.kind = kind
        self.members = {} if kind is None else _members(kind)
        self.scale = scale
        self.low = low
        whole = (1 << 8 * width) - 1
        self.high = whole if high is None else high
        self.bytes_item = width not in FORMATS
        full = low == 0 and self.high == whole
        self.raw_ok = kind is None and scale == 1 and full and not self.bytes_item

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        number = int.from_bytes(item, "little") if self.bytes_item else item
        if self.kind is not None:
            member = self.members.get(number)
            out.append(_refuse(self.name, self.kind, number) if member is None else member)
            return
        if not self.low <= number <= self.high:
            raise BadValue(self.name, self._limit(), number * self.scale)
        out.append(number * self.scale)

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        number = getattr(value, self.name) // self.scale
        return number.to_bytes(self.size, "little") if self.bytes_item else number

    def check(self, value: Any) -> None:
        number = getattr(value, self.name)
        if self.kind is not None:
            if type(number) is not self.kind:
                _refuse(self.name, self.kind, number)
            return
        if not isinstance(number, int):
            raise BadValue(self.name, "an integer", number)
        quotient, rest = divmod(number, self.scale)
        if rest or not self.low <= quotient <= self.high:
            raise BadValue(self.name, self._limit(), number)

    def _limit(self) -> str:
        if self.scale == 1:
            return f"{self.low} to {self.high}"
        return f"a multiple of {self.scale}, at most {self.high * self.scale}"


def _members(kind: type[IntEnum]) -> dict[int, IntEnum]:
    # A dictionary is some ten times as fast as calling the class.
    return {int(member): member for member in kind}


def _refuse(name: str, kind: type[IntEnum | bool], number: Any) -> NoReturn:
    if issubclass(kind, IntEnum):
        choices = ", ".join(f"{m.value} {m.name.lower()}" for m in kind)
        raise BadValue(name, f"a {kind.__name__} ({choices})", number)
    raise BadValue(name, "true or false", number)


def u8(
    offset: int | None,
    name: str,
    kind: type[IntEnum] | None = None,
    *,
    low: int = 0,
    high: int | None = None,
) -> Part:
    """An unsigned byte; `kind` makes it a member of an enumeration, `low`/`high` narrow its
    range.
    """
    return _Integer(offset, name, 1, kind, low, high, 1)


def u16(offset: int | None, name: str, kind: type[IntEnum] | None = None, *, low: int = 0) -> Part:
    """An unsigned 16-bit integer."""
    return _Integer(offset, name, 2, kind, low, None, 1)


def u24(offset: int | None, name: str) -> Part:
    """An unsigned 24-bit integer."""
    return _Integer(offset, name, 3, None, 0, None, 1)


def u32(offset: int | None, name: str) -> Part:
    """An unsigned 32-bit integer."""
    return _Integer(offset, name, 4, None, 0, None, 1)


def u64(offset: int | None, name: str, *, scale: int = 1) -> Part:
    """An unsigned 64-bit integer; with `scale` the attribute is the wire number times `scale`."""
    return _Integer(offset, name, 8, None, 0, None, scale)


class _Raw(Part):
    raw_ok = True

    def __init__(self, offset: int | None, name: str, size: int) -> None:
        super().__init__(offset)
        self.names = (name,)
        self.name = name
        self.size = size
        self.fmt = f"{size}s"

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        out.append(item)

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        return getattr(value, self.name)

    def check(self, value: Any) -> None:
        item = getattr(value, self.name)
        if type(item) is not bytes or len(item) != self.size:
            raise BadValue(self.name, f"{self.size} bytes", item)


def raw(offset: int | None, name: str, size: int) -> Part:
    """Opaque bytes, such as a tag, a UUID or a bitmap."""
    return _Raw(offset, name, size)


class Reserved(Part):
    def __init__(self, offset: int | None, size: int) -> None:
        super().__init__(offset)
        self.size = size
        self.fmt = f"{size}x"

    def reserved_in(self, data: memoryview) -> Iterator[int]:
        return (i for i in range(self.size) if data[i])


def reserved(offset: int | None, size: int) -> Part:
    """Bytes that are written zero and ignored when read."""
    return Reserved(offset, size)


class Bit:
    """A named range of bits inside a `bits` part; `counts` names the array whose length it
    holds.
    """

    def __init__(
        self, name: str, shift: int, width: int, kind: type[IntEnum | bool] | None, counts: bool
    ) -> None:
        self.name = name
        self.shift = shift
        self.mask = (1 << width) - 1
        self.kind = kind
        self.members: Mapping[int, Any] = {}
        if kind is not None:
            self.members = _members(kind) if issubclass(kind, IntEnum) else {0: False, 1: True}
        self.counts = counts


def bit(name: str, shift: int, width: int, kind: type[IntEnum] | None = None) -> Bit:
    """An integer or enumeration of `width` bits from bit `shift` up."""
    return Bit(name, shift, width, kind, False)


def flag(name: str, shift: int) -> Bit:
    """One bit, as a bool."""
    return Bit(name, shift, 1, bool, False)


def count_bits(of: str, shift: int, width: int) -> Bit:
    """The length of `of`, a variable part of the same structure; not an attribute."""
    return Bit(of, shift, width, None, True)


_KNOWN_MAX = 64


class Bits(Part):
    def __init__(self, offset: int | None, width: int, bits_: tuple[Bit, ...]) -> None:
        super().__init__(offset)
        self.size = width
        self.bytes_item = width not in FORMATS
        self.fmt = FORMATS.get(width, f"{width}s")
        self.bits = bits_
        self.names = tuple(b.name for b in bits_ if not b.counts)
        self.counted = tuple((b.name, b.mask) for b in bits_ if b.counts)
        used = 0
        for b in bits_:
            if used & (b.mask << b.shift) or (b.mask << b.shift) >> 8 * width:
                raise LayoutError(f"bits of {b.name} overlap or lie outside the field")
            used |= b.mask << b.shift
        self.used = used
        self._known: dict[Any, tuple[Any, ...]] = {}
        """Items read before and what they say; most are one of a few combinations of flags."""

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        known = self._known.get(item)
        if known is not None:
            out.extend(known)
            return
        before = len(out)
        self._read(item, out, counts)
        if not self.counted and len(self._known) < _KNOWN_MAX:
            self._known[item] = tuple(out[before:])

    def _read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        number = int.from_bytes(item, "little") if self.bytes_item else item
        for b in self.bits:
            part = number >> b.shift & b.mask
            if b.counts:
                counts[b.name] = part
            elif b.kind is None:
                out.append(part)
            else:
                member = b.members.get(part)
                out.append(_refuse(b.name, b.kind, part) if member is None else member)

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        number = 0
        for b in self.bits:
            number |= (counts[b.name] if b.counts else getattr(value, b.name)) << b.shift
        return number.to_bytes(self.size, "little") if self.bytes_item else number

    def check(self, value: Any) -> None:
        for b in self.bits:
            if b.counts:
                continue
            number = getattr(value, b.name)
            if b.kind is None:
                _check_int(b.name, number, 0, b.mask)
            elif type(number) is not b.kind:
                _refuse(b.name, b.kind, number)

    def reserved_in(self, data: memoryview) -> Iterator[int]:
        unused = int.from_bytes(data[: self.size], "little") & ~self.used
        return (i for i in range(self.size) if unused >> 8 * i & 0xFF)


def bits(offset: int | None, width: int, *members: Bit) -> Part:
    """An integer of `width` bytes divided into named bits; the bits without a name are reserved."""
    return Bits(offset, width, members)


def count(offset: int | None, width: int, of: str) -> Part:
    """An integer that holds the length of `of`, a variable part of the same structure."""
    return Bits(offset, width, (count_bits(of, 0, 8 * width),))


class _Nested(Part):
    def __init__(self, offset: int | None, name: str, kind: type[WireStruct]) -> None:
        super().__init__(offset)
        if kind.LAYOUT.variable:
            raise LayoutError(f"{name}: only structures of a fixed size nest")
        self.names = (name,)
        self.name = name
        self.kind = kind
        self.size = kind.LAYOUT.size
        self.fmt = f"{self.size}s"

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        out.append(self.kind.decode(item))

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        return getattr(value, self.name).encode()

    def check(self, value: Any) -> None:
        if not isinstance(getattr(value, self.name), self.kind):
            raise BadValue(self.name, f"a {self.kind.__name__}", getattr(value, self.name))

    def reserved_in(self, data: memoryview) -> Iterator[int]:
        return iter(self.kind.LAYOUT.reserved_nonzero(data[: self.size]))


def nested(offset: int | None, name: str, kind: type[WireStruct]) -> Part:
    """Another structure of a fixed size."""
    return _Nested(offset, name, kind)


class _Repeat(Part):
    def __init__(self, offset: int | None, name: str, width: int, times: int) -> None:
        super().__init__(offset)
        self.names = (name,)
        self.name = name
        self.times = times
        self.width = width
        self.struct = struct.Struct(f"<{times}{FORMATS[width]}")
        self.size = self.struct.size
        self.fmt = f"{self.size}s"

    def read(self, item: Any, out: list[Any], counts: dict[str, int]) -> None:
        out.append(self.struct.unpack(item))

    def write(self, value: Any, counts: Mapping[str, int]) -> Any:
        return self.struct.pack(*getattr(value, self.name))

    def check(self, value: Any) -> None:
        items = getattr(value, self.name)
        if type(items) is not tuple or len(items) != self.times:
            raise BadValue(self.name, f"a tuple of {self.times}", items)
        for item in items:
            _check_int(self.name, item, 0, (1 << 8 * self.width) - 1)


def repeat(offset: int | None, name: str, width: int, times: int) -> Part:
    """A fixed number of unsigned integers, as a tuple."""
    return _Repeat(offset, name, width, times)


# -- parts of a variable length, after the fixed head ----------------------------------------------


class VariablePart:
    """A part whose length another field, or the end of the payload, gives."""

    names: tuple[str, ...] = ()

    def __init__(self, offset: int | None, name: str) -> None:
        self.offset = offset
        self.name = name
        self.names = (name,)

    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        """The attribute, and the offset behind it. Raises WrongSize or BadValue."""
        raise NotImplementedError

    def write(self, value: Any) -> bytes:
        """The bytes for the attribute of `value`."""
        raise NotImplementedError

    def check(self, value: Any) -> None:
        """Raise BadValue if the attribute of `value` cannot be encoded."""
        if type(getattr(value, self.name)) is not tuple:
            raise BadValue(self.name, "a tuple", getattr(value, self.name))

    def reserved_in(self, data: memoryview, at: int, end: int) -> Iterator[int]:
        """Absolute offsets of reserved bytes between `at` and `end` that are not zero."""
        return iter(())

    def need(self, data: memoryview, at: int, size: int) -> None:
        """Raise WrongSize unless `size` bytes follow `at`."""
        if len(data) - at < size:
            raise WrongSize(self.name, f"{size} bytes at offset {at:#x}", len(data) - at)


class Element(Protocol):
    """What an array is made of: structures of one fixed size, or a choice of such structures."""

    size: int

    def read_all(self, data: memoryview) -> tuple[Any, ...]:
        """Every element in `data`, whose length is a multiple of the size."""

    def reserved_in(self, data: memoryview) -> Sequence[int]:
        """Offsets of reserved bytes in one element that are not zero."""


class _Plain:
    """Elements of one class."""

    def __init__(self, kind: type[WireStruct]) -> None:
        if kind.LAYOUT.variable:
            raise LayoutError(f"{kind.__name__}: array elements have a fixed size")
        self.kind = kind
        self.size = kind.LAYOUT.size

    def read_all(self, data: memoryview) -> tuple[Any, ...]:
        layout = self.kind.LAYOUT
        if layout.plain:
            # The hot path: no Python code per element beyond the constructor itself.
            return tuple(starmap(self.kind, layout.struct.iter_unpack(data)))
        return tuple(
            self.kind.decode(data[at : at + self.size]) for at in range(0, len(data), self.size)
        )

    def reserved_in(self, data: memoryview) -> Sequence[int]:
        return self.kind.LAYOUT.reserved_nonzero(data)


class _Choice:
    """Elements of one size whose first bytes say which class they are."""

    def __init__(
        self, key_size: int, kinds: Mapping[bytes, type[WireStruct]], other: type[WireStruct]
    ) -> None:
        self.key_size = key_size
        self.kinds = kinds
        self.other = other
        self.size = other.LAYOUT.size
        if any(k.LAYOUT.size != self.size or k.LAYOUT.variable for k in kinds.values()):
            raise LayoutError("all choices must have one size")

    def _kind(self, data: memoryview) -> type[WireStruct]:
        return self.kinds.get(bytes(data[: self.key_size]), self.other)

    def read_all(self, data: memoryview) -> tuple[Any, ...]:
        parts = (data[at : at + self.size] for at in range(0, len(data), self.size))
        return tuple(self._read(part) for part in parts)

    def _read(self, data: memoryview) -> WireStruct:
        try:
            return self._kind(data).decode(data)
        except BadValue:
            return self.other.decode(data)

    def reserved_in(self, data: memoryview) -> Sequence[int]:
        return self._kind(data).LAYOUT.reserved_nonzero(data)


def choice(
    key_size: int, kinds: Mapping[bytes, type[WireStruct]], other: type[WireStruct]
) -> Element:
    """Elements of one size, told apart by their first `key_size` bytes.

    `other` takes those of an unknown kind, and those with values that their own kind refuses.
    """
    return _Choice(key_size, kinds, other)


class _Array(VariablePart):
    def __init__(self, offset: int | None, name: str, element: Element) -> None:
        super().__init__(offset, name)
        self.element = element

    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        size = counts[self.name] * self.element.size
        self.need(data, at, size)
        return self.element.read_all(data[at : at + size]), at + size

    def write(self, value: Any) -> bytes:
        return b"".join([item.encode() for item in getattr(value, self.name)])

    def reserved_in(self, data: memoryview, at: int, end: int) -> Iterator[int]:
        size = self.element.size
        for start in range(at, end, size):
            for offset in self.element.reserved_in(data[start : start + size]):
                yield start + offset


def array(offset: int | None, name: str, element: type[WireStruct] | Element) -> VariablePart:
    """Structures of a fixed size, as many as the `count` of the same name says."""
    return _Array(offset, name, _Plain(element) if isinstance(element, type) else element)


class _OptionalArray(_Array):
    def __init__(
        self,
        offset: int | None,
        name: str,
        element: Element,
        selector: str,
        selected: IntEnum,
    ) -> None:
        super().__init__(offset, name, element)
        self.selector = selector
        self.selected = selected

    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        if head[self.selector] != self.selected:
            if len(data) - at != 4:
                return (), at
            # Not there by the table, yet senders that always write a zero count are tolerated.
            if bytes(data[at:]) != bytes(4):
                limit = f"absent unless {self.selector} is {self.selected.name.lower()}"
                raise BadValue(self.name, limit, int.from_bytes(data[at:], "little"))
            return (), at + 4
        self.need(data, at, 4)
        number = int.from_bytes(data[at : at + 4], "little")
        return super().read(data, at + 4, {self.name: number}, head)

    def write(self, value: Any) -> bytes:
        if getattr(value, self.selector) != self.selected:
            return b""
        return len(getattr(value, self.name)).to_bytes(4, "little") + super().write(value)

    def check(self, value: Any) -> None:
        super().check(value)
        items = getattr(value, self.name)
        if items and getattr(value, self.selector) != self.selected:
            limit = f"empty unless {self.selector} is {self.selected.name.lower()}"
            raise BadValue(self.name, limit, f"{len(items)} items")

    def reserved_in(self, data: memoryview, at: int, end: int) -> Iterator[int]:
        return super().reserved_in(data, min(at + 4, end), end)


def optional_array(
    offset: int | None, name: str, element: type[WireStruct], selector: str, selected: IntEnum
) -> VariablePart:
    """A u32 count and the structures it counts, both present only when `selector` is `selected`."""
    return _OptionalArray(offset, name, _Plain(element), selector, selected)


class _Numbers(VariablePart):
    def __init__(self, offset: int | None, name: str, width: int) -> None:
        super().__init__(offset, name)
        self.width = width

    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        number = counts[self.name]
        self.need(data, at, number * self.width)
        items = struct.unpack_from(f"<{number}{FORMATS[self.width]}", data, at)
        return items, at + number * self.width

    def write(self, value: Any) -> bytes:
        items = getattr(value, self.name)
        return struct.pack(f"<{len(items)}{FORMATS[self.width]}", *items)

    def check(self, value: Any) -> None:
        super().check(value)
        for item in getattr(value, self.name):
            _check_int(self.name, item, 0, (1 << 8 * self.width) - 1)


def numbers(offset: int | None, name: str, width: int) -> VariablePart:
    """Unsigned integers of `width` bytes, as many as the `count` of the same name says."""
    return _Numbers(offset, name, width)


class _Blob(VariablePart):
    def __init__(self, offset: int | None, name: str, counted: bool, size_max: int | None) -> None:
        super().__init__(offset, name)
        self.counted = counted
        self.size_max = size_max

    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        size = counts[self.name] if self.counted else len(data) - at
        if self.size_max is not None and size > self.size_max:
            raise WrongSize(f"{self.name} bytes", f"at most {self.size_max}", size)
        self.need(data, at, size)
        return bytes(data[at : at + size]), at + size

    def write(self, value: Any) -> bytes:
        item: bytes = getattr(value, self.name)
        return item

    def check(self, value: Any) -> None:
        item = getattr(value, self.name)
        if type(item) is not bytes:
            raise BadValue(self.name, "bytes", item)
        if self.size_max is not None and len(item) > self.size_max:
            raise BadValue(f"{self.name} bytes", f"at most {self.size_max}", len(item))


def blob(offset: int | None, name: str, *, size_max: int | None = None) -> VariablePart:
    """Bytes, as many as the `count` of the same name says."""
    return _Blob(offset, name, True, size_max)


def rest(offset: int | None, name: str) -> VariablePart:
    """Every byte up to the end of the payload."""
    return _Blob(offset, name, False, None)


class _OptionalByte(VariablePart):
    def read(
        self, data: memoryview, at: int, counts: Mapping[str, int], head: Mapping[str, Any]
    ) -> tuple[Any, int]:
        return (data[at], at + 1) if len(data) > at else (None, at)

    def write(self, value: Any) -> bytes:
        item = getattr(value, self.name)
        return b"" if item is None else bytes([item])

    def check(self, value: Any) -> None:
        item = getattr(value, self.name)
        if item is not None:
            _check_int(self.name, item, 0, 255)


def optional_u8(offset: int | None, name: str) -> VariablePart:
    """A last byte that shorter payloads leave out (then None)."""
    return _OptionalByte(offset, name)
