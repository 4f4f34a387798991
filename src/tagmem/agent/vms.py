"""What the agent remembers of the VMs of its host, without knowing how a VM is driven.

The hypervisors (`ports.Hypervisors`) keep documents here: a row per VM and per tag in one. They are
the agent's rows like its tags, written by its machine in its store, so that the two never disagree
after a crash; what they mean is the hypervisors' own affair.
"""

from __future__ import annotations

from tagmem.agent.records import VmDocument
from tagmem.base.units import Nanoseconds
from tagmem.ports import Change, Effect, Event

KIND = "vm"


class KeepVm(Event, frozen=True):
    """A document is to be kept, or (None) forgotten, before it is acted upon."""

    key: str
    document: str | None


class GuestsAsked(Event, frozen=True):
    """The hypervisors have tried to take a tag out of every VM; why it did not work, or nothing."""

    tag: str
    reason: str


class DetachGuests(Effect, frozen=True):
    """The detach rung: take a tag out of this host's VMs; brings GuestsAsked."""

    durable = False

    tag: str
    deadline_ns: Nanoseconds
    may_stop_vm: bool
    up_to: str = "detach"
    """The highest rung that is allowed: below `detach`, it concerns VMs whose RAM is in the tag."""


class VmTable:
    """The documents, as the machine holds them."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        """Why guests still have a tag, as it was last told."""

    def clear(self) -> None:
        """Forget everything."""
        self.documents.clear()
        self.reasons.clear()

    def restore(self, key: str, record: VmDocument) -> None:
        """From the store."""
        self.documents[key] = record.document

    def keep(self, event: KeepVm) -> Change:
        """The change that an event leads to."""
        if event.document is None:
            self.documents.pop(event.key, None)
            return Change(KIND, event.key, None)
        self.documents[event.key] = event.document
        return Change(KIND, event.key, VmDocument(event.document))
