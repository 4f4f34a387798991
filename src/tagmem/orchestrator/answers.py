"""Small parts of answers that handlers share: headers, and the refusals of preconditions."""

from __future__ import annotations

from typing import NoReturn

from tagmem.base.ids import Tag
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import CapacityRecord
from tagmem.orchestrator.asgi import Headers, Request
from tagmem.orchestrator.problems import Refused


def revision(held: CapacityRecord) -> Headers:
    """The ETag of what is shown."""
    return ((b"etag", b'"%d"' % held.revision),)


def location(tag: str) -> tuple[bytes, bytes]:
    """Where what was made is found."""
    return (b"location", b"/v1/capacities/" + tag.encode())


def applied(seconds: float) -> tuple[bytes, bytes]:
    """The wait that was honoured."""
    return (b"preference-applied", b"wait=%g" % seconds)


def ok(reply: Reply) -> Outcome:
    """The outcome. Raises Refused where it is a refusal."""
    if not reply.outcome.ok:
        raise Refused(reply)
    return reply.outcome


def allowed(request: Request, held: CapacityRecord) -> int:
    """The present revision. Raises Refused where `If-Match` does not allow it."""
    revisions = request.if_match()
    if revisions is not None and held.revision not in revisions:
        unmatched(held.tag, "If-Match", f'"{held.revision}"', request.header(b"if-match"))
    return held.revision


def unmatched(tag: Tag, field: str, limit: str, value: str) -> NoReturn:
    """Raises Refused: the revision is not the one that the client has seen."""
    raise Refused(
        Reply(Outcome.REVISION_DOES_NOT_MATCH, tag, field=field, limit=limit, value=value)
    )
