"""What the guest agent asks of the kernel beside files and processes: hot-plug news, ejecting,
modules, and the end of the machine.

One class, so that tests have a world of their own in its place.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from tagmem.base.errors import TagmemError, Unsupported
from tagmem.guest.cxl import Cxl, check
from tagmem.guest.find import Roots, attribute
from tagmem.wire.guest import Memory, Told

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_UEVENT_BYTES = 64 * 1024
MODULES = ("virtio_pmem", "nd_pmem", "dax_pmem", "device_dax")
"""What makes a DAX device of pmem, where no udev loads them."""
_REBOOT = {"poweroff": 0x4321FEDC, "reboot": 0x01234567, "kexec": 0x45584543}


class System:
    """The kernel under this agent."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._cxl = Cxl(roots, self.claim)

    def identity(self) -> tuple[str, str, str]:
        """(boot id, a name for this run of the agent, kernel)."""
        folder = f"{self._roots.proc}/sys/kernel/random"
        boot = attribute(folder, "boot_id") or "unknown"
        return boot[:64], secrets.token_hex(8), f"{os.uname().sysname} {os.uname().release}"[:128]

    def features(self) -> tuple[str, ...]:
        """What can be asked of this guest beside the obvious."""
        found = []
        if os.geteuid() == 0:
            found += ["eject", "shutdown"]
        if shutil.which("daxctl"):
            found.append("daxctl")
        if attribute(f"{self._roots.sysfs}/kernel", "kexec_loaded") == "1":
            found.append("kexec")
        return (*found, *self._cxl.features())

    def uevents(self) -> socket.socket | None:
        """A socket that becomes readable when devices come or go; None where we may not."""
        try:
            link = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
            )
        except OSError:
            return None
        try:
            link.bind((0, _KERNEL_GROUP))
        except OSError:
            link.close()
            return None
        link.setblocking(False)
        return link

    def load_modules(self) -> None:
        """Start loading what DAX devices need, without waiting for it."""
        if shutil.which("modprobe"):
            # Its end is nobody's business: what it brings shows in sysfs.
            threading.Thread(
                target=subprocess.run,
                args=(["modprobe", "-a", "-q", *MODULES],),
                kwargs={"stderr": subprocess.DEVNULL, "check": False},
                daemon=True,
            ).start()

    def eject(self, memory: Memory, done: Callable[[str], None]) -> None:
        """Take the memory's device away; `done` gets a reason, empty for success, in a thread.

        Its PCI function leaves the slot, whose power goes off: QEMU lets go of the memory. What is
        in no slot is unbound from its driver, which ends every mapping of a DAX device all the
        same.
        """
        sysfs = self._roots.sysfs
        if memory.kind == "cxl-dcd":
            self._apart(lambda: self._cxl.drop(memory.name), done)
            return
        if memory.kind == "cxl-static":
            self._apart(lambda: self._leave(memory), done)
            return
        if memory.slot:
            write = (f"{sysfs}/bus/pci/slots/{memory.slot}/power", "0")
        elif memory.address:
            write = (f"{sysfs}/bus/pci/devices/{memory.address}/remove", "1")
        else:
            write = (f"{sysfs}/bus/dax/drivers/device_dax/unbind", memory.name)
        self._write(*write, done)

    def eject_slot(self, slot: str, done: Callable[[str], None]) -> None:
        """Switch a slot's power off."""
        self._write(f"{self._roots.sysfs}/bus/pci/slots/{slot}/power", "0", done)

    def _leave(self, memory: Memory) -> None:
        self._cxl.tear_down(memory)
        if memory.slot:
            _put(f"{self._roots.sysfs}/bus/pci/slots/{memory.slot}/power", "0")

    def prepare(self, told: Told, seconds: float, done: Callable[[int, str], None]) -> None:
        """Make a DAX device of CXL memory; `done` gets where it lies (0: its serial tells), or a
        reason, in a thread.
        """
        place = [0]

        def make() -> None:
            check(told)
            if told.kind == "cxl":
                place[0] = self._cxl.take(told)
            else:
                self._cxl.commit(told, seconds)

        self._apart(make, lambda reason: done(place[0], reason))

    def give(self, told: Told, done: Callable[[str], None]) -> None:
        """Have a CXL device take an extent back; `done` gets a reason, in a thread."""

        def give() -> None:
            check(told)
            self._cxl.give(told)

        self._apart(give, done)

    def _write(self, path: str, value: str, done: Callable[[str], None]) -> None:
        self._apart(lambda: _put(path, value), done)

    def _apart(self, work: Callable[[], None], done: Callable[[str], None]) -> None:
        def run() -> None:
            try:
                work()
            except (TagmemError, OSError, ValueError) as error:
                done(str(error) or type(error).__name__)
            else:
                done("")

        # The kernel waits there for drivers and for pinned pages; we do not.
        threading.Thread(target=run, daemon=True).start()

    def claim(self, name: str, driver: str) -> None:
        """Make a DAX device one that can be mapped: bound to nothing, or RAM so far."""
        if driver:
            # Its memory blocks have to go offline first, which takes its time or does not work.
            command = ["daxctl", "reconfigure-device", "-m", "devdax", "-f", name]
            threading.Thread(target=_try, args=(command,), daemon=True).start()
        elif not self._tell("dax/drivers/device_dax/bind", name):
            # Made for kmem (CXL, soft-reserved): device_dax takes it when told its name first.
            self._tell("dax/drivers/device_dax/new_id", name)

    def rebind(self, namespace: str) -> None:
        """Have the kernel look for a header once more, unless the block device is in use."""
        device = f"{self._roots.sysfs}/bus/nd/devices/{namespace}"
        try:
            blocks = os.listdir(f"{device}/block")
            with open(f"{self._roots.proc}/self/mounts", encoding="utf-8") as file:
                mounted = {line.split(" ", 1)[0] for line in file}
        except OSError:
            return
        if mounted.isdisjoint(f"{self._roots.dev}/{block}" for block in blocks):
            self._tell("nd/drivers/nd_pmem/unbind", namespace)
            self._tell("nd/drivers/nd_pmem/bind", namespace)

    def _tell(self, place: str, value: str) -> bool:
        try:
            with open(f"{self._roots.sysfs}/bus/{place}", "w", encoding="ascii") as file:
                file.write(value)
        except OSError as error:
            say(f"{place} of {value}: {error.strerror}")
            return False
        return True

    def end(self, how: str) -> None:
        """Poweroff, reboot or kexec. Raises Unsupported where there is no way, OSError."""
        command = {"poweroff": "poweroff", "reboot": "reboot", "kexec": "kexec"}[how]
        if os.path.isdir("/run/systemd/system"):
            subprocess.run(["systemctl", "--no-block", command], check=True)
            return
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        os.sync()
        if libc.reboot(ctypes.c_int(_REBOOT[how])) != 0:
            number = ctypes.get_errno()
            raise Unsupported(f"{how}: {os.strerror(number)}")


def _put(path: str, value: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        raise Unsupported(f"{path}: {error.strerror}") from error


def _try(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"{command[0]}: {error.strerror}")
        return
    if done.returncode:
        say(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def say(text: str) -> None:
    """One line for the guest's console."""
    sys.stderr.write(f"tagmem guest: {text}\n")
    sys.stderr.flush()
