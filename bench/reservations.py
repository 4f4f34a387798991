"""Durable reserve and free of capacity that no host is offered yet: pairs per second, over HTTP."""

from __future__ import annotations

from bench.load import Load, drive
from bench.measure import Pair, Sample, quantile
from bench.report import Figure, Report, compared, scaled
from bench.system import floor_server, system
from bench.work import bare_pair, hold, pair

AIM = 1_200
HELD = 10_000
FLAT_MIN = 0.8
CLIENTS = (1, 8, 64)
_SIZE = 64 << 30


def _turns(ours: list[Load], floor: list[Load]) -> Pair:
    return Pair(
        Sample(tuple(load.rate for load in ours)), Sample(tuple(load.rate for load in floor))
    )


def _line(name: str, loads: list[Load]) -> Figure:
    times = [taken for load in loads for taken in load.times]
    p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
    return Figure(name, f"p50 {scaled(p50, 's')}, p99 {scaled(p99, 's')}")


def run(*, quick: bool) -> Report:
    rounds, seconds = (2, 0.5) if quick else (7, 1.5)
    figures: list[Figure] = []
    with (
        system(1, _SIZE) as few,
        few.started(agents=False),
        floor_server() as bare,
    ):
        for clients in CLIENTS:
            ours: list[Load] = []
            floor: list[Load] = []
            for _ in range(rounds):
                ours.append(drive(few.api, clients, seconds, pair))
                floor.append(drive(bare, clients, seconds, bare_pair))
            both = _turns(ours, floor)
            many = clients > 1
            met = both.ours.median > AIM if many else None
            aim = f"more than {AIM}/s" if many else ""
            figures.append(compared(f"pairs, {clients} clients", both, "/s", aim, met))
            figures.append(_line(f"one pair, {clients} clients", ours))
        with system(1, _SIZE) as many_held, many_held.started(agents=False):
            _fill(many_held.api)
            ours, floor = [], []
            for _ in range(rounds):
                ours.append(drive(many_held.api, 8, seconds, pair))
                floor.append(drive(few.api, 8, seconds, pair))
            both = _turns(ours, floor)
            figures.append(
                compared(
                    f"pairs, 8 clients, {HELD:,} tags held, against none held",
                    both,
                    "/s",
                    f"flat: at least {FLAT_MIN}",
                    both.ratio.median >= FLAT_MIN,
                )
            )
    about = (
        "A pair is two requests, each durable when it is answered. The floor is the same two "
        "requests "
        "to a server on the same event loop that appends them to a file with group commit and"
        " decides "
        "nothing."
    )
    return Report("reservations", about, tuple(figures))


def _fill(api: str) -> None:
    held = 0
    while held < HELD:
        held += len(drive(api, 64, 0.25, hold).times)
