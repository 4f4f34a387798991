"""The shell of the host agent: one engine, a connection per appliance, a session, and three
workers.

Each worker is a thread that takes all orders that wait and carries them out in their order, so a
burst of releases costs one look through /proc. Orders for one tag's device never overtake each
other: a surfacing that had to wait for the appliance is dropped when something newer has been
ordered.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tagmem.agent import records as r
from tagmem.agent.config import HostConfig
from tagmem.agent.connection import Connection, Dial, close_quietly
from tagmem.agent.kernel import KernelAppliance, KernelDax
from tagmem.agent.local import Listen, LocalApi
from tagmem.agent.loop import AgentMachine
from tagmem.agent.mailbox import HostLink, MediaAnswer
from tagmem.agent.peers import PeerDesk
from tagmem.agent.proof import Prover, Target
from tagmem.agent.session import OrchestratorSession
from tagmem.agent.vms import DetachGuests, GuestsAsked, KeepVm
from tagmem.agent.workloads import Workloads
from tagmem.base.errors import NotFound, Unsupported
from tagmem.engine import Engine
from tagmem.ports import (
    Clock,
    DaxDevices,
    DaxSource,
    Effect,
    Event,
    Holding,
    HostTag,
    Hypervisors,
    MediaPiece,
    Peers,
    Store,
)
from tagmem.wire.agentapi import Hello, Observed, WorkloadReport
from tagmem.wire.cci import ReturnCode, return_code_name
from tagmem.wire.vendor import MediaLayout

log = logging.getLogger(__name__)

MakeHypervisors = Callable[
    [Callable[[str, str | None], Awaitable[None]], Callable[[str], HostTag], Peers], Hypervisors
]
"""Made when the engine runs: given how to keep a document, how to look up a tag, and how to ask
other hosts.
"""
_NEVER_HERE = (ReturnCode.INVALID_INPUT, ReturnCode.UNSUPPORTED)
"""Said of a tag that this host has not accepted, and by appliances that never show bytes."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Worker:
    """Carries out batches of orders, in their order: in a thread, or (`inline`) in the loop.

    What makes a dozen short system calls per order is inline: in a thread each of them would wait
    for its turn to run Python again, which takes longer than the call.
    """

    def __init__(
        self, name: str, work: Callable[[list[Effect]], None], *, inline: bool = False
    ) -> None:
        self._name = name
        self._work = work
        self._orders: list[Effect] = []
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = (
            None if inline else ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        )

    def order(self, effect: Effect) -> None:
        """Queue an order; at most a few per tag can wait."""
        self._orders.append(effect)
        self._wake.set()

    def tell(self, function: Callable[..., object], *args: object) -> None:
        """From the work: call a function in the loop."""
        assert self._loop is not None
        if self._thread is None:
            function(*args)
        else:
            self._loop.call_soon_threadsafe(function, *args)

    async def run(self) -> None:
        """Until cancelled."""
        loop = self._loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            taken, self._orders = self._orders, []
            if self._thread is None:
                self._work(taken)
            else:
                await loop.run_in_executor(self._thread, self._work, taken)


class Refusals:
    """`<run>/refused/<uuid>`: why a tag was refused here, for whoever waits for it."""

    def __init__(self, run: Path) -> None:
        self._directory = run / "refused"
        self._directory.mkdir(parents=True, exist_ok=True)
        for old in self._directory.iterdir():
            old.unlink()

    def tell(self, tag: str, reason: str) -> None:
        """Leave a sentence; without one, take it away."""
        path = self._directory / tag
        if not reason:
            path.unlink(missing_ok=True)
            return
        aside = self._directory / f".{tag}"
        aside.write_text(reason + "\n", encoding="utf-8")
        aside.rename(path)


