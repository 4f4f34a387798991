"""What people ask of a host's hypervisor, and what is kept of a VM so that it is found again, or
made again on another host.

All of it is checked here for shape and limits; what it means for the VMs is `presenter/host.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from tagmem.base.errors import InvalidInput, Unsupported
from tagmem.base.units import GIB, SECOND, Bytes, Nanoseconds
from tagmem.presenter.choose import AUTO
from tagmem.presenter.contract import Lent, Need, Value
from tagmem.presenter.machine import CXL_UNIT_BYTES, CxlSpec, MemoryNode, VmSpec
from tagmem.presenter.migrate import DEADLINE_NS, DEADLINE_NS_MAX, Build
from tagmem.presenter.ram import MemoryFrom

log = logging.getLogger(__name__)

ASK_NS = 10 * SECOND
CXL_BANDWIDTH_BYTES = 32 * GIB
"""In a second: eight lanes of PCIe 5, or what `--memory-from` is told as."""
UNLIMITED = 1 << 60

T = TypeVar("T", bound=Value)


def read(body: Mapping[str, Any], kind: type[T]) -> T:
    """Raises InvalidInput with the field that is wrong."""
    try:
        return msgspec.convert(dict(body), kind)
    except msgspec.ValidationError as error:
        raise InvalidInput("request", "as documented", str(error)) from None


class VmRecord(Value, frozen=True):
    """What is kept of a VM. Key: `vm/NAME`."""

    name: str
    qmp: str
    agent: str = ""
    pid: int = 0
    """0: it was to be started."""
    started_at: int = 0
    """When the process began, in the kernel's ticks: a number alone may be another's by now."""
    directory: str = ""
    """Empty: somebody else started it."""
    cgroup: str = ""
    build: Build | None = None
    """What another host makes the same machine from; None where it could not."""
    nodes: tuple[MemoryNode, ...] = ()
    """RAM of it that is in tags."""
    lent: tuple[Lent, ...] = ()
    """What lies where in its CXL windows, which QEMU forgets."""


class Start(Value, frozen=True):
    """`start`."""

    name: str
    memory_bytes: Bytes = 1 * GIB
    cpus: int = 1
    qemu: str = "11.1"
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    nvdimm: bool = False
    cxl_ports: int = 0
    """CXL root ports, each for a device of one tag."""
    cxl_window: str = ""
    """The file of a pool (media by DPA), to be the memory of a device with dynamic capacity."""
    cxl_latency_ns: int = 0
    """What that device tells of itself; 0: what QEMU has it tell."""
    cxl_bandwidth_bytes: Bytes = CXL_BANDWIDTH_BYTES
    forwards: tuple[tuple[int, int], ...] = ()
    """(port of this machine's loopback, TCP port of the guest)."""
    wait: bool = True
    """Until the guest's agent answers."""
    memory_from: tuple[MemoryFrom, ...] = ()
    """Tags that lie beside `memory_bytes` in the guest's memory."""


class Adopt(Value, frozen=True):
    """`adopt`."""

    name: str
    qmp: str
    agent: str = ""
    pid: int = 0


class Named(Value, frozen=True):
    """`show`, `stop`."""

    name: str


class Attach(Value, frozen=True):
    """`attach`."""

    name: str
    tag: str
    way: str = AUTO
    overwrite: bool = False
    """What the tag has may be lost."""
    need: Need = Need()


class Detach(Value, frozen=True):
    """`detach`."""

    name: str
    tag: str
    deadline_ns: Nanoseconds = 10 * SECOND
    force: bool = False
    may_stop_vm: bool = False


class Run(Value, frozen=True):
    """`exec`."""

    name: str
    argv: tuple[str, ...]
    tag: str = ""
    env: dict[str, str] = {}


class Migrate(Value, frozen=True):
    """`migrate`."""

    name: str
    to_host: str
    form: Literal["auto", "stays", "switch", "remove-all"] = "auto"
    back: bool = True
    """What was switched for the journey is switched back."""
    force: bool = False
    """Processes in the guest that hold a tag which cannot travel are ended."""
    ask_ns: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_NS_MAX)] = ASK_NS
    """For each tag that has to be taken out."""
    deadline_ns: Annotated[int, msgspec.Meta(gt=0, le=DEADLINE_NS_MAX)] = DEADLINE_NS
    """For the stream; then it is cancelled."""
    bandwidth_bytes: Annotated[int, msgspec.Meta(ge=0, le=UNLIMITED)] = 0
    """Per second; 0: as fast as it goes."""
    downtime_ms: Annotated[int, msgspec.Meta(ge=1, le=2_000_000)] = 300
    """What the last part of the stream may take while nothing runs."""


