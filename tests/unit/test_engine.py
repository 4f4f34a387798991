"""The engine's promises to those who read: only what is durable is ever seen."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tagmem.base.errors import StorageFailed
from tagmem.base.units import Nanoseconds
from tagmem.engine import Engine
from tagmem.ports import Batch, Change, Effect, Event, Finish, HistoryEntry, Loaded, Step


class Add(Event, frozen=True):
    """Count one more."""


class Counting:
    """A machine that counts."""

    def __init__(self) -> None:
        self.count = 0

    def restore(self, loaded: Loaded) -> None:
        self.count = sum(1 for _ in loaded.records)

    def step(self, event: Event, now: Nanoseconds) -> Step:
        self.count += 1
        return Step(changes=(Change("count", str(self.count), None),), reply=self.count)

    def next_deadline(self) -> Nanoseconds | None:
        return None


class Gated:
    """A store whose commits wait to be let through, or refused."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.refuse = False
        self.kept = 0

    def load(self) -> Loaded:
        return Loaded([("count", str(n), None) for n in range(self.kept)], (), 0)

    def commit(self, batch: Batch) -> int:
        return self.begin(batch)()

    def begin(self, batch: Batch) -> Finish:
        def finish() -> int:
            self.entered.set()
            self.gate.wait()
            if self.refuse:
                raise StorageFailed("full")
            self.kept += len(batch.steps)
            return 0

        return finish

    def history(self, after: int, limit: int) -> list[HistoryEntry]:
        return []

    def last_history(self) -> int:
        return 0

    def close(self) -> None:
        return None


class Still:
    """A clock that stands."""

    def now(self) -> Nanoseconds:
        return 0


def nothing(effect: Effect) -> None:
    raise AssertionError(f"unexpected {effect}")


async def during_a_commit(refuse: bool) -> tuple[Any, Any, int]:
    store, machine = Gated(), Counting()
    engine = Engine(machine, store, Still(), nothing)
    task = asyncio.create_task(engine.run())
    asked = asyncio.create_task(engine.submit(Add(), lambda reply: ("answer", reply)))
    await asyncio.to_thread(store.entered.wait)
    ahead = machine.count
    seen = asyncio.create_task(engine.read(lambda: machine.count))
    await asyncio.to_thread(lambda: None)
    assert not seen.done()
    store.refuse = refuse
    store.gate.set()
    answers = await asyncio.gather(asked, seen, return_exceptions=True)
    await engine.stop()
    await task
    return answers[0], answers[1], ahead


def test_a_reader_waits_for_the_commit_under_way() -> None:
    answer, seen, ahead = asyncio.run(during_a_commit(refuse=False))
    assert (answer, seen, ahead) == (("answer", 1), 1, 1)


def test_what_a_refused_commit_would_have_kept_is_never_seen() -> None:
    answer, seen, ahead = asyncio.run(during_a_commit(refuse=True))
    assert isinstance(answer, StorageFailed)
    assert (seen, ahead) == (0, 1)


def test_a_mistake_in_a_reader_is_its_own() -> None:
    async def main() -> None:
        store = Gated()
        store.gate.set()
        engine = Engine(Counting(), store, Still(), nothing)
        task = asyncio.create_task(engine.run())
        with pytest.raises(ZeroDivisionError):
            await engine.submit(Add(), lambda _: 1 / 0)
        assert await engine.submit(Add()) == 2
        await engine.stop()
        await task

    asyncio.run(main())
