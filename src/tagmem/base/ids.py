"""Names of things. A tag is a UUID in its canonical text form; 16 big-endian bytes on the wire.

The text form is what databases, JSON and people use, so the domain keeps it; only `wire` packs it.
"""

from __future__ import annotations

import re
from typing import NewType

from tagmem.base.errors import InvalidInput

Tag = NewType("Tag", str)
HostId = NewType("HostId", str)
ApplianceId = NewType("ApplianceId", str)

NIL_TAG = Tag("00000000-0000-0000-0000-000000000000")
"""The all-zero tag: untagged capacity, ordinary memory that never carries the guarantee."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def parse_tag(text: str, field: str = "tag") -> Tag:
    """The tag written in `text`, in canonical form. Raises InvalidInput for the nil UUID and
    non-UUIDs.
    """
    if _CANONICAL.fullmatch(text):
        tag = Tag(text)
    else:
        from uuid import UUID  # rarely needed, and slow to load for an application's first open

        try:
            tag = Tag(str(UUID(text)))
        except (ValueError, AttributeError):
            raise InvalidInput(field, "a UUID", text) from None
    if tag == NIL_TAG:
        raise InvalidInput(field, "a non-nil UUID (the nil tag means untagged)", text)
    return tag


def tag_to_bytes(tag: Tag) -> bytes:
    """The 16 bytes of a tag as extents carry them (CXL r3.1 8.2.9.2.1.6, RFC 4122 order)."""
    return bytes.fromhex(tag.replace("-", ""))


def tag_from_bytes(raw: bytes) -> Tag:
    """The tag in 16 wire bytes; all zero gives NIL_TAG."""
    h = raw.hex()
    return Tag(f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}")


def parse_name(text: str, field: str) -> str:
    """A host or appliance name: lower-case letters, digits, `.`, `_`, `-`; 1 to 63 characters."""
    if not _NAME.fullmatch(text):
        raise InvalidInput(field, "1 to 63 of a-z 0-9 . _ - (alphanumeric at both ends)", text)
    return text
