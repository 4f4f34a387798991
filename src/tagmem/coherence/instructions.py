"""What an x86-64 instruction does to the memory that it faulted on: how many bytes, loaded, stored,
written back or dropped.

A page fault tells an address and whether it was a store. The rest is in the instruction's bytes,
and of those only prefixes, opcode and the middle of ModRM are needed (Intel SDM volume 2, chapter 2
and appendix A). What is not known here counts as a vector's width of the encoding; what a store
really changed is compared afterwards (`check.py`), so that a wrong guess is never a lost store.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

_LEGACY = frozenset(b"\x66\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65\x67")
_BYTE_OPCODES = frozenset(
    {op for op in range(0x40) if op & 7 in (0, 2)}
    | {0x80, 0x84, 0x86, 0x88, 0x8A, 0xA4, 0xA6, 0xAA, 0xAC, 0xAE, 0xC0, 0xC6, 0xD0, 0xD2, 0xF6}
    | {0xFE}
)
_PLAIN_STORES = frozenset({0x88, 0x89, 0x8F, 0xA2, 0xA3, 0xAA, 0xAB, 0xC6, 0xC7})
_STORES_0F = frozenset(
    {0x11, 0x13, 0x17, 0x29, 0x2B, 0x7E, 0x7F, 0xC3, 0xD6, 0xE7} | set(range(0x90, 0xA0))
)
_NON_TEMPORAL = frozenset({0x2B, 0xC3, 0xE7})
_X87 = {0xD8: 4, 0xD9: 4, 0xDA: 4, 0xDB: 4, 0xDC: 8, 0xDD: 8, 0xDE: 2, 0xDF: 2}
_BROADCAST = {0x18: 4, 0x19: 8, 0x1A: 16, 0x58: 4, 0x59: 8, 0x5A: 16, 0x78: 1, 0x79: 2}


class Does(Enum):
    """What the other hosts may care about."""

    ACCESS = auto()
    WRITE_BACK = auto()
    """CLWB."""
    FLUSH = auto()
    """CLFLUSHOPT, CLFLUSH: write back and drop."""
    NOTHING = auto()
    """Prefetches: a hint."""


@dataclass(frozen=True)
class Instruction:
    """One instruction's access to memory."""

    does: Does
    size_bytes: int
    loads: bool
    stores: bool
    moves: bool = False
    """MOVS: loads at RSI and stores at RDI, and faults on either."""
    around: bool = False
    """Non-temporal: written back as it is stored, complete after a fence."""
    locked: bool = False


@dataclass
class _Code:
    """Prefixes and opcode."""

    operand: int = 4
    prefix: int = 0
    """66, F2 or F3, which choose among vector instructions; also VEX's pp."""
    vector: int = 0
    """Bytes of VEX's or EVEX's vector; 0 for legacy encodings."""
    table: int = 0
    """0: one byte, 1: 0F, 2: 0F38, 3: 0F3A."""
    opcode: int = 0
    middle: int = 0
    """ModRM's reg field."""
    wide: bool = False
    locked: bool = False


def decode(code: bytes, *, write: bool) -> Instruction:
    """The access of an instruction that faulted; `write` is what the fault said."""
    found = _read(code.ljust(16, b"\x90"))
    if found.vector == 0 and found.table == 1:
        special = _special(found)
        if special is not None:
            return special
    size = _size(found)
    moves = found.table == 0 and found.vector == 0 and found.opcode in (0xA4, 0xA5)
    if moves:
        return Instruction(Does.ACCESS, size, loads=True, stores=True, moves=True)
    plain = _is_plain_store(found)
    around = write and found.table == 1 and found.opcode in _NON_TEMPORAL
    return Instruction(
        Does.ACCESS,
        size,
        loads=not write or not plain,
        stores=write,
        around=around,
        locked=found.locked,
    )


def _read(code: bytes) -> _Code:
    found, at = _Code(), 0
    while code[at] in _LEGACY and at < 14:
        byte = code[at]
        if byte == 0x66:
            found.operand, found.prefix = 2, found.prefix or byte
        elif byte in (0xF2, 0xF3):
            found.prefix = byte
        found.locked |= byte == 0xF0
        at += 1
    if code[at] & 0xF0 == 0x40:
        found.wide = bool(code[at] & 8)
        at += 1
    if code[at] in (0xC4, 0xC5, 0x62):
        at = _vector(found, code, at)
    elif code[at] == 0x0F:
        found.table, at = 1, at + 1
        if code[at] in (0x38, 0x3A):
            found.table, at = 2 if code[at] == 0x38 else 3, at + 1
    if found.wide:
        found.operand = 8
    found.opcode, found.middle = code[at], code[at + 1] >> 3 & 7
    return found


