"""What a guest says unasked, and what its host makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from tagmem.base.errors import OutcomeUnknown
from tagmem.presenter.attend import Attendant
from tagmem.presenter.channel import Channel
from tagmem.presenter.contract import Detached, Piece, Presentation, Tagged
from tagmem.wire import guest

ONE, TWO = (f"{n}aaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee" for n in (1, 2))


def shown(tag: str, told: guest.Told | None = None) -> Presentation:
    tagged = Tagged(tag, 2 << 20, (Piece("/file", 0, 2 << 20),))
    return Presentation(tagged, "vm", "pmem", f"tm-{tag}", "attached", guest_path="a", told=told)


class Guest(Channel):
    """A channel whose answers are given here."""

    def __init__(self, answer: Callable[[guest.Request], guest.Answer]) -> None:
        super().__init__("/nowhere")
        self.answer = answer
        self.asked: list[guest.Request] = []

    async def ask(self, request: guest.Request, deadline_ns: int) -> guest.Answer:
        self.asked.append(request)
        return self.answer(request)


class Host:
    def __init__(self, *there: Presentation) -> None:
        self.there = {entry.tagged.tag: entry for entry in there}
        self.taken: list[str] = []
        self.refuse = False

    async def take(self, entry: Presentation) -> Detached:
        self.taken.append(entry.tagged.tag)
        if self.refuse:
            raise OutcomeUnknown("silent")
        return Detached(done=True, rung="unplug")

    async def keep(self, entry: Presentation) -> None:
        self.there[entry.tagged.tag] = entry

    def attend(self, channel: Channel) -> Attendant:
        return Attendant(channel, lambda: list(self.there.values()), self.take, self.keep)


def memory(tag: str, path: str) -> guest.Memory:
    return guest.Memory(tag, "pmem", "dax7.0", path, 2 << 20, 2 << 20)


async def _settle(attendant: Attendant) -> None:
    task = attendant._task
    if task is not None:
        await task


def hello(boot: str) -> guest.Hello:
    return guest.Hello(0, guest.VERSION, boot, "one", "Linux")


def test_a_guest_that_leaves_has_taken_out_what_it_does_not_hold() -> None:
    async def whole() -> None:
        host = Host(shown(ONE), shown(TWO))
        channel = Guest(lambda _: guest.Done(0))
        attendant = host.attend(channel)
        channel.said(guest.Leaving(0, "SIGTERM", (TWO,)))
        await _settle(attendant)
        assert host.taken == [ONE]

    asyncio.run(whole())


def test_one_that_does_not_let_go_does_not_keep_the_others() -> None:
    async def whole() -> None:
        host = Host(shown(ONE), shown(TWO))
        host.refuse = True
        channel = Guest(lambda _: guest.Done(0))
        attendant = host.attend(channel)
        channel.said(guest.Leaving(0, "SIGTERM"))
        await _settle(attendant)
        assert host.taken == [ONE, TWO]

    asyncio.run(whole())


def test_after_a_reboot_it_is_told_again_and_its_new_name_kept() -> None:
    async def whole() -> None:
        told = guest.Told(ONE, "ivshmem", acpi_index=5)
        attaching = msgspec.structs.replace(shown(TWO), state="attaching")
        host = Host(shown(ONE, told), attaching)
        channel = Guest(lambda _: guest.Attached(1, memory(ONE, "/dev/dax7.0")))
        attendant = host.attend(channel)
        channel.said(hello("boot-2"))
        await _settle(attendant)
        assert [(r.tag, r.told) for r in channel.asked if isinstance(r, guest.Attach)] == [
            (ONE, told)
        ]
        assert host.there[ONE].guest_path == "/dev/dax7.0"
        channel.said(hello("boot-2"))
        assert attendant._task is not None
        assert attendant._task.done(), "the same boot again is no news"

    asyncio.run(whole())


def test_an_agent_that_comes_while_a_tag_is_attached_is_told_of_it_afterwards() -> None:
    """It did not hear the question, and the tag was not on record yet as one to ask for."""

    async def whole() -> None:
        host = Host()
        channel = Guest(lambda _: guest.Attached(1, memory(ONE, "/dev/dax7.0")))
        attendant = host.attend(channel)
        nameless = msgspec.structs.replace(shown(ONE), guest_path="")

        async def attaching() -> Presentation:
            host.there[ONE] = msgspec.structs.replace(nameless, state="attaching")
            channel.said(hello("boot-1"))
            await _settle(attendant)
            return nameless

        await attendant.attend(attaching())
        await _settle(attendant)
        assert len(channel.asked) == 1
        assert host.there[ONE].guest_path == "/dev/dax7.0"

    asyncio.run(whole())


def test_a_silent_guest_is_not_asked_again() -> None:
    async def whole() -> None:
        host = Host()
        channel = Guest(lambda _: guest.Done(0))
        attendant = host.attend(channel)

        async def attaching() -> Presentation:
            return msgspec.structs.replace(shown(ONE), guest_path="")

        await attendant.attend(attaching())
        assert attendant._task is None
        assert host.there[ONE].guest_path == ""

    asyncio.run(whole())


def test_one_that_is_closed_listens_no_more() -> None:
    async def whole() -> None:
        host = Host(shown(ONE))
        channel = Guest(lambda _: guest.Done(0))
        attendant = host.attend(channel)
        attendant.close()
        channel.said(guest.Leaving(0, "SIGTERM"))
        assert attendant._task is None

    asyncio.run(whole())
