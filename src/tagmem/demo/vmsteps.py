"""The seven steps with the workload inside a virtual machine: the same claims, the same checks.

memcached runs in a guest with a stock kernel, which finds the tag as a DAX device of its own; it is
loaded over the guest's network; and the tag comes back through the release ladder, whose detach
rung ends it in the guest. What the guest is asked proves nothing by itself: the appliance's media
and /proc are looked at as before.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tagmem.base.units import GIB, MIB, format_size
from tagmem.cli.vm import ask
from tagmem.demo import proof
from tagmem.demo.cache import Cache
from tagmem.demo.layout import HOSTS
from tagmem.demo.patience import insist, until
from tagmem.demo.steps import TAG_BYTES, Steps

_FIRST, _SECOND, *_ = HOSTS
_GUESTS = {_FIRST: "db1", _SECOND: "db2"}
_GUEST_PORT = 11211
_BOOT_SECONDS = 120.0
_EXEC_SECONDS = 60.0
_LOOK = """
import pathlib, sys
name = pathlib.Path(sys.argv[1]).resolve().name
device = (pathlib.Path("/sys/bus/dax/devices") / name).resolve()
print(device.joinpath("size").read_text().strip())
print(device.parent.joinpath("uuid").read_text().strip())
"""
_ZERO = """
import sys, tagmem
chunk = bytes(4 << 20)
with tagmem.open(sys.argv[1]) as capacity:
    view = capacity.view
    print(len(view))
    print(sum(bytes(view[at:at + len(chunk)]) != chunk for at in range(0, len(view), len(chunk))))
    del view
