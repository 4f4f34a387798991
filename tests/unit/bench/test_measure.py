"""The benchmarks' arithmetic: a wrong median would be believed by everybody."""

from __future__ import annotations

import pytest
from bench.measure import Sample, interleave, quantile
from bench.report import page, read_sections, scaled


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.5) == 1.5
    assert quantile([1, 2, 3, 4, 5], 0.25) == 2
    assert (quantile([7, 8], 0), quantile([7, 8], 1)) == (7, 8)


@pytest.mark.parametrize(("values", "share"), [((), 0.5), ((1.0,), 1.1), ((1.0,), -0.1)])
def test_a_quantile_of_nothing_is_refused(values: tuple[float, ...], share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        quantile(values, share)


def test_a_sample_has_a_median_and_quartiles() -> None:
    sample = Sample((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (sample.low, sample.median, sample.high) == (2, 3, 4)


def test_turns_alternate_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []
    readings = iter((2.0, 1.0, 2.0, 4.0))

    def ours() -> float:
        order.append("ours")
        return next(readings)

    def floor() -> float:
        order.append("floor")
        return next(readings)

    pair = interleave(ours, floor, 2)
    assert order == ["ours", "floor", "floor", "ours"]
    assert (pair.ours.values, pair.floor.values) == ((2, 4), (1, 2))
    assert pair.ratio.values == (2, 2)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00213, "s", "2.13 ms"),
        (12.5, "s", "12.5 s"),
        (1500.0, "s", "1500 s"),
        (2.5e6, "/s", "2.5 M/s"),
        (513.0, "/s", "513/s"),
        (35e6, "B", "35 MB"),
        (0.0, "s", "0 s"),
    ],
)
def test_values_have_three_digits_and_a_prefix(value: float, unit: str, text: str) -> None:
    assert scaled(value, unit) == text


def test_a_page_keeps_what_an_earlier_run_said(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "RESULTS.md"
    assert read_sections(path) == {}
    path.write_text(page("# Head\n", {"one": "\nfirst\n", "two": "\nsecond\n"}, ("one", "two")))
    sections = read_sections(path)
    assert sections == {"one": "\nfirst\n", "two": "\nsecond\n"}
    again = page("# Other\n", sections | {"two": "\nnew\n"}, ("two", "one"))
    assert again.index("new") < again.index("first")
    assert "second" not in again