def _vector(found: _Code, code: bytes, at: int) -> int:
    """VEX and EVEX prefixes; where the opcode is."""
    if code[at] == 0xC5:
        found.table, last = 1, code[at + 1]
        found.vector = 32 if last & 4 else 16
        at += 2
    elif code[at] == 0xC4:
        found.table, last = code[at + 1] & 0x1F, code[at + 2]
        found.wide = bool(last & 0x80)
        found.vector = 32 if last & 4 else 16
        at += 3
    else:
        found.table, last = code[at + 1] & 7, code[at + 2]
        found.wide = bool(last & 0x80)
        found.vector = 16 << min(code[at + 3] >> 5 & 3, 2)
        at += 4
    found.prefix = (0, 0x66, 0xF3, 0xF2)[last & 3]
    return at


def _special(found: _Code) -> Instruction | None:
    """Cache-line instructions, prefetches, CMPXCHG16B."""
    if found.opcode == 0xAE and found.middle == 6 and found.prefix == 0x66:
        return Instruction(Does.WRITE_BACK, 1, loads=False, stores=False)
    if found.opcode == 0xAE and found.middle == 7:
        return Instruction(Does.FLUSH, 1, loads=False, stores=False)
    if found.opcode in (0x0D, 0x18):
        return Instruction(Does.NOTHING, 0, loads=False, stores=False)
    if found.opcode == 0xC7:
        size = 16 if found.wide else 8
        return Instruction(Does.ACCESS, size, loads=True, stores=True, locked=found.locked)
    return None


def _is_plain_store(found: _Code) -> bool:
    if found.table == 0 and found.vector == 0:
        return found.opcode in _PLAIN_STORES or found.opcode in _X87
    # Vector instructions that write memory do not read it.
    return found.vector > 0 or found.table != 1 or found.opcode in _STORES_0F


def _size(found: _Code) -> int:
    if found.table == 0:
        if found.opcode in _BYTE_OPCODES:
            return 1
        if found.opcode == 0x63:
            return 4
        if found.opcode == 0x8F or (found.opcode == 0xFF and found.middle in (2, 4, 6)):
            return 8
        if found.opcode in _X87:
            extended = found.opcode == 0xDB and found.middle in (5, 7)
            return 10 if extended else _X87[found.opcode]
        return found.operand
    if found.table == 1:
        return _size_0f(found)
    if found.table == 2:
        if found.opcode in _BROADCAST:
            return _BROADCAST[found.opcode]
        if found.opcode in (0xF0, 0xF1) and not found.vector:
            return found.operand
        if 0x20 <= found.opcode <= 0x35:
            # PMOVZX, PMOVSX: a half, a quarter or an eighth is loaded.
            return (found.vector or 16) >> (1, 2, 3, 1, 2, 1)[(found.opcode & 7) % 6]
    return found.vector or 16


def _size_0f(found: _Code) -> int:
    opcode, prefix = found.opcode, found.prefix
    word = 8 if found.wide else 4
    if opcode in (0xB6, 0xBE, 0xB0, 0xC0) or 0x90 <= opcode < 0xA0:
        return 1
    if opcode in (0xB7, 0xBF):
        return 2
    if (0x40 <= opcode < 0x50 and not found.vector) or opcode in _WORDS_0F:
        return found.operand
    if opcode == 0xC3:
        return word
    if opcode in (0x12, 0x13, 0x16, 0x17) or opcode == 0xD6:
        return 8
    if opcode == 0x6E or (opcode == 0x7E and prefix != 0xF3):
        return word
    if opcode == 0x7E:
        return 8
    if opcode in (0x6F, 0x7F, 0xE7):
        return found.vector or (16 if prefix else 8)
    if prefix == 0xF3:
        return 4
    if prefix == 0xF2:
        return 8
    return found.vector or 16


_WORDS_0F = frozenset({0xA3, 0xAB, 0xAF, 0xB1, 0xB3, 0xB8, 0xBA, 0xBB, 0xBC, 0xBD, 0xC1})
