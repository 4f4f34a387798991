"""`tagmem vm migrate`, step by step: judge, attach on the target, move, release from the source.

Tags are the orchestrator's affair and VMs the agents', so it is this command that goes to both.
Nothing of it is kept: whatever ends it, the records of both sides say how things stand, and every
error here says it too, with the command that goes on or back. What was attached for a VM that
stayed is taken back; what cannot be said to be safe is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from tagmem.base.errors import Conflict, OutcomeUnknown, TagmemError, kind_of, of_kind

if TYPE_CHECKING:
    from tagmem.client.session import Client
    from tagmem.wire.rest import CapacityDocument

MIB = 1 << 20
Ask = Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]
"""The host agent's lines for a request, the last one with `done`."""


@dataclass
class Journey:
    """One VM's way from this host to another."""

    client: Client
    ask: Ask
    name: str
    to_host: str
    wish: Mapping[str, Any]
    """Further fields of the agents' `migrate`."""
    timeout: float
    """Seconds for a tag to be attached, and to be released."""
    quiet: bool = False
    source: str = ""
    moves: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    """On the target, by this command."""

    # ---- 1: judge

    def judge(self) -> dict[str, Any]:
        """What would be done with each tag, and why; nothing is changed.

        Raises Unsupported and Conflict with each tag that cannot move and the remedy.
        """
        self.source = str(self._last({"ask": "host"})["host"])
        if self.source == self.to_host:
            raise Conflict(f"VM {self.name} is on host {self.source} already")
        told = self._last({"vm": "migrate-look", **self._request()})
        self.moves, self.missing = list(told["moves"]), list(told["missing"])
        for tag in self.missing:
            self._check_sharable(self.client.capacity(tag))
        return {
            "name": self.name,
            "from_host": self.source,
            "to_host": self.to_host,
            "tags": self.moves,
            "to_attach": self.missing,
        }

    def _check_sharable(self, document: CapacityDocument) -> None:
        if document.sharing != "none":
            return
        raise Conflict(
            f"tag {document.tag} cannot be on two hosts: it was created without --share, and a "
            f"migration needs it on {self.source} and {self.to_host} for the handover. Nothing has "
            "been done. Create capacity with --share software-coherent and copy the data there, or "
            f"migrate without it: tagmem vm detach {self.name} {document.tag} (its bytes are wiped "
            "only when its last host releases it)"
        )

    def _request(self) -> dict[str, Any]:
        return {"name": self.name, "to_host": self.to_host, **self.wish}

    # ---- 2: attach

    def attach(self) -> None:
        """Have every tag on the target. What this attached is taken back when one fails."""
        for tag in self.missing:
            try:
                self._attach(tag)
            except TagmemError as error:
                text = f"tag {tag} could not be attached to {self.to_host}: {error}. VM {self.name}"
                raise _again(error, f"{text} runs on {self.source}; {self._undo()}") from error

    def _attach(self, tag: str) -> None:
        from tagmem.cli.progress import Progress, pending, ready

        progress = Progress(self.client, tag, quiet=self.quiet, timeout=self.timeout)
        document = self.client.attach(tag, self.to_host)
        self.attached.append(tag)

        def look() -> CapacityDocument | None:
            nonlocal document
            document = self.client.capacity(tag)
            return ready(document, (self.to_host,))

        progress.until(look, lambda: f"not ready in {self.timeout:g} s: {pending(document)}")

    def _undo(self) -> str:
        """Take back what this attached on the target; how that went, in words."""
        kept = []
        for tag in self.attached:
            try:
                self.client.release(tag, self.to_host)
            except TagmemError as error:
                kept.append(f"tagmem capacity release {tag} --host {self.to_host} ({error})")
        if kept:
            return f"still to be taken back there: {'; '.join(kept)}"
        if not self.attached:
            return f"nothing was attached to {self.to_host} for it"
        return f"what was attached to {self.to_host} for it is being released there"

    # ---- 3: move

    def move(self) -> dict[str, Any]:
        """Have the source's agent do it; its answer."""
        try:
            return self._last({"vm": "migrate", **self._request()}, self._tell)
        except KeyboardInterrupt:
            click.echo(
                f"tagmem: the migration goes on without this command. Ask: tagmem vm show "
                f"{self.name}; stop it: tagmem vm migrate-cancel {self.name}; afterwards release "
                f"the tags from the host without the VM ({self._hosts()})",
                err=True,
            )
            raise
        except OutcomeUnknown as error:
            raise OutcomeUnknown(
                f"{error}. Whether VM {self.name} has moved is not known, so its tags stay on both "
                f"hosts. See where it runs (tagmem vm show {self.name}, on each host); then "
                f"release them from the other one: {self._hosts()}"
            ) from error
        except TagmemError as error:
            left = self._undo()
            raise _again(error, f"{error}; {left}. Try again with the same command") from error

    def _hosts(self) -> str:
        tags = " ".join(move["tag"] for move in self.moves) or "none"
        return f"tagmem capacity release TAG --host {self.source} or {self.to_host}; tags: {tags}"

    def _tell(self, told: Mapping[str, Any]) -> None:
        phase = told.get("phase", "")
        if phase == "copying":
            done, total = told["transferred_bytes"] // MIB, told["total_bytes"] // MIB
            left = told["remaining_bytes"] // MIB
            self.say(f"copying: {done} MiB sent, {left} of {total} MiB left")
        elif phase == "arrived":
            self.say(f"arrived: the guest stood still for {told['downtime_ms']} ms")
        elif phase == "waiting":
            self.say(f"waiting for {self.to_host}: {told.get('reason', '')}")
        elif phase != "judged":
            self.say(f"{phase} {told.get('tag', '')}".strip())

    # ---- 4: release

    def release(self) -> list[str]:
        """Take the tags from the source; those that are left there."""
        left = []
        for move in self.moves:
            tag = move["tag"]
            try:
                self._release(tag)
            except TagmemError as error:
                left.append(tag)
                click.echo(
                    f"tagmem: VM {self.name} runs on {self.to_host}; tag {tag} is still on "
                    f"{self.source}: {error}. Go on: tagmem capacity release {tag} "
                    f"--host {self.source}",
                    err=True,
                )
        return left

    def _release(self, tag: str) -> None:
        from tagmem.cli.progress import Progress, pending

        progress = Progress(self.client, tag, quiet=self.quiet, timeout=self.timeout)
        last = self.client.release(tag, self.source)

        def look() -> bool | None:
            nonlocal last
            last = self.client.capacity(tag)
            over = [a for a in last.attachments if a.host == self.source and a.state != "released"]
            return True if not over else None

        if last is not None:
            progress.until(look, lambda: f"not released in {self.timeout:g} s: {pending(last)}")

    # ---- small things

    def say(self, text: str) -> None:
        """A line for people, unless they want none."""
        if not self.quiet:
            click.echo(f"tagmem: {text}", err=True)

    def _last(
        self, request: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        for told in self.ask(request):
            if told.get("done"):
                return {key: value for key, value in told.items() if key != "done"}
            if tell is not None:
                tell(told)
        raise OutcomeUnknown("the host agent hung up before it answered")


def _again(error: TagmemError, text: str) -> TagmemError:
    """The same kind of error, with more to say."""
    again = of_kind(kind_of(error), text)
    again.retry = error.retry
    return again


def sentences(moves: list[dict[str, Any]]) -> Iterator[str]:
    """The judgement, a line for each tag."""
    for move in moves:
        how = {
            "stays": "stays in the VM",
            "switch": f"travels as {move.get('travels_as', '')}, and is switched back",
            "remove-all": "is taken out, and attached again there",
        }.get(move["form"], move["form"])
        yield f"tag {move['tag']} ({move['presenter']}) {how}: {move['why']}"
