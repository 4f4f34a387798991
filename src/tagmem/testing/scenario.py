"""The scenario language: what happens, step by step, as text that people read and tests compare.

A scenario is a file of commands, each on a line that begins with `> `, and after each what
happened: what the machines noted, which commands passed the wires, what was answered, and extent
maps. The machines and links are the real ones, on simulated time, disks and wires without any
chance in them, so a transcript changes only when the behaviour does. Lines that begin with `#` are
the author's.

    > pod hosts w1 w2 blocks 16
    > create A 8MiB for w1
    > map

Tags are written as one letter, times as seconds since the start. Each command lets a second pass,
but for those that only look or arm something.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

from tagmem.agent.policy import Limits
from tagmem.base.ids import NIL_TAG, Tag
from tagmem.base.units import MIB, SECOND, Bytes, Nanoseconds, format_size, parse_size
from tagmem.cli.extents import draw
from tagmem.domain import effects
from tagmem.domain.device_records import AllocState, DeviceSpec, HeadReset, LdSpec, RegionSpec
from tagmem.domain.invariants import DeviceExtent
from tagmem.domain.outcome import Reply
from tagmem.domain.records import Sharing
from tagmem.orchestrator import documents
from tagmem.ports import Event
from tagmem.testing.nodes import Connection, Process
from tagmem.testing.pod import APPLIANCE, NOTHING_PLANTED, Pod
from tagmem.testing.rogue import Rogue
from tagmem.testing.sim import Simulation
from tagmem.testing.tap import Loss, Tap
from tagmem.wire.rest import ApplianceMapDocument, CapacityDocument, MapPiece, PoolMapDocument

PROMPT = "> "
BLOCK_BYTES = 2 * MIB
SETTLE_NS: Nanoseconds = 1 * SECOND
MAP_WIDTH = 100
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ScenarioError(Exception):
    """A line of a scenario that cannot be understood."""


class Steady(random.Random):
    """No chance: every draw is the middle of its range."""

    def random(self) -> float:
        """A half."""
        return 0.5

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """The middle."""
        low, high = (0, start) if stop is None else (start, stop)
        return low + (high - low) // 2 // step * step


class Stage(Simulation):
    """Simulated time without chance; what is said is kept as lines with tenths of seconds."""

    def __init__(self) -> None:
        super().__init__(0)
        self.random = Steady()
        self.began_ns = self.now_ns
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """One line of the transcript."""
        tenths = (self.now_ns - self.began_ns) // (SECOND // 10)
        self.lines.append(f"{tenths // 10:4d}.{tenths % 10}  {short(line)}")


def tag_of(letter: str) -> Tag:
    """The tag that a letter stands for."""
    if letter not in LETTERS or len(letter) != 1:
        raise ScenarioError(f"a tag is one letter A to Z, not {letter!r}")
    return Tag(str(UUID(bytes=letter.encode() * 16, version=4)))


def short(line: str) -> str:
    """A line with letters in place of tags, whole or cut to the eight digits of a subject."""
    for letter in LETTERS:
        tag = tag_of(letter)
        line = line.replace(tag, letter).replace(f" {tag[:8]} ", f" {letter} ")
        if line.endswith(f" {tag[:8]}"):
            line = line[:-8] + letter
    return line.replace(NIL_TAG, "nil").rstrip()


class ScenarioPod(Pod):
    """A pod whose wires can be listened to, lose a message, and be cut."""

    def __init__(
        self, sim: Simulation, spec: DeviceSpec, agents: Sequence[str], limits: dict[str, Limits]
    ) -> None:
        self.loss = Loss()
        self.cut: set[frozenset[str]] = set()
        self.wires: dict[frozenset[str], Connection] = {}
        super().__init__(sim, spec, agents, NOTHING_PLANTED, limits)

    def opened(self, wire: Connection, client: str, server: str) -> None:
        """Listen to it."""
        self.wires[frozenset((client, server))] = wire
        if server == APPLIANCE:
            self.listen(wire, "fm" if client == "orchestrator" else client)

    def listen(self, wire: Connection, client: str) -> None:
        """Say what passes between somebody and the appliance."""
        Tap(wire, client, APPLIANCE, self.loss, self.sim.say)

    def device_extents(self) -> list[DeviceExtent]:
        """Without foreign hosts: what strangers do is not known until it has been read."""
        lds = self.appliance.machine.spec.lds
        return [one for one in super().device_extents() if lds[one.ld].name in self.hosts]

    def reachable(self, client: str, server: str) -> bool:
        """Not while it is cut."""
        return frozenset((client, server)) not in self.cut


class Scenario:
    """A pod, and what can be done to it: one handler per verb."""

    def __init__(self) -> None:
        self.stage = Stage()
        self._pod: ScenarioPod | None = None
        self._rogue: Rogue | None = None
        self._launches = 0
        self._verbs: dict[str, Callable[[list[str]], None]] = {
            name.removeprefix("do_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }

    def run(self, line: str) -> list[str]:
        """Carry out one command; what happened. Raises ScenarioError for what is no command."""
        words = shlex.split(line)
        handler = self._verbs.get(words[0]) if words else None
        if handler is None:
            verbs = ", ".join(sorted(self._verbs))
            raise ScenarioError(f"{line!r}: no such verb; there are {verbs}")
        self.stage.lines = []
        handler(words[1:])
        return self.stage.lines

    # ---- helpers of the verbs

    @property
    def pod(self) -> ScenarioPod:
        """What `pod` made."""
        if self._pod is None:
            raise ScenarioError("begin with `pod`")
        return self._pod

    def _advance(self, by_ns: Nanoseconds = SETTLE_NS) -> None:
        self.stage.run(self.stage.now() + by_ns, self.pod.check)

    def _ask(self, event: Event) -> None:
        """Put a question to the orchestrator, as its API does."""

        def answered(reply: Any) -> None:
            assert isinstance(reply, Reply)
            detail = f": {reply.detail}" if reply.detail else ""
            self.stage.say(f"answer: {reply.outcome.title}{detail}")

        if not self.pod.orchestrator.alive:
            self.stage.say("nobody answers")
        self.pod.orchestrator.post(event, answered)
        self._advance()

    def _process(self, name: str) -> Process:
        pod = self.pod
        known: dict[str, Process] = {
            "orchestrator": pod.orchestrator,
            APPLIANCE: pod.appliance,
            **pod.hosts,
        }
        if name not in known:
            raise ScenarioError(f"no process {name!r}; there are {', '.join(known)}")
        return known[name]

    def _ld(self, name: str) -> int:
        lds = self.pod.appliance.machine.spec.lds
        return next(number for number, ld in enumerate(lds) if ld.name == name)

    def _print(self, line: str) -> None:
        self.stage.lines.append(f"        {short(line)}")

    # ---- verbs: the pod

    def do_pod(self, words: list[str]) -> None:
        """`pod hosts w1 w2 [foreign x] [blocks 16] [mirrored w2] [sharable] [hardware-coherent]
        [read-only] [view] [devices w1 0]`: one appliance a0, registered; agents on the hosts, none
        on the foreign ones; a view of the region for readers; w1 takes at most 0 devices.
        """
        options = _options(
            words,
            ("hosts", "foreign", "blocks", "mirrored", "devices"),
            ("sharable", "hardware-coherent", "read-only", "view"),
        )
        hosts, foreign = options.get("hosts", ["w1"]), options.get("foreign", [])
        mirrored, devices = options.get("mirrored", []), options.get("devices", [])
        blocks = int(options.get("blocks", ["32"])[0])
        region = RegionSpec(
            0,
            blocks * BLOCK_BYTES,
            BLOCK_BYTES,
            sharable="sharable" in options,
            hardware_coherent="hardware-coherent" in options,
            read_only="read-only" in options,
        )
        lds = tuple(LdSpec(name, mirrored=name in mirrored) for name in (*hosts, *foreign))
        limits = {devices[0]: Limits(devices_max=int(devices[1]))} if devices else {}
        regions: tuple[RegionSpec, ...] = (region,)
        if "view" in options:
            size = region.size_bytes
            regions = (region, RegionSpec(0, size, BLOCK_BYTES, sharable=True, read_only=True))
        pod = self._pod = ScenarioPod(self.stage, DeviceSpec(regions, lds), hosts, limits)
        self._rogue = Rogue(self.stage, "stranger", pod.appliance, pod.listen)
        pod.appliance.start()
        pod.orchestrator.start()
        pod.orchestrator.post(effects.RegisterAppliance(APPLIANCE, "sim"))
        self._advance()
        for host in pod.hosts.values():
            host.start()
        self._advance()

    def do_advance(self, words: list[str]) -> None:
        """`advance 5s`: let time pass."""
        self._advance(int(float(words[0].removesuffix("s")) * SECOND))

    # ---- verbs: people

    def do_register(self, words: list[str]) -> None:
        """`register appliance a1` or `register host w9 on a0 as 0`."""
        if words[0] == "appliance":
            self._ask(effects.RegisterAppliance(words[1], "sim"))
        else:
            self._ask(effects.RegisterHost(words[1], {words[3]: int(words[5])}))

    def do_create(self, words: list[str]) -> None:
        """`create A 8MiB [for w1 w2] [sharing hardware-coherent] [scatter] [untagged]
        [retain]`.
        """
        options = _options(words[2:], ("for", "sharing"), ("scatter", "untagged", "retain"))
        event = effects.CreateCapacity(
            NIL_TAG if words[0] == "nil" else tag_of(words[0]),
            _size(words[1]),
            tuple(options.get("for", ())),
            tagged="untagged" not in options,
            sharing=Sharing(options.get("sharing", ["none"])[0]),
            contiguous="scatter" not in options,
            retain="retain" in options,
        )
        self._ask(event)

    def do_attach(self, words: list[str]) -> None:
        """`attach A w2`."""
        self._ask(effects.AttachCapacity(tag_of(words[0]), words[1]))

    def do_hand_over(self, words: list[str]) -> None:
        """`hand-over A from w1 to w2 [up-to stop]`."""
        options = _options(words[1:], ("from", "to", "up-to"), ())
        up_to = options.get("up-to", ["detach"])[0]
        source, target = options["from"][0], options["to"][0]
        self._ask(effects.HandOver(tag_of(words[0]), source, target, up_to=up_to))

    def do_publish(self, words: list[str]) -> None:
        """`publish A to w2 w3 [up-to stop]`."""
        options = _options(words[1:], ("to", "up-to"), ())
        up_to = options.get("up-to", ["detach"])[0]
        self._ask(effects.PublishCapacity(tag_of(words[0]), tuple(options["to"]), up_to=up_to))

    def do_retain(self, words: list[str]) -> None:
        """`retain A [off]`: it outlives its last host, or no longer."""
        self._ask(effects.RetainCapacity(tag_of(words[0]), "off" not in words))

    def do_reset(self, words: list[str]) -> None:
        """`reset head of w1`: a conventional reset; no host is told by an event."""
        self.pod.appliance.post(HeadReset(self._ld(words[2])))
        self._advance()

    def do_release(self, words: list[str]) -> None:
        """`release A [from w1] [up-to force]`."""
        options = _options(words[1:], ("from", "up-to"), ())
        event = effects.ReleaseCapacity(
            tag_of(words[0]),
            options.get("from", [""])[0],
            up_to=options.get("up-to", ["detach"])[0],
        )
        self._ask(event)

    def do_launch(self, words: list[str]) -> None:
        """`launch A on w1 [stubborn]`: run something that maps the tag and writes to it. A stubborn
        one does not end when it is asked to.
        """
        self.pod.hosts[words[2]].obedient = "stubborn" not in words
        self._launches += 1
        identity = f"run-{self._launches}"
        self._ask(effects.LaunchWorkload(tag_of(words[0]), words[2], identity, ("app",)))

    def do_stop(self, words: list[str]) -> None:
        """`stop A on w1`."""
        self._ask(effects.StopWorkload(tag_of(words[0]), words[2]))

    def do_refresh(self, words: list[str]) -> None:
        """`refresh`: an operator wants the appliance's own lists read (a snapshot)."""
        self._ask(effects.RefreshAppliance(APPLIANCE))

    def do_explain(self, words: list[str]) -> None:
        """`explain 8MiB [for w1] [scatter]`."""
        options = _options(words[1:], ("for",), ("scatter",))
        hosts = tuple(options.get("for", ()))
        contiguous = "scatter" not in options
        event = effects.CreateCapacity("", _size(words[0]), hosts, contiguous=contiguous)
        found = self.pod.orchestrator.view.explain(event)
        self._print(found.detail if isinstance(found, Reply) else found.sentence)

    # ---- verbs: looking

    def do_show(self, words: list[str]) -> None:
        """`show`, `show A`: what the orchestrator knows, as its API says it."""
        view = self.pod.orchestrator.view
        appliance = view.appliances[APPLIANCE]
        document = documents.appliance(view, appliance)
        if not words:
            free, size = format_size(document.free_bytes), format_size(document.size_bytes)
            fault = f": {document.fault}" if document.fault else ""
            self._print(f"{APPLIANCE} {document.state}{fault}, {free} of {size} free")
            for odd in view.quarantine.values():
                pieces = ", ".join(f"{e.start:#x}+{e.length:#x}" for e in odd.extents)
                where = "" if odd.ld is None else f" on LD {odd.ld} [{pieces}]"
                self._print(f"quarantined: {odd.tag}{where}: {odd.reason}")
        for tag in [tag_of(word) for word in words] or sorted(map(Tag, view.capacities)):
            if tag not in view.capacities:
                self._print(f"{tag} is not there")
                continue
            for line in _capacity(documents.capacity(view, view.capacities[tag])):
                self._print(line)

    def do_map(self, words: list[str]) -> None:
        """`map`: the extent map as the orchestrator knows it; `map device`: the appliance's own."""
        pod = self.pod
        if words == ["device"]:
            document = _device_map(pod)
        else:
            view = pod.orchestrator.view
            document = documents.extent_map(view, view.appliances[APPLIANCE])
        letters: dict[str, str] = {tag_of(letter): letter for letter in LETTERS}
        for line in draw(document, MAP_WIDTH, letters):
            tag = next((tag for tag in letters if tag in line), "")
            self._print(line.replace(f" {tag}  ", "  ") if tag else line)

    # ---- verbs: faults

    def do_lose(self, words: list[str]) -> None:
        """`lose next [5604h] request|answer`: of a command to the appliance."""
        if words[0] != "next" or words[-1] not in ("request", "answer"):
            raise ScenarioError("lose next [opcode] request|answer")
        opcode = int(words[1].removesuffix("h"), 16) if len(words) == 3 else None
        self.pod.loss.arm(opcode, answer=words[-1] == "answer")

    def do_crash(self, words: list[str]) -> None:
        """`crash a0`: die now and come back by itself; `crash w1 before|after-commit [of Name]`: at
        its next commit, or that of an event or effect of this class.
        """
        process = self._process(words[0])
        if len(words) == 1:
            process.crash()
            self._advance()
            return
        moment = words[1].removesuffix("-commit")
        if moment not in ("before", "after"):
            raise ScenarioError("before-commit or after-commit")
        process.doom = (moment, words[3] if len(words) > 3 else "")

    def do_kill(self, words: list[str]) -> None:
        """`kill w1`: die, and stay dead until `start`."""
        self._process(words[0]).kill()
        self._advance()

    def do_start(self, words: list[str]) -> None:
        """`start w1`."""
        self._process(words[0]).start()
        self._advance()

    def do_disconnect(self, words: list[str]) -> None:
        """`disconnect w1 a0`: the connection breaks; whoever dialled it dials again."""
        wire = self.pod.wires.get(frozenset(words))
        if wire is None:
            raise ScenarioError(f"{words[0]} and {words[1]} are not connected")
        wire.close("the connection broke")
        self._advance()

    def do_cut(self, words: list[str]) -> None:
        """`cut w1 orchestrator`: no connection between them until `mend`."""
        self.pod.cut.add(frozenset(words))
        self.do_disconnect(words)

    def do_mend(self, words: list[str]) -> None:
        """`mend w1 orchestrator`."""
        self.pod.cut.discard(frozenset(words))
        self._advance()

    # ---- verbs: others

    def do_hold(self, words: list[str]) -> None:
        """`hold A on w1 [as redis]`: a process that nobody here started maps the tag."""
        name = words[4] if len(words) > 4 else "somebody"
        if not self.pod.hosts[words[2]].hold(tag_of(words[0]), name):
            self._print(f"{words[2]} has no device for {words[0]}")

    def do_unhold(self, words: list[str]) -> None:
        """`unhold A on w1`: it ends."""
        self.pod.hosts[words[2]].let_go(tag_of(words[0]))
        self._advance(2 * SECOND)

    def do_rogue(self, words: list[str]) -> None:
        """`rogue connect`: a second fabric manager takes the port; `rogue add Z 8MiB to x`: and has
        something offered; `rogue accept x`, `rogue give-back x`: the foreign host x.
        """
        assert self._rogue is not None
        if words[0] == "connect":
            self._rogue.connect(-1)
        elif words[0] == "add":
            self._rogue.add(self._ld(words[4]), tag_of(words[1]), _size(words[2]))
        elif words[0] == "accept":
            self._rogue.accept(self._ld(words[1]))
        elif words[0] == "give-back":
            self._rogue.give_back(self._ld(words[1]))
        else:
            raise ScenarioError("rogue connect, add, accept or give-back")
        self._advance()


