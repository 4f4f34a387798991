"""The agent's local socket: lines of JSON, errors by kind; and what the machine keeps of VMs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tagmem.agent.local import LINE_BYTES_MAX, LocalApi
from tagmem.agent.loop import AgentMachine
from tagmem.agent.vms import KeepVm, VmTable
from tagmem.base.errors import NotFound
from tagmem.io import stream
from tagmem.ports import Emit, Holding, Loaded


class Vms:
    """`ports.Hypervisors` of no VM."""

    async def restore(self, kept: Mapping[str, str]) -> None: ...

    async def call(self, request: Mapping[str, Any], emit: Emit) -> Mapping[str, Any]:
        if request["vm"] != "exec":
            raise NotFound("no VM db1")
        emit({"stream": 1, "data": "aGk="})
        return {"exit_code": 3}

    async def serve(self, from_host: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        raise NotFound(f"nothing for {from_host}")

    def holders(self, tag: str) -> Sequence[Holding]:
        return ()

    def holding(self, tag: str) -> str:
        return ""

    async def release(
        self, tag: str, deadline_ns: int, *, may_stop_vm: bool, up_to: str = "detach"
    ) -> str:
        return ""

    async def close(self) -> None: ...


def talk(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    """What is answered to these lines, one after another."""
    answers: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(5)
        link.connect(str(path))
        for line in lines:
            link.sendall(line + b"\n")
            text = b""
            while not text.endswith(b"\n") or (b"done" not in text and b"error" not in text):
                data = link.recv(65536)
                if not data:
                    return answers
                text += data
            answers += [json.loads(part) for part in text.splitlines()]
    return answers


def ask(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    async def serve() -> list[dict[str, Any]]:
        api = LocalApi(str(path), Vms(), "w1")
        api.start(stream.listen)
        try:
            return await asyncio.to_thread(talk, path, *lines)
        finally:
            api.close()

    return asyncio.run(serve())


def test_a_commands_output_comes_before_its_end(tmp_path: Path) -> None:
    answers = ask(tmp_path / "s", b'{"vm": "exec"}')
    assert answers == [{"stream": 1, "data": "aGk="}, {"exit_code": 3, "done": True}]


def test_the_host_has_a_name(tmp_path: Path) -> None:
    assert ask(tmp_path / "s", b'{"ask": "host"}') == [{"host": "w1", "done": True}]


def test_errors_have_a_kind(tmp_path: Path) -> None:
    answers = ask(tmp_path / "s", b'{"vm": "show"}', b"nonsense", b"[]", b'{"what": 1}')
    assert [answer["kind"] for answer in answers] == ["not-found", "invalid", "invalid", "invalid"]


def test_a_line_that_is_too_long_ends_the_connection(tmp_path: Path) -> None:
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        ask(tmp_path / "s", b"x" * (LINE_BYTES_MAX + 70_000))


def test_what_is_kept_of_vms_comes_back() -> None:
    machine = AgentMachine()
    step = machine.step(KeepVm("vm/db1", "{}"), 0)
    change = step.changes[0]
    assert (change.kind, change.key) == ("vm", "vm/db1")
    again = AgentMachine()
    again.restore(Loaded([(change.kind, change.key, change.record)], [], 0))
    assert again.vms.documents == {"vm/db1": "{}"}
    assert again.step(KeepVm("vm/db1", None), 1).changes[0].record is None
    assert again.vms.documents == {}
    assert VmTable().documents == {}
