"""`python -m bench [NAME...] [--quick]`: run benchmarks one after the other, write RESULTS.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from bench import machine, report

NAMES = (
    "codec",
    "placement",
    "datapath",
    "shared",
    "start",
    "reservations",
    "lifecycles",
    "handover",
    "capacity",
)
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = """# What it costs

Written by `make bench`; some parts anew by `make bench ARGS="codec start"`. Each figure stands
beside a *floor*, the least that anybody could do for the same result, measured in turn with ours in
the same run. Medians, with quartiles in brackets. Where the unit is a time or a size, a ratio of 1
is perfect and less is better; where it is a rate, more is better.
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="few rounds; writes no results")
    parser.add_argument("--output", type=Path, help=f"where results go instead of {RESULTS.name}")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {unknown[0]}")
    output = arguments.output or (None if arguments.quick else RESULTS)
    sections = report.read_sections(output) if output else {}
    head = "\n".join([HEAD, *machine.describe(Path(tempfile.gettempdir()))]) + "\n"
    print(head, flush=True)
    missed = 0
    for name in arguments.names or NAMES:
        begun = time.monotonic()
        load = f"Load average of the machine when this began: {os.getloadavg()[0]:.2f}."
        found: report.Report = import_module(f"bench.{name}").run(quick=arguments.quick)
        sections[name] = report.section(replace(found, remarks=(*found.remarks, load)))
        missed += sum(figure.met is False for figure in found.figures)
        print(f"## {name}\n{sections[name]}\n({time.monotonic() - begun:.0f} s)\n", flush=True)
        if output:
            output.write_text(report.page(head, sections, NAMES), "utf-8")
    print(f"{missed} aims missed" if missed else "every aim met")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
