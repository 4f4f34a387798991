"""The extent map: a pool of media drawn with one character per group of blocks, and its legend.

    A held  a offered or reserved  . free  ~ sanitising  ? unknown  ! quarantined

Pure, so that tests read it as text. A group that is not all free never looks free.
"""

from __future__ import annotations

from collections.abc import Mapping

from tagmem.base.units import ceil_div, format_size
from tagmem.wire.rest import ApplianceMapDocument, MapPiece, PoolMapDocument

FREE, SANITISING, UNKNOWN, QUARANTINED = ".", "~", "?", "!"
_SIGNS = {"free": FREE, "sanitising": SANITISING, "unknown": UNKNOWN, "quarantined": QUARANTINED}
_SMALL = frozenset({"offered", "reserved"})
_URGENCY = {QUARANTINED: 3, UNKNOWN: 2, SANITISING: 1}
"""Which sign a group shows when it holds several; letters stand between these and free."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS_MAX = 8


def draw(
    document: ApplianceMapDocument, width: int, named: Mapping[str, str] | None = None
) -> list[str]:
    """The maps of all pools of an appliance, at most `width` columns wide.

    Tags that have no letter in `named` get the next ones in order of their place.
    """
    lines: list[str] = []
    letters: dict[str, str] = dict(named or {})
    for pool in document.pools:
        lines += _pool(document.appliance, pool, letters, max(width, 40))
    lines += _legend(document, letters)
    return lines


def _pool(appliance: str, pool: PoolMapDocument, letters: dict[str, str], width: int) -> list[str]:
    blocks = ceil_div(pool.size_bytes, pool.block_bytes)
    per_row = width - 2
    group = max(1, ceil_div(blocks, per_row * ROWS_MAX))
    # Whole powers of two read well: 1 character = 64 MiB.
    group = 1 << (group - 1).bit_length()
    signs = _signs(pool, group * pool.block_bytes, letters)
    regions = ", ".join(map(str, pool.regions))
    head = (
        f"appliance {appliance} pool {pool.pool} (region {regions})  "
        f"{format_size(pool.size_bytes)}, 1 character = {format_size(group * pool.block_bytes)}"
    )
    rows = [signs[at : at + per_row] for at in range(0, len(signs), per_row)]
    return [head, *(f"|{row}|" for row in rows)]


def _signs(pool: PoolMapDocument, group_bytes: int, letters: dict[str, str]) -> str:
    """One character per group: the most urgent sign in it, else the letter with most bytes."""
    count = ceil_div(pool.size_bytes, group_bytes)
    weights: list[dict[str, int]] = [{} for _ in range(count)]
    for piece in pool.pieces:
        sign = _sign(piece, letters)
        if sign == FREE:
            continue
        end = piece.start + piece.length
        for index in range(piece.start // group_bytes, min(count, ceil_div(end, group_bytes))):
            overlap = min(end, (index + 1) * group_bytes) - max(piece.start, index * group_bytes)
            weights[index][sign] = weights[index].get(sign, 0) + overlap
    return "".join(_winner(weight) for weight in weights)


def _winner(weight: dict[str, int]) -> str:
    if not weight:
        return FREE
    return max(weight, key=lambda sign: (_URGENCY.get(sign, 0), weight[sign], sign))


def _sign(piece: MapPiece, letters: dict[str, str]) -> str:
    sign = _SIGNS.get(piece.state)
    if sign is not None:
        return sign
    letter = letters.setdefault(piece.tag, LETTERS[len(letters) % len(LETTERS)])
    return letter.lower() if piece.state in _SMALL else letter


def _legend(document: ApplianceMapDocument, letters: dict[str, str]) -> list[str]:
    """What each letter and sign on the map means, with sizes."""
    sizes: dict[str, int] = {}
    pieces: dict[str, MapPiece] = {}
    signs: dict[str, int] = {}
    for pool in document.pools:
        for piece in pool.pieces:
            if piece.state in _SIGNS:
                signs[piece.state] = signs.get(piece.state, 0) + piece.length
            else:
                sizes[piece.tag] = sizes.get(piece.tag, 0) + piece.length
                pieces[piece.tag] = piece
    lines = []
    for tag, piece in pieces.items():
        letter = letters[tag]
        sign = letter.lower() if piece.state in _SMALL else letter
        hosts = f" on {', '.join(piece.hosts)}" if piece.hosts else ""
        lines.append(f"{sign} {tag}  {format_size(sizes[tag])}  {piece.state}{hosts}")
    lines += [
        f"{sign} {state}  {format_size(signs[state])}"
        for state, sign in _SIGNS.items()
        if state in signs
    ]
    return lines
