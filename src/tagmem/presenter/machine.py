"""The machine that we start for a guest, as a command line: pure, so that a test can read it.

What is in it is what presenters need later, because slots, windows and room for device memory
cannot be added while the guest runs: shared RAM with a name, made first (a migration under TCG
aborts when a pool's backend is older), root ports with address space behind them, memory slots, a
port to the guest's agent, and 46 bits of physical address, because the default of TCG puts the
64-bit window into a hole of AMD's.
"""

from __future__ import annotations

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_name
from tagmem.base.units import GIB, MIB, Bytes
from tagmem.presenter.contract import Value
from tagmem.wire import cdat
from tagmem.wire.guest import PORT_NAME

PORTS_MAX = 16
MEMORY_SLOTS_MAX = 255
FORWARDS_MAX = 16
SUN_PATH_MAX = 107


LOCAL_LATENCY_NS = 100
LOCAL_BANDWIDTH_BYTES = 64 * GIB
"""What a guest is told of its own RAM, where it is told of any: a DDR5 channel's or two."""


class MemoryNode(Value, frozen=True):
    """A stretch of a file that is part of the guest's memory from the start, as a NUMA node."""

    number: int
    memory: str
    """QEMU's id of the memory behind it."""
    tag: str
    path: str
    offset: Bytes
    size_bytes: Bytes
    latency_ns: int
    bandwidth_bytes: Bytes
    """In a second."""
    specific_purpose: bool = False
    """Not RAM: soft-reserved, of which the guest's kernel makes a DAX device."""


CXL_PORTS_MAX = 8
CDAT_NAME = "cxl.cdat"
CXL_UNIT_BYTES = 256 * MIB
"""Of windows, and of the memory of devices in them."""
CXL_PORT_BYTES = 64 * GIB
"""The window of each port: the largest device that can be plugged there."""
CXL_BUS, CXL_BUSES = 32, 8
"""Bus numbers of the first CXL host bridge, and what is left to each."""
CXL_CHASSIS = 64
CXL_SERIAL = 0x7461676D_656D0000
"""Of the device with dynamic capacity; those of tags are random."""


class CxlSpec(Value, frozen=True):
    """CXL host bridges, each with one root port and one fixed memory window."""

    ports: int = 0
    """Free ones, for a device per tag."""
    window: str = ""
    """The file of a device with dynamic capacity (an appliance's pool, by DPA); empty: none."""
    window_bytes: Bytes = 0
    latency_ns: int = 0
    """Of the memory behind the window, as the device tells it (CDAT); 0: QEMU's own table."""
    bandwidth_bytes: Bytes = 0
    """In a second."""


class VmSpec(Value, frozen=True):
    """A VM to be started."""

    name: str
    directory: str
    """Its sockets, console and logs."""
    qemu: tuple[str, ...] = ("qemu-system-x86_64",)
    """The program and what always comes first (a loader, `-L` for its firmware)."""
    environment: dict[str, str] = {}
    memory_bytes: Bytes = 1 * GIB
    cpus: int = 1
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    accel: str = "tcg,thread=multi"
    cpu: str = "max,phys-bits=46"
    ports: int = 6
    port_bytes: Bytes = 2 * GIB + 2 * MIB
    """64-bit prefetchable address space behind each port."""
    memory_slots: int = 8
    memory_max_bytes: Bytes = 32 * GIB
    """Room for the guest's RAM and all device memory that is plugged later."""
    nvdimm: bool = False
    forwards: tuple[tuple[int, int], ...] = ()
    """(port of this machine's loopback, TCP port of the guest); any makes a user network card."""
    cxl: CxlSpec = CxlSpec()
    incoming: bool = False
    """Wait for a migration to come in."""
    nodes: tuple[MemoryNode, ...] = ()
    """Beside node 0, which has the processors and `memory_bytes`."""
    firmware: tuple[str, str] | None = None
    """UEFI: the code, and the variables of this VM; None: what QEMU brings."""
    extra: tuple[str, ...] = ()
    """Further arguments, as they are."""
    cgroup: str = ""


