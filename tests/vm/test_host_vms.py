"""`tagmem vm` against a host's agent: a tag in a guest through the whole system, a release that
climbs into the guest, an agent that is killed while a VM has a tag.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.waiting import wait_until

from tagmem.lab.programs import HOLD, SILENCE

TAGMEM = (sys.executable, "-m", "tagmem")
SIZE = 32 << 20
# Apart from the agent's own session: what it started it ends with itself.
DOWN = """
import os
told, ready = os.pipe()
if os.fork():
    os.read(told, 1)
    os._exit(0)
os.setsid()
os.write(ready, b"+")
for fd in 0, 1, 2:
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
os.execvp("tagmem", ["tagmem", "guest", "down"])
"""


class System:
    """An appliance, an orchestrator and two hosts, as `tagmem up` starts them; one VM on w1."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = dict(os.environ) | {"TAGMEM_STATE_DIR": str(state)}
        self.within: tuple[str, ...] = ()
        """Words before the command that starts the system, such as those that enter a namespace."""

    def tagmem(self, *words: str, code: int | None = 0) -> Any:
        """What it says; `code`: how it must end, None for any failure."""
        ran = subprocess.run(
            [*TAGMEM, *words], env=self.environment, capture_output=True, text=True, timeout=150
        )
        ended = ran.returncode == code if code is not None else ran.returncode != 0
        assert ended, f"{words}: {ran.returncode}: {ran.stderr}"
        return json.loads(ran.stdout) if ran.stdout.startswith(("{", "[")) else ran.stderr

    def run_in_guest(self, *words: str, vm: str = "db1") -> str:
        ran = subprocess.run(
            [*TAGMEM, "vm", "exec", vm, "--", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def up(self, *options: str) -> None:
        subprocess.run(
            [*self.within, *TAGMEM, "up", "--state-dir", str(self.state), *options],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        path = self.running()["w1"]["run"]
        self.environment["TAGMEM_RUN_DIR"] = path

    def running(self) -> Any:
        config = self.state / "w1.toml"
        run = next(line for line in config.read_text().splitlines() if line.startswith("run "))
        return {"w1": {"run": run.partition("=")[2].strip().strip('"')}}

    def agent_pid(self) -> int:
        return self._pid(b"host", str(self.state / "w1.toml"))

    def broker_pid(self) -> int:
        return self._pid(b"broker", f"{self.environment['TAGMEM_RUN_DIR']}/vm/.broker")

    def _pid(self, verb: bytes, argument: str) -> int:
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if verb in words and argument.encode() in words:
                    return int(name)
        return 0

    def down(self) -> None:
        for told in self.tagmem("vm", "list", "-o", "json"):
            self.tagmem("vm", "stop", told["name"], "-o", "json")
        subprocess.run(
            [*self.within, *TAGMEM, "down", "--state-dir", str(self.state)],
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )

    def capacity(self) -> str:
        words = ("capacity", "create", "--size", str(SIZE), "--host", "w1", "-o", "json")
        made = self.tagmem(*words)
        return str((made[0] if isinstance(made, list) else made)["tag"])


def silence(system: System) -> None:
    """The guest's agent answers nobody for some seconds, and has begun not to."""
    system.run_in_guest("python3", "-c", SILENCE, "10")
    words = [*TAGMEM, "vm", "exec", "db1", "--", "true"]

    def silent() -> bool:
        try:
            subprocess.run(words, env=system.environment, timeout=2)
        except subprocess.TimeoutExpired:
            return True
        return False

    wait_until(silent, "the guest's agent is silent")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(tmp_path_factory.mktemp("vms"))
    made.up()
    try:
        made.tagmem("vm", "start", "db1", "--memory", "512M", "--cpus", "2", "-o", "json")
        yield made
    finally:
        made.down()


def test_a_guest_opens_the_tag_with_the_same_call(system: System) -> None:
    tag = system.capacity()
    shown = system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    assert shown["as"] == "vhost-pmem"
    assert shown["guaranteed"] is True
    code = f"import tagmem; tagmem.open('{tag}').view[0:5] = b'guest'"
    system.run_in_guest("python3", "-c", code)
    run_dir = Path(system.environment["TAGMEM_RUN_DIR"])
    with (run_dir / "by-tag" / tag).open("rb") as media:
        assert media.read(5) == b"guest"
    assert "is in VM db1 already" in system.tagmem("vm", "attach", "db1", tag, code=4)
    gone = system.tagmem("vm", "detach", "db1", tag, "-o", "json")
    assert gone["rung"] == "unplug"
    system.tagmem("capacity", "release", tag, "-o", "json")


def test_a_release_climbs_into_the_guest(system: System) -> None:
    tag = system.capacity()
    shown = system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    pid = system.run_in_guest("python3", "-c", HOLD, shown["guest_path"], str(SIZE), "90")
    refused = system.tagmem("vm", "detach", "db1", tag, "--timeout", "3", code=4)
    assert f"process {pid}" in refused
    released = system.tagmem("capacity", "release", tag, "-o", "json")
    assert released["state"] == "released"
    assert system.tagmem("vm", "list", "-o", "json")[0]["tags"] == []


def test_an_agent_that_is_killed_finds_its_vm_again(system: System) -> None:
    tag = system.capacity()
    system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    before = system.tagmem("vm", "show", "db1", "-o", "json")
    killed = system.agent_pid()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: system.agent_pid() not in (0, killed), "a new agent")
    socket = Path(system.environment["TAGMEM_RUN_DIR"]) / "agent.sock"

    def found() -> Any:
        ran = subprocess.run(
            [*TAGMEM, "vm", "show", "db1", "-o", "json"],
            env=system.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return json.loads(ran.stdout) if socket.exists() and ran.returncode == 0 else None

    after = wait_until(found, "the VM under the new agent")
    assert after["pid"] == before["pid"]
    assert [shown["tag"] for shown in after["tags"]] == [tag]
    assert after["tags"][0]["guaranteed"] is True, "its broker is a process of its own"
    # A holder that does not let go: the bytes are taken by who did not attach them.
    path = after["tags"][0]["guest_path"]
    pid = system.run_in_guest("python3", "-c", HOLD, path, str(SIZE), "90")
    refused = system.tagmem("vm", "detach", "db1", tag, "--timeout", "3", code=4)
    assert f"process {pid}" in refused
    silence(system)
    taken = system.tagmem("vm", "detach", "db1", tag, "--timeout", "2", "--force", "-o", "json")
    assert taken["rung"] == "revoke"
    system.tagmem("capacity", "release", tag, "-o", "json")


def test_a_broker_that_is_killed_is_replaced_and_its_tags_attached_anew(system: System) -> None:
    held, idle = system.capacity(), system.capacity()
    told = system.tagmem("vm", "attach", "db1", held, "-o", "json")
    system.tagmem("vm", "attach", "db1", idle, "-o", "json")
    system.run_in_guest("python3", "-c", HOLD, told["guest_path"], str(SIZE), "90")
    broker = system.broker_pid()
    os.kill(broker, signal.SIGKILL)

    def guaranteed() -> dict[str, bool]:
        (vm,) = system.tagmem("vm", "list", "-o", "json")
        return {tag["tag"]: tag["guaranteed"] for tag in vm["tags"]}

    # Nobody has the one, so it was unplugged and plugged again; the other's holder is left alone.
    wait_until(lambda: guaranteed() == {held: False, idle: True}, "the idle one in hand again")
    assert system.broker_pid() not in (0, broker)
    code = f"import tagmem; print(len(tagmem.open('{idle}').view))"
    assert system.run_in_guest("python3", "-c", code) == str(SIZE)
    gone = system.tagmem("vm", "detach", "db1", held, "--force", "-o", "json")
    assert gone["rung"] != "stop-vm"
    system.tagmem("vm", "detach", "db1", idle, "-o", "json")
    for tag in (held, idle):
        system.tagmem("capacity", "release", tag, "-o", "json")


def test_a_guest_that_goes_down_has_its_tags_taken(system: System) -> None:
    """As before a kexec; the agent that is started anew may have the tag again."""
    tag = system.capacity()
    system.tagmem("vm", "attach", "db1", tag, "-o", "json")
    system.run_in_guest("python3", "-c", DOWN)

    def given_back() -> bool:
        return all(vm["tags"] == [] for vm in system.tagmem("vm", "list", "-o", "json"))

    wait_until(given_back, "the host to take what the guest gave back")

    def answering() -> bool:
        words = [*TAGMEM, "vm", "exec", "db1", "--", "true"]
        return subprocess.run(words, env=system.environment, timeout=90).returncode == 0

    wait_until(answering, "the agent that is started anew")
    assert system.tagmem("vm", "attach", "db1", tag, "-o", "json")["guest_path"]
    system.tagmem("vm", "detach", "db1", tag, "-o", "json")
    system.tagmem("capacity", "release", tag, "-o", "json")