def _size(text: str) -> Bytes:
    """A size, also one that nobody should ask for."""
    return -1 if text == "-1" else parse_size(text)


def _options(
    words: Sequence[str], keys: Sequence[str], flags: Sequence[str]
) -> dict[str, list[str]]:
    """Words after the keys that they follow; flags stand alone."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word in keys or word in flags:
            key = word if word in keys else ""
            found[word] = []
        elif key:
            found[key].append(word)
        else:
            raise ScenarioError(f"{word!r} is none of {', '.join((*keys, *flags))}")
    return found


def _capacity(document: CapacityDocument) -> Iterator[str]:
    """A capacity in a line, and one for each of its hosts."""
    pieces = ", ".join(f"{e.start:#x}+{e.length:#x}" for e in document.extents)
    words = [document.state]
    if document.fault:
        words.append(f"({document.fault})")
    if document.sharing != "none":
        words.append(f"shared {document.sharing}{', published' if document.published else ''}")
    if document.retain or document.reference != "none":
        words.append(f"reference {document.reference}")
    if not document.guaranteed:
        words.append("not guaranteed")
    yield f"{document.tag} {format_size(document.size_bytes)} {' '.join(words)} [{pieces}]"
    if document.move is not None:
        move = document.move
        parts = [f"{move.kind} {move.source} to {', '.join(move.targets)}", move.step, move.reason]
        yield "  " + ": ".join(part for part in parts if part)
    for held in document.attachments:
        parts = [held.state]
        if held.read_only:
            parts.append("read-only")
        if held.ready:
            parts.append(f"ready as {held.dax_path}" if held.dax_path else "ready")
        if held.rung:
            parts.append(f"rung {held.rung}")
        parts += [f"held by {who.name} (pid {who.pid}, {who.how})" for who in held.holders]
        if held.workload is not None:
            parts.append(f"workload {held.workload.state}")
        if held.reason:
            parts.append(held.reason)
        dpas = ", ".join(f"{dpa:#x}" for dpa, _ in held.dpas)
        yield f"  {held.host} at [{dpas}]: {'; '.join(parts)}"


_DEVICE_STATES = {AllocState.SANITISING: "sanitising", AllocState.FAILED: "quarantined"}


def _device_map(pod: Pod) -> ApplianceMapDocument:
    """The device's own books as a map: what is really so."""
    spec = pod.appliance.machine.spec
    pieces: list[MapPiece] = []
    for row in pod.appliance.machine.state.allocations.values():
        taken = any(not holder.pending for holder in row.holders)
        state = _DEVICE_STATES.get(row.state, "accepted" if taken else "offered")
        hosts = tuple(spec.lds[holder.ld].name for holder in row.holders)
        pieces += [MapPiece(p.start, p.length, state, row.tag, hosts) for p in row.pieces]
    region = spec.regions[0]
    pool = PoolMapDocument(0, (0,), region.size_bytes, region.block_bytes, tuple(pieces))
    return ApplianceMapDocument(f"{APPLIANCE} (its own books)", (pool,))


def play(text: str) -> str:
    """A scenario with what happens now in place of what it says. Raises ScenarioError with the
    line.
    """
    scenario = Scenario()
    out: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            if out and out[-1] and not out[-1].startswith("#"):
                out.append("")
            out.append(line)
        elif not line and out and out[-1].startswith("#"):
            out.append(line)
        elif line.startswith(PROMPT):
            if out and out[-1]:
                out.append("")
            out.append(line)
            try:
                out.extend(scenario.run(line.removeprefix(PROMPT)))
            except (ScenarioError, ValueError, IndexError, KeyError) as error:
                raise ScenarioError(f"line {number}: {line}: {error}") from error
    return "\n".join(out).rstrip("\n") + "\n"
