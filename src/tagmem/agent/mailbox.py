"""One host's mailbox at one appliance, without I/O: wire messages become events of the loop, and
its effects become commands.

A session begins with the interrupt policy (0103h), the regions (4800h), the event log (0100h) and
the device's own list (4801h), read again from its start when its generation moves; all that the
loop believes about the device comes from there. Groups are answered in order (4802h), and their
records are cleared (0101h) only after the answer: whoever crashes in between reads them again, and
a group that stands in the device's list, or before one that does, has been answered.

Acceptances do not wait for one another: each names its extents, so the device cannot take it for
another group's, and one that comes too early is refused there and sent again. A refusal names
nothing and goes alone.

Not certain: a *refusal* whose response was lost is sent again, and could then refuse the next
group, because a refusal names nothing. The orchestrator sees that group refused and offers it
again.

A command whose deadline passes ends the session: what it did is found out by reading the lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec

from tagmem.agent import records as r
from tagmem.agent.eventlog import EventLog, Group
from tagmem.base.ids import Tag, tag_from_bytes, tag_to_bytes
from tagmem.base.limits import (
    CCI_PAYLOAD_BYTES_MAX,
    EXTENTS_PER_LD_MAX,
    MAILBOX_REQUEST_DEADLINE_NS,
)
from tagmem.base.units import MILLISECOND, Dpa, Nanoseconds
from tagmem.ports import Effect, Event
from tagmem.wire import generic, memdev, vendor
from tagmem.wire.cci import Opcode, ReturnCode, return_code_name
from tagmem.wire.exchange import Fault, Notification, Requester, Response, SessionFull
from tagmem.wire.extent import UpdatedExtent, WireExtent
from tagmem.wire.generic import DcEventType
from tagmem.wire.generic import EventLog as Log
from tagmem.wire.layout import WireStruct
from tagmem.wire.mctp import DEVICE_EID, FM_EID, MctpStream

EXTENTS_PER_PAGE = (CCI_PAYLOAD_BYTES_MAX - 16) // 40
GENERATION_RETRIES_MAX = 10
"""How often the extent list may move while it is read (Linux gives up after as many)."""
POLL_NS = 100 * MILLISECOND
"""How often a log is read that cannot be emptied yet: a device only tells when an empty log
fills.
"""
RETRY_NS = 20 * MILLISECOND
"""After Retry Required or Busy."""
RETRIES_MAX = 100
BACKLOG_MAX = 4096
ANSWERS_IN_FLIGHT_MAX = 16
"""Acceptances on their way at the same time; the device commits them together."""

_AGAIN = (ReturnCode.RETRY_REQUIRED, ReturnCode.BUSY)
_NOT_PENDING = (ReturnCode.INVALID_INPUT, ReturnCode.INVALID_PHYSICAL_ADDRESS)
"""What a device says to an acceptance of a group that does not stand at the head of its queue."""

Then = Callable[[Response], None]


class MediaAnswer(msgspec.Struct, frozen=True):
    """The answer to `ask_media`; a descriptor came beside it when `media` is given."""

    tag: str
    code: int
    media: vendor.GetExtentMediaResponse | None = None


class _Waiting(msgspec.Struct, frozen=True):
    opcode: int
    payload: WireStruct
    then: Then


class HostLink:
    """A session with one appliance after the other; `feed`, `tick` and `perform` drive it."""

    def __init__(self, appliance: str) -> None:
        self.appliance = appliance
        self.session = 0
        self.broken = ""
        """Why this session must be closed; the shell looks after each call."""
        self._log = EventLog()
        self._events: list[Event | MediaAnswer] = []
        self._now: Nanoseconds = 0
        self._up = False
        self._reset()

    def _reset(self) -> None:
        self._requester = Requester(MctpStream(FM_EID, DEVICE_EID))
        self._then: dict[int, Then] = {}
        self._backlog: deque[_Waiting] = deque()
        self._answers: deque[r.Answer] = deque()
        self._sent: set[int] = set()
        """Groups whose answer was sent; the oldest of `_answers` is settled first."""
        self._too_early: set[int] = set()
        """Those of them whose answer was refused while an older one was not settled."""
        self._retries = 0
        self._retry_at: Nanoseconds | None = None
        self._poll_at: Nanoseconds | None = None
        self._getting = False
        self._again = False
        self._more = False
        self._clearing = False
        self._early: list[Group] = []
        self._regions: tuple[r.Region, ...] = ()
        self._page: list[WireExtent] = []
        self._page_generation: int | None = None
        self._page_retries = 0
        self._reading = False
        self._read_again = False

    # ---- driven by the shell

    def connected(self, now: Nanoseconds) -> None:
        """Bytes can flow: begin."""
        self._now = now
        self.session += 1
        self.broken = ""
        self._up = False
        self._log.forget()
        self._reset()
        policy = generic.SetEventInterruptPolicyRequest(dynamic_capacity=1)
        self._ask(Opcode.SET_EVENT_INTERRUPT_POLICY, policy, self._policy_set)

    def disconnected(self, now: Nanoseconds, reason: str) -> list[Event | MediaAnswer]:
        """The session has ended."""
        self._now = now
        lost: list[Event | MediaAnswer] = [r.LinkLost(self.appliance, reason)]
        self._up = False
        self._reset()
        return lost

    def feed(self, data: bytes, now: Nanoseconds) -> list[Event | MediaAnswer]:
        """Take bytes from the device; what the loop is to hear."""
        self._now = now
        for item in self._requester.feed(data, now):
            if self.broken:
                break
            if isinstance(item, Notification):
                if item.events >> Log.DYNAMIC_CAPACITY & 1:
                    self._get()
            elif isinstance(item, Fault):
                if item.fatal:
                    self._break(item.reason)
            else:
                self._response(item)
        self._drain_backlog()
        return self._take()

    def tick(self, now: Nanoseconds) -> list[Event | MediaAnswer]:
        """Time has passed."""
        self._now = now
        if self._requester.expire(now):
            self._break(f"no answer within {MAILBOX_REQUEST_DEADLINE_NS // MILLISECOND} ms")
        if self._retry_at is not None and self._retry_at <= now:
            self._retry_at = None
            if self._answers:
                self._answer(self._answers[0], self._answers[0].accepted)
            self._send_answers()
        if self._poll_at is not None and self._poll_at <= now:
            self._poll_at = None
            self._get()
        return self._take()

    def next_deadline(self) -> Nanoseconds | None:
        """When `tick` is wanted at the latest."""
        due = (self._requester.next_deadline(), self._retry_at, self._poll_at)
        return min((at for at in due if at is not None), default=None)

    def outgoing(self) -> bytes:
        """Bytes to send now."""
        return self._requester.outgoing()

    def perform(self, effect: Effect, now: Nanoseconds) -> None:
        """Carry out one effect of the loop, if the session that it was meant for still lasts."""
        self._now = now
        if not self._up or self.broken:
            return
        if isinstance(effect, r.Answer):
            if self._log.find(effect.group) is not None:
                self._answers.append(effect)
                self._send_answers()
        elif isinstance(effect, r.Acknowledge):
            self._done(effect.group)
        elif isinstance(effect, r.ReturnExtents):
            if effect.session == self.session:
                self._return(effect)
        elif isinstance(effect, r.ReadDevice):
            self._read_list()

    def ask_media(self, tag: str, now: Nanoseconds) -> bool:
        """Ask where the bytes of an accepted tag are (C000h); brings MediaAnswer.

        False: no session.
        """
        self._now = now
        if not self._up or self.broken:
            return False
        request = vendor.GetExtentMediaRequest(tag_to_bytes(Tag(tag)))

        def then(response: Response) -> None:
            media = response.body
            found = media if isinstance(media, vendor.GetExtentMediaResponse) else None
            self._events.append(MediaAnswer(tag, response.return_code, found))

        self._ask(Opcode.GET_EXTENT_MEDIA, request, then)
        return True

    # ---- requests

    def _take(self) -> list[Event | MediaAnswer]:
        events, self._events = self._events, []
        return events

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason

    def _ask(self, opcode: int, payload: WireStruct, then: Then) -> None:
        """Send a request, or queue it behind others: in order, always."""
        if self._backlog or not self._send(opcode, payload, then):
            if len(self._backlog) >= BACKLOG_MAX:
                self._break(f"more than {BACKLOG_MAX} commands wait for {self.appliance}")
                return
            self._backlog.append(_Waiting(opcode, payload, then))

    def _send(self, opcode: int, payload: WireStruct, then: Then) -> bool:
        deadline = self._now + MAILBOX_REQUEST_DEADLINE_NS
        try:
            key = self._requester.request(opcode, payload, self._now, deadline)
        except SessionFull:
            return False
        self._then[key] = then
        return True

    def _drain_backlog(self) -> None:
        while self._backlog:
            first = self._backlog[0]
            if not self._send(first.opcode, first.payload, first.then):
                return
            self._backlog.popleft()

    def _response(self, response: Response) -> None:
        then = self._then.pop(response.key, None)
        if response.malformed is not None:
            self._break(f"answer to {response.opcode:04x}h: {response.malformed}")
        elif then is not None:
            then(response)

    def _succeeded(self, response: Response, kind: type[Any]) -> Any:
        """The body, or None after breaking the session off."""
        if response.return_code == 0 and isinstance(response.body, kind):
            return response.body
        name = return_code_name(response.return_code)
        self._break(f"{response.opcode:04x}h was answered with {name}")
        return None

    # ---- the beginning of a session

    def _policy_set(self, response: Response) -> None:
        # A device that refuses the policy still has its log, which is then polled.
        if response.return_code != 0:
            self._poll_at = self._now + POLL_NS
        request = memdev.GetDcConfigurationRequest()
        self._ask(Opcode.GET_DC_CONFIGURATION, request, self._configured)

    def _configured(self, response: Response) -> None:
        body = self._succeeded(response, memdev.GetDcConfigurationResponse)
        if body is None:
            return
        self._regions = tuple(
            r.Region(Dpa(g.base_dpa), g.length_bytes, g.block_bytes) for g in body.regions
        )
        if self._up:
            self._read_list()
        else:
            self._get()

    def _read_list(self) -> None:
        if self._reading:
            self._read_again = True
            return
        self._reading = True
        self._page_retries = 0
        self._read_page(restart=True)

    def _read_page(self, *, restart: bool) -> None:
        if restart:
            self._page, self._page_generation = [], None
        request = memdev.GetDcExtentListRequest(EXTENTS_PER_PAGE, len(self._page))
        self._ask(Opcode.GET_DC_EXTENT_LIST, request, self._listed)

    def _listed(self, response: Response) -> None:
        body = self._succeeded(response, memdev.GetDcExtentListResponse)
        if body is None:
            return
        moved = self._page_generation not in (None, body.generation)
        self._page_generation = body.generation
        self._page += body.extents
        if len(self._page) > EXTENTS_PER_LD_MAX:
            self._break(f"extent list: at most {EXTENTS_PER_LD_MAX} extents, and more came")
        elif moved or (not body.extents and len(self._page) < body.extents_total):
            self._page_retries += 1
            if self._page_retries > GENERATION_RETRIES_MAX:
                self._break("the extent list moves faster than it can be read")
            else:
                self._read_page(restart=True)
        elif len(self._page) < body.extents_total:
            self._read_page(restart=False)
        else:
            self._reading = False
            self._list_read(tuple(self._page))

    def _list_read(self, extents: tuple[WireExtent, ...]) -> None:
        held = tuple(_extent(extent) for extent in extents)
        fresh = not self._up
        self._up = True
        self._events.append(r.DeviceRead(self.appliance, self._regions, held, fresh, self.session))
        if fresh:
            self._answered_before(held)
            early, self._early = self._early, []
            for group in early:
                self._announce(group)
            self._clear()
        if self._read_again:
            self._read_again = False
            self._read_list()

    def _answered_before(self, held: tuple[r.Extent, ...]) -> None:
        """Groups that an earlier session answered: those in the list, and all before such a one."""
        have = set(held)
        adds = [group for group in self._early if group.kind is DcEventType.ADD_CAPACITY]
        last = -1
        for index, group in enumerate(adds):
            if all(_extent(extent) in have for extent in group.extents):
                last = index
        for group in adds[: last + 1]:
            group.done = True

    # ---- the event log

    def _get(self) -> None:
        if self._getting:
            self._again = True
            return
        self._getting, self._again, self._poll_at = True, False, None
        request = generic.GetEventRecordsRequest(Log.DYNAMIC_CAPACITY)
        self._ask(Opcode.GET_EVENT_RECORDS, request, self._got)

    def _got(self, response: Response) -> None:
        self._getting = False
        body = self._succeeded(response, generic.GetEventRecordsResponse)
        if body is None:
            return
        try:
            groups = self._log.take(body.records)
        except ValueError as error:
            self._break(str(error))
            return
        if not self._up:
            self._early += groups
            if not self._reading:
                self._read_list()
        else:
            for group in groups:
                self._announce(group)
        if body.overflow:
            # Records were lost: the device's list is the truth (CXL r3.1 8.2.9.2.2).
            self._overflowed()
        self._more = body.more_records
        if self._again:
            self._get()
        self._clear()

    def _overflowed(self) -> None:
        if self._up:
            self._read_list()
        if self._log.empty and not self._clearing:
            self._clearing = True
            clear = generic.ClearEventRecordsRequest(Log.DYNAMIC_CAPACITY, (), clear_all=True)
            self._ask(Opcode.CLEAR_EVENT_RECORDS, clear, lambda given: self._cleared(given, ()))

    def _announce(self, group: Group) -> None:
        if group.done:
            return
        extents = tuple(_extent(extent) for extent in group.extents)
        if group.kind is DcEventType.ADD_CAPACITY:
            self._events.append(r.Offered(self.appliance, group.number, extents))
        elif group.kind is DcEventType.RELEASE_CAPACITY:
            self._events.append(r.ReleaseAsked(self.appliance, group.number, extents))
        elif group.kind is DcEventType.FORCED_CAPACITY_RELEASE:
            self._events.append(r.TakenByForce(self.appliance, group.number, extents))
        else:
            group.done = True
            if group.kind is DcEventType.REGION_CONFIGURATION_UPDATED:
                request = memdev.GetDcConfigurationRequest()
                self._ask(Opcode.GET_DC_CONFIGURATION, request, self._configured)

    def _done(self, number: int) -> None:
        group = self._log.find(number)
        if group is not None:
            group.done = True
            self._clear()

    def _clear(self) -> None:
        """Clear what is done, and look again until the log is empty."""
        handles = self._log.clearable() if self._up and not self._clearing else ()
        if handles:
            self._clearing = True
            clear = generic.ClearEventRecordsRequest(Log.DYNAMIC_CAPACITY, handles)
            self._ask(
                Opcode.CLEAR_EVENT_RECORDS, clear, lambda response: self._cleared(response, handles)
            )
        elif not self._log.empty and self._poll_at is None:
            self._poll_at = self._now + POLL_NS

    def _cleared(self, response: Response, handles: tuple[int, ...]) -> None:
        self._clearing = False
        if response.return_code != 0:
            self._break(f"0101h was answered with {return_code_name(response.return_code)}")
            return
        self._log.cleared(handles)
        if self._more or self._log.empty:
            self._get()
        else:
            # What waits for its answer would only be read again: the next clearing, or a
            # notification, comes soon.
            self._clear()

    # ---- answers and releases

    def _send_answers(self) -> None:
        if self._retry_at is not None:
            return
        for answer in islice(self._answers, ANSWERS_IN_FLIGHT_MAX):
            if answer.group not in self._sent:
                if self._sent and not answer.accepted:
                    return
                self._sent.add(answer.group)
                self._answer(answer, answer.accepted)
            if not answer.accepted:
                return

    def _answer(self, answer: r.Answer, accepted: tuple[r.Span, ...], because: int = 0) -> None:
        extents = tuple(UpdatedExtent(dpa, length) for dpa, length in accepted)
        self._ask(
            Opcode.ADD_DC_RESPONSE,
            memdev.AddDcResponseRequest(extents),
            lambda response: self._answer_taken(
                answer, response.return_code, accepting=bool(extents), because=because
            ),
        )

    def _answer_taken(self, answer: r.Answer, code: int, *, accepting: bool, because: int) -> None:
        if code != 0 and answer is not self._answers[0]:
            self._too_early.add(answer.group)
            return
        if code in _AGAIN and self._retries < RETRIES_MAX:
            self._retries += 1
            self._retry_at = self._now + RETRY_NS
            return
        if code != 0 and accepting and code not in _NOT_PENDING:
            # The device cannot take our acceptance, and still waits for an answer to this group.
            self._answer(answer, (), because=code)
            return
        if code != 0 and code not in _NOT_PENDING:
            self._break(f"4802h was answered with {return_code_name(code)}")
            return
        self._answers.remove(answer)
        self._sent.discard(answer.group)
        self._sent -= self._too_early
        self._too_early.clear()
        self._retries = 0
        self._events.append(r.Answered(self.appliance, answer.group, because or code))
        self._done(answer.group)
        self._send_answers()

    def _return(self, effect: r.ReturnExtents) -> None:
        extents = tuple(UpdatedExtent(dpa, length) for dpa, length in effect.extents)
        self._ask(
            Opcode.RELEASE_DC,
            memdev.ReleaseDcRequest(extents),
            lambda response: self._events.append(
                r.Returned(self.appliance, effect.tag, response.return_code)
            ),
        )


def _extent(extent: WireExtent) -> r.Extent:
    return r.Extent(
        Dpa(extent.start_dpa), extent.length_bytes, tag_from_bytes(extent.tag), extent.sequence
    )
