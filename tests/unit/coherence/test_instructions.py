"""What instructions do to memory, by their bytes as an assembler writes them."""

from __future__ import annotations

import pytest

from tagmem.coherence.instructions import Does, decode

LOADS = {
    "mov eax, [rdi]": ("8b07", 4),
    "mov rax, [rdi]": ("488b07", 8),
    "mov ax, [rdi]": ("668b07", 2),
    "mov al, [rdi]": ("8a07", 1),
    "movzx eax, byte [rdi]": ("0fb607", 1),
    "movzx eax, word [rdi]": ("0fb707", 2),
    "movsxd rax, [rdi]": ("486307", 4),
    "cmp byte [rdi], 1": ("803f01", 1),
    "cmp qword [rdi], 1": ("48833f01", 8),
    "movups xmm0, [rdi]": ("0f1007", 16),
    "movss xmm0, [rdi]": ("f30f1007", 4),
    "movsd xmm0, [rdi]": ("f20f1007", 8),
    "movdqu xmm0, [rdi]": ("f30f6f07", 16),
    "vmovdqu ymm0, [rdi]": ("c5fe6f07", 32),
    "vmovdqu64 zmm0, [rdi]": ("62f1fe486f07", 64),
    "movq xmm0, [rdi]": ("f30f7e07", 8),
    "vpbroadcastb ymm0, [rdi]": ("c4e27d7807", 1),
    "crc32 eax, qword [rdi]": ("f2480f38f107", 8),
    "push qword [rdi]": ("ff37", 8),
}
STORES = {
    "mov [rdi], rax": ("488907", 8),
    "mov byte [rdi], 1": ("c60701", 1),
    "mov dword [rdi], 1": ("c70701000000", 4),
    "movaps [rdi], xmm0": ("0f2907", 16),
    "vmovdqu [rdi], ymm0": ("c5fe7f07", 32),
    "vmovdqu64 [rdi], zmm0": ("62f1fe487f07", 64),
    "movq [rdi], xmm0": ("660fd607", 8),
    "stosb": ("aa", 1),
    "stosq": ("f348ab", 8),
    "sete [rdi]": ("0f9407", 1),
}


@pytest.mark.parametrize("name", LOADS)
def test_loads(name: str) -> None:
    code, size = LOADS[name]
    found = decode(bytes.fromhex(code), write=False)
    assert (found.does, found.size_bytes) == (Does.ACCESS, size)
    assert found.loads
    assert not found.stores


@pytest.mark.parametrize("name", STORES)
def test_stores(name: str) -> None:
    code, size = STORES[name]
    found = decode(bytes.fromhex(code), write=True)
    assert (found.does, found.size_bytes) == (Does.ACCESS, size)
    assert found.stores
    assert not found.loads
    assert not found.around


def test_what_changes_a_value_loads_and_stores_it() -> None:
    for code, size in (("480107", 8), ("fe07", 1), ("f0480fb10f", 8), ("8707", 4)):
        found = decode(bytes.fromhex(code), write=True)
        assert (found.loads, found.stores, found.size_bytes) == (True, True, size)
    assert decode(bytes.fromhex("f0480fb10f"), write=True).locked


def test_moves_touch_two_places() -> None:
    found = decode(bytes.fromhex("f348a5"), write=False)
    assert (found.moves, found.size_bytes) == (True, 8)


def test_stores_around_the_cache() -> None:
    for code, size in (("480fc307", 8), ("660fe707", 16), ("c5fde707", 32), ("0f2b07", 16)):
        found = decode(bytes.fromhex(code), write=True)
        assert (found.around, found.stores, found.size_bytes) == (True, True, size)


def test_cache_lines() -> None:
    assert decode(bytes.fromhex("660fae37"), write=False).does is Does.WRITE_BACK
    assert decode(bytes.fromhex("660fae3f"), write=False).does is Does.FLUSH
    assert decode(bytes.fromhex("0fae3f"), write=False).does is Does.FLUSH
    assert decode(bytes.fromhex("0f180f"), write=False).does is Does.NOTHING
    # XSAVE has the same opcode, and is an access.
    assert decode(bytes.fromhex("0fae27"), write=True).does is Does.ACCESS
