"""What a host does when a guest speaks unasked: a guest that is leaving has its tags taken out, one
that was rebooted, or has a new agent, is told again what it cannot find by itself.

The words are a guest's, so they decide nothing. *I gave it back* starts the same detach that a user
starts, with the same proofs; a greeting starts a question. A guest that says either all day keeps
one task of ours busy with what is in that guest, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec

from tagmem.base.errors import TagmemError
from tagmem.base.units import MILLISECOND, SECOND
from tagmem.presenter.channel import Channel
from tagmem.presenter.common import FIND_NS
from tagmem.presenter.contract import Detached, Presentation
from tagmem.wire import guest

log = logging.getLogger(__name__)


class Attendant:
    """Listens to one guest. `shown` is what is in it now, `take` takes one out, `keep` keeps what
    has changed of one.
    """

    def __init__(
        self,
        channel: Channel,
        shown: Callable[[], list[Presentation]],
        take: Callable[[Presentation], Awaitable[Detached]],
        keep: Callable[[Presentation], Awaitable[None]],
    ) -> None:
        self._channel = channel
        self._shown = shown
        self._take = take
        self._keep = keep
        self._who = ("", "")
        """Boot and agent that greeted last."""
        self._leaving: guest.Leaving | None = None
        self._came_anew = False
        self._greetings = 0
        self._task: asyncio.Task[None] | None = None
        channel.said = self._heard

    def close(self) -> None:
        """Listen no more, and drop what is under way."""
        self._channel.said = lambda _: None
        if self._task is not None:
            self._task.cancel()

    async def attend(self, attaching: Awaitable[Presentation]) -> Presentation:
        """Attach and keep. An agent that came while that went on did not hear the question, and
        there was nothing on record to tell it of: it is asked once more. Raises as `attaching`.
        """
        before = self._greetings
        shown = await attaching
        await self._keep(shown)
        if not shown.guest_path and self._greetings != before:
            self._came_anew = True
            self._begin()
        return shown

    def _heard(self, answer: guest.Answer) -> None:
        if isinstance(answer, guest.Leaving):
            self._leaving = answer
        elif isinstance(answer, guest.Hello) and (answer.boot_id, answer.instance) != self._who:
            self._who = (answer.boot_id, answer.instance)
            self._greetings += 1
            self._came_anew = True
        else:
            return
        self._begin()

    def _begin(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._attend())

    async def _attend(self) -> None:
        while self._leaving is not None or self._came_anew:
            leaving, self._leaving = self._leaving, None
            came_anew, self._came_anew = self._came_anew, False
            for shown in self._shown():
                with contextlib.suppress(TagmemError):
                    if leaving is not None and shown.tagged.tag not in leaving.held:
                        await self._hand_back(shown, leaving.reason)
                    elif came_anew and shown.state == "attached":
                        await self._find_again(shown)

    async def _hand_back(self, shown: Presentation, reason: str) -> None:
        ended = await self._take(shown)
        tag = shown.tagged.tag
        if ended.done:
            log.info("VM %s gave tag %s back (%.40s)", shown.vm, tag, reason)
        else:
            log.warning("VM %s says it gave tag %s back: %s", shown.vm, tag, ended.reason)

    async def _find_again(self, shown: Presentation) -> None:
        """The kernel may have numbered its devices otherwise, and forgot what it was told."""
        request = guest.Attach(0, shown.tagged.tag, FIND_NS // MILLISECOND, shown.told)
        answer = await self._channel.ask(request, FIND_NS + SECOND)
        if not isinstance(answer, guest.Attached):
            log.warning("VM %s does not find tag %s again: %.200r", shown.vm, request.tag, answer)
        elif answer.memory.path != shown.guest_path and shown in self._shown():
            await self._keep(msgspec.structs.replace(shown, guest_path=answer.memory.path))
