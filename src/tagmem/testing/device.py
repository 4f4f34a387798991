"""An appliance as a simulated process, and its media, which outlive it.

The media are modelled as the hardware is: blocks of a pool, whoever maps them. A writer leaves its
tag's name in every block that it maps; finding another name there means that bytes were lent twice
or not wiped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tagmem.appliance.dispatch import (
    FmDispatch,
    HostDispatch,
    Identity,
    Immediate,
    PortDispatch,
    Said,
)
from tagmem.base.units import MICROSECOND, MILLISECOND
from tagmem.domain.device import DeviceMachine
from tagmem.domain.device_records import (
    FM_PORT,
    KINDS,
    Adopt,
    Answer,
    Conceal,
    DeviceSpec,
    Drop,
    DurableEffect,
    Expose,
    FencePlan,
    Notify,
    Piece,
    Sanitise,
    SanitiseDone,
    SanitiseMethod,
    SessionStarted,
)
from tagmem.domain.extent import InvariantViolated
from tagmem.ports import Effect, Loaded
from tagmem.store.memory import MemoryStore
from tagmem.testing.nodes import Connection, Process
from tagmem.testing.sim import Simulation
from tagmem.wire.cci import MessageType, ReturnCode
from tagmem.wire.exchange import Fault, Request, Responder
from tagmem.wire.generic import EventLog
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream


class SimMedia:
    """Blocks, each with the name of who wrote it last, and the ways to them."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self.blocks: dict[tuple[int, int], str] = {}
        """(pool, block) to the tag that wrote there; absent: reads zero."""
        self._files: dict[str, tuple[int, tuple[Piece, ...]]] = {}
        self._links: dict[tuple[int, str], tuple[int, tuple[Piece, ...]]] = {}
        """(LD, file) of what each host may reach."""
        self.wipes: dict[str, int] = {}
        """How often the bytes of each file were wiped."""
        self._loaded: dict[str, int] = {}
        """Files that were written since they were wiped last."""

    def _blocks(self, pool: int, pieces: Iterable[Piece]) -> list[tuple[int, int]]:
        size = self._block_bytes
        return [
            (pool, block)
            for piece in pieces
            for block in range(piece.start // size, (piece.start + piece.length) // size)
        ]

    def expose(self, effect: Expose) -> None:
        """A host may reach the bytes from now on."""
        self._files[effect.file] = (effect.pool, effect.pieces)
        self._links[effect.ld, effect.file] = (effect.pool, effect.pieces)

    def conceal(self, ld: int, file: str) -> None:
        """No longer by name; mappings stay."""
        self._links.pop((ld, file), None)

    def revoke(self, file: str) -> None:
        """Mappings fault from now on."""
        self._files.pop(file, None)

    def file_of(self, ld: int, tag: str) -> str | None:
        """The file under which a host finds a tag."""
        return tag if (ld, tag) in self._links else None

    def write(self, file: str, tag: str) -> bool:
        """A mapping of `file` is written to. False: it faults. Raises when it shows another's
        bytes.
        """
        found = self._files.get(file)
        if found is None:
            return False
        for block in self._blocks(*found):
            there = self.blocks.setdefault(block, tag)
            if there != tag:
                raise InvariantViolated(f"{tag} maps block {block}, which has bytes of {there}")
        self._loaded[file] = self.wipes.get(file, 0)
        return True

    def read(self, file: str, tag: str) -> bool:
        """A mapping is read. False: it faults. Raises when what was written is not there."""
        found = self._files.get(file)
        if found is None:
            return False
        loaded = self._loaded.get(file) == self.wipes.get(file, 0)
        for block in self._blocks(*found):
            there = self.blocks.get(block, "")
            if there != (tag if loaded else ""):
                raise InvariantViolated(f"{tag} reads block {block} and finds {there or 'zeroes'}")
        return True

    def wipe(self, pool: int, pieces: Iterable[Piece], file: str = "") -> int:
        """Zero the blocks; returns how many bytes."""
        self.wipes[file] = self.wipes.get(file, 0) + 1
        blocks = self._blocks(pool, pieces)
        for block in blocks:
            self.blocks.pop(block, None)
        return len(blocks) * self._block_bytes

    def forget_links(self, kept: Iterable[tuple[int, str]]) -> None:
        """What a restarted appliance does: ways that should not be there go."""
        wanted = set(kept)
        self._links = {key: way for key, way in self._links.items() if key in wanted}


class _Port:
    """One port: its commands, and the one session that it has."""

    def __init__(self, dispatch: PortDispatch, types: frozenset[MessageType]) -> None:
        self.dispatch = dispatch
        self.types = types
        self.wire: Connection | None = None
        self.responder = self.fresh()

    def fresh(self) -> Responder:
        """A new session's framing."""
        return Responder(MctpStream(DEVICE_EID, FM_EID), message_types=self.types)


class ApplianceProcess(Process):
    """The device's machine behind its ports."""

    machine: DeviceMachine

    def __init__(
        self,
        sim: Simulation,
        name: str,
        spec: DeviceSpec,
        media: SimMedia,
        make: Callable[[DeviceSpec], DeviceMachine] = DeviceMachine,
    ) -> None:
        super().__init__(sim, name, partial(make, spec), MemoryStore(KINDS, DurableEffect))
        self.media = media
        identity = Identity(name, "sim", spec)
        hosts = tuple(HostDispatch(identity, ld, 4096) for ld in range(len(spec.lds)))
        host_types = frozenset({MessageType.CCI})
        self._ports = {ld: _Port(dispatch, host_types) for ld, dispatch in enumerate(hosts)}
        self._ports[FM_PORT] = _Port(FmDispatch(identity, hosts), frozenset(MessageType))

    # ---- life

    def started(self, loaded: Loaded) -> None:
        """Adopt the media, put right what hosts may reach, take up what was not wiped."""
        if self.machine.state.spec_row is None:
            self.post(Adopt("media"))
        exposures = self.machine.exposures()
        self.media.forget_links((way.ld, way.file) for way in exposures)
        for way in exposures:
            self.media.expose(way)
        for effect in loaded.outbox:
            self.perform(effect)

    def stopped(self) -> None:
        """Every session breaks."""
        for port in self._ports.values():
            if port.wire is not None:
                port.wire.close(f"{self.name} died")
                port.wire = None

    # ---- ports

    def accept(
        self, number: int, to_client: Callable[[bytes], None], *, fifo: bool
    ) -> Connection | None:
        """A connection to a port, displacing the one it had; None while nobody listens."""
        if not self.alive:
            return None
        port = self._ports[number]
        if port.wire is not None:
            port.wire.close("displaced")
        wire = Connection(
            self.sim, lambda data: self._receive(port, wire, data), to_client, fifo=fifo
        )
        port.wire = wire
        port.responder = port.fresh()
        self.post(SessionStarted(number))
        return wire

    def _receive(self, port: _Port, wire: Connection, data: bytes) -> None:
        if not self.alive or port.wire is not wire:
            return
        for item in port.responder.feed(data):
            if isinstance(item, Fault):
                if item.fatal:
                    wire.close(item.reason)
                continue
            plan = port.dispatch.plan(item.opcode, item.body)
            if isinstance(plan, Immediate):
                port.responder.respond(item, ReturnCode(plan.code), plan.body)
                self._flush(port)
            else:
                answer = partial(self._answered, port, wire, item, plan.said)
                self.post(plan.event, answer)

    def _answered(
        self,
        port: _Port,
        wire: Connection,
        request: Request,
        said: Callable[[Answer], Said],
        answer: Answer,
    ) -> None:
        for plan in answer.value if isinstance(answer.value, tuple) else ():
            if isinstance(plan, FencePlan) and not plan.shared:
                self.media.revoke(plan.file)
        if port.wire is wire:
            code, body = said(answer)
            port.responder.respond(request, ReturnCode(code), body)
            self._flush(port)

    def _flush(self, port: _Port) -> None:
        data = port.responder.outgoing()
        if data and port.wire is not None:
            port.wire.down.send(data)

    # ---- effects

    def perform(self, effect: Effect) -> None:
        """To the media, or a notification to a port."""
        if isinstance(effect, Expose):
            self.media.expose(effect)
        elif isinstance(effect, Conceal):
            self.media.conceal(effect.ld, effect.file)
        elif isinstance(effect, Notify):
            port = self._ports[effect.port]
            port.responder.notify(1 << EventLog.DYNAMIC_CAPACITY)
            self._flush(port)
        elif isinstance(effect, Sanitise):
            pause = self.sim.random.randrange(100 * MICROSECOND, 50 * MILLISECOND)
            self.later(pause, partial(self._sanitise, effect))
        elif not isinstance(effect, Drop):
            raise NotImplementedError(f"{effect} is not simulated")

    def _sanitise(self, effect: Sanitise) -> None:
        if effect.forced:
            self.media.revoke(effect.file)
        size = self.media.wipe(effect.pool, effect.pieces, effect.file)
        done = SanitiseDone(effect.id, effect.allocation, SanitiseMethod.PUNCH, size, size)
        self.post(done)
