"""What a guest's window onto a tag is made of, and the next thing to ask of the hypervisor to make
it so. Pure.

    0         2 MiB     data_at
    | header  |         | piece 0 | piece 1 | ... |       |   up to a power of two

The header is private memory of the broker; the media carry nothing of it. The pieces are
the tag's bytes, in the tag's order. What is left of the power of two has no memory at all: the
header tells the guest's kernel to leave it out. A window has a
*goal* and a picture of what is mapped; `next` compares the two. The same few lines therefore
present, revoke, and go on after a restart, whatever happened in between.

The picture can become *uncertain*: QEMU drops a device's mappings when the driver is unbound or
the guest reboots, keeps them while the VM is paused, and the back-end is told the same in both
cases. Mapping twice is an error that costs the back-end its channel, and taking the bytes away to
map them again would lose what the guest writes in between. So the header is unmapped: when that
succeeds everything else is still there, and when it is refused nothing is. A guest reads the header
when it finds the device, not while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import msgspec

from tagmem.base.errors import InvalidInput
from tagmem.base.limits import DAX_ALIGN_BYTES, WINDOW_PIECES_MAX
from tagmem.base.units import Bytes
from tagmem.wire.vhost_user import TABLE_REGIONS_MAX

HEAD_BYTES = DAX_ALIGN_BYTES
PAGE_BYTES = 4096
TABLE_PARTS_MAX = TABLE_REGIONS_MAX - 2
"""Parts of a window that a front-end can tell of in one memory table, beside the guest's RAM below
and above 4 GiB."""


class Source(Enum):
    """Whose memory a part of the window is."""

    HEADER = "header"
    DATA = "data"
    SCRAP = "scrap"


class Goal(Enum):
    """What the window should be."""

    PRESENTED = "presented"
    REVOKED = "revoked"
    """No byte of the tag; scrap memory in the hole, so that the guest's accesses go nowhere but
    still end."""


_PROBED = (Source.HEADER, Source.SCRAP, Source.DATA)


class Part(msgspec.Struct, frozen=True):
    """A run of the window, and where its memory comes from."""

    source: Source
    at: Bytes
    length: Bytes
    path: str = ""
    """Of DATA; the other sources are the broker's own."""
    file_offset: Bytes = 0
    writable: bool = False


class Map(msgspec.Struct, frozen=True):
    """Ask for this part to be mapped."""

    part: Part


class Unmap(msgspec.Struct, frozen=True):
    """Ask for this part, mapped as it stands, to be taken out."""

    part: Part


class Probe(msgspec.Struct, frozen=True):
    """Ask for a part to be taken out that nobody uses, to learn whether the window is there."""

    part: Part


Operation = Map | Unmap | Probe


def bar_bytes(device_bytes: Bytes) -> Bytes:
    """Memory that the guest sees of a window, and the address space that it takes: a power of two,
    because it is a PCI BAR, and QEMU 11.1 aborts when it is told of any other size.
    """
    return 1 << max(device_bytes - 1, 0).bit_length()


def lay_out(
    pieces: Iterable[tuple[str, Bytes, Bytes]], *, read_only: bool, data_at: Bytes = HEAD_BYTES
) -> tuple[Part, ...]:
    """The parts of a window whose bytes are these (path, offset, length), in order.

    Neighbours in one file become one part. Raises InvalidInput for none, too many, or pieces that
    cannot be mapped.
    """
    found = [Part(Source.HEADER, 0, HEAD_BYTES)]
    at = data_at
    for path, offset, length in pieces:
        if length <= 0 or length % DAX_ALIGN_BYTES:
            raise InvalidInput("piece length", f"a multiple of {DAX_ALIGN_BYTES} above 0", length)
        if offset < 0 or offset % PAGE_BYTES:
            raise InvalidInput("piece offset", f"a multiple of {PAGE_BYTES}", offset)
        last = found[-1]
        end = last.file_offset + last.length
        if last.source is Source.DATA and (last.path, end) == (path, offset):
            found[-1] = msgspec.structs.replace(last, length=last.length + length)
        else:
            found.append(Part(Source.DATA, at, length, path, offset, not read_only))
        at += length
    data = len(found) - 1
    if not 0 < data <= WINDOW_PIECES_MAX:
        raise InvalidInput("pieces", f"1 to {WINDOW_PIECES_MAX} that are not neighbours", data)
    return tuple(found)


