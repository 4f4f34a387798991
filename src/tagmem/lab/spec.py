"""What a lab guest is, and the command line that follows from it: pure, so that a test can read it.

The defaults are what the presenters count on: main RAM shared and named before any other backend
(another process serves queues in it, and migration under TCG aborts otherwise), root ports with
prefetchable space for windows to be plugged in while the guest runs, and an address width that
keeps that space out of a hole that AMD processors have below 1 TiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tagmem.base.errors import InvalidInput
from tagmem.base.units import GIB, MIB, Bytes
from tagmem.lab.qemus import NAMES, Qemu
from tagmem.presenter.machine import CxlSpec, cxl_arguments, cxl_options, cxl_words

Accel = Literal["kvm", "tcg"]
Firmware = Literal["seabios", "edk2"]

AGENT_PORT = "org.tagmem.agent.0"
RAM = "ram0"
"""The id of the main RAM's backend."""

MODULES = (
    "virtio_pmem",
    "nd_pmem",
    "device_dax",
    "dax_pmem",
    "nfit",
    "virtio_mem",
    "virtio_blk",
    "qemu_fw_cfg",
)
"""What is loaded before the agent starts. Not the CXL drivers: where decoders are to be committed
from user space, that comes first."""
NESTED_MODULES = ("kvm_amd", "kvm_intel")
"""One of them loads: an emulated processor has virtualisation too. A VM in a VM boots in seconds by
it, and in an emulator that is emulated in minutes."""

MEMORY_BYTES_MIN = 256 * MIB
CPUS_MAX = 64
ROOT_PORTS_MAX = 16
SOCKET_PATH_BYTES_MAX = 107
"""What fits in a sockaddr_un."""


@dataclass(frozen=True)
class GuestSpec:
    """A guest to be booted. Raises InvalidInput for a field outside its limit."""

    name: str = "guest"
    qemu: str = "11.1"
    """`10.0` or `11.1`."""
    memory_bytes: Bytes = 1 * GIB
    memory_slots: int = 8
    memory_bytes_max: Bytes = 32 * GIB
    cpus: int = 2
    root_ports: int = 6
    """pcie-root-ports `rp1` to `rpN`, chassis and slot the same number."""
    port_reserve_bytes: Bytes = 4 * GIB
    """64-bit prefetchable space behind each of them: the largest window that fits."""
    machine: tuple[str, ...] = ()
    """Options of the machine: `nvdimm=on`, `cxl=on`."""
    cpu: str = "max"
    """The model, and features as QEMU writes them: `max,hypervisor=off`."""
    numa: tuple[str, ...] = ()
    """Values of `-numa` beside node 0, which has the main RAM and the processors."""
    objects: tuple[str, ...] = ()
    """Values of `-object`, after the main RAM's."""
    devices: tuple[str, ...] = ()
    """Values of `-device`, after the root ports."""
    arguments: tuple[str, ...] = ()
    """Further words of QEMU's command line."""
    kernel_arguments: tuple[str, ...] = ()
    modules: tuple[str, ...] = MODULES
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Laid over the image: path in the guest to content; `#!` in front makes it executable."""
    nested: bool = False
    """It gets the QEMU that it runs on, in /opt/qemu, a kernel and initrd in /boot, and KVM."""
    agent: bool = True
    accel: Accel | None = None
    """None: KVM where it boots, else TCG."""
    firmware: Firmware = "seabios"
    """`edk2` is the newest that is within reach: unlike SeaBIOS it knows specific-purpose memory;
    it takes longer to boot."""
    incoming: bool = False
    """Started as the target of a migration: it waits for `migrate-incoming`."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) - _NAME or len(self.name) > 32:
            raise InvalidInput("name", "1 to 32 of a-z, 0-9, - and _", self.name)
        if self.qemu not in NAMES:
            raise InvalidInput("qemu", f"one of {', '.join(NAMES)}", self.qemu)
        for name, value, low, high in (
            ("memory", self.memory_bytes, MEMORY_BYTES_MIN, self.memory_bytes_max),
            ("cpus", self.cpus, 1, CPUS_MAX),
            ("root_ports", self.root_ports, 0, ROOT_PORTS_MAX),
        ):
            if not low <= value <= high:
                raise InvalidInput(name, f"{low} to {high}", value)
        if self.memory_bytes % (2 * MIB):
            raise InvalidInput("memory", "a multiple of 2 MiB", self.memory_bytes)


