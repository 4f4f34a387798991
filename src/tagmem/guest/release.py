"""The way of one tag back: ask its holders, stop them, prove that nobody has it.

As on a host (`domain.ladder`), but for the rungs that a guest does not have: what lies beyond is
the host's. A rung without time is left out, so `ask_ms` 0 and `stop_ms` 0 only look.

Given the time with each step, it waits for nothing itself: whoever drives it wakes it at `next_at`,
and at once when something ended.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from tagmem.guest.commands import Command
from tagmem.io.holders import Holding, Proof, Prover, Target
from tagmem.wire.guest import HOLDERS_MAX, Holder

LOOK_SECONDS_MIN = 0.01
LOOK_SECONDS_MAX = 0.25
"""Looks through /proc while waiting come less often, the longer it takes."""


class Outcome(NamedTuple):
    """How it ended: proved, or who holds it."""

    proof: Proof
    stopped: tuple[Holder, ...]

    @property
    def released(self) -> bool:
        """Whether it is proved that nobody has the tag."""
        return self.proof.complete and not self.proof.holders


class Release:
    """One tag on its way back. `commands` gives those that we started and that still run."""

    def __init__(
        self,
        target: Target,
        prover: Prover,
        commands: Callable[[], list[Command]],
        *,
        now: float,
        ask_ms: int,
        stop_ms: int,
        everyone: bool,
    ) -> None:
        self.target = target
        self._prover = prover
        self._commands = commands
        self._everyone = everyone
        self._ask_ms = ask_ms
        self._stop_ms = stop_ms
        self._ask_until = now + ask_ms / 1000
        self._stop_until = self._ask_until + stop_ms / 1000
        self._pause = LOOK_SECONDS_MIN
        self._asked: set[int] = set()
        self._ours: set[int] = set()
        """Sessions that we started; kept, for their first process may end before the others."""
        self._stopped: dict[int, Holder] = {}
        self.next_at = now

    def step(self, now: float) -> Outcome | None:
        """Look, and do what is due; None while it is under way."""
        proof = self._prover.check([self.target])[self.target.tag]
        running = self._on_the_tag(proof)
        self._ours |= {command.process.pid for command in running}
        if not running and proof.complete and not proof.holders:
            return self._outcome(proof)
        within_reach = bool(running) or any(self._may_signal(h.pid) for h in proof.holders)
        if now < self._ask_until:
            self._ask(running, proof)
        elif now < self._stop_until and (within_reach or not proof.complete):
            self._stop(running, proof)
        else:
            return self._outcome(self._with_commands(proof, running))
        self._pause = min(self._pause * 1.5, LOOK_SECONDS_MAX)
        until = self._ask_until if now < self._ask_until else self._stop_until
        self.next_at = min(now + self._pause, until)
        return None

    def _on_the_tag(self, proof: Proof) -> list[Command]:
        """Those that were started on it, and those that took it up by themselves."""
        holding = {_session(holder.pid) for holder in proof.holders} | self._ours
        return [
            command
            for command in self._commands()
            if command.request.tag == self.target.tag or command.process.pid in holding
        ]

    def _may_signal(self, pid: int) -> bool:
        return self._everyone or _session(pid) in self._ours

    def _ask(self, running: list[Command], proof: Proof) -> None:
        """Each is asked once: what we started as a whole, others one by one."""
        for command in running:
            if command.process.pid not in self._asked:
                self._asked.add(command.process.pid)
                command.signal(signal.SIGTERM)
        fresh = {holder.pid for holder in proof.holders} - self._asked
        if fresh:
            self._asked |= fresh
            groups = {command.process.pid for command in running}
            self._prover.kill(
                self.target,
                signal.SIGTERM,
                lambda pid: pid in fresh and _group(pid) not in groups and self._may_signal(pid),
            )

    def _stop(self, running: list[Command], proof: Proof) -> None:
        for command in running:
            command.signal(signal.SIGKILL)
        if proof.holders:
            for holder in self._prover.kill(self.target, signal.SIGKILL, self._may_signal):
                self._stopped[holder.pid] = as_told(holder)

    def _with_commands(self, proof: Proof, running: list[Command]) -> Proof:
        """What we started on the tag counts as holding it, even while it maps nothing."""
        known = {holder.pid for holder in proof.holders}
        more = tuple(
            Holding(command.process.pid, os.path.basename(command.request.argv[0]), "open")
            for command in running
            if command.process.pid not in known
        )
        return proof._replace(holders=proof.holders + more)

    def _outcome(self, proof: Proof) -> Outcome:
        return Outcome(proof, tuple(self._stopped.values())[:HOLDERS_MAX])


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def as_told(holder: Holding) -> Holder:
    """A holder as the host is told of it."""
    return Holder(holder.pid, holder.name[:64] or "?", holder.how)
