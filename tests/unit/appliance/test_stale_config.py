"""`stale_caches` belongs to regions that several hosts may write, and whose caches nobody keeps."""

from __future__ import annotations

from typing import Literal

import pytest

from tagmem.appliance.config import ApplianceConfig, HostSection, RegionSection
from tagmem.base.errors import InvalidInput

Layout = Literal["by-tag", "by-dpa"]


def config(region: RegionSection, layout: Layout = "by-tag") -> ApplianceConfig:
    hosts = (HostSection("w1", "/run/w1.sock"),)
    return ApplianceConfig("a0", "/var/lib/a0", "/run/fm.sock", (region,), hosts, layout=layout)


def region(**more: bool) -> RegionSection:
    return RegionSection(size="64MiB", stale_caches=7, **more)


def test_where_it_may_be() -> None:
    config(region(sharable=True)).check()


@pytest.mark.parametrize(
    ("section", "layout"),
    [
        (region(), "by-tag"),
        (region(sharable=True, hardware_coherent=True), "by-tag"),
        (region(sharable=True, read_only=True), "by-tag"),
        (region(sharable=True), "by-dpa"),
    ],
)
def test_where_it_may_not(section: RegionSection, layout: Layout) -> None:
    with pytest.raises(InvalidInput, match="stale_caches"):
        config(section, layout).check()
