"""`tagmem vm migrate`: the order of its steps, and what each way of failing leaves and says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.client.fake_api import TAG, FakeApi, Request, attachment, capacity

from tagmem.base.errors import Conflict, OutcomeUnknown, TagmemError, Unsupported
from tagmem.cli.migrate import Journey, sentences
from tagmem.client.session import Client
from tagmem.domain.outcome import Outcome

PATH = f"/v1/capacities/{TAG}"
MOVE = {"tag": TAG, "presenter": "vhost-pmem", "form": "switch", "travels_as": "pmem", "why": "w"}


class World:
    """An orchestrator that has one capacity, and the agent of w1."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.hosts = ["w1"]
        self.sharing = "software-coherent"
        self.refuse = ""
        self.end: TagmemError | None = None
        self.asked: list[Mapping[str, Any]] = []
        self.client = Client(api.url)
        api.on("GET", PATH, lambda _: self.document())
        for host in ("w1", "w2"):
            api.on("PUT", f"{PATH}/attachments/{host}", self.attach)
            api.on("DELETE", f"{PATH}/attachments/{host}", self.release)

    def document(self) -> Any:
        found = [
            attachment(
                host, **({"state": "refused", "reason": "full"} if host == self.refuse else {})
            )
            for host in self.hosts
        ]
        return capacity(*found, sharing=self.sharing)

    def attach(self, request: Request) -> Any:
        self.hosts.append(request.path.rpartition("/")[2])
        return self.document()

    def release(self, request: Request) -> Any:
        self.hosts.remove(request.path.rpartition("/")[2])
        return self.document()

    def ask(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.asked.append(request)
        if "ask" in request:
            yield {"host": "w1", "done": True}
        elif request["vm"] == "migrate-look":
            missing = [] if "w2" in self.hosts else [TAG]
            yield {"moves": [MOVE], "missing": missing, "done": True}
        else:
            assert "w2" in self.hosts, "the target has the tag before the VM moves"
            yield {"phase": "judged", "moves": [MOVE]}
            copied = {"transferred_bytes": 5 << 20, "remaining_bytes": 0, "total_bytes": 5 << 20}
            yield {"phase": "copying", **copied}
            if self.end is not None:
                raise self.end
            yield {"phase": "arrived", "downtime_ms": 12}
            yield {"name": "db1", "to_host": "w2", "tags": [], "done": True}

    def journey(self, to_host: str = "w2") -> Journey:
        return Journey(self.client, self.ask, "db1", to_host, {"form": "auto"}, 5.0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with FakeApi(tmp_path) as api:
        made = World(api)
        with made.client:
            yield made


def test_a_tag_is_attached_there_before_and_released_here_after(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    journey = world.journey()
    judged = journey.judge()
    assert (judged["from_host"], judged["to_attach"]) == ("w1", [TAG])
    assert list(sentences(journey.moves)) == [
        f"tag {TAG} (vhost-pmem) travels as pmem, and is switched back: w"
    ]
    assert world.hosts == ["w1"], "a judgement changes nothing"
    journey.attach()
    assert journey.move() == {"name": "db1", "to_host": "w2", "tags": []}
    assert world.hosts == ["w1", "w2"]
    assert journey.release() == []
    assert world.hosts == ["w2"]
    said = capsys.readouterr().err
    assert "copying: 5 MiB sent, 0 of 5 MiB left" in said
    assert "stood still for 12 ms" in said
    assert world.asked[-1] == {"vm": "migrate", "name": "db1", "to_host": "w2", "form": "auto"}


def test_what_is_there_already_is_not_attached_nor_taken_back(world: World) -> None:
    world.hosts.append("w2")
    world.end = Conflict("VM db1 stays on this host: the stream failed")
    journey = world.journey()
    journey.judge()
    journey.attach()
    with pytest.raises(Conflict, match="nothing was attached to w2"):
        journey.move()
    assert world.hosts == ["w1", "w2"]


def test_a_tag_that_is_not_sharable_is_refused_up_front(world: World) -> None:
    world.sharing = "none"
    with pytest.raises(Conflict, match=r"created without --share.*Nothing has been done"):
        world.journey().judge()
    assert world.hosts == ["w1"]
    with pytest.raises(Conflict, match="on host w1 already"):
        world.journey("w1").judge()


def test_a_target_that_refuses_the_tag_leaves_the_vm_where_it_is(world: World) -> None:
    world.refuse = "w2"
    journey = world.journey()
    journey.judge()
    with pytest.raises(Conflict, match=r"refused tag .* full.*runs on w1.*is being released there"):
        journey.attach()
    assert world.hosts == ["w1"]
    assert all(request.get("vm") != "migrate" for request in world.asked)


def test_a_vm_that_stays_has_its_tag_taken_back_there(world: World) -> None:
    world.end = Unsupported("VM db1 stays on this host: its accelerator is tcg")
    journey = world.journey()
    journey.judge()
    journey.attach()
    with pytest.raises(Unsupported, match=r"accelerator.*is being released there.*Try again"):
        journey.move()
    assert world.hosts == ["w1"]


def test_where_the_vm_is_not_known_nothing_is_released(world: World) -> None:
    world.end = OutcomeUnknown("the host agent hung up")
    journey = world.journey()
    journey.judge()
    journey.attach()
    with pytest.raises(OutcomeUnknown, match=f"is not known.*vm show db1.*{TAG}"):
        journey.move()
    assert world.hosts == ["w1", "w2"]


def test_what_could_not_be_released_here_is_named_with_its_command(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    journey = world.journey()
    journey.judge()
    journey.attach()
    journey.move()
    world.api.on("DELETE", f"{PATH}/attachments/w1", Outcome.TAG_IS_UNKNOWN)
    assert journey.release() == [TAG]
    said = capsys.readouterr().err
    assert f"tagmem capacity release {TAG} --host w1" in said
