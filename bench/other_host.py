"""The other host of the benchmark `shared`: a process that gives one table away three ways.

`python -m bench.other_host RUN_DIR TAG BYTES FILE`: puts a table of about BYTES into the tag's
catalogue, writes the same as an Arrow file to FILE, prints the port of an Arrow Flight server on
loopback that has it too, and serves until it is told to end.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from tagmem import shared


def table_of(size_bytes: int) -> pa.Table:
    """Three columns of numbers, a quarter of them 4 bytes wide."""
    rows = size_bytes // 20
    number = np.arange(rows, dtype=np.int64)
    return pa.table({"id": number, "amount": number / 4, "shop": (number % 97).astype(np.int32)})


class Server(fl.FlightServerBase):  # type: ignore[misc]  # pyarrow ships no types
    """Serves one table to whoever asks."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._table = table

    def do_get(self, context: Any, ticket: Any) -> Any:
        return fl.RecordBatchStream(self._table)


def main(run_dir: str, tag: str, size_bytes: int, file: str) -> None:
    table = table_of(size_bytes)
    with shared.create(tag, run_dir=run_dir, timeout=0) as catalogue:
        catalogue.put("table", table)
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    server = Server(table)
    print(server.port, flush=True)
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
