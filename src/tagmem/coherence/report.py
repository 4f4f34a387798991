"""A finding told to people and to programs: what was missing, who loaded, who stored, and where.

The same from the simulated hosts and from a traced program, which differ in what a place in the
program looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from tagmem.coherence.luck import Finding, Missing

_ADVICE = {
    Missing.FLUSH: "the writer must write the line back and fence before it says that it is there",
    Missing.FENCE: "the write back had not arrived when the writer said that it is there: fence "
    "before the word that says so",
    Missing.LATE: "the writer said that it is there before it wrote it back: write back and fence "
    "before the word that says so",
    Missing.INVALIDATE: "the reader may have an old copy of the line: invalidate it after learning "
    "that there is something new, and before loading it",
    Missing.ORDER: "nothing made the reader wait until the writer had published it; if the bytes "
    "are a word that races by design, declare it with --word",
}


class Access(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who did something, when (in accesses of the run), and where in the program."""

    host: str
    step: int
    where: list[str]
    """Innermost first."""


class Report(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The first access that depended on luck."""

    missing: str
    access: str
    """`load`; `store` where that put bytes in doubt; `end` for a word never published."""
    offset: int
    length: int
    line: int
    by: Access
    stored: Access
    written_back: int
    """When, in steps; 0 is never, as for the next two."""
    fenced: int
    invalidated: int
    """By the one who loaded."""
    noticed: Access | None = None
    advice: str


def report(finding: Finding, hosts: Sequence[str], show: Callable[[object], list[str]]) -> Report:
    """A finding as a document. `show` makes lines of a place in the program."""
    store = finding.store
    noticed = None
    if finding.loaded_at:
        where = show(finding.loaded_site)
        noticed = Access(hosts[finding.loaded_by], finding.loaded_at, where)
    return Report(
        missing=str(finding.missing),
        access=finding.access,
        offset=finding.offset,
        length=finding.length,
        line=store.line,
        by=Access(hosts[finding.host], finding.at, show(finding.site)),
        stored=Access(hosts[store.host], store.at, show(store.site)),
        written_back=store.flushed,
        fenced=store.published,
        invalidated=finding.invalidated,
        noticed=noticed,
        advice=_ADVICE[finding.missing],
    )


def tell(found: Report) -> str:
    """A report as a few lines."""
    span = f"bytes {found.offset} to {found.offset + found.length - 1}, line {found.line}"
    if found.access == "end":
        head = f"{found.missing}: a word ({span}) was stored and never published"
        return "\n".join([head, *_place("stored", found.stored), f"  {found.advice}"])
    what = {"load": "a load", "store": "a store into a line that others use"}[found.access]
    lines = [f"{found.missing}: {what}, by host {found.by.host} ({span}), depended on luck"]
    lines += _place(f"{found.access} by", found.by)
    lines += _place("stored by", found.stored)
    lines.append(
        f"  written back {_when(found.written_back)}, fenced {_when(found.fenced)}, "
        f"invalidated by {found.by.host} {_when(found.invalidated)}"
    )
    if found.noticed is not None:
        lines += _place("then loaded by", found.noticed)
    return "\n".join([*lines, f"  {found.advice}"])


def _place(what: str, access: Access) -> list[str]:
    where = access.where or ["(unknown)"]
    first = f"  {what} {access.host} at step {access.step}: {where[0]}"
    return [first, *(f"      from {line}" for line in where[1:])]


def _when(step: int) -> str:
    return f"at step {step}" if step else "never"