_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True)
class Places:
    """Where a running guest's files are, all in one folder."""

    folder: Path

    def __post_init__(self) -> None:
        longest = len(str(self.agent).encode())
        if longest > SOCKET_PATH_BYTES_MAX:
            limit = f"a path that leaves sockets in it {SOCKET_PATH_BYTES_MAX} bytes"
            raise InvalidInput("folder", limit, str(self.folder))

    @property
    def qmp(self) -> Path:
        """QMP for whoever manages the guest; the lab itself uses another."""
        return self.folder / "qmp.sock"

    @property
    def lab_qmp(self) -> Path:
        """The lab's own QMP."""
        return self.folder / "lab.sock"

    @property
    def agent(self) -> Path:
        """The guest agent's channel; one client at a time."""
        return self.folder / "agent.sock"

    @property
    def console(self) -> Path:
        """What the guest wrote on its console."""
        return self.folder / "console.log"

    @property
    def qmp_log(self) -> Path:
        """Every QMP command, answer and event of every client, as QEMU itself saw them."""
        return self.folder / "qmp.log"

    @property
    def errors(self) -> Path:
        """What QEMU wrote on stderr."""
        return self.folder / "qemu.err"

    @property
    def command(self) -> Path:
        """The command line it was started with."""
        return self.folder / "command"

    @property
    def firmware(self) -> tuple[Path, Path]:
        """UEFI firmware, and the variables that it keeps for this guest."""
        return (self.folder / "firmware.fd", self.folder / "variables.fd")

    @property
    def logs(self) -> tuple[Path, ...]:
        """What to read when something failed."""
        return (self.console, self.qmp_log, self.errors, self.command)


def command_line(
    spec: GuestSpec, qemu: Qemu, accel: Accel, kernel: Path, initrd: Path, places: Places
) -> list[str]:
    """QEMU's whole command line for a guest."""
    ram = f"memory-backend-memfd,id={RAM},size={spec.memory_bytes},share=on"
    machine = ["q35", *spec.machine]
    if not spec.numa:
        machine.append(f"memory-backend={RAM}")
    memory = f"{spec.memory_bytes // MIB}M"
    if spec.memory_slots:
        memory += f",slots={spec.memory_slots},maxmem={spec.memory_bytes_max // MIB}M"
    line = [*qemu.argv, "-name", spec.name, "-nodefaults", "-display", "none", "-no-user-config"]
    line += ["-object", ram, "-machine", ",".join(machine), "-accel", ACCEL[accel]]
    line += ["-cpu", f"{spec.cpu},{WIDTH[accel]}", "-smp", str(spec.cpus), "-m", memory]
    if spec.firmware == "edk2":
        for path, access in zip(places.firmware, ("on", "off"), strict=True):
            drive = f"if=pflash,format=raw,readonly={access},file={_escaped(path)}"
            line += ["-drive", drive]
    if spec.numa:
        line += ["-numa", f"node,nodeid=0,cpus=0-{spec.cpus - 1},memdev={RAM}"]
    for value in spec.objects:
        line += ["-object", value]
    for value in spec.numa:
        line += ["-numa", value]
    for number in range(1, spec.root_ports + 1):
        port = f"pcie-root-port,id=rp{number},bus=pcie.0,chassis={number},slot={number}"
        line += ["-device", f"{port},pref64-reserve={spec.port_reserve_bytes}"]
    line += ["-device", "virtio-serial-pci,id=serial0", "-chardev", _server("agent", places.agent)]
    line += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    line += ["-chardev", f"file,id=console,path={_escaped(places.console)}"]
    line += ["-serial", "chardev:console"]
    for name, path in (("lab", places.lab_qmp), ("qmp", places.qmp)):
        line += ["-chardev", _server(name, path), "-qmp", f"chardev:{name}"]
    for event in QMP_TRACE:
        line += ["-trace", f"enable={event}"]
    line += ["-D", str(places.qmp_log)]
    line += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", kernel_line(spec)]
    for value in spec.devices:
        line += ["-device", value]
    if spec.incoming:
        line += ["-incoming", "defer"]
    return line + list(spec.arguments)


def with_cxl(spec: GuestSpec, cxl: CxlSpec) -> GuestSpec:
    """The guest with CXL host bridges, ports and windows beside what it has, its figures QEMU's."""
    words = cxl_words(cxl, spec.memory_bytes, spec.memory_bytes_max, spec.memory_slots)
    return replace(
        spec,
        machine=(*spec.machine, *cxl_options(cxl)),
        arguments=(*spec.arguments, *cxl_arguments(cxl)),
        kernel_arguments=(*spec.kernel_arguments, *words),
    )


QMP_TRACE = ("handle_qmp_command", "monitor_qmp_respond", "monitor_protocol_event_emit")
ACCEL: dict[Accel, str] = {"kvm": "kvm", "tcg": "tcg,thread=multi"}
"""The values of `-accel`."""
WIDTH: dict[Accel, str] = {"kvm": "host-phys-bits=on", "tcg": "phys-bits=46"}
"""The feature of `-cpu` that says how wide addresses are. Under KVM they cannot be wider than the
machine's own."""


def kernel_line(spec: GuestSpec) -> str:
    """The kernel's command line. A panicked guest stays as it is, to be looked at."""
    words = ["console=ttyS0", "panic=0", "quiet", "audit=0"]
    modules = (*spec.modules, *NESTED_MODULES) if spec.nested else spec.modules
    words.append(f"tagmem.modules={','.join(modules)}")
    if not spec.agent:
        words.append("tagmem.agent=off")
    return " ".join([*words, *spec.kernel_arguments])


def _server(name: str, path: Path) -> str:
    return f"socket,id={name},path={_escaped(path)},server=on,wait=off"


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
