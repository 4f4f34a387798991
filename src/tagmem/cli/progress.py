"""What happens while a command waits: a line on stderr per step, from the event stream.

Waiting without a word is how people come to press Ctrl-C; so the steps of the system are shown as
they are committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from tagmem.base.errors import Conflict

if TYPE_CHECKING:
    from tagmem.client.session import Client
    from tagmem.wire.rest import AttachmentDocument, CapacityDocument, EventDocument

T = TypeVar("T")

_VALUE_CHARACTERS_MAX = 120


class Progress:
    """Waits for something about one tag, telling what happens on the way."""

    def __init__(self, client: Client, tag: str, *, quiet: bool, timeout: float | None) -> None:
        self._client = client
        self._tag = tag
        self._quiet = quiet
        self._timeout = timeout
        self._begun = time.monotonic()
        self._after = client.last_event()
        self._told: set[str] = set()

    def say(self, text: str) -> None:
        """One line, with the time since the command began."""
        if not self._quiet:
            elapsed = time.monotonic() - self._begun
            click.echo(f"tagmem: {elapsed:8.3f} s  {text}", err=True)

    def until(self, look: Callable[[], T | None], late: Callable[[], str]) -> T:
        """What `look` returns, once it is something. Raises WaitTimeout with what `late` says."""
        from tagmem.client.session import concerns

        timeout = self._timeout
        if timeout is not None:
            timeout = max(0.0, self._begun + timeout - time.monotonic())
        subjects = frozenset({self._tag})
        found = self._client.wait(
            look,
            subjects=subjects,
            timeout=timeout,
            after=self._after,
            on_event=self._tell,
            late=late,
        )
        if not self._quiet:
            # It may have come about before its events were heard.
            for event in self._client.history(self._after):
                if concerns(event, subjects):
                    self._tell(event)
        return found

    def _tell(self, event: EventDocument) -> None:
        self._after = event.id
        self._told.add(event.type)
        self.say(event_line(event).removeprefix("capacity "))

    def ready(self, attachment: AttachmentDocument) -> None:
        """Say that the tag can be opened, unless the event has said so."""
        if "capacity.ready" not in self._told:
            self.say(f"ready  host={attachment.host}  dax_path={attachment.dax_path}")


def event_line(event: EventDocument) -> str:
    """An event in a line: `attachment accepted  host=w1`."""
    facts = "  ".join(
        f"{name}={_short(value)}"
        for name, value in event.data.items()
        if value not in ("", None, [], {}) and name != "tag"
    )
    return f"{event.type.replace('.', ' ').replace('_', ' ')}  {facts}".rstrip()


def _short(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        value = ",".join(map(str, value))
    text = value if isinstance(value, str) else str(value)
    if len(text) > _VALUE_CHARACTERS_MAX:
        return text[: _VALUE_CHARACTERS_MAX - 3] + "..."
    return text


def ready(document: CapacityDocument, hosts: tuple[str, ...] = ()) -> CapacityDocument | None:
    """The document once the tag can be opened on each of `hosts` (none: each asked for); None
    before.

    Raises Conflict with the host's reason when one refused, and when the capacity was quarantined.
    """
    if document.state == "quarantined":
        raise Conflict(f"tag {document.tag} is quarantined: {document.fault or 'see the events'}")
    wanted = [a for a in document.attachments if not hosts or a.host in hosts]
    for attachment in wanted:
        if attachment.state == "refused":
            reason = attachment.reason or "no reason given"
            raise Conflict(f"host {attachment.host} refused tag {document.tag}: {reason}")
    missing = set(hosts) - {attachment.host for attachment in wanted}
    return document if not missing and all(a.ready for a in wanted) else None


def moved(document: CapacityDocument, hosts: tuple[str, ...]) -> CapacityDocument | None:
    """The document once its hand-over or publication is over and `hosts` have it; None before.

    Raises Conflict when it failed, with who has the capacity now, and when a host refused.
    """
    move = document.move
    if move is not None and not move.ended_ns:
        return None
    if move is not None and move.step == "failed":
        over = ("released", "refused")
        having = [a.host for a in document.attachments if a.state not in over]
        where = f"{', '.join(having)} has it" if having else f"it is {document.state}"
        raise Conflict(f"the {move.kind} of tag {document.tag} failed: {move.reason}; {where}")
    return ready(document, hosts)


def pending(document: CapacityDocument | None) -> str:
    """What a capacity is waiting for, in a sentence with the holders that stand in the way."""
    if document is None:
        return "nothing is known yet"
    parts = [f"tag {document.tag} is {document.state}"]
    move = document.move
    if move is not None and not move.ended_ns:
        parts.append(f"the {move.kind} to {', '.join(move.targets)} is {move.step}")
    parts += [_pending_on(a) for a in document.attachments if a.state != "released"]
    return "; ".join(parts)


def _pending_on(attachment: AttachmentDocument) -> str:
    text = f"on {attachment.host} it is {attachment.state}"
    if attachment.state == "attached" and not attachment.ready:
        text += ", not surfaced yet"
    if attachment.rung:
        text += f" (rung {attachment.rung})"
    if attachment.reason:
        text += f": {attachment.reason}"
    if attachment.holders:
        text += ", held by " + ", ".join(
            f"pid {h.pid} {h.name} ({h.how})" for h in attachment.holders
        )
    return text
