"""The comparison's words and pictures follow from recorded cells, and say what is missing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import msgspec

from tagmem.lab.report import (
    HEADINGS,
    Cell,
    Comparison,
    Row,
    cell,
    merged,
    page,
    plot,
    recommendation,
)

RECORDED = b"""
{"machine": {"machine": "2 CPUs", "QEMU 11.1": "1:11.1.3"},
 "rows": [
  {"option": "vhost-pmem", "summary": "the broker's window", "qemu": "11.1", "accel": "tcg",
   "load": [1.5, 2.5],
   "cells": {
    "attach": {"text": "180 ms", "evidence": "170, 180, 190 ms", "value": 180.0},
    "bare": {"text": "150 ms", "value": 150.0},
    "detach": {"text": "90 ms", "value": 90.0},
    "bandwidth": {"text": "100 % (500 / 500 MB/s)", "value": 100.0},
    "tag": {"text": "yes"}, "dax": {"text": "yes"},
    "silent": {"text": "yes, 30 ms"}, "paused": {"text": "yes, 40 ms"},
    "panicked": {"text": "yes, 35 ms"}, "guaranteed": {"text": "yes"},
    "migration": {"text": "refused: non-migratable | device"}}},
  {"option": "pmem", "summary": "in QEMU", "qemu": "11.1", "accel": "tcg",
   "cells": {
    "attach": {"text": "200 ms", "value": 200.0}, "detach": {"text": "120 ms", "value": 120.0},
    "tag": {"text": "yes"}, "dax": {"text": "yes"},
    "paused": {"text": "no: cannot answer"}, "guaranteed": {"text": "no (paused)"}}},
  {"option": "dimm", "summary": "RAM", "qemu": "11.1", "accel": "tcg",
   "cells": {
    "attach": {"text": "not measured: <slow>", "status": "not-measured"},
    "dax": {"text": "no: System RAM"}, "paused": {"text": "no: it stays"},
    "guaranteed": {"text": "no (paused)"}}},
  {"option": "cxl", "summary": "not built yet"}]}
"""


def recorded() -> Comparison:
    return msgspec.json.decode(RECORDED, type=Comparison)


def test_what_was_not_asked_says_so() -> None:
    rows = recorded().rows
    assert cell(rows[1], "migration").text.startswith("not measured")
    assert cell(rows[3], "migration").text == "not built yet"


def test_the_page_has_every_column_and_every_row() -> None:
    text = page(recorded())
    for heading in HEADINGS:
        assert f"| {heading.title} |" in text
    for row in recorded().rows:
        assert text.count(f"| {row.option} |") == 3
    assert "non-migratable \\| device" in text
    assert "load was 1.5 to 2.5" in text
    assert "emulation" in text


def test_a_table_has_as_many_cells_in_each_line() -> None:
    lines = [line for line in page(recorded()).splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in lines]
    assert len(set(widths)) <= 3
    assert widths == sorted(widths, key=widths.index)


def test_the_recommendation_follows_the_figures() -> None:
    said = recommendation(recorded())
    assert said.startswith("Take **vhost-pmem (11.1)**")
    assert "+30 ms against the bare commands" in said
    assert "pmem (11.1): the guest finds the tag" in said
    assert "dimm (11.1) (paused guest: no: it stays)" in said
    assert "cxl: not built yet" in said


def test_no_guarantee_is_claimed_that_was_not_seen() -> None:
    rows = tuple(row for row in recorded().rows if row.option != "vhost-pmem")
    said = recommendation(Comparison({}, rows))
    assert "No option of this run" in said
    assert "Take" not in said


def test_the_plot_is_an_image_with_a_bar_per_figure() -> None:
    root = ET.fromstring(plot(recorded()))
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{space}rect") if rect.get("fill") != "#ffffff"]
    assert len(bars) == 2 + 1 + 2 + 1
    assert all(float(rect.get("width", "0")) > 0 for rect in bars)
    words = [text.text or "" for text in root.iter(f"{space}text")]
    assert any("<slow>" in word for word in words)


def test_the_plot_of_nothing_is_an_image() -> None:
    ET.fromstring(plot(Comparison({}, ())))


def test_a_later_run_replaces_its_own_rows_alone() -> None:
    order = ("vhost-pmem", "pmem", "dimm", "cxl")
    fresh = [
        Row("pmem", "in QEMU", "11.1", "kvm", cells={"attach": Cell("9 ms", value=9.0)}),
        Row("pmem", "in QEMU", "10.0", "kvm", cells={"attach": Cell("8 ms", value=8.0)}),
        Row("cxl", "type 3", "11.1", "kvm", cells={"attach": Cell("7 ms", value=7.0)}),
    ]
    made = merged(recorded(), {"machine": "4 CPUs"}, fresh, order)
    assert [(row.option, row.qemu) for row in made.rows] == [
        ("vhost-pmem", "11.1"),
        ("pmem", "11.1"),
        ("dimm", "11.1"),
        ("cxl", "11.1"),
        ("pmem", "10.0"),
    ]
    assert cell(made.rows[1], "attach").value == 9.0
    assert made.machine == {"machine": "4 CPUs"}
