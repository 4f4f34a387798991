"""Figures for Prometheus, written by hand: the format is simple, its library costs 79 ms of start.

No figure is labelled by tag: there are as many tags as users like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tagmem.engine import Engine
from tagmem.orchestrator.documents import View
from tagmem.orchestrator.sessions import Sessions
from tagmem.ports import Step

Sample = tuple[dict[str, str], float]


class Metrics:
    """Counts what passes, and reads the rest from the state when asked."""

    def __init__(self, engine: Engine, version: str) -> None:
        self._engine = engine
        self._version = version
        self._notes: Counter[str] = Counter()
        self._commits = 0
        self._steps = 0
        self.answers: Counter[int] = Counter()
        """Requests answered, by HTTP status."""
        engine.observe(self._observe)

    def _observe(self, steps: list[Step], last_history: int) -> None:
        self._commits += 1
        self._steps += len(steps)
        for step in steps:
            for note in step.notes:
                self._notes[note.type] += 1

    def text(self, view: View, sessions: Sessions) -> str:
        """All figures in the text exposition format, version 0.0.4."""
        lines: list[str] = []
        add = lines.extend
        add(_family("build_info", "gauge", "Always 1.", [({"version": self._version}, 1)]))
        add(_family("events_total", "counter", "Public events.", _counted("type", self._notes)))
        add(
            _family(
                "http_answers_total",
                "counter",
                "Requests answered.",
                _counted("status", Counter({str(k): v for k, v in self.answers.items()})),
            )
        )
        add(_family("commits_total", "counter", "Batches handled.", [({}, self._commits)]))
        add(_family("steps_total", "counter", "Events handled.", [({}, self._steps)]))
        add(_family("queue_events", "gauge", "Events waiting.", [({}, self._engine.waiting)]))
        states = Counter(record.state.value for record in view.capacities.values())
        add(_family("capacities", "gauge", "Capacities held.", _counted("state", states)))
        add(_family("quarantined", "gauge", "Unknown holdings.", [({}, len(view.quarantine))]))
        add(_family("hosts", "gauge", "Hosts registered.", [({}, len(view.hosts))]))
        add(_family("hosts_connected", "gauge", "Agents connected.", [({}, len(sessions))]))
        add(
            _family(
                "appliance_up",
                "gauge",
                "1 when an appliance's picture can be trusted.",
                [
                    ({"appliance": record.id}, float(record.state.value == "ready"))
                    for record in view.appliances.values()
                ],
            )
        )
        add(
            _family(
                "pool_capacity_bytes", "gauge", "Bytes of each pool.", list(_pool_samples(view))
            )
        )
        return "\n".join(lines) + "\n"


def _pool_samples(view: View) -> Iterable[Sample]:
    for record in view.appliances.values():
        seen: set[int] = set()
        for region in record.regions:
            if region.pool in seen:
                continue
            seen.add(region.pool)
            free, _ = view.free_bytes(record.id, region.index)
            labels = {"appliance": record.id, "pool": str(region.pool)}
            yield {**labels, "state": "free"}, free
            yield {**labels, "state": "used"}, region.size_bytes - free


def _counted(label: str, counter: Counter[str]) -> list[Sample]:
    return [({label: name}, count) for name, count in sorted(counter.items())]


def _family(name: str, kind: str, about: str, samples: list[Sample]) -> list[str]:
    lines = [f"# HELP tagmem_{name} {about}", f"# TYPE tagmem_{name} {kind}"]
    for labels, value in samples:
        pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        lines.append(
            f"tagmem_{name}{{{pairs}}} {_number(value)}"
            if pairs
            else f"tagmem_{name} {_number(value)}"
        )
    return lines


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    # Bytes of a pool need all their digits.
    return str(int(value)) if value == int(value) else repr(value)
