"""Composition roots: the only place where real clocks, sockets and stores meet.

Each section loads its daemon inside its function, so that starting one costs nothing for the
others.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

    from tagmem.agent.config import HostConfig
    from tagmem.appliance.config import ApplianceConfig
    from tagmem.base.units import Bytes
    from tagmem.orchestrator.config import OrchestratorConfig
    from tagmem.ports import DaxDevices, Hypervisors, Media, Peers, Store
    from tagmem.presenter.host import Keep, Tags
    from tagmem.presenter.machine import VmSpec

# ---- what every daemon has

GC_THRESHOLDS = (20_000, 20, 50)
"""Objects made between two looks for cycles; Python's own 700 cost a twentieth of all time."""


def _prepare() -> None:
    """Logs to stderr, and as many descriptors as this process may have."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(main: Coroutine[Any, Any, None]) -> None:
    import uvloop

    # What was loaded until here stays: the collector need not look at it again.
    gc.freeze()
    # Events and steps are freed as soon as they are done with; cycles are few.
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


# ---- orchestrator


def orchestrator(config: Path | None, overrides: Mapping[str, Any]) -> int:
    """Be the orchestrator until SIGTERM; the exit code.

    Raises Conflict when its state directory or an address is in use, InvalidInput for a wrong
    configuration, StorageFailed when its database cannot be used.
    """
    _prepare()
    from tagmem.domain.effects import DurableEffect
    from tagmem.domain.records import KINDS
    from tagmem.io.lockfile import StateDirectory
    from tagmem.orchestrator.config import load
    from tagmem.orchestrator.server import Listening
    from tagmem.store.sqlite import SqliteStore

    settings = load(config, overrides)
    with (
        StateDirectory(settings.state_dir, field="state_dir") as directory,
        closing(Listening(settings.endpoints())) as listening,
        closing(SqliteStore(directory.path / "orchestrator.db", KINDS, DurableEffect)) as store,
    ):
        _run(_orchestrate(settings, store, listening.sockets))
    return 0


async def _orchestrate(
    settings: OrchestratorConfig, store: Store, sockets: Sequence[socket.socket]
) -> None:
    from tagmem import __version__
    from tagmem.domain.machine import OrchestratorMachine
    from tagmem.io import stream
    from tagmem.io.clock import SystemClock
    from tagmem.orchestrator.fabric import Links
    from tagmem.orchestrator.service import Orchestrator

    async def dial(address: str) -> stream.Connection:
        return await stream.connect(address.removeprefix("unix:"))

    clock = SystemClock()
    service = Orchestrator(
        settings,
        OrchestratorMachine(),
        store,
        clock,
        lambda engine, _view: Links(engine, clock, dial),
        __version__,
    )
    await service.run(sockets)


# ---- appliance


def appliance(config: Path) -> int:
    """Be an emulated memory appliance until SIGTERM; the exit code.

    Raises Conflict when its state directory, media or a socket is in use, InvalidInput for a wrong
    configuration, StorageFailed when its database cannot be used.
    """
    _prepare()
    from tagmem.appliance.config import load
    from tagmem.appliance.media import open_media
    from tagmem.domain.device_records import KINDS, DurableEffect
    from tagmem.io.lockfile import StateDirectory
    from tagmem.store.sqlite import SqliteStore

    settings = load(config)
    directory = StateDirectory(settings.state_dir, field="state_dir")
    try:
        pools = {region.pool: region.size_bytes for region in settings.spec().regions}
        media = open_media(
            settings.layout,
            settings.media_path,
            settings.host_directories,
            pools,
            hugetlbfs=settings.hugetlbfs,
            head_bytes=settings.head_bytes,
            header=_header,
        )
        with (
            closing(media),
            closing(SqliteStore(directory.path / "appliance.db", KINDS, DurableEffect)) as store,
        ):
            _run(_appliance(settings, store, media))
    finally:
        directory.release()
    return 0


def _header(allocation: str, size_bytes: Bytes) -> tuple[Bytes, bytes]:
    """What shows a tag to the kernel of a guest; nothing where no DAX device could be made."""
    from tagmem.base.errors import InvalidInput
    from tagmem.presenter.header import DATA_AT, HEADER_AT, dax_header

    try:
        content = dax_header(allocation, DATA_AT + size_bytes)
    except InvalidInput:
        content = b""
    return DATA_AT - HEADER_AT, content


async def _appliance(settings: ApplianceConfig, store: Store, media: Media) -> None:
    import signal

    from tagmem import __version__
    from tagmem.appliance.server import Appliance
    from tagmem.io import stream
    from tagmem.io.clock import SystemClock

    server = Appliance(settings, store, SystemClock(), media, __version__)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.run(stream.listen)


# ---- host


def host(config: Path) -> int:
    """Be a host's agent until SIGTERM; the exit code. Workloads go on, and are found again.

    Raises Conflict when its state directory is in use, InvalidInput for a wrong configuration,
    StorageFailed when its database cannot be used.
    """
    _prepare()
    from tagmem.agent.config import load
    from tagmem.agent.devices import EmulatedDax
    from tagmem.agent.kernel import KernelDax
    from tagmem.agent.records import KINDS
    from tagmem.io.lockfile import StateDirectory
    from tagmem.store.sqlite import SqliteStore

    settings = load(config)
    with (
        StateDirectory(settings.state, field="state") as directory,
        StateDirectory(settings.run, field="run") as run,
        closing(SqliteStore(directory.path / "agent.db", KINDS)) as store,
    ):
        kernel = settings.dax == "kernel"
        _run(_be_host(settings, store, KernelDax(run.path) if kernel else EmulatedDax(run.path)))
    return 0


BROKER_DIRECTORY = ".broker"
"""In `<run>/vm`, which has a directory for each VM beside it; no VM has such a name."""


def _cgroup_name(settings: HostConfig) -> str:
    """Two hosts of one name on one machine (two systems side by side) must not share one."""
    import zlib

    state = zlib.crc32(str(Path(settings.state).resolve()).encode())
    return f"tagmem-{settings.name}-{state:08x}"


async def _be_host(settings: HostConfig, store: Store, devices: DaxDevices) -> None:
    import signal

    from tagmem.agent.proof import Prover
    from tagmem.agent.service import HostService
    from tagmem.agent.workloads import Workloads, find_cgroup
    from tagmem.io import stream
    from tagmem.io.clock import SystemClock

    cgroup = find_cgroup(_cgroup_name(settings)) if settings.use_cgroup else None
    workloads = Workloads(Path(settings.state), Path(settings.run), cgroup)
    service = HostService(
        settings,
        store,
        SystemClock(),
        devices,
        workloads,
        Prover(),
        stream.connect,
        stream.listen,
        lambda keep, tags, peers: _hypervisors(settings, keep, tags, peers),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    await service.run()


def _hypervisors(settings: HostConfig, keep: Keep, tags: Tags, peers: Peers) -> Hypervisors:
    """QEMU, and a broker of windows; guests without a kernel of their own are the lab's."""
    import msgspec

    from tagmem.agent.workloads import find_cgroup
    from tagmem.io import stream
    from tagmem.presenter import apart
    from tagmem.presenter.brokerlink import BrokerLink
    from tagmem.presenter.host import Hypervisor
    from tagmem.presenter.house import this_site

    directory = Path(settings.run) / "vm"
    windows = directory / BROKER_DIRECTORY
    windows.mkdir(mode=0o700, parents=True, exist_ok=True)
    cgroups = find_cgroup(_cgroup_name(settings)) if settings.use_cgroup else None

    async def parts(spec: VmSpec, qemu: str) -> VmSpec:
        spec = await machine_parts(spec, qemu)
        if cgroups is None:
            return spec
        own = cgroups / f"vm-{spec.name}"
        await asyncio.to_thread(own.mkdir, exist_ok=True)
        return msgspec.structs.replace(spec, cgroup=str(own))

    def broker() -> subprocess.Popen[bytes]:
        own = None if cgroups is None else cgroups / "broker"
        if own is not None:
            own.mkdir(exist_ok=True)
        line = (sys.executable, "-m", "tagmem", "broker", str(windows))
        return apart.start(line, str(windows / "log"), cgroup=str(own or ""))

    link = BrokerLink(windows, stream.connect, broker)
    site = this_site(settings.vms.migration_address)
    return Hypervisor(directory, keep, tags, link, parts, peers, settings.vms.broker_death, site)


