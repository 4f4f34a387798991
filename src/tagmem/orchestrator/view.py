"""The machine's state as the documents want to read it.

The machine replaces its state when a commit fails, so everything here goes through the machine
each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tagmem.domain import attachment as attachments
from tagmem.domain.desired import Desired as Wanted
from tagmem.domain.effects import CreateCapacity
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.placement import Explanation, Request
from tagmem.domain.records import (
    ApplianceRecord,
    AttachmentRecord,
    CapacityRecord,
    HostRecord,
    QuarantineRecord,
)
from tagmem.domain.requests import request_of
from tagmem.domain.state import State
from tagmem.orchestrator import documents
from tagmem.wire.agentapi import Desired, Workload
from tagmem.wire.rest import CandidateDocument, ExplanationDocument


class Readable(Protocol):
    """The orchestrator's machine (`domain/machine.py`), as far as readers know it."""

    state: State

    def desired(self, host: str, tag: str) -> Wanted | None: ...

    def explain(self, request: Request) -> Explanation: ...


class MachineView:
    """A `documents.View` of a machine."""

    def __init__(self, machine: Readable) -> None:
        self._machine = machine

    @property
    def capacities(self) -> Mapping[str, CapacityRecord]:
        """By tag."""
        return self._machine.state.capacities

    @property
    def appliances(self) -> Mapping[str, ApplianceRecord]:
        """By name."""
        return self._machine.state.appliances

    @property
    def hosts(self) -> Mapping[str, HostRecord]:
        """By name."""
        return self._machine.state.hosts

    @property
    def quarantine(self) -> Mapping[str, QuarantineRecord]:
        """By id."""
        return self._machine.state.quarantines

    def attachment(self, tag: str, host: str) -> AttachmentRecord | None:
        """One capacity on one host."""
        return self._machine.state.attachment(tag, host)

    def attachments_of(self, tag: str) -> Sequence[AttachmentRecord]:
        """In the order in which the hosts were named; those that came later by name."""
        found = list(self._machine.state.attachments.get(tag, {}).values())
        if len(found) > 1:
            named = self._machine.state.capacities[tag].hosts
            order = {host: place for place, host in enumerate(named)}
            found.sort(key=lambda each: (order.get(each.host, len(order)), each.host))
        return found

    def tags_on(self, host: str) -> Sequence[str]:
        """The tags that the host has, is to have, or is giving back."""
        state = self._machine.state
        return [
            tag
            for tag in state.by_host.get(host, ())
            if state.attachments[tag][host].state not in attachments.OVER
        ]

    def free_bytes(self, appliance: str, region: int) -> tuple[int, int]:
        """(free, largest free run) of the pool behind a region."""
        free = self._machine.state.pool(appliance, region).free
        return free.free_bytes, free.largest_bytes

    def explain(self, event: CreateCapacity) -> ExplanationDocument | Reply:
        """Where a request would go; what is wrong with it, where it can go nowhere at all."""
        explained = self._machine.explain(request_of(event))
        if not explained.reply.outcome.ok and not explained.candidates:
            return explained.reply
        return _document(explained)

    def desired(self, host: str, tag: str) -> Desired | None:
        """What the host is to reach for a tag; None once it has nothing to do with it any more."""
        wanted = self._machine.desired(host, tag)
        if wanted is None:
            return None
        spec = wanted.workload
        return Desired(
            tag=wanted.tag,
            revision=wanted.revision,
            goal="released" if wanted.released else "attached",
            appliance=wanted.appliance,
            size_bytes=wanted.size_bytes,
            tagged=wanted.tagged,
            read_only=wanted.read_only,
            extents=wanted.extents,
            workload=(
                None
                if spec is None
                else Workload(spec.id, spec.command, spec.environment, spec.stop)
            ),
            up_to=wanted.up_to,
            deadlines_ns=wanted.deadlines_ns,
            kill_holders=wanted.kill_holders,
            shared=wanted.shared,
            held_back=wanted.held_back,
            sharing=wanted.sharing.value,
        )


def _document(explained: Explanation) -> ExplanationDocument:
    choice = explained.choice
    return ExplanationDocument(
        fits=explained.reply.outcome is Outcome.OK and choice is not None,
        sentence=explained.sentence,
        candidates=tuple(
            CandidateDocument(
                candidate.window.appliance,
                candidate.window.region.index,
                candidate.verdict.value,
                candidate.window.pool.free.free_bytes,
                candidate.window.pool.free.largest_bytes,
            )
            for candidate in explained.candidates
        ),
        extents=documents.extents(choice.extents) if choice else (),
    )
