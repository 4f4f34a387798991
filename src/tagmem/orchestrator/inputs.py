"""Bodies, queries and headers into the machine's events, each field checked against its limit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from tagmem.base.ids import Tag
from tagmem.base.units import Nanoseconds
from tagmem.domain.effects import CreateCapacity, HandOver, PublishCapacity, ReleaseCapacity
from tagmem.domain.records import RUNGS, Sharing
from tagmem.orchestrator.asgi import Request
from tagmem.orchestrator.problems import refuse_field
from tagmem.orchestrator.routes import RELEASE_QUERY
from tagmem.wire import rest

_SECONDS_MAX = 86_400.0
_KEY_CHARACTERS_MAX = 255

encode = msgspec.json.Encoder().encode


def create_event(tag: Tag, wanted: rest.CapacityRequest, key: str) -> CreateCapacity:
    """What a creating request asks of the machine. The same body has the same digest."""
    return CreateCapacity(
        tag=tag,
        size_bytes=wanted.size_bytes,
        hosts=wanted.hosts,
        tagged=wanted.tagged,
        sharing=Sharing(wanted.sharing),
        owner=wanted.owner,
        appliance=wanted.appliance,
        region=wanted.region,
        contiguous=wanted.contiguous,
        retain=wanted.retain,
        digest=hashlib.sha256(encode(wanted)).hexdigest()[:32],
        idempotency_key=key,
    )


def release_event(
    request: Request,
    tag: Tag,
    host: str,
    defaults: Mapping[str, Nanoseconds],
    revision: int | None,
) -> ReleaseCapacity:
    """What a DELETE asks. Raises Refused for an unknown rung, deadline or revision."""
    return with_plan(ReleaseCapacity(tag, host, if_match=revision), request, defaults)


PlannedT = TypeVar("PlannedT", ReleaseCapacity, HandOver, PublishCapacity)


def with_plan(event: PlannedT, request: Request, defaults: Mapping[str, Nanoseconds]) -> PlannedT:
    """How far the release in an event may go, from the query. Raises Refused."""
    query = request.query(*(each.name for each in RELEASE_QUERY))
    deadlines = dict(defaults)
    for rung in RUNGS:
        text = query.get(f"{rung}_seconds")
        if text is not None:
            deadlines[rung] = nanoseconds(f"{rung}_seconds", text)
    up_to = query.get("up_to", event.up_to)
    if up_to not in RUNGS:
        raise refuse_field("up_to", "one of " + ", ".join(RUNGS), up_to)
    return msgspec.structs.replace(event, up_to=up_to, deadlines_ns=deadlines)


def nanoseconds(field: str, text: str) -> Nanoseconds:
    """A query's seconds. Raises Refused outside 0 to one day."""
    limit = f"a number of seconds from 0 to {_SECONDS_MAX:g}"
    try:
        seconds = float(text)
    except ValueError:
        raise refuse_field(field, limit, text) from None
    if not 0 <= seconds <= _SECONDS_MAX:
        raise refuse_field(field, limit, text)
    return int(seconds * 1_000_000_000)


def integer(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A query's whole number. Raises Refused outside `low` to `high`."""
    text = query.get(name)
    if text is None:
        return default
    # 19 digits hold every number that is allowed; more would be a long way to say no.
    if text.isascii() and text.isdigit() and len(text) <= 19 and low <= int(text) <= high:
        return int(text)
    raise refuse_field(name, f"a whole number from {low} to {high}", text)


def idempotency_key(request: Request) -> str:
    key = request.header(b"idempotency-key")
    if len(key) > _KEY_CHARACTERS_MAX:
        raise refuse_field("Idempotency-Key", f"at most {_KEY_CHARACTERS_MAX} characters", key)
    return key