"""


class VmSteps(Steps):
    """One run of the demo with a VM on each host."""

    up_to = "detach"
    _memcached: subprocess.Popen[bytes] | None = None
    """What runs it in the guest."""
    _port = 0
    _qemu = 0

    def run(self) -> None:
        """All steps. Raises Mismatch, or whatever else went wrong."""
        self._port = _free_port()
        self._cache_at = ("127.0.0.1", self._port)
        try:
            self._boot(_FIRST, ((self._port, _GUEST_PORT),))
            self._decide()
            self._offer()
            device = self._accept()
            self._present()
            self._launch(device)
            self._load(device)
            self._give_back(device)
            self._wipe()
            self._boot(_SECOND, ())
            self._offer_again()
        finally:
            if self._memcached is not None:
                self._memcached.kill()
                self._memcached.wait()

    def _vm(self, host: str, verb: str, **request: Any) -> dict[str, Any]:
        run_dir = str(self._layout.run_dir(host))
        *_, last = ask(run_dir, {"vm": verb, "name": _GUESTS[host], **request})
        return last

    def _exec(self, host: str, *argv: str) -> list[str]:
        """What a command in the guest says. Raises Mismatch when it fails."""
        ran = subprocess.run(
            [*self._tagmem(host), "exec", _GUESTS[host], "--", *argv],
            capture_output=True,
            timeout=_EXEC_SECONDS,
            check=False,
        )
        told = ran.stderr.decode(errors="replace")
        self._check(ran.returncode == 0, f"{argv[0]} in {_GUESTS[host]}: {told}")
        return ran.stdout.decode(errors="replace").split()

    def _tagmem(self, host: str) -> list[str]:
        run_dir = str(self._layout.run_dir(host))
        return [sys.executable, "-m", "tagmem", "vm", "--run-dir", run_dir]

    def _boot(self, host: str, forwards: tuple[tuple[int, int], ...]) -> None:
        name = _GUESTS[host]
        with self._say.step(f"Boot: {name} on {host}, a stock Debian kernel") as came_to:
            begun = time.monotonic()
            told = self._vm(host, "start", memory_bytes=GIB // 2, cpus=2, forwards=forwards)
            self._qemu = int(told["pid"])
            (release,) = self._exec(host, "uname", "-r")
            self._say.fact("guest", f"Linux {release}, {format_size(GIB // 2)}, 2 processors")
            self._say.fact("QEMU", f"{told['qemu']} ({told['accel']}), pid {told['pid']}")
            came_to.append(f"Linux {release} in {time.monotonic() - begun:.1f} s")

    def _present(self) -> None:
        name = _GUESTS[_FIRST]
        with self._say.step(f"Attach: the tag is shown to {name} while it runs") as came_to:
            told = self._vm(_FIRST, "attach", tag=self._tag)
            self._say.fact("presented as", f"{told['as']}: {told['why']}")
            self._check(bool(told["guaranteed"]), f"{told['as']} gives no guarantee")
            path = str(told["guest_path"])
            size, uuid = self._exec(_FIRST, "python3", "-c", _LOOK, path)
            self._check(int(size) == TAG_BYTES, f"the guest's {path} has {size} bytes")
            self._check(uuid == self._tag, f"the guest's {path} says tag {uuid}")
            self._say.proof(
                "in the guest", f"{path}: {int(size):,} bytes, uuid {uuid} in its sysfs,"
            )
            came_to.append(f"{told['as']}, found by its tag as {path}")

    def _launch(self, device: Path) -> None:
        with self._say.step("Launch: Debian's memcached in the guest, on the tag") as came_to:
            argv = ["memcached", "-u", "root", "-e", "{dax}", "-m", str(TAG_BYTES // MIB)]
            argv += ["-l", "0.0.0.0", "-p", str(_GUEST_PORT), "-U", "0"]
            run = ["tagmem", "run", "--as-file", self._tag, "--", *argv]
            self._memcached = subprocess.Popen(
                [*self._tagmem(_FIRST), "exec", _GUESTS[_FIRST], "--", *run],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            cache = until(self._connect, "memcached answers", _EXEC_SECONDS)
            self._say.fact("command", " ".join(run))
            self._say.fact("memcached", f"version {cache.version}, in the guest")
            cache.close()
            pids = [pid for pid, _ in proof.holders(device)]
            self._check(self._qemu in pids, f"QEMU does not map {device}, but {pids} have it")
            self._say.proof("mapped by", f"QEMU (pid {self._qemu})")
            came_to.append(f"memcached {cache.version} in {_GUESTS[_FIRST]}")

    def _connect(self) -> Cache | None:
        """A connection once there is one. QEMU takes it before anybody in the guest listens."""
        assert self._memcached is not None
        if self._memcached.poll() is not None:
            _, told = self._memcached.communicate()
            self._check(False, f"memcached ended: {told.decode(errors='replace')}")
        with suppress(OSError):
            return Cache(self._cache_at)
        return None

    def _how_it_ended(self, rungs: list[str]) -> str:
        assert self._memcached is not None
        self._check("detach" in rungs, f"the tag was in a VM, and the rungs were {rungs}")
        self._memcached.wait(_EXEC_SECONDS)
        left = self._exec(_FIRST, "sh", "-c", "ls /dev | grep dax || true")
        self._check(not left, f"the guest still has {left}")
        (count,) = self._exec(_FIRST, "sh", "-c", "pidof memcached | wc -w")
        self._check(count == "0", "memcached still runs in the guest")
        self._say.proof("in the guest", "no DAX device and no memcached,")
        return "was ended in the guest, the tag taken out"

    def _read_as_next(self) -> None:
        super()._read_as_next()
        name = _GUESTS[_SECOND]
        told = self._vm(_SECOND, "attach", tag=self._next_tag)
        size, dirty = self._exec(_SECOND, "python3", "-c", _ZERO, self._next_tag)
        self._check(int(size) == TAG_BYTES, f"{name} sees {size} bytes")
        self._check(dirty == "0", f"{name} reads something in {dirty} chunks")
        self._say.proof(f"read in {name}", f"{int(size):,} bytes as {told['as']}, all zero,")
        insist(lambda: self._vm(_SECOND, "detach", tag=self._next_tag))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number
