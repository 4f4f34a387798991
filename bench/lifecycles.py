"""Whole lives of a tag per second: create, FM command, accept, DAX device, release, proof,
sanitised.
"""

from __future__ import annotations

from bench.load import Load, drive
from bench.measure import Pair, Sample, quantile
from bench.report import Figure, Report, compared, scaled
from bench.system import floor_server, system
from bench.work import bare_pair, lives

AIM = 500
CLIENTS = (1, 8, 64)
HOSTS = 2
_SIZE = 16 << 30


def run(*, quick: bool) -> Report:
    rounds, seconds = (2, 1.0) if quick else (7, 3.0)
    figures: list[Figure] = []
    with system(HOSTS, _SIZE) as ready, ready.started(), floor_server() as bare:
        life = lives(ready.hosts)
        drive(ready.api, 8, 0.5, life)
        for clients in CLIENTS:
            ours: list[Load] = []
            floor: list[Load] = []
            for _ in range(rounds):
                ours.append(drive(ready.api, clients, seconds, life))
                floor.append(drive(bare, clients, seconds / 3, bare_pair))
            both = Pair(
                Sample(tuple(load.rate for load in ours)),
                Sample(tuple(load.rate for load in floor)),
            )
            last = clients == CLIENTS[-1]
            met = both.ours.median >= AIM if last else None
            aim = f"at least {AIM}/s" if last else ""
            figures.append(compared(f"lives, {clients} clients", both, "/s", aim, met))
            times = [taken for load in ours for taken in load.times]
            p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
            spread = f"p50 {scaled(p50, 's')}, p99 {scaled(p99, 's')}"
            figures.append(Figure(f"one life, {clients} clients", spread))
    about = (
        f"One orchestrator, one appliance, {HOSTS} host agents, all on the cores above "
        "together with "
        "the clients. A life is a PUT that is answered when the host has surfaced the DAX "
        "device, and "
        "a DELETE that is answered when every byte has been wiped, read back and is free "
        "again. The "
        "floor is two durable requests to a server that does nothing else."
    )
    return Report("lifecycles", about, tuple(figures))
