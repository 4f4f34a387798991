"""Which host's agent `tagmem vm` asks, where several hosts are processes of one machine."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tagmem.base.errors import NotFound, kind_of
from tagmem.cli import vm as commands
from tagmem.cli.main import invoke
from tagmem.demo.layout import HOSTS, Layout


class Agent(threading.Thread):
    """Answers for a host that has some VMs, and nothing else."""

    def __init__(self, run_dir: Path, *vms: str) -> None:
        super().__init__(daemon=True)
        run_dir.mkdir(parents=True)
        self.vms = list(vms)
        self.asked: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(run_dir / "agent.sock"))
        self.listener.listen()
        self.start()

    def run(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return
            with link, link.makefile("rw") as lines:
                lines.write(json.dumps(self.answer(json.loads(lines.readline()))) + "\n")

    def answer(self, request: dict[str, str]) -> dict[str, object]:
        verb, name = request["vm"], request.get("name", "")
        self.asked.append(verb)
        if verb == "list":
            row = {"state": "running", "pid": 1, "tags": []}
            return {"vms": [{"name": vm, **row} for vm in self.vms], "done": True}
        if verb != "start" and name not in self.vms:
            error = NotFound(f"no VM {name} on this host")
            return {"error": str(error), "kind": kind_of(error)}
        return {"name": name, "done": True}

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Agent]]:
    """As `tagmem up` leaves them, with db1 on w2."""
    monkeypatch.setenv("TAGMEM_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("TAGMEM_RUN_DIR", raising=False)
    layout = Layout.of(tmp_path)
    made = {host: Agent(layout.run_dir(host), *(["db1"] if host == "w2" else [])) for host in HOSTS}
    yield made
    for agent in made.values():
        agent.close()
    shutil.rmtree(layout.volatile)


def test_the_host_that_has_the_vm_is_asked(agents: dict[str, Agent]) -> None:
    assert invoke(["vm", "stop", "db1"]) == 0
    assert agents["w2"].asked == ["show", "stop"]
    assert "stop" not in agents["w1"].asked


def test_a_new_vm_starts_on_the_first_or_on_the_one_that_is_named(
    agents: dict[str, Agent],
) -> None:
    assert invoke(["vm", "start", "db2"]) == 0
    assert agents["w1"].asked == ["start"]
    assert invoke(["vm", "--host", "w3", "start", "db2"]) == 0
    assert agents["w3"].asked == ["start"]


def test_vms_of_all_hosts_are_listed(
    agents: dict[str, Agent], capsys: pytest.CaptureFixture[str]
) -> None:
    agents["w1"].vms.append("db3")
    assert invoke(["vm", "list", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["host"]) for row in told] == [("db3", "w1"), ("db1", "w2")]
    assert invoke(["vm", "list", "-o", "table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["db3", "w1", "running"]


def test_a_name_that_two_hosts_have_must_be_told_apart(
    agents: dict[str, Agent], capsys: pytest.CaptureFixture[str]
) -> None:
    agents["w1"].vms.append("db1")
    assert invoke(["vm", "stop", "db1"]) == 4
    assert "w1 and w2 have a VM db1 each" in capsys.readouterr().err
    assert invoke(["vm", "--host", "w1", "stop", "db1"]) == 0


@pytest.mark.usefixtures("agents")
def test_a_vm_and_a_host_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["vm", "stop", "db9"]) == 3
    assert "no VM db9" in capsys.readouterr().err
    assert invoke(["vm", "--host", "w9", "list"]) == 2
    assert "one of w1, w2, w3" in capsys.readouterr().err


def test_a_run_directory_that_was_named_is_the_only_one(
    agents: dict[str, Agent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(commands.run_dirs(str(tmp_path), None, None).values()) == {str(tmp_path)}
    assert invoke(["vm", "--run-dir", str(tmp_path), "list"]) == 6
    assert "no host agent" in capsys.readouterr().err
    assert agents["w1"].asked == []
