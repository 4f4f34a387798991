"""What objects in shared memory cost: a table that another host wrote, a look-up, a publication.

The other host is another process (bench.other_host). It gives the same table through the shared
memory, over Arrow Flight on loopback, and as a file in the page cache; the reader adds up every
column, so that it has seen every byte whichever way they came.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as fl

from bench.datapath import surfaced
from bench.measure import Measure, interleave, rate, seconds
from bench.placement import tag_of
from bench.report import Figure, Report, compared, scaled
from bench.system import running, wait_for
from tagmem import shared
from tagmem.base.units import MIB
from tagmem.client.mapping import address_of
from tagmem.shared.coherence import SoftwareCoherent, publish, refresh
from tagmem.shared.lines import CpuLines, instructions
from tagmem.shared.memory import MappedMemory

_TAG = tag_of(1)
_LOOKUPS = 1_000
_READY_SECONDS = 60.0


class Ways:
    """The same table, three ways; each returns it."""

    def __init__(self, run_dir: Path, port: int, file: Path) -> None:
        self._run_dir = run_dir
        self._client = fl.connect(f"grpc://127.0.0.1:{port}")
        self._file = str(file)
        self.catalogue = shared.open(_TAG, run_dir=run_dir, timeout=0)

    def here(self) -> pa.Table:
        """Verified already: what every get but the first costs."""
        return self.catalogue.get("table")

    def first(self) -> pa.Table:
        """Open the tag, find the table, verify its checksum."""
        with shared.open(_TAG, run_dir=self._run_dir, timeout=0) as catalogue:
            return catalogue.get("table")

    def flight(self) -> pa.Table:
        return self._client.do_get(fl.Ticket(b"")).read_all()

    def file(self) -> pa.Table:
        with pa.OSFile(self._file) as source:
            return pa.ipc.open_file(source).read_all()

    def mapped_file(self) -> pa.Table:
        with pa.memory_map(self._file) as source:
            return pa.ipc.open_file(source).read_all()

    def close(self) -> None:
        self._client.close()
        self.catalogue.close()


@contextmanager
def other_host(size: int) -> Iterator[Ways]:
    """Another process that has the table."""
    with (
        surfaced(2 * size + 4 * MIB) as run_dir,
        tempfile.TemporaryDirectory(prefix="tagmem-bench-") as name,
    ):
        folder = Path(name)
        log, file = folder / "log", folder / "table.arrow"
        command = [sys.executable, "-m", "bench.other_host", str(run_dir), _TAG, str(size)]
        with running([*command, str(file)], log):
            wait_for("the other host", lambda: log.read_bytes().endswith(b"\n"), _READY_SECONDS)
            ways = Ways(run_dir, int(log.read_text("utf-8").split()[-1]), file)
            try:
                yield ways
            finally:
                ways.close()


def _added_up(get: Callable[[], pa.Table]) -> Measure:
    return lambda: seconds(lambda: [pc.sum(column) for column in get().columns])


def _copied(table: pa.Table) -> int:
    """Bytes of a table that lie in this process's own memory, and not in a file's that is mapped:
    who got them there has copied them.
    """
    mapped = []
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        span, *_, path = line.split()
        if path.startswith("/") and "tagmem-bench-" in path:
            begin, end = (int(part, 16) for part in span.split("-"))
            mapped.append(range(begin, end))
    buffers = [b for column in table.columns for c in column.chunks for b in c.buffers() if b]
    return sum(b.size for b in buffers if not any(b.address in span for span in mapped))


def _table(size: int, rounds: int) -> Iterator[Figure]:
    with other_host(size) as ways:
        ours = _added_up(ways.here)
        for name, get in (
            ("Arrow Flight on loopback", ways.flight),
            ("reading a file in page cache", ways.file),
            ("mapping a file in page cache", ways.mapped_file),
        ):
            pair = interleave(ours, _added_up(get), rounds)
            aim = "" if get == ways.mapped_file else "below 1"
            met = pair.ratio.median < 1 if aim else None
            yield compared(
                f"a table of another host, added up, against {name}", pair, "s", aim, met
            )
        pair = interleave(_added_up(ways.first), _added_up(ways.flight), rounds)
        yield compared(
            "the same with open and first get, checksum verified, against Flight", pair, "s"
        )
        copied = _copied(ways.first())
        for name, get in (("Arrow Flight", ways.flight), ("reading a file", ways.file)):
            theirs = _copied(get())
            yield Figure(
                f"bytes of it that were copied, against {name}",
                scaled(copied, "B"),
                scaled(theirs, "B"),
                f"**{copied / theirs:.3g}**",
                "0",
                copied == 0,
            )


def _look_up(rounds: int) -> Figure:
    """Of a name that is known: one line is invalidated and loaded, then it is a dictionary."""
    buffer = bytearray(8 * MIB)
    with shared.create(buffer) as writer:
        names = [f"object {number}" for number in range(_LOOKUPS)]
        for name in names:
            writer.put(name, b"x")
        known = dict(writer.entries)
        memory = MappedMemory(buffer, SoftwareCoherent(shared.cpu_lines(buffer)))
        look = shared.Catalogue.open(memory).look
        pair = interleave(
            rate(_LOOKUPS, lambda: [look(name) for name in names]),
            rate(_LOOKUPS, lambda: [known[name] for name in names]),
            rounds,
        )
    return compared("look-ups of a name, against a dictionary", pair, "/s")


def _coherence(size: int, rounds: int) -> Iterator[Figure]:
    """Per MiB; every line is dirty before a write-back, and in the cache before an invalidation."""
    with mmap.mmap(-1, size) as mapping:
        here = instructions()
        lines = CpuLines(mapping, here)
        memory = MappedMemory(mapping, SoftwareCoherent(lines))
        at, mib = address_of(mapping), size / MIB

        def per_mib(work: Callable[[], object], byte: int) -> Measure:
            def measure() -> float:
                ctypes.memset(at, byte, size)
                return seconds(work) / mib

            return measure

        def bare_publish() -> None:
            here.write_back(at, size)
            here.fence()

        ours = per_mib(lambda: publish(memory, 0, size), 1)
        pair = interleave(ours, per_mib(bare_publish, 2), rounds)
        yield compared("publish, per MiB, against bare instructions", pair, "s")
        ours = per_mib(lambda: refresh(memory, 0, size), 3)
        pair = interleave(ours, per_mib(lambda: here.invalidate(at, size), 4), rounds)
        yield compared("refresh, per MiB, against bare instructions", pair, "s")
        memory.release()
        lines.release()


def run(*, quick: bool) -> Report:
    size = (8 if quick else 256) * MIB
    rounds = 3 if quick else 21
    figures = (
        *_table(size, rounds),
        _look_up(rounds),
        *_coherence(size // 4, rounds),
    )
    about = f"A table of {size >> 20} MiB that another process wrote."
    ways = instructions()
    remark = (
        f"Lines of {ways.line_bytes} B are written back with {ways.write_back_way.name} and "
        f"invalidated with {ways.invalidate_way.name}. Bytes copied are those that lie in the "
        "reader's own memory; the kernel's copies through a socket come on top of Flight's."
    )
    return Report("shared", about, figures, (remark,))