class Window:
    """One window: parts, goal, and what is mapped of them."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.goal = Goal.PRESENTED
        self.scrap = True
        """Fill the hole when revoked."""
        self.certain = True
        """Whether `mapped` is known to be so."""
        self.failed = ""
        """Why nothing more can be asked of the hypervisor."""
        self._mapped: dict[Bytes, Part] = {}
        self._header = self.parts[0]
        self._data = self.parts[1:]
        hole = sum(part.length for part in self._data)
        self._scrap = Part(Source.SCRAP, self._data[0].at, hole, writable=True)

    @property
    def fits_table(self) -> bool:
        """Whether a front-end can tell of all its parts in one memory table."""
        return len(self.parts) <= TABLE_PARTS_MAX

    @property
    def data_bytes(self) -> Bytes:
        """Of the tag."""
        return self._scrap.length

    @property
    def mapped(self) -> tuple[Part, ...]:
        """What is mapped, as far as is known, in the order of the window."""
        return tuple(self._mapped[at] for at in sorted(self._mapped))

    @property
    def has_data(self) -> bool:
        """Whether, as far as is known, some of the tag's bytes are mapped."""
        return any(part.source is Source.DATA for part in self._mapped.values())

    @property
    def settled(self) -> bool:
        """Goal and picture agree."""
        return not self.failed and self.next() is None

    def next(self) -> Operation | None:
        """What is to be asked next. None when nothing is, or nothing can be."""
        if self.failed:
            return None
        if not self.certain and self._mapped:
            # The header, unless the device was stopped before there was one.
            return Probe(min(self._mapped.values(), key=lambda part: _PROBED.index(part.source)))
        wanted = {part.at: part for part in self._wanted()}
        for at in sorted(self._mapped):
            part = self._mapped[at]
            # A revoked window keeps its header: who has it mapped reads what he read before.
            if wanted.get(at) != part and part.source in (Source.DATA, Source.SCRAP):
                return Unmap(part)
        for at in sorted(wanted):
            if at not in self._mapped:
                return Map(wanted[at])
        return None

    def _wanted(self) -> tuple[Part, ...]:
        if self.goal is Goal.PRESENTED:
            return self.parts
        # After a reboot of the guest nothing is to be found under the tag any more.
        return (self._scrap,) if self.scrap else ()

    def done(self, operation: Operation, succeeded: bool) -> None:
        """The hypervisor's verdict on what `next` gave."""
        part = operation.part
        if isinstance(operation, Map):
            if succeeded:
                self._mapped[part.at] = part
            else:
                self.failed = f"the hypervisor refused to map {part.source.value} at {part.at:#x}"
            return
        if isinstance(operation, Probe):
            self.certain = True
            if not succeeded:
                self._mapped.clear()
        # Refused: it was not mapped, which is what was asked for. Proof is looked for elsewhere.
        self._mapped.pop(part.at, None)

    def doubt(self) -> None:
        """The device was stopped: its mappings may be gone, or not."""
        self.certain = self.certain and not self._mapped

    def dropped(self) -> None:
        """The hypervisor has none of it mapped."""
        self._mapped.clear()
        self.certain = True
        self.failed = ""

    def assume(self, goal: Goal) -> None:
        """Somebody before us brought the window there, or meant to."""
        self.goal = goal
        self._mapped = {part.at: part for part in (self._header, *self._wanted())}
        self.certain = False
