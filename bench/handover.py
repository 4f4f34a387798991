"""How long a hand-over takes, and that it does not take longer for more bytes."""

from __future__ import annotations

import json
import mmap
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from bench.load import Answer, ask, connect, request
from bench.measure import Pair, Sample, interleave, seconds
from bench.report import Figure, Report, compared, scaled
from bench.system import System, system

SIZES = (1 << 30, 8 << 30)
GROWTH_AIM = 1.2
_STEP = 1 << 16
"""One byte in so many is written: so every part of the media is there, in a sixteenth of its
memory."""
_WAIT = "Prefer: wait=30\r\n"


class Refused(Exception):
    """The orchestrator did not do it."""


def _do(sock: socket.socket, method: str, path: str, body: object = None) -> Answer:
    data = b"" if body is None else json.dumps(body).encode()
    answer = ask(sock, request(method, f"/v1/capacities/{path}", data, _WAIT))
    if answer.status not in (200, 201, 204):
        raise Refused(f"{method} {path}: {answer.status} {answer.body!r}")
    return answer


def _loaded(ready: System, sock: socket.socket, size: int) -> str:
    tag = str(uuid4())
    first = ready.hosts[0]
    _do(sock, "PUT", tag, {"size_bytes": size, "hosts": [first], "sharing": "hardware-coherent"})
    path = ready.run_dir(first) / "by-tag" / tag
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as view:
        for at in range(0, size, _STEP):
            view[at] = 1
    return tag


def _hand_overs(sock: socket.socket, tag: str, hosts: tuple[str, ...]) -> Callable[[], float]:
    """There and back, by turns; the time of one."""
    there = list(hosts[:2])

    def one() -> float:
        source, target = there
        there.reverse()
        body = {"from": source, "to": target}
        return seconds(lambda: _do(sock, "POST", f"{tag}/hand-over", body))

    return one


def _by_hand(sock: socket.socket, tag: str, hosts: tuple[str, ...]) -> Callable[[], float]:
    """The least that does it: one host more, then one less, with nothing to hold on to."""
    there = list(hosts[:2])

    def one() -> float:
        source, target = there
        there.reverse()

        def both() -> None:
            _do(sock, "PUT", f"{tag}/attachments/{target}")
            _do(sock, "DELETE", f"{tag}/attachments/{source}")

        return seconds(both)

    return one


def _copied(folder: Path, size: int) -> float:
    """What people do otherwise: copy the bytes within this machine's memory."""
    one, other = folder / "one", folder / "other"
    with one.open("wb") as file:
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    begun = time.perf_counter()
    shutil.copyfile(one, other)
    taken = time.perf_counter() - begun
    one.unlink()
    other.unlink()
    return taken


def run(*, quick: bool) -> Report:
    rounds = 5 if quick else 25
    figures: list[Figure] = []
    medians: list[float] = []
    with system(2, 2 * sum(SIZES), shared=True) as ready, ready.started():
        with connect(ready.api) as sock:
            for size in SIZES:
                tag, plain = _loaded(ready, sock, size), _loaded(ready, sock, size)
                ours = _hand_overs(sock, tag, ready.hosts)
                pair: Pair = interleave(ours, _by_hand(sock, plain, ready.hosts), rounds)
                figures.append(compared(f"hand-over of {size >> 30} GiB", pair, "s"))
                medians.append(pair.ours.median)
                for each in (tag, plain):
                    _do(sock, "DELETE", each)
        copied = Sample(tuple(_copied(ready.memory, SIZES[0]) for _ in range(3)))
    growth = medians[-1] / medians[0]
    aim = f"at most {GROWTH_AIM:g}"
    figures.append(
        Figure("growth from 1 GiB to 8 GiB", f"{growth:.3g}", "", "", aim, growth <= GROWTH_AIM)
    )
    figures.append(Figure("for comparison: copying 1 GiB in memory", scaled(copied.median, "s")))
    about = (
        "Two hosts take a tag from each other by turns; one byte of every 64 KiB is written. A "
        "hand-over is one request, answered when the next host can open the tag and the last one "
        "has proved that nothing there maps it; a reference keeps the bytes meanwhile. The floor "
        "is the same by hand, one host more and then one less, with nothing to keep the bytes."
    )
    return Report("handover", about, tuple(figures))
