"""A program under hosts whose caches lie: its accesses, one at a time, in an order from a seed.

Each access to the tag stops the program before it happens (tracer.c). Here it is given its turn,
the bytes that its host's cache has at that moment are put where it looks, and what it stores is
taken from there into the host's cache. So the program meets stale bytes as it would on real hosts,
and `luck` judges every access.

The order is a function of the seed as far as the program lets it be: nobody gets a turn before all
threads have come to an access or sleep. Who waits for a timer or for the world outside comes when
it comes.
"""

from __future__ import annotations

import os
import random
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import Tag
from tagmem.coherence.caches import HABITS, LINE_BYTES, Caches
from tagmem.coherence.instructions import Does, Instruction, decode
from tagmem.coherence.luck import Finding, Luck
from tagmem.coherence.processes import Processes
from tagmem.coherence.region import View
from tagmem.coherence.trace import (
    EVENT_BYTES_MAX,
    GO,
    GO_TO_FENCE,
    Code,
    Event,
    Kind,
    Site,
    decode_event,
    library,
    python_frames,
)

PAGE_BYTES = 4096
WORD_BYTES = 8
_TURNS = (1, 2, 5, 20, 60)
_SLOW_SECONDS = 0.0015
_REST_SECONDS = 5.0
_AFTER_FINDING = 20_000
"""Accesses that a program may still make once something was found: a late flush names the mistake.
"""
_WORD_FUNCTIONS = ("load_word", "store_word")
_RACING_FUNCTIONS = ("read_superblock",)
"""Of tagmem.shared: what it loads is checked by a checksum and by a word afterwards."""


@dataclass(frozen=True)
class Plan:
    """What is to be checked, and how."""

    command: Sequence[str]
    hosts: tuple[str, ...]
    size_bytes: int
    tag: Tag
    words: frozenset[int] = frozenset()
    """Offsets of words that race by design, beside those that tagmem.shared has."""
    racing: tuple[range, ...] = ()
    once: bool = False
    """Start the command on the first host only; it starts the others itself."""
    deadline_s: float = 60.0
    stdout: int | None = None
    """Where its output goes; None is ours."""


@dataclass(frozen=True)
class Verdict:
    """How one schedule went."""

    seed: int
    finding: Finding | None
    codes: tuple[int | None, ...]
    """Exit codes of the commands, by host; None of who had to be ended."""
    accesses: int
    timed_out: bool
    unfenced: bool
    """Whether somebody's fence was looked for in vain."""


@dataclass
class _Thread:
    """One traced thread, by its connection."""

    channel: socket.socket
    pid: int = 0
    tid: int = 0
    event: Event | None = None
    """What it wants to do next; None while it runs."""


