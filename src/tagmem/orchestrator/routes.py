"""The API's table of operations: dispatch, the OpenAPI document and the tests all read this one.

Answers and queries that many operations share are named once here.
"""

from __future__ import annotations

from typing import Any

from tagmem.base.limits import LIST_PAGE_MAX
from tagmem.domain.records import RUNGS
from tagmem.orchestrator.routing import Query, Route
from tagmem.wire import rest

_TEXT: dict[str, Any] = {"type": "string"}
NAME_SCHEMA: dict[str, Any] = {
    "type": "string",
    "pattern": r"^[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?$",
}
_STATES = ("reserved", "active", "retained", "releasing", "sanitising", "quarantined")

EVENTS_PAGE = 1_000
CAPACITIES_PAGE = 1_000

RELEASE_QUERY = (
    Query("up_to", {"enum": list(RUNGS)}, "The highest rung of the ladder that may be climbed."),
    *(
        Query(
            f"{rung}_seconds",
            {"type": "number", "minimum": 0, "maximum": 86_400},
            f"How long the rung `{rung}` may take.",
        )
        for rung in RUNGS
    ),
)
CAPACITIES_QUERY = (
    Query("after", _TEXT, "Only tags behind this one."),
    Query(
        "limit",
        {"type": "integer", "minimum": 1, "maximum": LIST_PAGE_MAX, "default": CAPACITIES_PAGE},
        "At most so many.",
    ),
    Query("host", NAME_SCHEMA, "Only what is, or is to be, on this host."),
    Query("state", {"enum": list(_STATES)}, "Only capacities in this state."),
    Query("owner", _TEXT, "Only this owner's."),
    Query("appliance", _TEXT, "Only what lies on this appliance."),
)
EVENTS_QUERY = (
    Query(
        "after",
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        "Only events behind this number. Without it a page begins at the first, a stream now.",
    ),
    Query(
        "limit",
        {"type": "integer", "minimum": 1, "maximum": LIST_PAGE_MAX, "default": EVENTS_PAGE},
        "At most so many on a page; no matter to a stream.",
    ),
    Query("subject", _TEXT, "Only events about this tag, host or appliance."),
)

_CAPACITY = "/v1/capacities/{tag}"
_ATTACHMENT = _CAPACITY + "/attachments/{host}"
_WORKLOAD = _ATTACHMENT + "/workload"
_HELD = rest.CapacityDocument
_PROBLEM = rest.Problem


def _change(ok: int, *refused: int, gone: bool = False) -> dict[int, Any]:
    answers: dict[int, Any] = {ok: _HELD, 202: _HELD}
    if gone:
        answers[204] = None
    return answers | dict.fromkeys((*refused, 409, 422, 503), _PROBLEM)