def spec_of(request: Start, directory: str, nodes: tuple[MemoryNode, ...]) -> VmSpec:
    """The machine that is asked for. Raises InvalidInput for a pool that cannot be."""
    return VmSpec(
        request.name,
        directory,
        memory_bytes=request.memory_bytes,
        cpus=request.cpus,
        kernel=request.kernel,
        initrd=request.initrd,
        append=request.append,
        nvdimm=request.nvdimm,
        forwards=request.forwards,
        nodes=nodes,
        cxl=_cxl_of(request),
    )


def _cxl_of(request: Start) -> CxlSpec:
    """As much of the pool's file as windows can show. Raises InvalidInput."""
    path = request.cxl_window
    if not path:
        return CxlSpec(request.cxl_ports, latency_ns=request.cxl_latency_ns)
    try:
        path = os.path.realpath(path)
        size = os.stat(path).st_size
    except OSError as error:
        raise InvalidInput("cxl_window", f"a file ({error.strerror})", path) from None
    if size < CXL_UNIT_BYTES:
        raise InvalidInput("cxl_window", f"of at least {CXL_UNIT_BYTES} bytes", size)
    figures = (request.cxl_latency_ns, request.cxl_bandwidth_bytes)
    if not request.cxl_latency_ns:
        figures = (0, 0)
    return CxlSpec(request.cxl_ports, path, size - size % CXL_UNIT_BYTES, *figures)


def build_of(request: Start, spec: VmSpec) -> Build | None:
    """What another host can make the same machine from: nothing that only this host has."""
    own = request.kernel or request.initrd or request.forwards or request.memory_from
    if own or spec.cxl != CxlSpec():
        return None
    try:
        return read(
            {
                "qemu": request.qemu,
                "memory_bytes": spec.memory_bytes,
                "memory_max_bytes": spec.memory_max_bytes,
                "cpus": spec.cpus,
                "ports": spec.ports,
                "port_bytes": spec.port_bytes,
                "memory_slots": spec.memory_slots,
                "nvdimm": spec.nvdimm,
                "append": request.append,
            },
            Build,
        )
    except InvalidInput as error:
        log.info("VM %s cannot be made again elsewhere: %s", request.name, error)
        return None


def rebuildable(record: VmRecord) -> Build:
    if record.build is None:
        why = "was started by somebody else, who migrates it"
        if record.directory:
            why = (
                "has a kernel, a QEMU, ports or a pool of this host alone, or CXL devices, which "
                "QEMU does not migrate, and cannot leave it"
            )
        if record.nodes:
            why = "has RAM in a tag of this host, and cannot leave it while it runs"
        raise Unsupported(f"VM {record.name} {why}")
    return record.build


def same_machine(build: Build, name: str, directory: str, extra: tuple[str, ...]) -> VmSpec:
    """The machine of a build, waiting for its guest."""
    return VmSpec(
        name,
        directory,
        memory_bytes=build.memory_bytes,
        cpus=build.cpus,
        append=build.append,
        ports=build.ports,
        port_bytes=build.port_bytes,
        memory_slots=build.memory_slots,
        memory_max_bytes=build.memory_max_bytes,
        nvdimm=build.nvdimm,
        incoming=True,
        extra=extra,
    )
