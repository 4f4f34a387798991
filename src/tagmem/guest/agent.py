"""The guest agent: one loop over the channel to the host, hot-plug news, commands and deadlines.

What it knows is small, and all of it can be had again: tags are found anew after a reboot, names
and what was told of them are read back after a restart of the agent, and the host is greeted
whenever the port opens, so that it knows what it may still expect.

SIGTERM comes before shutdown, reboot and kexec: every tag is given back then, in order. The host is
told, and has a moment to take the devices, for which the agent still answers it; what is there
afterwards is ejected, so that the next kernel finds nothing. SIGINT ends the agent and the commands
that it runs; tags keep their names.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tagmem.base.errors import Unsupported
from tagmem.client import launch
from tagmem.guest import find as finding
from tagmem.guest.channel import Channel
from tagmem.guest.commands import Commands
from tagmem.guest.down import take_lock
from tagmem.guest.find import Roots
from tagmem.guest.making import Making
from tagmem.guest.names import Names
from tagmem.guest.release import Outcome, Release, as_told
from tagmem.guest.system import System, say
from tagmem.io.holders import DEVICE, Identity, Prover, Target, identities_of
from tagmem.wire import guest as w

SCAN_SECONDS = 0.05
"""While a tag is expected, in case that no uevent tells of it."""
IDLE_SCAN_SECONDS = 2.0
LATE_HEADER_SECONDS = 0.15
"""The kernel looks for a header about 40 ms after the device came, once."""
EJECT_SECONDS = 30.0
ATTACHES_MAX = 64
LEAVE_ASK_MS, LEAVE_STOP_MS = 5_000, 3_000
HAND_BACK_SECONDS = 10.0
"""How long a host has to take the devices of what was given back, before they are ejected."""
_SIGTERM = "SIGTERM"
_WHILE_PARTING = (w.Greet, w.Find, w.Detach)

_Reply = Callable[[Outcome, bool, str], None]
"""How a release ended, whether the device is still there, and why its eject failed."""


class Options(NamedTuple):
    """What the owner of the guest decides."""

    channel: str
    roots: Roots = Roots()
    commands: bool = True
    """Whether the host may run commands here."""
    modules: bool = False
    """Whether to load kernel modules, where no udev does."""
    hand_back_seconds: float = HAND_BACK_SECONDS


class _Attaching(NamedTuple):
    request: w.Attach
    since: float
    until: float


class _Detaching:
    """A tag on its way out, on behalf of one request; `reply` is called once."""

    def __init__(
        self,
        tag: str,
        memory: w.Memory | None,
        release: Release,
        reply: _Reply,
        *,
        eject: bool,
        force: bool,
    ) -> None:
        self.tag = tag
        self.memory = memory
        self.release = release
        self.reply = reply
        self.eject = eject
        self.force = force
        self.outcome: Outcome | None = None
        """Set while the eject runs."""
        self.eject_until = 0.0


class Agent:
    """The agent of one guest."""

    def __init__(
        self, options: Options, system: System | None = None, prover: Prover | None = None
    ) -> None:
        self._options = options
        self._roots = options.roots
        self._system = system or System(options.roots)
        self._selector = selectors.DefaultSelector()
        self._frames = w.Frames()
        self._names = Names(self._roots.run)
        self._prover = prover or Prover(self._roots.proc, threads=True)
        self._channel = Channel(options.channel, self._selector)
        self._channel.opened = self._greet
        self._channel.received = self._received
        self._channel.lost = self._frames.clear
        self._commands = Commands(self._selector, self._send, lambda: self._channel.live)
        self._commands.changed = self._hurry
        self._boot, self._instance, self._kernel = self._system.identity()
        self._told: dict[str, w.Told] = {}
        self._present: dict[str, w.Memory] = {}
        """Tags that have names."""
        self._identities: dict[str, tuple[Identity, ...]] = {}
        """Of tags that had names since they came: for holders of what is gone."""
        self._revocable: set[str] = set()
        """Of these: a DAX device that goes ends its mappings (SIGBUS); a BAR's stay."""
        self._withdrawn: dict[str, w.Memory] = {}
        """Given back while their devices are still there: not named again unasked."""
        self._attaching: dict[str, list[_Attaching]] = {}
        self._detaching: dict[str, _Detaching] = {}
        self._ejected: list[Callable[[], None]] = []
        self._making = Making(self._system, self._later)
        self._claimed: set[tuple[str, str]] = set()
        """(tag, DAX device) that was claimed for an Attach that still waits."""
        self._raw: set[str] = set()
        """Namespaces without a header that are not ours to bind anew: they were here before us, or
        it was tried."""
        self._next_scan = 0.0
        self._leaving = ""
        """Why every tag is being given back; empty while it is not."""
        self._held: dict[str, Outcome] = {}
        self._then: Callable[[dict[str, Outcome]], None] = lambda _: None
        self._after: Callable[[], None] | None = None
        self._parting_until: float | None = None
        """Set when every tag was given back and the agent is to end: the host has until then."""
        self._ejecting = False
        self._ended = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._uevents = self._system.uevents()
        if self._uevents is not None:
            self._selector.register(self._uevents, selectors.EVENT_READ, self._hotplug)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            w.Greet: lambda request: self._greet(request.id),
            w.Find: self._find,
            w.Attach: self._attach,
            w.Detach: self._detach,
            w.Give: self._give,
            w.Exec: self._exec,
            w.Signal: self._signal,
            w.Eject: self._eject,
            w.Reset: self._reset,
            w.Shutdown: self._shutdown,
        }

    # ---- the loop

    def run(self) -> int:
        """Until told to end; the exit code."""
        if self._options.modules:
            self._system.load_modules()
        self.adopt()
        while not (self._ended and (self._channel.flushed or not self._channel.live)):
            self.turn()
        self.close()
        if self._after is not None:
            self._after()
        return 0

    def turn(self, most_seconds: float = IDLE_SCAN_SECONDS) -> None:
        """Wait for something, at most until the next deadline, and deal with it."""
        now = time.monotonic()
        self._commands.throttle(full=self._channel.full)
        self._channel.tick(now)
        if now >= self._next_scan:
            self._scan(now)
        self._advance(now)
        for key, events in self._selector.select(min(self._timeout(), most_seconds)):
            key.data(events)

    def _timeout(self) -> float:
        due = [self._next_scan]
        if (channel := self._channel.due()) is not None:
            due.append(channel)
        due += [a.until for waiting in self._attaching.values() for a in waiting]
        for detaching in self._detaching.values():
            ejecting = detaching.outcome is not None
            due.append(detaching.eject_until if ejecting else detaching.release.next_at)
        if self._ended or self._parting_until is not None:
            due.append(time.monotonic() + SCAN_SECONDS)
        return max(min(due) - time.monotonic(), 0)

    def install_signals(self) -> None:
        """SIGTERM gives everything back; SIGINT ends the agent alone."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)

    def _woken(self, _events: int) -> None:
        """A signal's number, or 0 from a thread that has finished."""
        numbers = set(os.read(self._wake_read, 4096))
        finished, self._ejected = self._ejected, []
        for finish in finished:
            finish()
        if signal.SIGTERM in numbers:
            self._leave(_SIGTERM, LEAVE_ASK_MS, LEAVE_STOP_MS, lambda _: None)
        if signal.SIGINT in numbers:
            self._ended = True

    def _hotplug(self, _events: int) -> None:
        assert self._uevents is not None
        try:
            while self._uevents.recv(65536):
                pass
        except BlockingIOError:
            pass
        except OSError:
            pass  # More news than the buffer held; a look at everything makes up for it.
        self._next_scan = 0.0

    def _hurry(self) -> None:
        """A command has ended: look at once."""
        for detaching in self._detaching.values():
            detaching.release.next_at = 0.0

    def close(self) -> None:
        """End what runs and let go of everything; tags keep their names for the next agent."""
        self._commands.close()
        self._channel.close()
        for descriptor in (self._wake_read, self._wake_write):
            os.close(descriptor)
        if self._uevents is not None:
            self._uevents.close()
        self._selector.close()

    # ---- messages

    def _send(self, message: w.Message) -> None:
        self._channel.send(w.encode(message))

    def _greet(self, number: int = 0) -> None:
        features = (*self._system.features(), *(("exec",) if self._options.commands else ()))
        hello = w.Hello(
            number,
            w.VERSION,
            self._boot,
            self._instance,
            self._kernel,
            features,
            tuple(sorted(self._present))[: w.MEMORIES_MAX],
        )
        self._send(hello)

    def _received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            request = w.decode(payload, w.REQUESTS)
            if isinstance(request, w.Unknown):
                reason = f"this agent (version {w.VERSION}) knows no {request.kind!r}"
                self._fail(request.id, "unsupported", reason)
            elif isinstance(request, w.Malformed):
                self._fail(request.id, "invalid", request.reason)
            elif not self._answers(request):
                self._fail(request.id, "busy", "the agent is leaving")
            else:
                self._handlers[type(request)](request)

    def _answers(self, request: w.Request) -> bool:
        if self._parting_until is not None and not self._ended:
            return isinstance(request, _WHILE_PARTING)
        return not (self._leaving or self._ended)

    def _fail(self, number: int, code: str, reason: str) -> None:
        self._send(w.Failed(number, code, reason[:2000]))

    # ---- finding and naming

    def adopt(self) -> None:
        """What an earlier agent of this boot named stays named, if it is still there."""
        adopted = self._names.adopt()
        self._told |= {tag: told for tag, told in adopted.items() if told is not None}
        self._scan(time.monotonic(), adopting=True)
        for tag in adopted.keys() - self._present.keys():
            self._names.withdraw(tag)

    def _scan(self, now: float, *, adopting: bool = False) -> None:
        soon = self._attaching or self._parting_until is not None
        self._next_scan = now + (SCAN_SECONDS if soon else IDLE_SCAN_SECONDS)
        found = {m.tag: m for m in finding.find(self._roots, self._told.values())}
        for tag in [*self._present.keys() - found.keys()]:
            self._vanished(tag)
        for tag in [*self._withdrawn.keys() - found.keys()]:
            del self._withdrawn[tag]
            self._forget_told(tag)
        if adopting:
            self._raw = set(finding.raw_namespaces(self._roots))
        for tag in self._attaching.keys() - found.keys():
            self._claim(tag, now)
        for tag, memory in found.items():
            if tag in self._withdrawn or tag in self._detaching:
                continue
            if self._present.get(tag) != memory:
                self._surface(memory, quiet=adopting)
            if tag in self._present:
                self._answer_attach(tag)

    def _claim(self, tag: str, now: float) -> None:
        """What is expected may be there in a shape that nobody can map: help it along, once."""
        waiting = self._attaching[tag][0]
        for name, driver in finding.claimable(self._roots, tag, self._told.values()):
            if (tag, name) not in self._claimed:
                self._claimed.add((tag, name))
                self._system.claim(name, driver)
        if now - waiting.since < LATE_HEADER_SECONDS:
            return
        for namespace in finding.raw_namespaces(self._roots):
            if namespace not in self._raw:
                self._raw.add(namespace)
                self._system.rebind(namespace)

    def _surface(self, memory: w.Memory, *, quiet: bool) -> None:
        try:
            finding.prepare(memory)
            identities: list[Identity] = []
            for path in finding.aliases(memory):
                if os.path.exists(path):
                    identities += identities_of(path)
            self._names.surface(memory, self._told.get(memory.tag))
        except OSError as error:
            say(f"tag {memory.tag} on {memory.name} gets no name: {error}")
            return
        self._identities[memory.tag] = tuple(identities)
        if memory.name.startswith("dax"):
            self._revocable.add(memory.tag)
        self._present[memory.tag] = memory
        if not quiet and memory.tag not in self._attaching:
            self._send(w.Attached(0, memory))

    def _vanished(self, tag: str) -> None:
        del self._present[tag]
        self._names.withdraw(tag)
        # The device's number may be another's soon; the node and its inode are not.
        known = self._identities.get(tag, ())
        self._identities[tag] = tuple(i for i in known if i[0] != DEVICE)
        if tag not in self._detaching:
            self._forget_told(tag)
            self._send(w.Vanished(0, tag))

    def _forget_told(self, tag: str) -> None:
        """Its device has gone: what comes in its place (slot, address) is another tag's."""
        if tag not in self._attaching:
            self._told.pop(tag, None)

    def _find(self, request: w.Find) -> None:
        told = {**self._told, **{entry.tag: entry for entry in request.told}}
        self._send(w.Found(request.id, tuple(finding.find(self._roots, told.values()))))

    # ---- attach

    def _attach(self, request: w.Attach) -> None:
        tag = request.tag
        if tag in self._detaching:
            self._fail(request.id, "conflict", f"tag {tag} is being detached")
            return
        if sum(map(len, self._attaching.values())) >= ATTACHES_MAX:
            self._fail(request.id, "busy", f"{ATTACHES_MAX} tags are waited for")
            return
        if request.told is not None and request.told.tag != tag:
            self._fail(request.id, "invalid", f"told.tag: must be {tag}")
            return
        self._withdrawn.pop(tag, None)
        now = time.monotonic()
        waiting = _Attaching(request, now, now + request.wait_ms / 1000)
        self._attaching.setdefault(tag, []).append(waiting)
        told = request.told
        if told is not None and not self._making.make(told, request.wait_ms / 1000, self._made):
            self._learn(told)
        self._scan(now)

    def _learn(self, told: w.Told) -> None:
        """The newest word counts: what is said of this device now was another tag's before."""
        where = told._replace(tag="", size_bytes=0, read_only=False)
        for tag, known in list(self._told.items()):
            if known._replace(tag="", size_bytes=0, read_only=False) == where:
                del self._told[tag]
        if len(self._told) < w.MEMORIES_MAX:
            self._told[told.tag] = told

    def _made(self, told: w.Told, reason: str) -> None:
        """CXL memory has its DAX device, or there is none, and why."""
        self._next_scan = 0.0
        self._learn(told)
        for waiting in self._attaching.pop(told.tag, ()) if reason else ():
            self._fail(waiting.request.id, "failed", reason)

    def _answer_attach(self, tag: str) -> None:
        self._claimed = {claimed for claimed in self._claimed if claimed[0] != tag}
        for waiting in self._attaching.pop(tag, ()):
            self._send(w.Attached(waiting.request.id, self._present[tag]))

    def _give_up_attach(self, now: float) -> None:
        for tag, waiting in list(self._attaching.items()):
            over = [w for w in waiting if now >= w.until]
            left = [w for w in waiting if now < w.until]
            if over:
                self._attaching[tag] = left
                if not left:
                    del self._attaching[tag]
                    self._claimed = {c for c in self._claimed if c[0] != tag}
            for attaching in over:
                there = ", ".join(sorted(self._present)) or "no tagged memory"
                reason = f"tag {tag} did not come in {attaching.request.wait_ms} ms; there is "
                self._fail(attaching.request.id, "absent", reason + there)

    # ---- detach

    def _target(self, tag: str) -> Target:
        return Target(tag, (), self._identities.get(tag, ()))

    def _begin(
        self,
        tag: str,
        reply: _Reply,
        *,
        ask_ms: int,
        stop_ms: int,
        everyone: bool,
        eject: bool = False,
        force: bool = False,
    ) -> None:
        """Take the names away, so that nobody finds the tag from now on, and start the release."""
        memory = self._present.pop(tag, None) or self._withdrawn.pop(tag, None)
        self._names.withdraw(tag)
        release = Release(
            self._target(tag),
            self._prover,
            self._commands.all,
            now=time.monotonic(),
            ask_ms=ask_ms,
            stop_ms=stop_ms,
            everyone=everyone,
        )
        self._detaching[tag] = _Detaching(tag, memory, release, reply, eject=eject, force=force)

    def _detach(self, request: w.Detach) -> None:
        tag = request.tag
        if tag in self._detaching:
            self._fail(request.id, "conflict", f"tag {tag} is being detached already")
            return
        for waiting in self._attaching.pop(tag, ()):
            self._fail(waiting.request.id, "conflict", f"tag {tag} is to be detached")
        self._begin(
            tag,
            lambda outcome, present, why: self._detached(request, outcome, present, why),
            ask_ms=request.ask_ms,
            stop_ms=request.stop_ms,
            everyone=request.everyone,
            eject=request.eject,
            force=request.force,
        )

    def _detached(self, request: w.Detach, outcome: Outcome, present: bool, why: str) -> None:
        holders = tuple(map(as_told, outcome.proof.holders))[: w.HOLDERS_MAX]
        if why:
            self._fail(request.id, "busy", why)
        elif outcome.released:
            self._send(w.Released(request.id, request.tag, present, outcome.stopped))
        elif not present and request.tag in self._revocable:
            self._send(w.Released(request.id, request.tag, False, outcome.stopped, holders))
        else:
            proof = outcome.proof
            held = w.Held(request.id, request.tag, holders, proof.complete, proof.reason[:2000])
            self._send(held)

    def _advance(self, now: float) -> None:
        self._give_up_attach(now)
        for detaching in list(self._detaching.values()):
            if detaching.outcome is not None:
                if now >= detaching.eject_until:
                    self._finish(detaching, f"the eject did not end in {EJECT_SECONDS:g} s")
            elif now >= detaching.release.next_at:
                outcome = detaching.release.step(now)
                if outcome is not None:
                    self._settle(detaching, outcome, now)
        if self._detaching or self._ended:
            return
        if self._leaving:
            self._left(now)
        elif self._parting_until is not None:
            self._part(now)

    def _settle(self, detaching: _Detaching, outcome: Outcome, now: float) -> None:
        detaching.outcome = outcome
        detaching.eject_until = now + EJECT_SECONDS
        wanted = detaching.force or (detaching.eject and outcome.released)
        if not wanted or detaching.memory is None:
            self._finish(detaching, "")
            return
        self._system.eject(detaching.memory, self._when_ejected(detaching))

    def _when_ejected(self, detaching: _Detaching) -> Callable[[str], None]:
        def ejected(reason: str) -> None:
            self._later(lambda: self._finish(detaching, reason))

        return ejected

    def _later(self, finish: Callable[[], None]) -> None:
        """What a thread has for the loop to do."""
        self._ejected.append(finish)
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            return

    def _finish(self, detaching: _Detaching, why: str) -> None:
        """Proved, refused, or the eject failed: what is refused gets its names back."""
        tag, outcome = detaching.tag, detaching.outcome
        if self._detaching.get(tag) is not detaching or outcome is None:
            return
        del self._detaching[tag]
        found = {m.tag: m for m in finding.find(self._roots, self._told.values())}
        memory = found.get(tag)
        if memory is not None:
            if outcome.released:
                self._withdrawn[tag] = memory
            else:
                self._surface(memory, quiet=True)
        else:
            self._told.pop(tag, None)
        gone = detaching.memory is None or not finding.is_there(self._roots, detaching.memory)
        detaching.reply(outcome, not gone, why)
        if gone and (outcome.released or tag in self._revocable):
            self._identities.pop(tag, None)
            self._revocable.discard(tag)

    # ---- commands

    def _exec(self, request: w.Exec) -> None:
        if not self._options.commands:
            self._fail(request.id, "unsupported", "this guest runs no commands for the host")
            return
        values: dict[str, str] = {}
        environment = {"TAGMEM_RUN_DIR": self._roots.run}
        if request.tag:
            memory = self._present.get(request.tag)
            if memory is None:
                self._fail(request.id, "absent", f"tag {request.tag} is not here")
                return
            path = self._names.path(memory)
            values = launch.values(memory.tag, path, memory.size_bytes)
            environment = launch.variables(memory.tag, path, memory.size_bytes, self._roots.run)
        self._commands.start(request, values, environment)

    def _signal(self, request: w.Signal) -> None:
        command = self._commands.get(request.exec_id)
        if command is None:
            self._fail(request.id, "absent", f"no command of id {request.exec_id} runs")
            return
        command.signal(request.number)
        self._send(w.Done(request.id))

    # ---- eject, reset, the end

    def _give(self, request: w.Give) -> None:
        def given(reason: str) -> None:
            number = request.id
            self._send(w.Failed(number, "conflict", reason) if reason else w.Done(number))

        self._making.give(request.told, given, busy=request.told.tag in self._detaching)

    def _eject(self, request: w.Eject) -> None:
        def done(reason: str) -> None:
            answer = w.Failed(request.id, "failed", reason) if reason else w.Done(request.id)
            self._later(lambda: self._send(answer))

        memory = self._present.get(request.tag) or self._withdrawn.get(request.tag)
        if bool(request.slot) == bool(request.tag):
            self._fail(request.id, "invalid", "slot, tag: must be one of them")
        elif request.tag and memory is None:
            self._fail(request.id, "absent", f"tag {request.tag} is not here")
        elif memory is not None:
            self._system.eject(memory, done)
        elif request.slot not in finding.slots_by_address(self._roots).values():
            self._fail(request.id, "absent", f"there is no slot {request.slot}")
        else:
            self._system.eject_slot(request.slot, done)

    def _reset(self, request: w.Reset) -> None:
        def reset(held: dict[str, Outcome]) -> None:
            self._told = {tag: told for tag, told in self._told.items() if tag in held}
            self._answer_leaving(request.id, held)

        for waiting in [a for many in self._attaching.values() for a in many]:
            self._fail(waiting.request.id, "conflict", "the agent is reset")
        self._attaching.clear()
        self._leave("reset", request.ask_ms, request.stop_ms, reset, everyone=request.everyone)

    def _shutdown(self, request: w.Shutdown) -> None:
        if request.how != "agent" and "shutdown" not in self._system.features():
            self._fail(request.id, "unsupported", f"{request.how}: this agent is not root")
            return

        def shut(held: dict[str, Outcome]) -> None:
            self._answer_leaving(request.id, held)
            if held:
                return
            self._bid_farewell(request.how, time.monotonic())
            if request.how != "agent":
                self._after = lambda: self._end(request.how)

        self._leave(request.how, request.ask_ms, request.stop_ms, shut)

    def _end(self, how: str) -> None:
        try:
            self._system.end(how)
        except (Unsupported, OSError) as error:
            say(str(error))

    def _answer_leaving(self, number: int, held: dict[str, Outcome]) -> None:
        for tag, outcome in held.items():
            holders = tuple(map(as_told, outcome.proof.holders))[: w.HOLDERS_MAX]
            proof = outcome.proof
            self._send(w.Held(number, tag, holders, proof.complete, proof.reason[:2000]))
            return
        self._send(w.Done(number))

    def _leave(
        self,
        reason: str,
        ask_ms: int,
        stop_ms: int,
        then: Callable[[dict[str, Outcome]], None],
        *,
        everyone: bool = True,
    ) -> None:
        """Give every tag back, then say so; commands on no tag are ended as well."""
        if self._leaving:
            return
        self._leaving, self._then, self._held = reason, then, {}
        for command in self._commands.all():
            if not command.request.tag:
                command.signal(signal.SIGTERM if ask_ms else signal.SIGKILL)
        for detaching in self._detaching.values():
            detaching.reply = self._noting(detaching.tag, detaching.reply)
        for tag in sorted({*self._present, *self._withdrawn} - self._detaching.keys()):
            reply = self._noting(tag, lambda *_: None)
            self._begin(tag, reply, ask_ms=ask_ms, stop_ms=stop_ms, everyone=everyone)

    def _noting(self, tag: str, reply: _Reply) -> _Reply:
        """Note what is still held, beside what else is to be done about it."""

        def noted(outcome: Outcome, present: bool, why: str) -> None:
            if not outcome.released:
                self._held[tag] = outcome
            reply(outcome, present, why)

        return noted

    def _left(self, now: float) -> None:
        for command in self._commands.all():
            command.signal(signal.SIGKILL)
        reason, self._leaving = self._leaving, ""
        if reason == _SIGTERM:
            self._bid_farewell(reason, now)
        else:
            self._then(self._held)

    def _bid_farewell(self, reason: str, now: float) -> None:
        """Say what was given back; the host may take the devices now."""
        self._send(w.Leaving(0, reason, tuple(self._held)[: w.MEMORIES_MAX]))
        self._parting_until = now + self._options.hand_back_seconds

    def _part(self, now: float) -> None:
        """End when nothing of what was given back is there any more, or nothing can be done."""
        assert self._parting_until is not None
        there = sorted(self._withdrawn.keys() - self._held.keys())
        if there and not self._ejecting:
            if self._channel.live and now < self._parting_until:
                return
            self._ejecting = True
            for tag in there:
                self._begin(tag, lambda *_: None, ask_ms=0, stop_ms=0, everyone=False, eject=True)
            return
        self._ended = True


def serve(options: Options) -> int:
    """Be the agent of this guest; the exit code. Raises Conflict when another one is."""
    lock = take_lock(options.roots.run)
    try:
        agent = Agent(options)
        agent.install_signals()
        say(f"on {options.channel}, names in {options.roots.run}")
        return agent.run()
    finally:
        os.close(lock)