def broker(directory: Path) -> int:
    """Be a host's broker of windows until nobody needs it; the exit code.

    Raises Conflict when there is one already.
    """
    _prepare()
    with asyncio.Runner() as runner:
        runner.run(_broke(directory))
    return 0


async def _broke(directory: Path) -> None:
    import signal

    from tagmem import __version__
    from tagmem.io import stream
    from tagmem.presenter.brokerserver import BrokerServer

    server = BrokerServer(stream, directory, __version__)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.end_soon)
    await server.run()


async def machine_parts(spec: VmSpec, qemu: str) -> VmSpec:
    """The QEMU of that name or path, and the lab's kernel and initial RAM disk where none are
    given.
    """
    import msgspec

    from tagmem.lab import image, qemus
    from tagmem.lab.boot import Lab
    from tagmem.lab.spec import MODULES, GuestSpec, kernel_line

    if qemu in qemus.NAMES:
        lab = Lab()
        found = await asyncio.to_thread(lab.qemu, qemu)
        accel = await lab.accel(found)
        spec = msgspec.structs.replace(
            spec,
            qemu=found.argv,
            environment=found.environment,
            accel="kvm" if accel == "kvm" else "tcg,thread=multi",
            cpu="max,host-phys-bits=on" if accel == "kvm" else "max,phys-bits=46",
        )
    else:
        spec = msgspec.structs.replace(spec, qemu=(qemu,))
    special = any(node.specific_purpose for node in spec.nodes)
    if special:
        spec = await asyncio.to_thread(_with_firmware, spec)
    if spec.kernel:
        return spec
    made = await asyncio.to_thread(image.get)
    directory = Path(spec.directory)
    await asyncio.to_thread(directory.mkdir, 0o700, parents=True, exist_ok=True)
    initrd = await asyncio.to_thread(image.initrd, made, directory)
    modules = (*MODULES, "virtio_net") if spec.forwards else MODULES
    modules = (*modules, "dax_hmem") if special else modules
    append = f"{kernel_line(GuestSpec(name=spec.name, modules=modules))} {spec.append}".strip()
    return msgspec.structs.replace(spec, kernel=str(made.kernel), initrd=str(initrd), append=append)


def _with_firmware(spec: VmSpec) -> VmSpec:
    """With firmware that passes specific-purpose memory on. Raises Unsupported where none is."""
    import msgspec

    from tagmem.base.errors import Unsupported
    from tagmem.lab import firmware
    from tagmem.lab.errors import LabFailed
    from tagmem.lab.packages import cache_dir

    directory = Path(spec.directory)
    directory.mkdir(0o700, parents=True, exist_ok=True)
    files = directory / "firmware.fd", directory / "variables.fd"
    try:
        firmware.place(files, cache_dir())
    except LabFailed as error:
        why = "SeaBIOS and older edk2 hide specific-purpose memory from the guest"
        raise Unsupported(f"--specific-purpose: {why}, and {error}") from None
    return msgspec.structs.replace(spec, firmware=(str(files[0]), str(files[1])))
