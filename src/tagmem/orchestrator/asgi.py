"""The little of HTTP that the API needs, straight on ASGI.

A framework would answer the same, but costs a quarter of the time that the process may take until
its first allocation, and as much again of every request as the decision itself. So: a request
that is read with a bound, an answer that is one value, and errors that are answers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import NIL_TAG, Tag, parse_name, parse_tag
from tagmem.base.limits import REQUEST_BODY_BYTES_MAX
from tagmem.domain.outcome import Outcome, Reply
from tagmem.orchestrator.problems import Refused, from_decoding, refuse_field

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]
BodyT = TypeVar("BodyT", bound=msgspec.Struct)

JSON = b"application/json"
ENTITY_TAGS = r'(?:W/)?"[!#-~]{0,64}"(?: *, *(?:W/)?"[!#-~]{0,64}"){0,15}'
"""What `If-Match` and `If-None-Match` hold besides `*`."""
_ENTITY_TAGS = re.compile(ENTITY_TAGS)
QUERY_FIELDS_MAX = 32
WAIT_SECONDS_MAX = 600.0
"""Longest that one request may hold its answer; a client that wants more asks again."""


class Response(NamedTuple):
    """A whole answer."""

    status: int
    body: bytes = b""
    headers: Headers = ()
    media_type: bytes = JSON


class Stream(Protocol):
    """An answer that goes on until the client or the server has had enough."""

    async def run(self, receive: Receive, send: Send) -> None: ...


async def respond(send: Send, response: Response) -> None:
    """Send a whole answer."""
    headers = [*response.headers]
    if response.status not in (204, 304):
        headers.append((b"content-type", response.media_type))
        headers.append((b"content-length", b"%d" % len(response.body)))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


class Request:
    """One HTTP request: its path parameters, headers and query; its body is read when asked for."""

    __slots__ = ("_headers", "_receive", "parameters", "scope")

    def __init__(self, scope: Scope, receive: Receive, parameters: tuple[str, ...]) -> None:
        self.scope = scope
        self.parameters = parameters
        self._receive = receive
        self._headers: dict[bytes, bytes] | None = None

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """Headers by lower-case name; of a repeated one, the last."""
        if self._headers is None:
            self._headers = dict(self.scope["headers"])
        return self._headers

    def header(self, name: bytes) -> str:
        """A header's text; empty when absent."""
        return self.headers.get(name, b"").decode("latin-1").strip()

    def tag(self, position: int = 0) -> Tag:
        """The path parameter that names a tag. Raises Refused when it is none."""
        return tag_of(self.parameters[position])

    def name(self, position: int, field: str) -> str:
        """The path parameter that names a host or appliance. Raises Refused when it cannot."""
        return name_of(self.parameters[position], field)

    def query(self, *known: str) -> dict[str, str]:
        """The query's fields. Raises Refused for one that is not `known` or that is repeated."""
        raw: bytes = self.scope.get("query_string", b"")
        if not raw:
            return {}
        try:
            pairs = parse_qsl(
                raw.decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=QUERY_FIELDS_MAX,
            )
        except ValueError as error:
            raise refuse_field("query", "percent-encoded UTF-8 fields", str(error)) from None
        found: dict[str, str] = {}
        for name, value in pairs:
            if name not in known:
                limit = "one of " + ", ".join(known) if known else "absent: this takes no query"
                raise refuse_field("query", limit, name)
            if name in found:
                raise refuse_field(name, "given once", value)
            found[name] = value
        return found

    async def body(self) -> bytes:
        """The whole body. Raises Refused when it is larger than REQUEST_BODY_BYTES_MAX."""
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > REQUEST_BODY_BYTES_MAX:
            raise _too_large(declared.decode("ascii"))
        message = await self._receive()
        body: bytes = message.get("body", b"")
        while message.get("more_body", False):
            message = await self._receive()
            body += message.get("body", b"")
            if len(body) > REQUEST_BODY_BYTES_MAX:
                raise _too_large(f"more than {REQUEST_BODY_BYTES_MAX}")
        if message["type"] == "http.disconnect":
            raise ClientGone
        if len(body) > REQUEST_BODY_BYTES_MAX:
            raise _too_large(str(len(body)))
        return body

    async def decode(self, decoder: msgspec.json.Decoder[BodyT]) -> BodyT:
        """The body as what the route takes. Raises Refused, naming the field, when it is not."""
        media_type = self.headers.get(b"content-type", JSON).partition(b";")[0].strip().lower()
        if media_type != JSON:
            raise Refused(
                Reply(
                    Outcome.MEDIA_TYPE_IS_NOT_SUPPORTED,
                    field="Content-Type",
                    limit="application/json",
                    value=media_type.decode("latin-1"),
                    detail="send the body as application/json",
                ),
                ((b"accept", JSON),),
            )
        raw = await self.body()
        try:
            return decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise from_decoding(error, raw) from None

    def wait_seconds(self) -> float:
        """How long `Prefer: wait=` asks the answer to be held (RFC 7240); 0 when it does not."""
        prefer = self.headers.get(b"prefer")
        if prefer is None:
            return 0.0
        for preference in prefer.decode("latin-1").split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip().lower() != "wait":
                continue
            text = value.strip().strip('"')
            if not text.isascii() or not text.replace(".", "", 1).isdigit():
                raise refuse_field("Prefer", "wait=SECONDS, a number not below 0", text)
            return min(float(text), WAIT_SECONDS_MAX)
        return 0.0

    def if_match(self) -> frozenset[int] | None:
        """The revisions that `If-Match` allows; None when any will do. A weak tag, or one that was
        never ours, allows nothing (RFC 9110 13.1.1). Raises Refused for no list of entity tags.
        """
        text = self.header(b"if-match")
        if text in ("", "*"):
            return None
        if not _ENTITY_TAGS.fullmatch(text):
            raise refuse_field("If-Match", 'entity tags in quotes, such as "3", or *', text)
        tags = (tag.strip().strip('"') for tag in text.split(","))
        return frozenset(int(tag) for tag in tags if tag.isascii() and tag.isdigit())

    def seen(self, revision: int) -> bool:
        """Whether `If-None-Match` names this revision: the client has it already."""
        text = self.headers.get(b"if-none-match")
        if text is None:
            return False
        known = [part.strip().removeprefix(b"W/") for part in text.split(b",")]
        return b"*" in known or b'"%d"' % revision in known


class ClientGone(Exception):
    """The client went away before its request was whole; nobody is there to be answered."""


def tag_of(text: str, field: str = "tag") -> Tag:
    """A tag as the API takes it. Raises Refused for a nil tag or no UUID."""
    try:
        return parse_tag(text, field)
    except InvalidInput as error:
        nil = text.replace("-", "") == NIL_TAG.replace("-", "")
        outcome = Outcome.TAG_IS_NIL if nil else Outcome.NAME_IS_MALFORMED
        raise refuse_field(error.field, error.limit, text, outcome) from None


def name_of(text: str, field: str) -> str:
    """A host's or appliance's name as the API takes it. Raises Refused for anything else."""
    try:
        return parse_name(text, field)
    except InvalidInput as error:
        raise refuse_field(error.field, error.limit, text, Outcome.NAME_IS_MALFORMED) from None


def _too_large(got: str) -> Refused:
    return Refused(
        Reply(
            Outcome.BODY_IS_TOO_LARGE,
            field="body",
            limit=f"{REQUEST_BODY_BYTES_MAX} bytes",
            value=f"{got} bytes",
            detail=f"a request body may have {REQUEST_BODY_BYTES_MAX} bytes, this one has {got}",
        ),
        ((b"connection", b"close"),),
    )
