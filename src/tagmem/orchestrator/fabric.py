"""The shell around the links: one connection per registered appliance, kept alive.

Each `_Port` connects, feeds its link, sends what the link has to send, posts what it tells, and
connects again later each time when the connection ends. What to do is the link's business; this
file only moves bytes, time and events.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import ApplianceId
from tagmem.base.units import MILLISECOND, SECOND, Nanoseconds
from tagmem.domain.effects import (
    ApplianceDisconnected,
    ApplianceSnapshot,
    ConnectAppliance,
    DurableEffect,
    ReadAppliance,
)
from tagmem.domain.records import ApplianceRecord
from tagmem.engine import Engine
from tagmem.orchestrator.links import FmLink
from tagmem.ports import Clock, Dial, Effect, FabricLink, Loaded, Step, Stream

log = logging.getLogger(__name__)

PAUSE_FIRST_NS: Nanoseconds = 50 * MILLISECOND
PAUSE_LAST_NS: Nanoseconds = 5 * SECOND
"""Between two attempts to connect; doubled each time, and short again after a snapshot."""

LinkFactory = Callable[[ApplianceId], FabricLink]


class Links:
    """The links to all appliances. `dial` connects to an appliance's address."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        dial: Dial,
        link: LinkFactory = FmLink,
        *,
        pause_first_ns: Nanoseconds = PAUSE_FIRST_NS,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._dial = dial
        self._link = link
        self._pause_first_ns = pause_first_ns
        self._ports: dict[str, _Port] = {}
        self._owners: dict[int, _Port] = {}
        """Which port has a durable effect that is not done yet."""
        self._closing = False
        engine.observe(self._committed)

    def start(self, loaded: Loaded) -> None:
        """Connect to the appliances on record and take up the outbox."""
        for _, _, record in loaded.records:
            if isinstance(record, ApplianceRecord):
                self._open(record.id, record.address)
        for effect in loaded.outbox:
            self.perform(effect)

    def perform(self, effect: Effect) -> None:
        """Carry out one effect without waiting; its result is posted as an event."""
        if isinstance(effect, ConnectAppliance):
            self._open(effect.appliance, effect.address)
        elif isinstance(effect, DurableEffect | ReadAppliance):
            port = self._ports.get(effect.appliance)
            if port is None:
                # Cannot be while the books are right: an appliance is registered before it is used.
                log.error("effect %d is for %s, which has no link", effect.id, effect.appliance)
                return
            if effect.durable:
                self._owners[effect.id] = port
            port.perform(effect)

    def _open(self, appliance: ApplianceId, address: str) -> None:
        if appliance not in self._ports and not self._closing:
            link = self._link(appliance)
            port = _Port(appliance, address, link, self._engine, self._clock)
            port.start(self._dial, self._pause_first_ns)
            self._ports[appliance] = port

    def _committed(self, steps: list[Step], _last_history: int) -> None:
        for step in steps:
            for effect_id in step.done:
                port = self._owners.pop(effect_id, None)
                if port is not None:
                    port.forget(effect_id)

    async def close(self) -> None:
        """End all links. What was under way stays in the outbox."""
        self._closing = True
        for port in self._ports.values():
            await port.close()


