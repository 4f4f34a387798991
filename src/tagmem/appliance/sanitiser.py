"""Wipes media: small jobs at once, in the loop, and the others in one thread, a bounded chunk of
each in turn, so that a large tag does not hold up smaller ones.

Jobs come from the outbox and report back as events; a process that dies in between finds them there
again. A job taken by force from media that somebody still maps waits, and says for whom.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator

from tagmem.domain.device_records import Sanitise, SanitiseDone, SanitiseFailed, SanitiseMethod
from tagmem.ports import Event, Media, Wiped

log = logging.getLogger(__name__)

SMALL_BYTES = 4 << 20
"""Wiped and read back in a fraction of a millisecond, which taking turns with a thread would cost
as well."""
HELD_RETRY_SECONDS = 0.5
"""Between two looks at who still maps what was taken by force."""

Job = Generator[None, None, Wiped]
Call = Callable[..., None]
"""Has the loop call a function: at once from the loop itself, in its next turn from a thread."""


class Sanitiser:
    """Runs Sanitise effects; `post` gets their results in the event loop."""

    def __init__(self, media: Media, post: Callable[[Event], None]) -> None:
        self._media = media
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[tuple[Sanitise, Job]] = deque()
        self._wake = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="sanitise", daemon=True)
        self._thread.start()

    def perform(self, effect: Sanitise) -> None:
        """Queue a job, or do it when the loop comes round next."""
        job = self._job(effect)
        if effect.forced or sum(piece.length for piece in effect.pieces) > SMALL_BYTES:
            self._queue(effect, job)
        else:
            self._loop.call_soon(self._advance, effect, job, _at_once)

    def _queue(self, effect: Sanitise, job: Job) -> None:
        with self._wake:
            self._jobs.append((effect, job))
            self._wake.notify()

    def _job(self, effect: Sanitise) -> Job:
        pieces = self._media.positions((p.start, p.length, p.at) for p in effect.pieces)
        if effect.forced:
            holding = self._media.revoke(effect.file, effect.pool, pieces)
            if holding:
                raise BlockingIOError(", ".join(f"{h.name}[{h.pid}] {h.how} it" for h in holding))
        return (yield from self._media.sanitise(effect.file, effect.pool, pieces, part=effect.part))

    def close(self) -> None:
        """Stop after the chunk under way; what is unfinished stays in the outbox."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        self._thread.join()

    # ---- in the thread, or in the loop where the job is small

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._ending:
                    self._wake.wait()
                if self._ending:
                    return
                effect, job = self._jobs.popleft()
            self._advance(effect, job, self._in_loop)

    def _advance(self, effect: Sanitise, job: Job, call: Call) -> None:
        try:
            next(job)
        except StopIteration as end:
            call(self._post, _done(effect, end.value))
        except BlockingIOError as error:
            log.warning("sanitise %s waits: %s", effect.file, error)
            call(self._retry, effect)
        except (OSError, ValueError) as error:
            log.error("sanitise %s failed: %s", effect.file, error)
            call(self._post, SanitiseFailed(effect.id, effect.allocation, str(error)))
        else:
            self._queue(effect, job)

    def _in_loop(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed: the process ends, and the outbox still has the job.
            return

    # ---- in the loop

    def _retry(self, effect: Sanitise) -> None:
        self._loop.call_later(HELD_RETRY_SECONDS, self.perform, effect)


def _at_once(function: Callable[..., object], *args: object) -> None:
    function(*args)


def _done(effect: Sanitise, wiped: Wiped) -> SanitiseDone:
    return SanitiseDone(
        effect.id,
        effect.allocation,
        SanitiseMethod.PUNCH if wiped.punched else SanitiseMethod.OVERWRITE,
        wiped.sanitised_bytes,
        wiped.read_back_bytes,
    )
