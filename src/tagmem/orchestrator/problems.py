"""Every error of the API as one RFC 9457 document, made here and nowhere else.

What the machine answers is a Reply; what HTTP itself finds wrong (a malformed body, an unknown
path) is made into one too, so that a client reads all errors in the same way and finds each
outcome's stable number.
"""

from __future__ import annotations

import re

import msgspec

from tagmem.domain.outcome import Outcome, Reply
from tagmem.wire.rest import Problem

PROBLEM_TYPE = b"application/problem+json"
VALUE_CHARACTERS_MAX = 200
"""How much of a wrong value is repeated to the client that sent it."""

_PATH = re.compile(r" - at `(key in )?\$(.*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$")
_ENUM = re.compile(r"^Invalid enum value (.*)$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected (.*?)(?:, got .*)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")

encode = msgspec.json.Encoder().encode


class Refused(Exception):
    """A request that ends in a problem document; raised anywhere in a handler."""

    def __init__(self, reply: Reply, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(reply.detail or reply.outcome.title)
        self.reply = reply
        self.headers = headers


def problem(reply: Reply) -> Problem:
    """The document of a Reply that is not ok."""
    outcome = reply.outcome
    facts = outcome.facts
    return Problem(
        type="/problems/" + outcome.name.lower().replace("_", "-"),
        title=outcome.title,
        status=facts.http_status,
        detail=reply.detail or _detail(reply),
        code=int(outcome),
        outcome=outcome.name.lower(),
        field=reply.field,
        limit=reply.limit,
        value=shorten(reply.value),
        transient=facts.transient,
    )


def _detail(reply: Reply) -> str:
    if reply.field:
        return f"{reply.field}: must be {reply.limit}, got {shorten(reply.value)}"
    return f"{reply.subject}: {reply.outcome.title}" if reply.subject else reply.outcome.title


def shorten(text: str) -> str:
    """As much of a value as a message repeats."""
    if len(text) <= VALUE_CHARACTERS_MAX:
        return text
    return f"{text[:VALUE_CHARACTERS_MAX]}... ({len(text)} characters)"


def refuse_field(
    field: str, limit: str, value: str, outcome: Outcome = Outcome.FIELD_OUT_OF_RANGE
) -> Refused:
    """A field outside its limit."""
    detail = f"{field}: must be {limit}, got {shorten(value)}"
    return Refused(Reply(outcome, field=field, limit=limit, value=value, detail=detail))


def from_decoding(error: Exception, body: bytes) -> Refused:
    """What a decoder said about a body, as field, limit and value."""
    if not isinstance(error, msgspec.ValidationError):
        got = body[:VALUE_CHARACTERS_MAX].decode("utf-8", "replace")
        detail = f"the body is not one JSON document: {error}"
        return Refused(
            Reply(
                Outcome.BODY_IS_MALFORMED,
                field="body",
                limit="one JSON document",
                value=got,
                detail=detail,
            )
        )
    message = str(error)
    path = ""
    located = _PATH.search(message)
    if located:
        path = located.group(2)
        message = message[: located.start()]
    prefix = path.lstrip(".") + "." if path else ""
    if unknown := _UNKNOWN.match(message):
        field = prefix + unknown.group(1)
        return refuse_field(field, "absent: there is no such field", _value(body, path, field))
    if missing := _MISSING.match(message):
        return refuse_field(prefix + missing.group(1), "given", "nothing")
    if enum := _ENUM.match(message):
        return refuse_field(path.lstrip("."), "one of its documented names", enum.group(1))
    expected = _EXPECTED.match(message)
    limit = expected.group(1).replace("`", "") if expected else message
    return refuse_field(path.lstrip(".") or "body", limit, _value(body, path, path.lstrip(".")))


def _value(body: bytes, path: str, field: str) -> str:
    """The value at a decoder's path, as JSON; the decoder names only its type."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "not readable as JSON"
    leaf = field.rsplit(".", 1)[-1]
    for name, index in _STEP.findall(path):
        if name and isinstance(value, dict) and name in value:
            value = value[name]
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            break
    if isinstance(value, dict) and leaf in value:
        value = value[leaf]
    return msgspec.json.encode(value).decode()