def check(spec: VmSpec) -> None:
    """Raises InvalidInput that names the field, the limit and the value."""
    parse_name(spec.name, "name")
    if not spec.qemu:
        raise InvalidInput("qemu", "a program", spec.qemu)
    if not 64 * MIB <= spec.memory_bytes <= spec.memory_max_bytes:
        limit = f"from {64 * MIB} to {spec.memory_max_bytes} bytes"
        raise InvalidInput("memory_bytes", limit, spec.memory_bytes)
    if spec.memory_bytes % (2 * MIB):
        raise InvalidInput("memory_bytes", "a multiple of 2 MiB", spec.memory_bytes)
    if not 1 <= spec.cpus <= 64:
        raise InvalidInput("cpus", "1 to 64", spec.cpus)
    if not 0 <= spec.ports <= PORTS_MAX:
        raise InvalidInput("ports", f"0 to {PORTS_MAX}", spec.ports)
    if not 0 <= spec.memory_slots <= MEMORY_SLOTS_MAX:
        raise InvalidInput("memory_slots", f"0 to {MEMORY_SLOTS_MAX}", spec.memory_slots)
    if len(spec.forwards) > FORWARDS_MAX:
        raise InvalidInput("forwards", f"at most {FORWARDS_MAX}", len(spec.forwards))
    for pair in spec.forwards:
        if not all(1 <= port <= 65535 for port in pair):
            raise InvalidInput("forwards", "ports from 1 to 65535", pair)
    if len(f"{spec.directory}/agent".encode()) > SUN_PATH_MAX:
        raise InvalidInput(
            "directory", f"a path of at most {SUN_PATH_MAX - 6} bytes", spec.directory
        )
    if _ram_bytes(spec) > spec.memory_max_bytes:
        raise InvalidInput("memory", f"at most {spec.memory_max_bytes} bytes", _ram_bytes(spec))
    _check_cxl(spec)
    paths = (spec.directory, spec.kernel, spec.initrd, *(node.path for node in spec.nodes))
    for path in (*paths, *(spec.firmware or ()), spec.cxl.window):
        if "," in path or "\n" in path:
            raise InvalidInput("path", "without commas", path)


def _check_cxl(spec: VmSpec) -> None:
    cxl = spec.cxl
    if not 0 <= cxl.ports <= CXL_PORTS_MAX:
        raise InvalidInput("cxl.ports", f"0 to {CXL_PORTS_MAX}", cxl.ports)
    if cxl.window and (not cxl.window_bytes or cxl.window_bytes % CXL_UNIT_BYTES):
        limit = f"a multiple of {CXL_UNIT_BYTES}"
        raise InvalidInput("cxl.window_bytes", limit, cxl.window_bytes)
    if cxl.window and any(node.specific_purpose for node in spec.nodes):
        limit = "without specific-purpose memory, which moves the window"
        raise InvalidInput("cxl.window", limit, cxl.window)
    if cxl.latency_ns and not cxl.window:
        raise InvalidInput("cxl.latency_ns", "0 without a window", cxl.latency_ns)
    files(spec)


def files(spec: VmSpec) -> dict[str, bytes]:
    """What QEMU reads as it starts, by path: the table of the dynamic device's figures."""
    cxl = spec.cxl
    if not cxl.latency_ns:
        return {}
    table = cdat.performance([cxl.window_bytes], cxl.latency_ns, cxl.bandwidth_bytes)
    return {f"{spec.directory}/{CDAT_NAME}": table}


def _ram_bytes(spec: VmSpec) -> Bytes:
    """What `-m` counts: specific-purpose memory is beside it."""
    return spec.memory_bytes + sum(n.size_bytes for n in spec.nodes if not n.specific_purpose)


