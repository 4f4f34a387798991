"""Kills daemons of the running demo at chosen moments, to show that nothing is lost by it.

`kill -9` and nothing else: no daemon is told. The supervisor starts it again, and the demo goes on
asking until it has its answer.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from tagmem.demo.layout import DAEMONS, Layout
from tagmem.demo.patience import until

STEPS = ("decide", "offer", "accept", "launch", "load", "give back", "wipe", "re-offer")
Choose = Callable[[str, str], str]
"""Step and moment to the name of the daemon that dies then; "" for none."""
MOMENTS = ("before", "during")
"""Before the step's first request, and right after it was answered (nothing has settled yet)."""


@dataclass(slots=True)
class Chaos:
    """Which daemon dies at which moment; `choose` gives "" for none.

    `settle`, if there is one, is called before each step, when what was killed has been started
    again: so that each kill meets a system that works. Without it troubles meet.
    """

    layout: Layout
    choose: Choose = lambda _step, _moment: ""
    settle: Callable[[], object] | None = None
    killed: list[str] = field(default_factory=list)
    """`step/moment: daemon` of each kill, in order."""
    _dead: dict[str, int] = field(default_factory=dict)

    def __call__(self, step: str, moment: str) -> str:
        """Kill what is due at this moment; its name, or "" when nobody was killed."""
        if moment == MOMENTS[0] and self.settle is not None:
            until(self._replaced, "what was killed is started again")
            self.settle()
        name = self.choose(step, moment)
        pid = kill(self.layout, name) if name else 0
        if not pid:
            return ""
        self._dead[name] = pid
        self.killed.append(f"{step}/{moment}: {name}")
        return name

    def _replaced(self) -> bool | None:
        pids = running(self.layout)
        return all(pids[name] not in (0, pid) for name, pid in self._dead.items()) or None


def seeded(seed: int) -> Choose:
    """At about every second moment, one daemon at random; the same ones for the same seed."""
    world = random.Random(seed)
    return lambda _step, _moment: world.choice((*DAEMONS, *("" for _ in DAEMONS)))


def always(name: str, moment: str) -> Choose:
    """The same daemon in every step, at one moment of it."""
    return lambda _step, now: name if now == moment else ""


def kill(layout: Layout, name: str) -> int:
    """`kill -9` of a daemon; the process that was killed, 0 when it is down already."""
    pid = running(layout).get(name, 0)
    if not pid:
        return 0
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return pid


def running(layout: Layout) -> dict[str, int]:
    """Process ids by daemon, as the supervisor last wrote them; 0 while one is down."""
    try:
        document = json.loads(layout.status.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: int(facts["pid"]) for name, facts in document["daemons"].items()}
