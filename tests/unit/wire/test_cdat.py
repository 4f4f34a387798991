"""The table of a whole device, byte for byte, and its limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagmem.base.errors import InvalidInput
from tagmem.base.units import GIB, MIB
from tagmem.wire.cdat import (
    BANDWIDTH_BYTES_MAX,
    LATENCY_NS_MAX,
    CdatHeader,
    DataType,
    Dslbis,
    Dsmas,
    performance,
)

GOLDEN = """
58 00 00 00 01 7f 00 00 00 00 00 00 00 00 00 00
00 00 18 00 00 20 00 00 00 00 00 00 00 00 00 00 00 00 00 20 00 00 00 00
01 00 18 00 00 00 00 00 e8 03 00 00 00 00 00 00 5e 01 00 00 00 00 00 00
01 00 18 00 00 00 03 00 01 00 00 00 00 00 00 00 00 50 00 00 00 00 00 00
"""


def test_one_region_byte_for_byte() -> None:
    """512 MiB, 350 ns, 20 GiB in a second."""
    table = performance([512 * MIB], 350, 20 * GIB)
    assert table == bytes.fromhex(GOLDEN)


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=8),
    st.integers(1, LATENCY_NS_MAX),
    st.integers(MIB, BANDWIDTH_BYTES_MAX),
)
def test_any_table_sums_up_to_zero_and_tells_what_was_meant(
    units: list[int], latency_ns: int, bandwidth: int
) -> None:
    lengths = [unit * 256 * MIB for unit in units]
    table = performance(lengths, latency_ns, bandwidth)
    assert sum(table) & 0xFF == 0
    header, at = CdatHeader.decode_prefix(table)
    assert header.length_bytes == len(table)
    dpa = 0
    for number, length in enumerate(lengths):
        region, size = Dsmas.decode_prefix(table[at:])
        assert (region.handle, region.dpa, region.dpa_length_bytes) == (number, dpa, length)
        assert region.dynamic
        at, dpa = at + size, dpa + length
        for kind in (DataType.ACCESS_LATENCY, DataType.ACCESS_BANDWIDTH):
            figure, size = Dslbis.decode_prefix(table[at:])
            at += size
            assert (figure.handle, figure.data_type) == (number, kind)
            assert 0 < figure.entries[0] < 0xFFFF
            said = figure.base_unit * figure.entries[0]
            if kind is DataType.ACCESS_LATENCY:
                assert said == latency_ns * 1000
            else:
                assert 0 <= bandwidth // MIB - said < figure.base_unit
    assert at == len(table)


@pytest.mark.parametrize(
    ("latency_ns", "bandwidth", "field"),
    [
        (0, GIB, "latency_ns"),
        (LATENCY_NS_MAX + 1, GIB, "latency_ns"),
        (1, MIB - 1, "bandwidth_bytes"),
        (1, BANDWIDTH_BYTES_MAX + 1, "bandwidth_bytes"),
    ],
)
def test_figures_that_cannot_be_told_are_refused(
    latency_ns: int, bandwidth: int, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        performance([256 * MIB], latency_ns, bandwidth)
    assert caught.value.field == field