ROUTES: tuple[Route, ...] = (
    Route(
        "GET",
        "/v1/capacities",
        "list_capacities",
        "List capacities in the order of their tags, a page at a time.",
        {200: rest.CapacityPage, 422: _PROBLEM},
        query=CAPACITIES_QUERY,
    ),
    Route(
        "POST",
        "/v1/capacities",
        "create_capacity",
        "Set capacity aside under a tag that the server picks, and offer it to the named hosts.",
        _change(201, 400, 404, 413, 415, 507) | {200: _HELD},
        body=rest.CapacityRequest,
        waits=True,
        revised=True,
        keyed=True,
    ),
    Route(
        "GET",
        _CAPACITY,
        "get_capacity",
        "Show one capacity with its attachments.",
        {200: _HELD, 304: None, 404: _PROBLEM, 422: _PROBLEM},
        revised=True,
    ),
    Route(
        "PUT",
        _CAPACITY,
        "put_capacity",
        "Set capacity aside under a tag that the client picks. A repeat changes nothing.",
        _change(201, 400, 404, 412, 413, 415, 507) | {200: _HELD},
        body=rest.CapacityRequest,
        waits=True,
        matches=True,
        revised=True,
        keyed=True,
    ),
    Route(
        "DELETE",
        _CAPACITY,
        "release_capacity",
        "Give a capacity back, from all its hosts and then to its pool.",
        {202: _HELD, 204: None} | dict.fromkeys((404, 409, 412, 422, 503), _PROBLEM),
        query=RELEASE_QUERY,
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "POST",
        _CAPACITY + "/hand-over",
        "hand_over",
        "Have the next host take a shared capacity with its contents, and then the present one let "
        "go of it. No byte is copied or wiped.",
        _change(200, 400, 404, 412, 413, 415),
        body=rest.HandOverRequest,
        query=RELEASE_QUERY,
        waits=True,
        matches=True,
        revised=True,
        keyed=True,
    ),
    Route(
        "POST",
        _CAPACITY + "/publish",
        "publish",
        "End the writing of read-only capacity, and let the named hosts and its writer read it.",
        _change(200, 400, 404, 412, 413, 415),
        body=rest.PublishRequest,
        query=RELEASE_QUERY,
        waits=True,
        matches=True,
        revised=True,
        keyed=True,
    ),
    Route(
        "PUT",
        _CAPACITY + "/reference",
        "retain_capacity",
        "Have a shared capacity outlive its last host.",
        _change(200, 404, 412),
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "DELETE",
        _CAPACITY + "/reference",
        "unretain_capacity",
        "Let a shared capacity go with its last host again; what no host has is wiped now.",
        _change(200, 404, 412, gone=True),
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "GET",
        _ATTACHMENT,
        "get_attachment",
        "Show one capacity on one host.",
        {200: rest.AttachmentDocument, 304: None, 404: _PROBLEM, 422: _PROBLEM},
        revised=True,
    ),
    Route(
        "PUT",
        _ATTACHMENT,
        "attach_capacity",
        "Offer a capacity to one more host.",
        _change(201, 400, 404, 412, 413, 415) | {200: _HELD},
        body=rest.AttachmentRequest,
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "DELETE",
        _ATTACHMENT,
        "release_attachment",
        "Take a capacity back from one host.",
        _change(200, 404, 412, gone=True),
        query=RELEASE_QUERY,
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "GET",
        _WORKLOAD,
        "get_workload",
        "Show what runs, or last ran, on an attachment.",
        {200: rest.WorkloadDocument, 304: None, 404: _PROBLEM, 422: _PROBLEM},
        revised=True,
    ),
    Route(
        "POST",
        _WORKLOAD,
        "launch_workload",
        "Have the host run a command on the tag.",
        _change(201, 400, 404, 412, 413, 415) | {200: _HELD},
        body=rest.WorkloadRequest,
        waits=True,
        matches=True,
        revised=True,
        keyed=True,
    ),
    Route(
        "DELETE",
        _WORKLOAD,
        "stop_workload",
        "Have the host stop the command; the capacity stays attached.",
        _change(200, 404, 412),
        waits=True,
        matches=True,
        revised=True,
    ),
    Route(
        "GET",
        "/v1/appliances",
        "list_appliances",
        "List the appliances.",
        {200: rest.ApplianceList},
    ),
    Route(
        "GET",
        "/v1/appliances/{appliance}",
        "get_appliance",
        "Show one appliance.",
        {200: rest.ApplianceDocument, 404: _PROBLEM, 422: _PROBLEM},
    ),
    Route(
        "PUT",
        "/v1/appliances/{appliance}",
        "put_appliance",
        "Name an appliance and where its fabric-manager port is.",
        dict.fromkeys((200, 201, 202), rest.ApplianceDocument)
        | dict.fromkeys((400, 409, 413, 415, 422, 503), _PROBLEM),
        body=rest.ApplianceRequest,
        waits=True,
    ),
    Route(
        "GET",
        "/v1/appliances/{appliance}/map",
        "get_appliance_map",
        "Show every byte of each pool of an appliance, in order.",
        {200: rest.ApplianceMapDocument, 404: _PROBLEM, 422: _PROBLEM},
    ),
    Route(
        "POST",
        "/v1/appliances/{appliance}/refresh",
        "refresh_appliance",
        "Compare with the appliance's own lists now.",
        dict.fromkeys((200, 202), rest.ApplianceDocument)
        | dict.fromkeys((404, 422, 503), _PROBLEM),
    ),
    Route("GET", "/v1/hosts", "list_hosts", "List the hosts.", {200: rest.HostList}),
    Route(
        "GET",
        "/v1/hosts/{host}",
        "get_host",
        "Show one host.",
        {200: rest.HostDocument, 404: _PROBLEM, 422: _PROBLEM},
    ),
    Route(
        "PUT",
        "/v1/hosts/{host}",
        "put_host",
        "Name a host and its LD on each appliance that it reaches.",
        dict.fromkeys((200, 201, 202), rest.HostDocument)
        | dict.fromkeys((400, 404, 409, 413, 415, 422, 503), _PROBLEM),
        body=rest.HostRequest,
        waits=True,
    ),
    Route(
        "GET",
        "/v1/quarantine",
        "list_quarantine",
        "List what lies on appliances and was not put there by this orchestrator.",
        {200: rest.QuarantineList},
    ),
    Route(
        "POST",
        "/v1/explain",
        "explain",
        "Say where a request would go, and why; nothing is changed.",
        {200: rest.ExplanationDocument} | dict.fromkeys((400, 404, 413, 415, 422), _PROBLEM),
        body=rest.CapacityRequest,
    ),
    Route(
        "GET",
        "/v1/events",
        "list_events",
        "What has happened: a page of it, or (Accept: text/event-stream) as it happens.",
        {200: rest.EventPage, 422: _PROBLEM, 503: _PROBLEM},
        query=EVENTS_QUERY,
        streams=True,
    ),
    Route(
        "GET", "/v1/health", "get_health", "How the orchestrator is.", {200: rest.HealthDocument}
    ),
    Route(
        "GET",
        "/v1/metrics",
        "get_metrics",
        "Figures in the text format that Prometheus reads.",
        {200: None},
        media_type="text/plain",
    ),
    Route("GET", "/openapi.json", "get_openapi", "This document.", {200: None}),
)
