"""The agents' WebSocket: who is let in, what is sent down, what is taken up."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from tests.unit.orchestrator.world import BLOCK_BYTES, OTHER, TAG, World, world

from tagmem.base.errors import InvalidInput
from tagmem.domain.effects import RefreshAppliance
from tagmem.orchestrator.config import OrchestratorConfig, load
from tagmem.orchestrator.sessions import ANSWERS_WAITING_MAX, MESSAGE_BYTES_MAX
from tagmem.wire.agentapi import (
    Desired,
    Hello,
    Message,
    Observed,
    PeerAnswer,
    PeerCall,
    Rejected,
    SyncDone,
    decode_to_agent,
    encode,
)

CAPACITY = f"/v1/capacities/{TAG}"
H0 = Hello("h0", "boot-1", {"a0": 0})


class Agent:
    """The other end of a session."""

    def __init__(self, w: World, host: str = "h0") -> None:
        self._up: asyncio.Queue[Any] = asyncio.Queue()
        self._down: asyncio.Queue[Any] = asyncio.Queue()
        self._up.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": f"/v1/hosts/{host}/session"}
        application = w.orchestrator.application
        self.served = asyncio.create_task(application(scope, self._up.get, self._down.put))

    def say(self, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        self._up.put_nowait({"type": "websocket.receive", "text": data.decode()})

    def go(self) -> None:
        self._up.put_nowait({"type": "websocket.disconnect", "code": 1000})

    async def hear(self) -> Any:
        """The next message from the orchestrator, or the code and reason of its close."""
        sent = await self._down.get()
        if sent["type"] == "websocket.accept":
            sent = await self._down.get()
        if sent["type"] == "websocket.close":
            return sent["code"], sent.get("reason", "")
        return decode_to_agent(sent["text"])

    async def sync(self) -> list[Desired]:
        """Everything up to SyncDone."""
        heard: list[Desired] = []
        while not isinstance(message := await self.hear(), SyncDone):
            assert isinstance(message, Desired)
            heard.append(message)
        return heard


def test_hello_is_answered_with_all_that_is_wanted() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": BLOCK_BYTES, "hosts": ["h0"]}
            await w.call("PUT", CAPACITY, body)
            agent = Agent(w)
            agent.say(H0)
            (desired,) = await agent.sync()
            assert (desired.tag, desired.goal, desired.appliance) == (TAG, "attached", "a0")
            assert desired.extents == ((0, BLOCK_BYTES),)
            assert (await w.call("GET", "/v1/hosts/h0")).json["connected"] is True
            await w.call("PUT", f"/v1/capacities/{OTHER}", body)
            pushed = await agent.hear()
            assert (pushed.tag, pushed.goal) == (OTHER, "attached")
            agent.go()
            await agent.served
            assert (await w.call("GET", "/v1/hosts/h0")).json["connected"] is False

    asyncio.run(main())


def test_an_observation_becomes_the_state() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": BLOCK_BYTES, "hosts": ["h0"]})
            agent = Agent(w)
            agent.say(H0)
            (desired,) = await agent.sync()
            await w.offer(TAG)
            held = asyncio.create_task(
                w.call("PUT", f"{CAPACITY}/attachments/h0", {}, headers={"prefer": "wait=9"})
            )
            await w.accept(TAG)
            agent.say(Observed(TAG, desired.revision, "attached", dax_path="/run/dax0.1"))
            assert (await held).json["attachments"][0]["ready"] is True
            agent.go()
            await agent.served

    asyncio.run(main())


def test_only_the_newest_wish_of_a_tag_is_sent() -> None:
    async def main() -> None:
        async with world() as w:
            agent = Agent(w)
            agent.say(H0)
            await agent.sync()
            session = w.orchestrator.sessions._sessions["h0"]
            for number in range(5):
                session.push(TAG, encode(Rejected(str(number))))
                session.push(OTHER, encode(Rejected("other")))
            assert await agent.hear() == Rejected("4")
            assert await agent.hear() == Rejected("other")
            agent.go()
            await agent.served

    asyncio.run(main())


def test_a_new_session_displaces_the_old_one() -> None:
    async def main() -> None:
        async with world() as w:
            old, new = Agent(w), Agent(w)
            old.say(H0)
            await old.sync()
            new.say(H0)
            await new.sync()
            code, reason = await old.hear()
            assert (code, reason) == (4001, "a newer session of this host has begun")
            await old.served
            assert (await w.call("GET", "/v1/hosts/h0")).json["connected"] is True
            await w.call("PUT", CAPACITY, {"size_bytes": BLOCK_BYTES, "hosts": ["h0"]})
            assert (await new.hear()).tag == TAG
            new.go()
            await new.served

    asyncio.run(main())


def test_a_session_that_ends_while_its_successor_arrives_does_not_disconnect_it() -> None:
    async def main() -> None:
        async with world() as w:
            old, new = Agent(w), Agent(w)
            old.say(H0)
            await old.sync()
            new.say(H0)
            old.go()
            await new.sync()
            await old.served
            await w.call("PUT", CAPACITY, {"size_bytes": BLOCK_BYTES, "hosts": ["h0"]})
            assert (await new.hear()).tag == TAG
            new.go()
            await new.served

    asyncio.run(main())


def test_an_unknown_host_registers_itself_where_it_may() -> None:
    async def main() -> None:
        async with world() as w:
            agent = Agent(w, "h7")
            agent.say(Hello("h7", "b", {"a0": 7}))
            assert await agent.sync() == []
            assert (await w.call("GET", "/v1/hosts/h7")).json["links"] == {"a0": 7}
            agent.go()
            await agent.served
        async with world(config=OrchestratorConfig(self_registration=False)) as w:
            agent = Agent(w, "h7")
            agent.say(Hello("h7", "b", {"a0": 7}))
            rejected = await agent.hear()
            assert isinstance(rejected, Rejected)
            assert "unknown" in rejected.reason
            assert (await agent.hear())[0] == 1008

    asyncio.run(main())


def test_what_ends_a_session_before_it_begins() -> None:
    bad: list[tuple[Message | bytes, str]] = [
        (b"{", "not a message"),
        (b'{"type": "Shout"}', "not a message"),
        (Observed(TAG, 1, "attached"), "must be Hello"),
        (Hello("h1", "b", {}), "host: must be h0"),
        (Hello("h0", "b", {}, protocol=9), "protocol: must be 1"),
        (Hello("h0", "b", {"a0": 1}), "links"),
        (Hello("h0", "b", {"A!": 1}), "links"),
        (Hello("h0", "b", {"a0": 2**40}), "links.a0"),
        (Hello("h0", "b" * 200, {"a0": 0}), "boot_id"),
        (b'"' + b"x" * MESSAGE_BYTES_MAX + b'"', "bytes"),
    ]

    async def main() -> None:
        async with world() as w:
            for message, reason in bad:
                agent = Agent(w)
                agent.say(message)
                rejected = await agent.hear()
                assert isinstance(rejected, Rejected)
                assert reason in rejected.reason
                code, said = await agent.hear()
                assert code in (1008, 1009)
                assert len(said.encode()) <= 123
                await agent.served
            assert len(w.orchestrator.sessions) == 0

    asyncio.run(main())


def test_a_bad_word_later_ends_the_session_with_a_reason() -> None:
    async def main() -> None:
        async with world() as w:
            for bad in (b"[]", encode(H0), encode(Observed("nil", 1, "absent"))):
                agent = Agent(w)
                agent.say(H0)
                await agent.sync()
                agent.say(bad)
                code, reason = await agent.hear()
                assert code == 1008
                assert reason
                await agent.served

    asyncio.run(main())


def test_a_call_passes_between_sessions_and_ends_with_either() -> None:
    async def main() -> None:
        async with world() as w:
            agents = Agent(w), Agent(w, "h1")
            for ld, agent in enumerate(agents):
                agent.say(Hello(f"h{ld}", "b", {"a0": ld}, peer_calls=True))
                await agent.sync()
            caller, target = agents
            caller.say(PeerCall(4, "h1", msgspec.Raw(b'{"vm":"x"}')))
            asked = await target.hear()
            assert (asked.from_host, bytes(asked.request)) == ("h0", b'{"vm":"x"}')
            target.say(PeerAnswer(asked.id, msgspec.Raw(b'{"y":1}')))
            assert bytes((await caller.hear()).answer) == b'{"y":1}'
            caller.say(PeerCall(5, "h1", msgspec.Raw(b"{}")))
            await target.hear()
            target.go()
            told = await caller.hear()
            assert (told.id, told.kind) == (5, "unknown")
            caller.go()
            await asyncio.gather(*(agent.served for agent in agents))

    asyncio.run(main())


def test_an_agent_that_does_not_read_what_is_said_to_it_is_hung_up_on() -> None:
    async def main() -> None:
        async with world() as w:
            agent = Agent(w)
            agent.say(H0)
            await agent.sync()
            session = w.orchestrator.sessions._sessions["h0"]
            for _ in range(ANSWERS_WAITING_MAX + 1):
                session.say(PeerAnswer(1))
            assert await agent.hear() == (1008, "what is said to it is not read")
            await agent.served

    asyncio.run(main())


def test_many_observations_are_taken_in_order() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": BLOCK_BYTES, "hosts": ["h0"]})
            await w.accept(TAG)
            agent = Agent(w)
            agent.say(H0)
            (desired,) = await agent.sync()
            for number in range(300):
                agent.say(Observed(TAG, desired.revision, "attached", dax_path=f"/dax{number}"))
            agent.go()
            await agent.served
            await w.submit(RefreshAppliance("a0"))  # behind everything that was posted
            shown = (await w.call("GET", f"{CAPACITY}/attachments/h0")).json
            assert shown["dax_path"] == "/dax299"

    asyncio.run(main())


def test_configuration_names_what_is_wrong() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"colour": 1}, "colour"),
        ({"ladder": {"ask_seconds": -1}}, "ladder.ask_seconds"),
        ({"listen": "localhost"}, "listen"),
        ({"listen": "unix:run/x"}, "listen"),
        ({"listen": "127.0.0.1:70000"}, "listen: port"),
        ({"socket": "/" + "x" * 120}, "socket"),
        ({"listen": []}, "listen"),
        ({"hosts": {"H!": {"links": {}}}}, "hosts"),
        ({"hosts": {"h0": {"links": {"a0": 99_999}}}}, "hosts"),
    ]
    for given, field in bad:
        with pytest.raises(InvalidInput) as caught:
            load(None, given)
        assert field in caught.value.field
    addresses = ["[::1]:7070", "unix:/run/x.sock"]
    config = load(None, {"listen": addresses, "ladder": {"ask_seconds": 2}})
    assert [str(each) for each in config.endpoints()] == ["http://[::1]:7070", "unix:/run/x.sock"]
    assert config.ladder.deadlines_ns() == {"ask": 2_000_000_000}