def _nodes(spec: VmSpec) -> list[str]:
    """The memory that lies in files, node by node, and what the HMAT says of each. The way to a
    CXL host bridge is a node without memory (a generic port): what is behind it is the device's to
    tell.
    """
    bridges = _bridges(spec.cxl) if spec.cxl.latency_ns else range(0)
    if not spec.nodes and not bridges:
        return []
    first = 1 + max((node.number for node in spec.nodes), default=0)
    ports = {first + n: bridge for n, bridge in enumerate(bridges)}
    words = ["-numa", f"node,nodeid=0,cpus=0-{spec.cpus - 1},memdev=ram0,initiator=0"]
    for node in spec.nodes:
        backend = f"memory-backend-file,id={node.memory},size={node.size_bytes}"
        backend += f",mem-path={node.path},offset={node.offset},share=on"
        words += ["-object", backend]
        here = f"node,nodeid={node.number},initiator=0"
        if not node.specific_purpose:
            here += f",memdev={node.memory}"
        words += ["-numa", here]
    for number, bridge in ports.items():
        words += ["-numa", f"node,nodeid={number}"]
        port = f"acpi-generic-port,id=tmgp{bridge},pci-bus=tmcxl{bridge},node={number}"
        words += ["-object", port]
    # In QEMU's order: bandwidth and latency come after all nodes.
    figures = [(0, LOCAL_LATENCY_NS, LOCAL_BANDWIDTH_BYTES)]
    figures += [(n.number, n.latency_ns, n.bandwidth_bytes) for n in spec.nodes]
    figures += [(number, LOCAL_LATENCY_NS, LOCAL_BANDWIDTH_BYTES) for number in ports]
    for number, latency_ns, bandwidth_bytes in figures:
        pair = f"hmat-lb,initiator=0,target={number},hierarchy=memory"
        words += ["-numa", f"{pair},data-type=access-latency,latency={latency_ns}"]
        bandwidth = f"bandwidth={bandwidth_bytes // MIB}M"
        words += ["-numa", f"{pair},data-type=access-bandwidth,{bandwidth}"]
    for node in spec.nodes:
        if node.specific_purpose:
            words += ["-device", f"sp-mem,id={node.memory}-sp,memdev={node.memory}"]
            words[-1] += f",node={node.number}"
    return words


def _bridges(cxl: CxlSpec) -> range:
    """Their numbers; 0 is that of the window."""
    return range(0 if cxl.window else 1, cxl.ports + 1)


def cxl_options(cxl: CxlSpec) -> tuple[str, ...]:
    """Options of the machine; the window of the dynamic device comes first."""
    sizes = ([cxl.window_bytes] if cxl.window else []) + [CXL_PORT_BYTES] * cxl.ports
    first = 0 if cxl.window else 1
    windows = [
        f"cxl-fmw.{n}.targets.0=tmcxl{n + first},cxl-fmw.{n}.size={size}"
        for n, size in enumerate(sizes)
    ]
    return ("cxl=on", *windows) if windows else ()


def cxl_arguments(cxl: CxlSpec, table: str = "") -> list[str]:
    """Bridges, ports, and the dynamic device, its CDAT from the file `table`. Bridges of plugged
    devices have decoders, because a device behind one that passes all through never leaves in QEMU.
    """
    line: list[str] = []
    for number in _bridges(cxl):
        bridge = f"pxb-cxl,id=tmcxl{number},bus=pcie.0,bus_nr={CXL_BUS + CXL_BUSES * number}"
        slot = CXL_CHASSIS + number
        port = f"cxl-rp,id=tmcp{number},bus=tmcxl{number},port=0,chassis={slot},slot={slot}"
        line += ["-device", bridge + (",hdm_for_passthrough=on" if number else "")]
        line += ["-device", port]
    if cxl.window:
        file = f"memory-backend-file,id=tmcw0-m,mem-path={cxl.window},size={cxl.window_bytes}"
        device = f"cxl-type3,id=tmcw0,bus=tmcp0,sn={CXL_SERIAL:#x},volatile-dc-memdev=tmcw0-m"
        line += ["-object", f"{file},share=on,dump=off"]
        device += f",cdat={table}" if table else ""
        line += ["-device", f"{device},num-dc-regions=1"]
    return line


