"""The lab itself: guests boot on both QEMUs, run commands, reboot, end; and failures name logs."""

from __future__ import annotations

import json

import pytest
from tests.vm.conftest import Boot, Run

from tagmem.base.errors import RemoteError
from tagmem.base.units import MIB
from tagmem.lab.boot import Guest, Lab
from tagmem.lab.errors import GuestDied
from tagmem.lab.qemus import NAMES
from tagmem.lab.spec import GuestSpec

BOOT_SECONDS_MAX = 40.0

LOOK = """
import os, json
total = int(open("/proc/meminfo").read().split()[1])
slots = sorted(os.listdir("/sys/bus/pci/slots"))
loaded = [line.split()[0] for line in open("/proc/modules")]
hello = open("/etc/hello").read()
print(json.dumps([total, len(slots), loaded, os.uname().release, hello]))
"""


@pytest.fixture(scope="module", params=NAMES)
def guest(boot: Boot, request: pytest.FixtureRequest) -> Guest:
    name = request.param.replace(".", "-")
    files = {"etc/hello": b"from the host"}
    return boot(GuestSpec(name=f"boot-{name}", qemu=request.param, files=files))


def test_it_is_ready_in_time_on_the_qemu_that_was_asked_for(guest: Guest, run: Run) -> None:
    assert guest.boot_seconds < BOOT_SECONDS_MAX
    assert guest.qemu is not None
    said = run(guest.command("query-version"))
    assert f"{said['qemu']['major']}.{said['qemu']['minor']}" == guest.spec.qemu
    assert guest.spec.qemu in guest.qemu.version


def test_a_command_in_it_sees_its_memory_and_modules(guest: Guest, run: Run, lab: Lab) -> None:
    total_kib, slots, loaded, release, hello = json.loads(run(guest.python(LOOK)))
    assert 800 * MIB < total_kib * 1024 <= guest.spec.memory_bytes
    assert slots >= guest.spec.root_ports
    assert {"virtio_pmem", "nd_pmem", "device_dax", "dax_pmem"} <= set(loaded)
    assert release == lab.image().release
    assert hello == "from the host"


def test_a_command_ends_with_its_code_and_both_outputs(guest: Guest, run: Run) -> None:
    async def whole() -> None:
        channel = await guest.agent()
        ran = await channel.run(["sh", "-c", "cat; echo no >&2; exit 7"], stdin=b"in\n")
        assert (ran.code, ran.output, ran.errors) == (7, b"in\n", b"no\n")
        for tool in ("ndctl", "daxctl", "cxl"):
            assert (await channel.run([tool, "list"])).code == 0
        assert (await channel.run(["kexec", "--version"])).code == 0

    run(whole())


def test_qemu_keeps_a_log_of_what_was_asked_of_it(guest: Guest, run: Run) -> None:
    with pytest.raises(RemoteError, match="no-such-command"):
        run(guest.command("no-such-command"))
    log = guest.places.qmp_log.read_text()
    assert '"execute": "no-such-command"' in log
    assert "CommandNotFound" in log


def test_it_reboots_and_its_agent_comes_again(guest: Guest, run: Run) -> None:
    async def whole() -> None:
        first = await (await guest.agent()).greet()
        await guest.command("system_reset")
        await guest.ready()
        second = await (await guest.agent()).greet()
        assert second.boot_id != first.boot_id

    run(whole())


def test_it_powers_itself_off(guest: Guest, run: Run) -> None:
    assert run(guest.poweroff()) == 0
    assert not guest.alive


def test_with_uefi_firmware_specific_purpose_memory_is_a_dax_device(boot: Boot, run: Run) -> None:
    guest = boot(
        GuestSpec(
            name="edk2",
            firmware="edk2",
            root_ports=0,
            cpus=1,
            modules=("dax_hmem",),
            numa=("node,nodeid=1",),
            objects=(f"memory-backend-memfd,id=m1,size={512 * MIB},share=on",),
            devices=("sp-mem,memdev=m1,node=1,id=sp1",),
        )
    )
    devices = (
        "import glob; print([open(p).read() for p in glob.glob('/sys/bus/dax/devices/*/size')])"
    )
    assert str(512 * MIB) in run(guest.python(devices))
    assert guest.boot_seconds < 2 * BOOT_SECONDS_MAX
    run(guest.stop())


def test_a_guest_can_be_a_host_itself(boot: Boot, run: Run) -> None:
    guest = boot(GuestSpec(name="outer", nested=True, root_ports=0))

    async def whole() -> None:
        channel = await guest.agent()
        said = await channel.run(["/opt/qemu/start", "--version"])
        assert guest.spec.qemu in said.text
        # The emulator itself starts, with its accelerator and firmware, and speaks QMP.
        asked = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
        words = [
            "-M",
            "q35",
            "-m",
            "64",
            "-accel",
            "tcg",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-qmp",
            "stdio",
        ]
        ran = await channel.run(["/opt/qemu/start", *words], stdin=asked)
        assert ran.code == 0, ran.errors
        assert '"SHUTDOWN"' in ran.text
        assert (await channel.run(["ls", "/boot"])).text.split() == ["initrd", "vmlinuz"]

    run(whole())
    run(guest.stop())


def test_a_qemu_that_does_not_start_leaves_its_words_and_its_logs(lab: Lab, run: Run) -> None:
    broken = lab.guest(GuestSpec(name="broken", arguments=("-no-such-option",)))

    async def whole() -> None:
        async with broken:
            pass

    with pytest.raises(GuestDied) as caught:
        run(whole())
    message = str(caught.value)
    assert "no-such-option" in message
    assert str(broken.places.command) in message
    assert broken.places.command.read_text().rstrip().endswith("-no-such-option")
    broken.remove_logs()


def test_a_guest_whose_kernel_panics_is_given_up_at_once(lab: Lab, run: Run) -> None:
    lost = lab.guest(GuestSpec(name="lost", root_ports=0, kernel_arguments=("rdinit=/etc/hello",)))

    async def whole() -> None:
        async with lost:
            pass

    with pytest.raises(GuestDied, match="kernel panicked"):
        run(whole())
    assert not lost.alive
    assert "Kernel panic" in lost.console()
    lost.remove_logs()
