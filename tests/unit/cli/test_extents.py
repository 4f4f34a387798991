"""The extent map as text: what a reader sees for each state, and that nothing held looks free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tagmem.cli.extents import draw
from tagmem.wire.rest import ApplianceMapDocument, MapPiece, PoolMapDocument

MIB = 1 << 20
A, B = "aaaaaaaa-0000-4000-8000-000000000000", "bbbbbbbb-0000-4000-8000-000000000000"


def pool(*pieces: MapPiece, blocks: int) -> ApplianceMapDocument:
    return ApplianceMapDocument(
        "a0", (PoolMapDocument(0, (0, 1), blocks * 2 * MIB, 2 * MIB, pieces),)
    )


def piece(start: int, length: int, state: str, tag: str = "", *hosts: str) -> MapPiece:
    return MapPiece(start * 2 * MIB, length * 2 * MIB, state, tag, hosts)


def test_each_state_has_its_sign() -> None:
    document = pool(
        piece(0, 8, "accepted", A, "w1", "w2"),
        piece(8, 4, "free"),
        piece(12, 4, "offered", B, "w3"),
        piece(16, 2, "sanitising"),
        piece(18, 2, "unknown"),
        piece(20, 2, "quarantined"),
        piece(22, 2, "free"),
        blocks=24,
    )
    assert draw(document, 100) == [
        "appliance a0 pool 0 (region 0, 1)  48 MiB, 1 character = 2 MiB",
        "|AAAAAAAA....bbbb~~??!!..|",
        f"A {A}  16 MiB  accepted on w1, w2",
        f"b {B}  8 MiB  offered on w3",
        ". free  12 MiB",
        "~ sanitising  4 MiB",
        "? unknown  4 MiB",
        "! quarantined  4 MiB",
    ]


def test_wide_maps_wrap_and_large_ones_group_blocks() -> None:
    lines = draw(pool(piece(0, 100, "accepted", A), blocks=100), 42)
    assert lines[1:4] == ["|" + "A" * 40 + "|", "|" + "A" * 40 + "|", "|" + "A" * 20 + "|"]
    large = draw(pool(piece(5, 1, "quarantined"), blocks=1 << 20), 100)
    assert large[0].endswith("2 TiB, 1 character = 4 GiB")
    assert [len(line) for line in large[1:7]] == [100, 100, 100, 100, 100, 24]
    assert large[1].startswith("|!.")


def test_letters_begin_again_after_z() -> None:
    tags = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(28)]
    lines = draw(pool(*(piece(n, 1, "accepted", tag) for n, tag in enumerate(tags)), blocks=28), 80)
    assert lines[1] == "|ABCDEFGHIJKLMNOPQRSTUVWXYZAB|"


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from(["free", "accepted", "offered", "unknown"])),
        min_size=1,
        max_size=20,
    ),
    st.integers(10, 200),
)
def test_nothing_held_looks_free(runs: list[tuple[int, str]], width: int) -> None:
    pieces, at = [], 0
    for length, state in runs:
        pieces.append(piece(at, length, state, "" if state == "free" else A))
        at += length
    lines = draw(pool(*pieces, blocks=at), width)
    signs = "".join(line[1:-1] for line in lines[1:] if line.startswith("|"))
    blocks = [state != "free" for length, state in runs for _ in range(length)]
    group = 1
    while len(signs) < -(-at // group):
        group *= 2
    held = [any(blocks[n : n + group]) for n in range(0, at, group)]
    assert [sign != "." for sign in signs] == held