def cxl_words(
    cxl: CxlSpec, memory_bytes: Bytes, memory_max_bytes: Bytes, memory_slots: int
) -> tuple[str, ...]:
    """What the guest's kernel is told: the window of the dynamic device is specific-purpose memory,
    and no driver takes it before the agent does.

    q35 puts CXL behind all device memory, which has room for aligning each slot to 1 GiB; host
    bridges' registers come first.
    """
    if not cxl.window:
        return ()
    above = memory_bytes - 2 * GIB if memory_bytes >= 2816 * MIB else 0
    start = -(-(4 * GIB + above) // GIB) * GIB
    start += memory_max_bytes - memory_bytes + memory_slots * GIB
    unit = CXL_UNIT_BYTES
    window = -(-start // unit) * unit + unit
    size = cxl.window_bytes // MIB
    return (f"memmap={size}M%{window:#x}+0xefffffff", "modprobe.blacklist=dax_hmem,kmem")


def argv(spec: VmSpec) -> list[str]:
    """QEMU's command line. Raises InvalidInput."""
    check(spec)
    where = spec.directory
    nodes = _nodes(spec)
    machine = "q35,hmat=on" if nodes else "q35,memory-backend=ram0"
    machine += ",nvdimm=on" if spec.nvdimm else ""
    own, memory = f"{spec.memory_bytes // MIB}M", f"{_ram_bytes(spec) // MIB}M"
    machine = ",".join([machine, *cxl_options(spec.cxl)])
    arguments = [
        *spec.qemu,
        *("-name", spec.name, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", f"memory-backend-memfd,id=ram0,size={own},share=on"),
        *("-machine", machine, "-accel", spec.accel, "-cpu", spec.cpu, "-smp", str(spec.cpus)),
        *("-m", f"{memory},slots={spec.memory_slots},maxmem={spec.memory_max_bytes // MIB}M"),
        *nodes,
        *("-qmp", f"unix:{where}/qmp,server=on,wait=off"),
        *("-serial", f"file:{where}/console.log"),
        *("-device", "virtio-serial-pci,id=agents"),
        *("-chardev", f"socket,id=agent,path={where}/agent,server=on,wait=off"),
        *("-device", f"virtserialport,bus=agents.0,chardev=agent,name={PORT_NAME}"),
    ]
    for number in range(1, spec.ports + 1):
        port = f"pcie-root-port,id=tmp{number},bus=pcie.0,chassis={number},slot={number}"
        arguments += ["-device", f"{port},pref64-reserve={spec.port_bytes}"]
    if spec.forwards:
        pairs = [f"hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for ours, theirs in spec.forwards]
        arguments += ["-netdev", ",".join(["user,id=net0", *pairs])]
        arguments += ["-device", "virtio-net-pci,netdev=net0,romfile="]
    for path, readonly in zip(spec.firmware or (), ("on", "off"), strict=False):
        arguments += ["-drive", f"if=pflash,format=raw,readonly={readonly},file={path}"]
    arguments += cxl_arguments(spec.cxl, next(iter(files(spec)), ""))
    words = cxl_words(spec.cxl, _ram_bytes(spec), spec.memory_max_bytes, spec.memory_slots)
    if spec.kernel:
        arguments += ["-kernel", spec.kernel]
    if spec.initrd:
        arguments += ["-initrd", spec.initrd]
    append = " ".join(word for word in (spec.append, *words) if word)
    if spec.kernel and append:
        arguments += ["-append", append]
    if spec.incoming:
        arguments += ["-incoming", "defer"]
    return arguments + list(spec.extra)
