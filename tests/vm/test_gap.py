"""What docs/virtio-mem-tags.md argues from, seen again: virtio-mem as it is, on a stock guest."""

from __future__ import annotations

from tests.vm.conftest import Run

from tagmem.lab import virtiomem
from tagmem.lab.boot import Lab


def test_the_gap_of_virtio_mem_is_what_its_page_says(lab: Lab, run: Run) -> None:
    found = {finding.what: finding for finding in run(virtiomem.gap(lab))}
    assert found["content kept by device_add"].value == 0
    assert "found" not in found["tag in the guest"].seen
    assert "virtio_mem" in found["place, seen in the guest"].seen
    kept = found["unplug, in use"]
    assert kept.value is not None
    assert kept.value > 0, kept
    assert "cannot get unplugged" in kept.seen