class Check:
    """One schedule of a program."""

    def __init__(self, plan: Plan, seed: int) -> None:
        """Raises Unsupported (no tracer here), InvalidInput (the size)."""
        self._tracer = library()
        self._plan = plan
        self._seed = seed
        self._chance = random.Random(seed)
        habits = self._chance.choice(HABITS)
        if plan.size_bytes % PAGE_BYTES or not plan.size_bytes:
            raise InvalidInput("size", f"a multiple of {PAGE_BYTES} (bytes)", plan.size_bytes)
        self._caches = Caches(plan.size_bytes, len(plan.hosts), self._chance, habits)
        self._luck = Luck(len(plan.hosts), plan.racing)
        self._turn = self._chance.choice(_TURNS)
        self._left = 0
        self._last: _Thread | None = None
        self._threads: list[_Thread] = []
        self._views: list[View] = []
        self._code = Code()
        self._processes = Processes()
        self._accesses = 0
        self._unfenced = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> Verdict:
        """Start the command, let it end, and judge. Raises NotFound (no such command), Unsupported
        (it cannot be run).
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="tagmem-check-")))
            stack.callback(self._selector.close)
            for host, name in enumerate(self._plan.hosts):
                view = View(folder / name, self._plan.tag, self._plan.size_bytes, host=host)
                stack.callback(view.close)
                self._views.append(view)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(str(folder / "trace"))
            listener.listen(64)
            self._selector.register(listener, selectors.EVENT_READ, None)
            stack.callback(self._close_threads)
            stack.callback(self._processes.end)
            started = self._plan.hosts[:1] if self._plan.once else self._plan.hosts
            for name in started:
                self._start(folder, name)
            timed_out = not self._go(listener)
            codes = tuple(self._processes.codes())
        return Verdict(
            self._seed, self._luck.end(), codes, self._accesses, timed_out, self._unfenced
        )

    def _start(self, folder: Path, host: str) -> None:
        values = {
            "{tag}": str(self._plan.tag),
            "{host}": host,
            "{size}": str(self._plan.size_bytes),
            "{dax}": str(folder / host / "dax0.1" / "dax0.1"),
        }
        command = [_fill(argument, values) for argument in self._plan.command]
        environment = {**os.environ, **self._environment(folder, host)}
        self._processes.start(command, environment, self._plan.stdout)

    def _environment(self, folder: Path, host: str) -> Mapping[str, str]:
        preload = os.environ.get("LD_PRELOAD", "")
        return {
            "LD_PRELOAD": f"{self._tracer} {preload}".strip(),
            "TAGMEM_TRACE_SOCKET": str(folder / "trace"),
            "TAGMEM_TRACE_VIEWS": ",".join(view.identity for view in self._views),
            "TAGMEM_HOST": host,
            "TAGMEM_HOSTS_DIR": str(folder),
            "TAGMEM_RUN_DIR": str(folder / host),
            "TAGMEM_TAG": str(self._plan.tag),
            "TAGMEM_SIZE": str(self._plan.size_bytes),
            "TAGMEM_DAX": str(folder / host / "dax0.1" / "dax0.1"),
            # Copies by vectors are tens of instructions a page; by REP MOVSB they are thousands.
            "GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=0x7fffffff",
            "PYTHONHASHSEED": "0",
        }

    # ---- turns

    def _go(self, listener: socket.socket) -> bool:
        """Give turns until all have ended; False when the time is up."""
        end = time.monotonic() + self._plan.deadline_s
        found_at = 0
        while self._processes.running or self._threads:
            if time.monotonic() > end:
                return False
            if self._luck.first is not None:
                found_at = found_at or self._accesses
                if self._accesses - found_at > _AFTER_FINDING:
                    return True
            self._gather(listener, end)
            ready = [thread for thread in self._threads if thread.event is not None]
            if not ready:
                continue
            self._give(self._choose(ready))
        return True

    def _choose(self, ready: list[_Thread]) -> _Thread:
        if self._left > 0 and self._last in ready:
            self._left -= 1
            return self._last
        # The order of their numbers is that of their birth.
        ready.sort(key=lambda thread: (self._of(thread), thread.pid, thread.tid))
        self._left = self._chance.randrange(self._turn)
        self._last = ready[self._chance.randrange(len(ready))]
        return self._last

    def _of(self, thread: _Thread) -> int:
        return thread.event.host if thread.event is not None else 0

    def _gather(self, listener: socket.socket, end: float) -> None:
        """Until every thread waits: here for its turn, or for something else."""
        begun = time.monotonic()
        quiet = 0
        looked = False
        while quiet < 2 and time.monotonic() < end:
            if self._receive(listener, 0.0005 if quiet else 0):
                quiet = 0
                continue
            waiting = frozenset(t.tid for t in self._threads if t.event is not None)
            quiet = quiet + 1 if self._processes.at_rest(but=waiting) else 0
            if quiet == 2 and not waiting and self._threads and self._processes.running:
                # Everybody sleeps, and for nothing of ours: for a timer, for the world outside.
                self._receive(listener, 0.02)
                return
            if quiet == 0:
                self._receive(listener, 0.0002)
            if not looked and time.monotonic() - begun > _SLOW_SECONDS:
                # Long enough for a process to have been made.
                looked = True
                self._processes.look()
                quiet = 0
            if time.monotonic() - begun > _REST_SECONDS and waiting:
                return

    def _receive(self, listener: socket.socket, seconds: float) -> bool:
        """Take what has come; whether anything has."""
        got = False
        for key, _ in self._selector.select(seconds):
            got = True
            if key.data is None:
                channel, _ = listener.accept()
                thread = _Thread(channel)
                self._threads.append(thread)
                self._selector.register(channel, selectors.EVENT_READ, thread)
            else:
                self._take(key.data)
        return got

    def _take(self, thread: _Thread) -> bool:
        """One message of a thread; False when it has gone."""
        try:
            data = thread.channel.recv(EVENT_BYTES_MAX)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(thread.channel)
            thread.channel.close()
            self._threads.remove(thread)
            return False
        try:
            event = decode_event(data)
        except ValueError as error:
            raise InvalidInput("trace", "a tracer's events", str(error)) from None
        if not thread.pid:
            self._processes.met(event.pid)
        thread.pid, thread.tid = event.pid, event.tid
        if event.host >= len(self._views):
            raise InvalidInput("trace: host", f"below {len(self._views)}", event.host)
        if event.kind is Kind.ACCESS and event.offset >= self._plan.size_bytes:
            raise InvalidInput("trace: offset", f"below {self._plan.size_bytes}", event.offset)
        thread.event = event
        return True

    def _give(self, thread: _Thread) -> None:
        event, thread.event = thread.event, None
        assert event is not None
        if event.kind is Kind.ACCESS:
            self._access(thread, event)
            return
        if event.kind is Kind.FENCE:
            self._luck.fence(event.host, event.tid)
            self._caches.fence(event.host)
        elif event.kind is Kind.UNFENCED:
            self._unfenced = True
        self._answer(thread, GO)

    def _answer(self, thread: _Thread, answer: bytes) -> None:
        try:
            thread.channel.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It was killed; its connection says so next.

    # ---- one access

    def _access(self, thread: _Thread, event: Event) -> None:
        does = decode(event.code, write=event.write)
        self._accesses += 1
        host, at = event.host, event.offset
        if does.does is Does.NOTHING:
            self._step(thread, GO)
            return
        if does.does is not Does.ACCESS:
            line = at // LINE_BYTES * LINE_BYTES
            self._luck.write_back(host, line, LINE_BYTES, event.tid)
            self._caches.write_back(host, line, LINE_BYTES)
            if does.does is Does.FLUSH:
                self._luck.invalidate(host, line, LINE_BYTES)
                self._caches.invalidate(host, line, LINE_BYTES)
            self._step(thread, GO_TO_FENCE)
            return
        site = python_frames(event.stack) or self._code.frames(event)
        loads, stores = self._ranges(event, does)
        view = self._views[host].bytes
        before: list[tuple[int, bytes]] = []
        for offset, length in sorted({*loads, *stores}):
            self._show(host, offset, length)
        for offset, length in loads:
            self._load(host, offset, length, site)
        pages = {(o + n) // PAGE_BYTES for o, length in stores for n in (0, length - 1)}
        for page in sorted(pages):
            start = page * PAGE_BYTES
            before.append((start, view[start : start + PAGE_BYTES]))
        self._step(thread, GO_TO_FENCE if does.around else GO)
        for offset, length in stores:
            self._store(host, offset, length, site)
            if does.around:
                self._luck.write_back(host, offset, length, event.tid)
                self._caches.write_back(host, offset, length)
        self._store_rest(host, before, stores, site)

    def _step(self, thread: _Thread, answer: bytes) -> None:
        """Let it do one instruction, and wait until it has: faults on further pages are let in."""
        self._answer(thread, answer)
        while thread in self._threads:
            if not self._take(thread):
                return
            event, thread.event = thread.event, None
            assert event is not None
            if event.kind is Kind.DONE:
                return
            # The instruction goes on over the end of a page: its bytes have been shown.
            self._answer(thread, GO)

    def _ranges(
        self, event: Event, does: Instruction
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """What it loads and what it stores, as far as it lies in the tag."""
        room = self._plan.size_bytes
        if does.moves:
            sides = (event.source, event.target)
            loads, stores = ([(at, does.size_bytes)] if at < room else [] for at in sides)
        else:
            span = (event.offset, does.size_bytes)
            loads = [span] if does.loads else []
            stores = [span] if does.stores else []
        loads = [(at, min(length, room - at)) for at, length in loads]
        return loads, [(at, min(length, room - at)) for at, length in stores]

    def _show(self, host: int, offset: int, length: int) -> None:
        """Put the lines of a range, as the host's cache has them, where the program looks."""
        start = offset // LINE_BYTES * LINE_BYTES
        end = -(-(offset + length) // LINE_BYTES) * LINE_BYTES
        self._views[host].bytes[start:end] = self._caches.load(host, start, end - start)

    def _load(self, host: int, offset: int, length: int, site: Site) -> None:
        if self._is_word(offset, length, site):
            word = offset // WORD_BYTES * WORD_BYTES
            value = int.from_bytes(self._views[host].bytes[word : word + WORD_BYTES], "little")
            self._luck.load_word(host, word, value)
        elif not any(frame.name in _RACING_FUNCTIONS for frame in site if _ours(frame.file)):
            self._luck.load(host, offset, length, site)

    def _store(self, host: int, offset: int, length: int, site: Site) -> None:
        data = self._views[host].bytes[offset : offset + length]
        if self._is_word(offset, length, site):
            word = offset // WORD_BYTES * WORD_BYTES
            value = int.from_bytes(self._views[host].bytes[word : word + WORD_BYTES], "little")
            self._luck.store_word(host, word, value, site)
        else:
            self._luck.store(host, offset, length, site)
        self._caches.store(host, offset, data)

    def _store_rest(
        self,
        host: int,
        before: list[tuple[int, bytes]],
        stores: list[tuple[int, int]],
        site: Site,
    ) -> None:
        """Bytes that changed beyond what the instruction was taken for."""
        view = self._views[host].bytes
        known = {at for offset, length in stores for at in range(offset, offset + length)}
        for start, was in before:
            now = view[start : start + PAGE_BYTES]
            if now == was:
                continue
            for at in range(PAGE_BYTES):
                if now[at] != was[at] and start + at not in known:
                    self._luck.store(host, start + at, 1, site)
                    self._caches.store(host, start + at, now[at : at + 1])

    def _is_word(self, offset: int, length: int, site: Site) -> bool:
        if offset % WORD_BYTES + length > WORD_BYTES:
            return False
        if offset // WORD_BYTES * WORD_BYTES in self._plan.words:
            return True
        return bool(site) and site[0].name in _WORD_FUNCTIONS and _ours(site[0].file)

    def _close_threads(self) -> None:
        for thread in self._threads:
            thread.channel.close()


def _ours(file: str) -> bool:
    return "/tagmem/shared/" in file


def _fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text