class HostService:
    """The agent of one host, built from explicit adapters; `run` until `stop`."""

    def __init__(
        self,
        config: HostConfig,
        store: Store,
        clock: Clock,
        devices: DaxDevices,
        workloads: Workloads,
        prover: Prover,
        dial: Dial,
        listen: Listen | None = None,
        hypervisors: MakeHypervisors | None = None,
    ) -> None:
        self._config = config
        self._devices = devices
        self._workloads = workloads
        self._prover = prover
        self._machine = AgentMachine(config.policy())
        self.engine = Engine(self._machine, store, clock, self._perform)
        hello = Hello(
            config.name,
            _BOOT_ID.read_text().strip(),
            {a.name: a.ld for a in config.appliance},
            peer_calls=True,
        )
        self._peers = PeerDesk(config.vms.accept_migrations, self._serve_peer)
        self.session = OrchestratorSession(
            config.orchestrator, hello, self.engine.post, self._peers
        )
        self._directories = {a.name: a.directory for a in config.appliance}
        self.connections: dict[str, Connection | KernelAppliance] = {}
        for a in config.appliance:
            post = self.engine.post
            if isinstance(devices, KernelDax):
                self.connections[a.name] = KernelAppliance(a.name, devices, post)
            else:
                link = HostLink(a.name)
                connection = Connection(link, a.socket, clock, post, self._media, dial)
                self.connections[a.name] = connection
        self._make_hypervisors = hypervisors
        self._listen = listen
        self._vms: Hypervisors | None = None
        self._local: LocalApi | None = None
        self._detaching: dict[str, asyncio.Task[None]] = {}
        self._head_bytes = {a.name: a.head_bytes() for a in config.appliance}
        self._tickets: dict[str, int] = {}
        self._surfacing: dict[str, r.Surface] = {}
        self._checking: dict[str, r.CheckHolders] = {}
        self._media_kept: dict[str, int] = {}
        self._refusals = Refusals(Path(config.run))
        self._refused: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        # An emulated host's devices are names on a tmpfs; the kernel's may take their time.
        inline = not isinstance(devices, KernelDax)
        self._device_worker = Worker("devices", self._work_devices, inline=inline)
        self._proof_worker = Worker("proof", self._work_proofs)
        self._workload_worker = Worker("workloads", self._work_workloads)

    async def run(self) -> None:
        """Take up what an earlier agent left, then serve."""
        self._loop = asyncio.get_running_loop()
        self.engine.restore()
        adopted = self._workloads.adopt()
        self.engine.post(r.Started(dict(self._devices.found()), adopted))
        for tag, report in adopted.items():
            if report.state == "running":
                self._watch(tag, report.id)
        parts: list[Coroutine[Any, Any, None]] = [
            self.engine.run(),
            self.session.run(),
            *(connection.run() for connection in self.connections.values()),
            *(w.run() for w in (self._device_worker, self._proof_worker, self._workload_worker)),
            self._serve_host(),
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
            await self._stopping.wait()
            await self.engine.stop()
            await tasks[0]
            for task in tasks[1:]:
                task.cancel()
        self._workloads.close()
        if self._local is not None:
            self._local.close()
        if self._vms is not None:
            await self._vms.close()

    async def _serve_host(self) -> None:
        """Find the VMs again, then be there for people on this host."""
        if self._make_hypervisors is not None:
            vms = self._make_hypervisors(self._keep_vm, self._host_tag, self._peers)
            await vms.restore(dict(self._machine.vms.documents))
            self._vms = vms
        if self._listen is not None:
            path = os.path.join(self._config.run, "agent.sock")
            self._local = LocalApi(path, self._vms, self._config.name)
            self._local.start(self._listen)

    async def _serve_peer(self, host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What another host's agent asks, which is about VMs."""
        if self._vms is None:
            raise Unsupported("its agent has no hypervisor, or is still finding its VMs")
        return await self._vms.serve(host, request)

    def stop(self) -> None:
        """End `run` after the commit under way. Workloads go on; the next agent finds them."""
        self._stopping.set()

    def _post(self, event: Event) -> None:
        """From a worker's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.engine.post, event)

    # ---- effects

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, r.Report):
            self.session.push(effect.observed)
            self._tell_applications(effect.observed)
        elif isinstance(effect, r.Surface):
            self._surface(effect)
        elif isinstance(effect, r.Withdraw):
            self._tickets[effect.tag] = effect.ticket
            self._device_worker.order(effect)
        elif isinstance(effect, r.ReturnExtents | r.GiveUp):
            self._device_worker.order(effect)
        elif isinstance(effect, r.CheckHolders):
            self._check(effect)
        elif isinstance(effect, r.KillHolders):
            self._proof_worker.order(effect)
        elif isinstance(effect, r.Launch | r.Signal):
            self._workload_worker.order(effect)
        elif isinstance(effect, DetachGuests):
            self._detach_guests(effect)
        elif isinstance(effect, r.EndSession):
            self.session.hang_up(effect.reason)
        elif isinstance(effect, r.Answer | r.Acknowledge | r.ReadDevice):
            connection = self.connections.get(effect.appliance)
            if connection is not None:
                connection.perform(effect)

    def _tell_applications(self, observed: Observed) -> None:
        """Leave why a tag was refused where `tagmem.open` looks, until it is expected again."""
        tag, refused = observed.tag, observed.phase == "refused"
        if refused or tag in self._refused:
            (self._refused.add if refused else self._refused.discard)(tag)
            self._device_worker.order(_Refusal(0, tag, observed.reason if refused else ""))

    # ---- VMs

    async def _keep_vm(self, key: str, document: str | None) -> None:
        await self.engine.submit(KeepVm(key, document))

    def _host_tag(self, tag: str) -> HostTag:
        """What the hypervisors have to know of a tag. Raises NotFound, Unsupported."""
        state = self._machine.tag(tag)
        path = self._devices.found().get(tag, "")
        if state is None or not path or not state.in_use:
            raise NotFound(f"tag {tag} is not attached to this host")
        size = sum(length for _, length in state.extents)
        head = self._head_bytes.get(state.appliance, 0)
        pieces: Sequence[MediaPiece] = (MediaPiece(head, size),)
        own = os.path.exists(path)
        if not own:
            pool = self._devices.pool(tag)
            if pool is None or sum(piece.length for piece in pool[1]) != size:
                why = "its bytes are in no file that this host knows of"
                raise Unsupported(f"tag {tag}: {why}; attached anew, it asks the appliance")
            (path, pieces), head = pool, 0
        desired = state.desired
        return HostTag(
            tag,
            size,
            path,
            pieces,
            desired is not None and desired.read_only,
            desired is not None and desired.shared,
            dead_end=own and not isinstance(self._devices, KernelDax),
            head_room_bytes=head,
        )

    def _detach_guests(self, order: DetachGuests) -> None:
        """One at a time per tag; it is ordered again as long as somebody holds the tag."""
        if self._vms is None or order.tag in self._detaching:
            return
        task = asyncio.get_running_loop().create_task(self._take_back(self._vms, order))
        self._detaching[order.tag] = task
        task.add_done_callback(lambda _: self._detaching.pop(order.tag, None))

    async def _take_back(self, vms: Hypervisors, order: DetachGuests) -> None:
        self.engine.post(GuestsAsked(order.tag, vms.holding(order.tag)))
        why = await vms.release(
            order.tag, order.deadline_ns, may_stop_vm=order.may_stop_vm, up_to=order.up_to
        )
        self.engine.post(GuestsAsked(order.tag, why))

    def _source_path(self, appliance: str, tag: str) -> str:
        directory = self._directories.get(appliance, "")
        path = os.path.join(directory, tag) if directory else ""
        return path if path and os.path.exists(path) else ""

    def _surface(self, effect: r.Surface) -> None:
        self._tickets[effect.tag] = effect.ticket
        in_place = isinstance(self._devices, KernelDax)
        named = not effect.read_only and self._source_path(effect.appliance, effect.tag)
        if in_place or named:
            self._device_worker.order(effect)
            return
        self._surfacing[effect.tag] = effect
        connection = self.connections.get(effect.appliance)
        if connection is None or not connection.ask_media(effect.tag):
            reason = f"appliance {effect.appliance} is not connected"
            self.engine.post(r.SurfaceFailed(effect.tag, effect.ticket, reason))

    def _check(self, effect: r.CheckHolders) -> None:
        """Without a path to the bytes the appliance lends their descriptor for the proof.

        To know of no bytes proves nothing: an agent that was restarted after it took the device
        away has to be told again where they are.
        """
        tag = effect.tag
        known = self._devices.descriptor(tag) >= 0 or self._source_path(effect.appliance, tag)
        connection = self.connections.get(effect.appliance)
        if not known and connection is not None and connection.ask_media(tag):
            self._checking[tag] = effect
        elif not (known or self._devices.identities(tag) or isinstance(self._devices, KernelDax)):
            why = f"appliance {effect.appliance} is not connected, and knows where the bytes are"
            self.engine.post(r.HoldersChecked(tag, effect.ticket, (), False, why))
        elif self._prover.alone(self._target(effect)):
            self.engine.post(r.HoldersChecked(tag, effect.ticket, (), True, ""))
        else:
            self._proof_worker.order(effect)

    def _prove_as_told(self, check: r.CheckHolders, answer: MediaAnswer, descriptor: int) -> None:
        """Prove it with what the appliance said of the tag's bytes."""
        if answer.media is not None and answer.media.layout is MediaLayout.BY_DPA:
            close_quietly(descriptor)
            self.engine.post(self._guests_proof(check))
        elif answer.media is None and answer.code not in _NEVER_HERE:
            close_quietly(descriptor)
            why = f"appliance {check.appliance} does not say where its bytes are: "
            why += return_code_name(answer.code)
            self.engine.post(r.HoldersChecked(check.tag, check.ticket, (), False, why))
        else:
            self._proof_worker.order(_Lent(0, check, descriptor))

    def _guests_proof(self, order: r.CheckHolders) -> r.HoldersChecked:
        """Of a tag without a file of its own, as part of a pool is: programs of this host cannot
        have it, and the VMs that do are those on record.
        """
        if self._make_hypervisors is not None and self._vms is None:
            why = "the VMs of this host are still being found"
            return r.HoldersChecked(order.tag, order.ticket, (), False, why)
        holders = tuple(self._vms.holders(order.tag)) if self._vms is not None else ()
        return r.HoldersChecked(order.tag, order.ticket, holders, True, "")

    def _media(self, answer: MediaAnswer, descriptor: int) -> None:
        """The appliance has said where the bytes of a tag are, or that it does not say."""
        check = self._checking.pop(answer.tag, None)
        if check is not None:
            self._prove_as_told(check, answer, descriptor)
            return
        effect = self._surfacing.pop(answer.tag, None)
        if effect is None or answer.media is None:
            close_quietly(descriptor)
            if effect is not None:
                reason = f"its media: {return_code_name(answer.code)}"
                self.engine.post(r.SurfaceFailed(effect.tag, effect.ticket, reason))
            return
        close_quietly(self._media_kept.pop(answer.tag, -1))
        if descriptor >= 0:
            self._media_kept[answer.tag] = descriptor
        pieces = tuple(MediaPiece(p.media_offset, p.length_bytes) for p in answer.media.pieces)
        path = pool = ""
        if answer.media.layout is MediaLayout.BY_TAG and descriptor >= 0:
            path = f"/proc/self/fd/{descriptor}"
        elif descriptor >= 0:
            pool = os.readlink(f"/proc/self/fd/{descriptor}")
        self._device_worker.order(_Placed(0, effect, path, pieces, pool))

    # ---- in the device worker

    def _post_device(self, event: Event) -> None:
        self._device_worker.tell(self.engine.post, event)

    def _work_devices(self, orders: list[Effect]) -> None:
        for order in orders:
            if isinstance(order, r.Surface):
                path = self._source_path(order.appliance, order.tag)
                head = self._head_bytes.get(order.appliance, 0)
                self._make(order, path, (MediaPiece(head, order.size_bytes),))
            elif isinstance(order, _Placed):
                self._make(order.surface, order.path, order.pieces, order.pool)
                if order.path:
                    close_quietly(self._media_kept.pop(order.surface.tag, -1))
            elif isinstance(order, r.Withdraw):
                self._withdraw(order)
            elif isinstance(order, _Refusal):
                self._refusals.tell(order.tag, order.reason)
            elif isinstance(order, r.GiveUp):
                self._give_up(order.tag)
            elif isinstance(order, r.ReturnExtents):
                self._return(order)

    def _make(
        self, order: r.Surface, path: str, pieces: tuple[MediaPiece, ...], pool: str = ""
    ) -> None:
        if self._tickets.get(order.tag) != order.ticket:
            return
        align = self._config.policy().align_bytes
        source = DaxSource(
            order.tag,
            order.region,
            order.size_bytes,
            align,
            order.read_only,
            path,
            pieces,
            order.sharing,
            pool,
        )
        try:
            found = self._devices.surface(source)
        except OSError as error:
            reason = f"{error.strerror} ({error.filename})" if error.filename else str(error)
            self._post_device(r.SurfaceFailed(order.tag, order.ticket, reason))
            return
        self._post_device(r.Surfaced(order.tag, order.ticket, found))

    def _withdraw(self, order: r.Withdraw) -> None:
        try:
            left = self._devices.withdraw(order.tag)
        except OSError as error:
            self._post_device(r.WithdrawFailed(order.tag, order.ticket, str(error)))
            return
        self._post_device(r.Withdrawn(order.tag, order.ticket, left))

    def _return(self, order: r.ReturnExtents) -> None:
        if not self._give_up(order.tag):
            self._post_device(r.Returned(order.appliance, order.tag, ReturnCode.INTERNAL_ERROR))
            return
        connection = self.connections.get(order.appliance)
        if connection is not None:
            self._device_worker.tell(connection.perform, order)

    def _give_up(self, tag: str) -> bool:
        close_quietly(self._media_kept.pop(tag, -1))
        self._tickets.pop(tag, None)
        try:
            self._devices.give_up(tag)
        except OSError as error:
            log.warning("tag %s: the device could not be let go: %s", tag, error)
            return False
        return True

    # ---- in the proof worker's thread

    def _target(self, order: r.CheckHolders | r.KillHolders, descriptor: int = -1) -> Target:
        directory = self._directories.get(order.appliance, "")
        path = self._source_path(order.appliance, order.tag)
        ours = tuple(os.path.join(d, "") for d in (self._config.run, directory) if d)
        identities = tuple(self._devices.identities(order.tag))
        paths = (path, *self._devices.views(order.tag)) if path else ()
        if not paths and descriptor < 0:
            descriptor = self._devices.descriptor(order.tag)
        return Target(order.tag, paths, identities, ours, descriptor, order.shared)

    def _work_proofs(self, orders: list[Effect]) -> None:
        self._prover.excluded = {c.peer_pid for c in self.connections.values() if c.peer_pid}
        checks = {o.tag: (o, -1) for o in orders if isinstance(o, r.CheckHolders)}
        lent = [o for o in orders if isinstance(o, _Lent)]
        checks |= {o.check.tag: (o.check, o.descriptor) for o in lent}
        for order in orders:
            if isinstance(order, r.KillHolders):
                for holder in self._prover.kill(self._target(order)):
                    log.warning("tag %s: killed %d (%s)", order.tag, holder.pid, holder.name)
        if not checks:
            return
        proofs = self._prover.check([self._target(*check) for check in checks.values()])
        for order in lent:
            close_quietly(order.descriptor)
        for tag, proof in proofs.items():
            ticket = checks[tag][0].ticket
            holders = tuple(Holding(*holder) for holder in proof.holders)
            self._post(r.HoldersChecked(tag, ticket, holders, proof.complete, proof.reason))

    # ---- in the workload worker's thread

    def _work_workloads(self, orders: list[Effect]) -> None:
        assert self._loop is not None
        for order in orders:
            if isinstance(order, r.Launch):
                report = self._launch(order)
                self._post(r.WorkloadChanged(order.tag, report))
                if report.state == "running":
                    self._loop.call_soon_threadsafe(self._watch, order.tag, report.id)
            elif isinstance(order, r.Signal):
                report = self._workloads.stop(order.tag, order.workload_id, order.how)
                if report.state != "running":
                    self._post(r.WorkloadChanged(order.tag, report))
            elif isinstance(order, _Ended):
                report = self._workloads.look(order.tag, order.workload_id)
                self._post(r.WorkloadChanged(order.tag, report))

    def _launch(self, order: r.Launch) -> WorkloadReport:
        workload = order.workload
        try:
            return self._workloads.launch(order.tag, workload, order.dax_path, order.size_bytes)
        except (OSError, ValueError) as error:
            return WorkloadReport(workload.id, "failed", reason=f"it could not be started: {error}")

    def _watch(self, tag: str, workload_id: str) -> None:
        """On the loop: be told of a workload's end."""
        loop = asyncio.get_running_loop()
        pidfd = self._workloads.watch(tag, workload_id)
        if pidfd is None:
            self._workload_worker.order(_Ended(0, tag, workload_id))
            return

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._workload_worker.order(_Ended(0, tag, workload_id))

        loop.add_reader(pidfd, ended)


class _Refusal(Effect, frozen=True):
    """Tell applications why a tag was refused; without a reason, that it is not any more."""

    durable = False

    tag: str
    reason: str


class _Ended(Effect, frozen=True):
    """A workload's process has ended: read how."""

    durable = False

    tag: str
    workload_id: str


class _Lent(Effect, frozen=True):
    """Check, with the descriptor (or -1) that the appliance has lent for it."""

    durable = False

    check: r.CheckHolders
    descriptor: int


class _Placed(Effect, frozen=True):
    """Surface, now that the appliance has said where the bytes are."""

    durable = False

    surface: r.Surface
    path: str
    pieces: tuple[MediaPiece, ...]
    pool: str