class _Port:
    """One appliance: its link, and the connection of the moment."""

    def __init__(
        self,
        appliance: ApplianceId,
        address: str,
        link: FabricLink,
        engine: Engine,
        clock: Clock,
    ) -> None:
        self._appliance = appliance
        self._address = address
        self._link = link
        self._engine = engine
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._stream: Stream | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: Nanoseconds | None = None
        self._flush_due = False
        self._closing = False
        self._worked = False
        """This session came as far as a snapshot."""
        self._session = 0
        self._out_of_reach = False
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, dial: Dial, pause_ns: Nanoseconds) -> None:
        connecting = self._stay_connected(dial, pause_ns)
        self._task = self._loop.create_task(connecting, name=f"link {self._appliance}")

    # ---- the engine's side

    def perform(self, effect: Effect) -> None:
        self._link.perform(effect, self._clock.now())
        self._flush_soon()

    def forget(self, effect_id: int) -> None:
        self._link.forget((effect_id,), self._clock.now())
        self._flush_soon()

    def _flush_soon(self) -> None:
        """A commit brings many effects: what they make is sent at once."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def close(self) -> None:
        self._closing = True
        if self._stream is not None:
            self._stream.close("the orchestrator is ending")
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # ---- the connection

    async def _stay_connected(self, dial: Dial, pause_first_ns: Nanoseconds) -> None:
        pause_ns = pause_first_ns
        while True:
            try:
                stream = await dial(self._address)
            except (OSError, InvalidInput) as error:
                self._unreachable(error)
            else:
                self._out_of_reach = self._worked = False
                self._ended.clear()
                self._session += 1
                self._stream = stream
                stream.attach(self)
                self._link.connected(self._clock.now())
                self._flush()
                await self._ended.wait()
                if self._worked:
                    pause_ns = pause_first_ns
            await asyncio.sleep(pause_ns / SECOND)
            pause_ns = min(2 * pause_ns, PAUSE_LAST_NS)

    def _unreachable(self, error: Exception) -> None:
        """Tell it once, so that people see why an appliance is not there."""
        reason = getattr(error, "strerror", None) or str(error)
        if not self._out_of_reach:
            self._out_of_reach = True
            log.warning("appliance %s at %s: %s", self._appliance, self._address, reason)
            self._engine.post(ApplianceDisconnected(self._appliance, reason))

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes from the appliance; descriptors have no business on this port."""
        for descriptor in descriptors:
            os.close(descriptor)
        if self._stream is not None:
            self._link.feed(data, self._clock.now())
            self._flush()

    def drained(self) -> None:
        """Requests are bounded by the link, so there is nothing to go on with."""

    def closed(self, reason: str) -> None:
        """The connection ended: the link says what that leaves unknown."""
        if self._stream is None:
            return
        self._stream = None
        level = logging.INFO if self._closing else logging.WARNING
        log.log(level, "appliance %s at %s: %s", self._appliance, self._address, reason)
        self._link.disconnected(reason, self._clock.now())
        self._flush()
        self._ended.set()

    # ---- what the link wants

    def _flush(self) -> None:
        """Send what is to be sent, post what happened, and see when the link wants its tick."""
        self._flush_due = False
        stream = self._stream
        if stream is not None:
            data = self._link.outgoing()
            if data:
                stream.send(data)
        for event in self._link.events():
            if isinstance(event, ApplianceSnapshot):
                self._report(event)
            else:
                self._engine.post(event)
        if self._stream is not None and self._link.wants_close:
            self._stream.close(self._link.wants_close)
        else:
            self._set_timer()

    def _report(self, snapshot: ApplianceSnapshot) -> None:
        session = self._session
        self._worked = True

        def committed(future: asyncio.Future[object]) -> None:
            if future.cancelled():
                return
            failed = future.exception() is not None and session == self._session
            if failed and self._stream is not None:
                # The machine was set back behind this snapshot: only a new one can be believed.
                self._stream.close("the snapshot could not be kept")
            self._link.resume(self._clock.now())
            self._flush()

        self._engine.report(snapshot).add_done_callback(committed)

    def _set_timer(self) -> None:
        due = self._link.next_deadline()
        if due == self._timer_at:
            return
        # A deadline that moved away (an answer came) leaves the old timer: it ticks in vain once.
        if due is not None and self._timer_at is not None and due > self._timer_at:
            return
        self._stop_timer()
        if due is not None:
            self._timer_at = due
            delay = max(0, due - self._clock.now()) / SECOND
            self._timer = self._loop.call_later(delay, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_at = None

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._link.tick(self._clock.now())
        self._flush()
