"""Durable effects of one appliance from commit to done: the outbox as its session sees it. No I/O.

Effects on one tag and host form a *lane* and go out one after another, in the order of their
commits; lanes do not wait for each other. An effect that the device answers with Retry Required
waits, longer each time, until a later effect comes in its lane: then it is given up, because the
device has refused it so far and what comes later matters more.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from enum import Enum

from tagmem.base.ids import Tag
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.domain.effects import DurableEffect
from tagmem.wire.layout import WireStruct

RETRY_FIRST_NS: Nanoseconds = 5 * MILLISECOND
RETRY_LAST_NS: Nanoseconds = 1 * SECOND


class State(Enum):
    """Where an effect is."""

    QUEUED = 1
    SENT = 2
    RETRYING = 3
    UNKNOWN = 4
    """Sent, and the session ended without an answer."""
    ANSWERED = 5
    """Its answer was told; the step that declares it done is not committed yet."""


class Job:
    """One effect. `requests` is what is still to be asked for it."""

    __slots__ = ("delay_ns", "effect", "lane", "requests", "state")

    def __init__(self, effect: DurableEffect) -> None:
        self.effect = effect
        self.lane: tuple[int, Tag] = (effect.ld, effect.tag)
        self.state = State.QUEUED
        self.requests: deque[WireStruct] = deque()
        self.delay_ns = RETRY_FIRST_NS


class Pending:
    """The effects of one appliance that are not known to be done."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._lanes: dict[tuple[int, Tag], deque[Job]] = {}
        self._ready: deque[Job] = deque()
        self._retries: list[tuple[Nanoseconds, int]] = []
        self.sent = 0
        """Commands under way."""

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, effect: DurableEffect) -> Job | None:
        """Queue a committed effect; repeats are ignored. Returns the job that this one gives up."""
        if effect.id in self._jobs:
            return None
        job = Job(effect)
        self._jobs[effect.id] = job
        lane = self._lanes.setdefault(job.lane, deque())
        lane.append(job)
        if lane[0] is job:
            self._ready.append(job)
        elif lane[0].state is State.RETRYING:
            return lane[0]
        return None

    def forget(self, effect_ids: Iterable[int]) -> None:
        """These are done, by a committed step."""
        for effect_id in effect_ids:
            job = self._jobs.pop(effect_id, None)
            if job is not None and job.state is not State.SENT:
                self._leave_lane(job)

    def take(self) -> Job | None:
        """The next effect that may go out; None when there is none."""
        while self._ready:
            job = self._ready.popleft()
            if job.state is State.QUEUED and job.effect.id in self._jobs:
                return job
        return None

    def go_on(self, job: Job) -> None:
        """One request of several is answered: the next one of this effect may go out."""
        job.requests.popleft()
        job.state = State.QUEUED
        self._ready.appendleft(job)

    def retry(self, job: Job, now: Nanoseconds) -> bool:
        """The device has no room: wait. False when the effect should be given up instead."""
        job.state = State.RETRYING
        if job.effect.id not in self._jobs or len(self._lanes[job.lane]) > 1:
            return False
        heapq.heappush(self._retries, (now + job.delay_ns, job.effect.id))
        job.delay_ns = min(2 * job.delay_ns, RETRY_LAST_NS)
        return True

    @property
    def retry_at(self) -> Nanoseconds | None:
        """When the next waiting effect may go out again."""
        return self._retries[0][0] if self._retries else None

    def tick(self, now: Nanoseconds) -> None:
        """Let those go that waited long enough."""
        while self._retries and self._retries[0][0] <= now:
            _, effect_id = heapq.heappop(self._retries)
            job = self._jobs.get(effect_id)
            if job is not None and job.state is State.RETRYING:
                job.state = State.QUEUED
                self._ready.append(job)

    def answered(self, job: Job) -> None:
        """Its answer is told; the next of its lane may go out."""
        job.state = State.ANSWERED
        job.requests.clear()
        self._leave_lane(job)

    def _leave_lane(self, job: Job) -> None:
        lane = self._lanes.get(job.lane)
        if lane is None or job not in lane:
            return
        first = lane[0] is job
        lane.remove(job)
        if not lane:
            del self._lanes[job.lane]
        elif first:
            self._ready.append(lane[0])

    def suspend(self) -> list[int]:
        """The session ended: nothing goes out. Returns the ids whose outcome is unknown."""
        unknown = []
        self._lanes.clear()
        self._ready.clear()
        self._retries.clear()
        self.sent = 0
        for job in self._jobs.values():
            if job.state is State.SENT:
                job.state = State.UNKNOWN
                unknown.append(job.effect.id)
            if job.state is not State.ANSWERED:
                job.requests.clear()
                self._lanes.setdefault(job.lane, deque()).append(job)
        return unknown

    def resume(self) -> None:
        """The truth is known and committed: what is left may go out, from its beginning."""
        self._retries.clear()
        for lane in self._lanes.values():
            for job in lane:
                job.state = State.QUEUED
                job.delay_ns = RETRY_FIRST_NS
        self._ready = deque(lane[0] for lane in self._lanes.values())
