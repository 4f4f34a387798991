"""The HTTP API: what each operation answers, and what bad input gets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.unit.orchestrator.world import BLOCK_BYTES, OTHER, POOL_BYTES, TAG, world

from tagmem.base.limits import REQUEST_BODY_BYTES_MAX

CAPACITY = f"/v1/capacities/{TAG}"
ON_H0 = f"{CAPACITY}/attachments/h0"
SIZE = 4 * BLOCK_BYTES


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


# ---- capacities


def test_put_reserves_and_a_repeat_changes_nothing() -> None:
    async def main() -> None:
        async with world() as w:
            first = await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            again = await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            assert (first.status, again.status) == (201, 200)
            assert first.json == again.json
            assert first.json["state"] == "reserved"
            assert first.json["guaranteed"] is True
            assert first.json["extents"] == [{"sequence": 0, "start": 0, "length": SIZE}]
            assert first.headers["etag"] == f'"{first.json["revision"]}"'
            assert first.headers["location"] == CAPACITY

    run(main())


def test_put_with_other_parameters_is_a_conflict() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            other = await w.call("PUT", CAPACITY, {"size_bytes": 2 * SIZE})
            assert other.status == 409
            assert other.headers["content-type"] == "application/problem+json"
            assert other.json["outcome"] == "tag_exists_with_other_parameters"

    run(main())


def test_a_tag_is_taken_in_any_spelling() -> None:
    async def main() -> None:
        async with world() as w:
            spelt = f"/v1/capacities/{TAG.upper().replace('-', '')}"
            assert (await w.call("PUT", spelt, {"size_bytes": SIZE})).json["tag"] == TAG
            assert (await w.call("GET", CAPACITY)).status == 200

    run(main())


def test_post_picks_a_tag_and_the_key_makes_a_repeat_harmless() -> None:
    async def main() -> None:
        async with world() as w:
            key = {"idempotency-key": "k1"}
            first = await w.call("POST", "/v1/capacities", {"size_bytes": SIZE}, headers=key)
            again = await w.call("POST", "/v1/capacities", {"size_bytes": SIZE}, headers=key)
            other = await w.call("POST", "/v1/capacities", {"size_bytes": 2 * SIZE}, headers=key)
            apart = await w.call("POST", "/v1/capacities", {"size_bytes": SIZE})
            assert first.status == 201
            assert again.json["tag"] == first.json["tag"] != apart.json["tag"]
            assert (other.status, other.json["outcome"]) == (422, "idempotency_key_reused")

    run(main())


def test_a_key_belongs_to_one_tag() -> None:
    async def main() -> None:
        async with world() as w:
            key = {"idempotency-key": "k1"}
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE}, headers=key)
            other = f"/v1/capacities/{OTHER}"
            answer = await w.call("PUT", other, {"size_bytes": SIZE}, headers=key)
            assert (answer.status, answer.json["outcome"]) == (422, "idempotency_key_reused")

    run(main())


def test_delete_frees_a_reservation_at_once() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            gone = await w.call("DELETE", CAPACITY)
            assert (gone.status, gone.body) == (204, b"")
            assert "content-length" not in gone.headers
            assert (await w.call("GET", CAPACITY)).json["outcome"] == "tag_is_unknown"
            assert (await w.call("DELETE", CAPACITY)).status == 404

    run(main())


def test_lists_come_in_pages_and_are_filtered() -> None:
    async def main() -> None:
        async with world() as w:
            tags = [f"00000000-0000-4000-8000-00000000000{n}" for n in range(1, 6)]
            for n, tag in enumerate(reversed(tags)):
                body: dict[str, Any] = {"size_bytes": SIZE, "owner": f"o{n % 2}"}
                if n == 0:
                    body["hosts"] = ["h1"]
                assert (await w.call("PUT", f"/v1/capacities/{tag}", body)).status == 201
            seen, after = [], ""
            while True:
                page = (await w.call("GET", f"/v1/capacities?limit=2&after={after}")).json
                seen += [item["tag"] for item in page["items"]]
                after = page["next"]
                if after is None:
                    break
            assert seen == tags

            async def found(query: str) -> list[str]:
                listed = await w.call("GET", f"/v1/capacities?{query}")
                return [item["tag"] for item in listed.json["items"]]

            assert await found("owner=o1") == [tags[1], tags[3]]
            assert await found("host=h1") == [tags[4]]
            assert await found("host=h0") == []
            assert await found("state=active") == [tags[4]]
            assert await found("appliance=a0&owner=o0&state=reserved") == [tags[0], tags[2]]

    run(main())


# ---- revisions


def test_etag_spares_an_unchanged_document() -> None:
    async def main() -> None:
        async with world() as w:
            etag = (await w.call("PUT", CAPACITY, {"size_bytes": SIZE})).headers["etag"]
            same = await w.call("GET", CAPACITY, headers={"if-none-match": f'"7", W/{etag}'})
            assert (same.status, same.body, same.headers["etag"]) == (304, b"", etag)
            assert (await w.call("GET", CAPACITY, headers={"if-none-match": '"7"'})).status == 200

    run(main())


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", CAPACITY, None),
        ("PUT", CAPACITY, {"size_bytes": SIZE}),
        ("PUT", ON_H0, {}),
        ("DELETE", ON_H0, None),
        ("POST", f"{ON_H0}/workload", {"command": ["true"]}),
        ("DELETE", f"{ON_H0}/workload", None),
    ],
)
def test_if_match_is_honoured(method: str, path: str, body: Any) -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE, "hosts": ["h0"]})
            stale = await w.call(method, path, body, headers={"if-match": '"1"'})
            assert (stale.status, stale.json["outcome"]) == (412, "revision_does_not_match")
            held = await w.call("GET", CAPACITY)
            weak = {"if-match": f"W/{held.headers['etag']}"}
            assert (await w.call(method, path, body, headers=weak)).status == 412
            allowed = {"if-match": f'"1", {held.headers["etag"]}'}
            now = await w.call(method, path, body, headers=allowed)
            assert now.status != 412
            wrong = await w.call(method, path, body, headers={"if-match": "yesterday"})
            assert (wrong.status, wrong.json["field"]) == (422, "If-Match")

    run(main())


def test_put_only_if_there_is_none() -> None:
    async def main() -> None:
        async with world() as w:
            none = {"if-none-match": "*"}
            assert (await w.call("PUT", CAPACITY, {"size_bytes": SIZE}, headers=none)).status == 201
            assert (await w.call("PUT", CAPACITY, {"size_bytes": SIZE}, headers=none)).status == 412
            elsewhere = f"/v1/capacities/{OTHER}"
            must = {"if-match": '"5"'}
            answer = await w.call("PUT", elsewhere, {"size_bytes": SIZE}, headers=must)
            assert answer.status == 412

    run(main())


# ---- waiting


def test_wait_holds_the_answer_until_every_host_is_ready() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": SIZE, "hosts": ["h0"]}
            held = await w.begin(
                w.call("PUT", CAPACITY, body, headers={"prefer": "respond-async, wait=30"})
            )
            await w.accept(TAG)
            answer = await held
            assert answer.status == 201
            assert answer.headers["preference-applied"] == "wait=30"
            assert answer.headers["location"] == CAPACITY
            (attached,) = answer.json["attachments"]
            assert (attached["state"], attached["ready"]) == ("attached", True)
            assert attached["dpas"] == [[0, SIZE]]
            assert len(w.orchestrator.waiters) == 0

    run(main())


def test_a_refused_offer_ends_the_wait_with_its_reason() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": SIZE, "hosts": ["h1"]}
            held = await w.begin(w.call("PUT", CAPACITY, body, headers={"prefer": "wait=30"}))
            await w.refuse(TAG, "h1", "no slot free")
            answer = await held
            assert (answer.status, answer.json["outcome"]) == (409, "host_refused_offer")
            assert "no slot free" in answer.json["detail"]
            assert answer.json["value"] == "h1"

    run(main())


def test_time_up_answers_202_with_what_there_is() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": SIZE, "hosts": ["h0"]}
            answer = await w.call("PUT", CAPACITY, body, headers={"prefer": "wait=0.01"})
            assert (answer.status, answer.json["state"]) == (202, "active")
            assert len(w.orchestrator.waiters) == 0

    run(main())


def test_delete_waits_until_the_capacity_is_gone() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE, "hosts": ["h0"]})
            await w.accept(TAG)
            begun = await w.call("DELETE", f"{CAPACITY}?up_to=force&ask_seconds=0.5")
            assert (begun.status, begun.json["state"]) == (202, "releasing")
            attached = w.orchestrator.view.attachment(TAG, "h0")
            assert attached is not None
            assert attached.release is not None
            assert attached.release.up_to == "force"
            assert attached.release.deadlines_ns == {"ask": 500_000_000}
            held = await w.begin(w.call("DELETE", CAPACITY, headers={"prefer": "wait=30"}))
            await w.give_back(TAG)
            assert (await held).status == 204

    run(main())


def test_the_end_of_the_process_answers_who_waits() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": SIZE, "hosts": ["h0"]}
            held = await w.begin(w.call("PUT", CAPACITY, body, headers={"prefer": "wait=30"}))
            w.orchestrator.waiters.end()
            assert (await held).status == 202

    run(main())


# ---- attachments and workloads


def test_attach_detach_and_attach_elsewhere() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            begun = await w.call("PUT", ON_H0)
            assert begun.status == 202
            await w.accept(TAG)
            shown = await w.call("GET", ON_H0)
            assert (shown.status, shown.json["state"]) == (200, "attached")
            taken = await w.call("PUT", f"{CAPACITY}/attachments/h1", {})
            assert (taken.status, taken.json["outcome"]) == (409, "tag_is_not_sharable")
            held = await w.begin(w.call("DELETE", ON_H0, headers={"prefer": "wait=9"}))
            await w.give_back(TAG)
            assert (await held).status == 200
            nobody = await w.call("GET", f"{CAPACITY}/attachments/h1")
            assert (nobody.status, nobody.json["outcome"]) == (404, "host_does_not_hold_tag")

    run(main())


def test_a_workload_is_launched_seen_and_stopped() -> None:
    async def main() -> None:
        from tagmem.domain.records import WorkloadStatus

        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE, "hosts": ["h0"]})
            path = f"{ON_H0}/workload"
            early = await w.call("POST", path, {"command": ["true"]})
            assert (early.status, early.json["outcome"]) == (409, "tag_is_not_attached")
            await w.accept(TAG)
            assert (await w.call("GET", path)).json["outcome"] == "workload_is_unknown"
            command = {"command": ["cat", "{dax}"], "id": "w1"}
            held = await w.begin(w.call("POST", path, command, headers={"prefer": "wait=9"}))
            running = WorkloadStatus("w1", "running", pid=42)
            dax = "/run/tagmem/dax0.1/dax0.1"
            await w.observe(TAG, "h0", "attached", dax_path=dax, workload=running)
            launched = (await held).json["attachments"][0]["workload"]
            assert (launched["state"], launched["pid"]) == ("running", 42)
            assert (await w.call("GET", path)).json == launched
            twice = await w.call("POST", path, {"command": ["true"], "id": "w2"})
            assert twice.json["outcome"] == "workload_is_running"
            stopped = await w.begin(w.call("DELETE", path, headers={"prefer": "wait=9"}))
            ended = WorkloadStatus("w1", "exited", pid=42, exit_code=0)
            await w.observe(TAG, "h0", "attached", dax_path=dax, workload=ended)
            answer = await stopped
            assert (answer.status, answer.json["attachments"][0]["workload"]["exit_code"]) == (
                200,
                0,
            )

    run(main())


def test_one_key_is_one_launch() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE, "hosts": ["h0"]})
            await w.accept(TAG)
            key = {"idempotency-key": "launch-1"}
            path, body = f"{ON_H0}/workload", {"command": ["true"]}
            first = await w.call("POST", path, body, headers=key)
            again = await w.call("POST", path, body, headers=key)
            ids = [a.json["attachments"][0]["workload"]["id"] for a in (first, again)]
            assert ids[0] == ids[1]
            assert (first.status, again.status) == (202, 200)

    run(main())


# ---- appliances, hosts, questions


def test_the_map_shows_every_byte_in_order() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE, "hosts": ["h1"]})
            await w.call("PUT", f"/v1/capacities/{OTHER}", {"size_bytes": SIZE})
            await w.accept(TAG, "h1")
            (pool,) = (await w.call("GET", "/v1/appliances/a0/map")).json["pools"]
            at = 0
            for piece in pool["pieces"]:
                assert piece["start"] == at
                at += piece["length"]
            assert at == pool["size_bytes"] == POOL_BYTES
            states = [(p["state"], p["tag"], p["hosts"]) for p in pool["pieces"]]
            assert states == [
                ("accepted", TAG, ["h1"]),
                ("reserved", OTHER, []),
                ("free", "", []),
            ]
            # The second LD sees the pool mirrored, above its own base.
            (attached,) = (await w.call("GET", CAPACITY)).json["attachments"]
            assert attached["dpas"] == [[16 * 2**30 + POOL_BYTES - SIZE, SIZE]]

    run(main())


def test_appliances_and_hosts_are_registered_listed_and_shown() -> None:
    async def main() -> None:
        async with world() as w:
            shown = await w.call("GET", "/v1/appliances/a0")
            assert shown.json["free_bytes"] == POOL_BYTES
            assert shown.json["hosts"] == {"h0": 0, "h1": 1}
            made = await w.call("PUT", "/v1/appliances/a1", {"address": "unix:/a1"})
            again = await w.call("PUT", "/v1/appliances/a1", {"address": "unix:/a1"})
            other = await w.call("PUT", "/v1/appliances/a1", {"address": "unix:/b"})
            assert (made.status, again.status, other.status) == (201, 200, 409)
            listed = (await w.call("GET", "/v1/appliances")).json["items"]
            assert [item["id"] for item in listed] == ["a0", "a1"]
            host = await w.call("PUT", "/v1/hosts/h2", {"links": {"a1": 3}})
            assert (host.status, host.json["connected"]) == (201, False)
            hosts = (await w.call("GET", "/v1/hosts")).json["items"]
            assert [item["id"] for item in hosts] == ["h0", "h1", "h2"]
            assert (await w.call("POST", "/v1/appliances/a0/refresh")).status == 202
            health = (await w.call("GET", "/v1/health")).json
            assert (health["status"], health["appliances"]["a1"]) == ("degraded", "lost")
            assert (await w.call("GET", "/v1/quarantine")).json == {"items": []}

    run(main())


def test_explain_changes_nothing() -> None:
    async def main() -> None:
        async with world() as w:
            fits = (await w.call("POST", "/v1/explain", {"size_bytes": SIZE})).json
            assert fits["fits"] is True
            assert fits["extents"][0]["length"] == SIZE
            large = (await w.call("POST", "/v1/explain", {"size_bytes": 8 * POOL_BYTES})).json
            assert large["fits"] is False
            assert large["sentence"]
            unknown = await w.call("POST", "/v1/explain", {"size_bytes": SIZE, "hosts": ["no"]})
            assert (unknown.status, unknown.json["value"]) == (404, "no")
            assert (await w.call("GET", "/v1/capacities")).json["items"] == []

    run(main())


def test_metrics_are_prometheus_text() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            answer = await w.call("GET", "/v1/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            lines = answer.body.decode().splitlines()
            labels = 'appliance="a0",pool="0",state="free"'
            assert f"tagmem_pool_capacity_bytes{{{labels}}} {POOL_BYTES - SIZE}" in lines
            assert 'tagmem_capacities{state="reserved"} 1' in lines
            assert 'tagmem_http_answers_total{status="201"} 1' in lines
            assert not [line for line in lines if TAG in line]

    run(main())


# ---- events


def test_events_come_in_pages_by_subject() -> None:
    async def main() -> None:
        async with world() as w:
            await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            await w.call("PUT", f"/v1/capacities/{OTHER}", {"size_bytes": SIZE})
            await w.call("DELETE", CAPACITY)
            page = (await w.call("GET", f"/v1/events?subject={TAG}")).json
            types = [event["type"] for event in page["items"]]
            assert types == ["capacity.created", "capacity.releasing", "capacity.released"]
            assert page["next"] == page["last"]
            every = (await w.call("GET", "/v1/events?limit=2&after=1")).json
            assert [event["id"] for event in every["items"]] == [2, 3]
            assert every["next"] == 3

    run(main())


# ---- bad input


PROBLEMS: list[tuple[str, str, bytes, dict[str, str], int, str, str]] = [
    ("PUT", CAPACITY, b"{", {}, 400, "body_is_malformed", "body"),
    ("PUT", CAPACITY, b'{"size_bytes": "1"}', {}, 422, "field_out_of_range", "size_bytes"),
    ("PUT", CAPACITY, b'{"size_bytes": 1, "colour": 2}', {}, 422, "field_out_of_range", "colour"),
    ("PUT", CAPACITY, b"{}", {}, 422, "field_out_of_range", "size_bytes"),
    ("PUT", CAPACITY, b"[]", {}, 422, "field_out_of_range", "body"),
    (
        "PUT",
        CAPACITY,
        b'{"size_bytes":1,"hosts":["a",7]}',
        {},
        422,
        "field_out_of_range",
        "hosts[1]",
    ),
    ("PUT", CAPACITY, b'{"size_bytes":1,"sharing":"x"}', {}, 422, "field_out_of_range", "sharing"),
    ("PUT", CAPACITY, b"\xff\xfe", {}, 400, "body_is_malformed", "body"),
    ("PUT", CAPACITY, b"[" * 60_000, {}, 422, "field_out_of_range", "body"),
    (
        "PUT",
        CAPACITY,
        b"{}",
        {"content-type": "text/xml"},
        415,
        "media_type_is_not_supported",
        "Content-Type",
    ),
    ("PUT", CAPACITY, b'{"size_bytes": 0}', {}, 422, "size_is_zero", "size_bytes"),
    ("PUT", CAPACITY, b'{"size_bytes": 3}', {}, 422, "size_is_not_aligned", "size_bytes"),
    ("PUT", "/v1/capacities/nil", b'{"size_bytes": 1}', {}, 422, "name_is_malformed", "tag"),
    (
        "GET",
        "/v1/capacities/00000000-0000-0000-0000-000000000000",
        b"",
        {},
        422,
        "tag_is_nil",
        "tag",
    ),
    ("GET", CAPACITY, b"", {}, 404, "tag_is_unknown", ""),
    ("GET", "/v1/hosts/UPPER", b"", {}, 422, "name_is_malformed", "host"),
    ("GET", "/v1/hosts/nobody", b"", {}, 404, "host_is_unknown", ""),
    ("GET", "/v1/appliances/none", b"", {}, 404, "appliance_is_unknown", ""),
    (
        "PUT",
        "/v1/appliances/a9",
        b'{"address": "tcp:1.2.3.4"}',
        {},
        422,
        "field_out_of_range",
        "address",
    ),
    ("GET", "/v1/nothing", b"", {}, 404, "path_is_unknown", ""),
    ("GET", "/v1/capacities/", b"", {}, 404, "path_is_unknown", ""),
    ("PATCH", CAPACITY, b"", {}, 405, "method_is_not_allowed", "method"),
    ("GET", "/v1/capacities?limit=0", b"", {}, 422, "field_out_of_range", "limit"),
    ("GET", "/v1/capacities?limit=1e3", b"", {}, 422, "field_out_of_range", "limit"),
    ("GET", "/v1/capacities?limit=1&limit=2", b"", {}, 422, "field_out_of_range", "limit"),
    ("GET", "/v1/capacities?colour=red", b"", {}, 422, "field_out_of_range", "query"),
    ("GET", "/v1/capacities?state=happy", b"", {}, 422, "field_out_of_range", "state"),
    ("GET", "/v1/health?x=1", b"", {}, 422, "field_out_of_range", "query"),
    ("GET", f"/v1/events?after={2**80}", b"", {}, 422, "field_out_of_range", "after"),
    ("DELETE", f"{CAPACITY}?up_to=nuke", b"", {}, 422, "field_out_of_range", "up_to"),
    ("DELETE", f"{CAPACITY}?ask_seconds=nan", b"", {}, 422, "field_out_of_range", "ask_seconds"),
    ("DELETE", f"{CAPACITY}?ask_seconds=-1", b"", {}, 422, "field_out_of_range", "ask_seconds"),
    ("DELETE", CAPACITY, b"", {"prefer": "wait=soon"}, 422, "field_out_of_range", "Prefer"),
    (
        "PUT",
        CAPACITY,
        b'{"size_bytes": 1}',
        {"idempotency-key": "k" * 256},
        422,
        "field_out_of_range",
        "Idempotency-Key",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "outcome", "field"), PROBLEMS
)
def test_bad_input_is_named_and_changes_nothing(
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    outcome: str,
    field: str,
) -> None:
    async def main() -> None:
        async with world() as w:
            before = w.store.commits
            answer = await w.call(method, path, body=body or None, headers=headers)
            assert answer.status == status
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json
            assert (problem["outcome"], problem["field"]) == (outcome, field)
            assert problem["type"] == "/problems/" + outcome.replace("_", "-")
            assert problem["status"] == status
            assert problem["detail"]
            assert w.store.commits == before

    run(main())


def test_a_wrong_value_is_repeated_in_part() -> None:
    async def main() -> None:
        async with world() as w:
            body = {"size_bytes": 1, "hosts": ["x" * 5_000]}
            problem = (await w.call("PUT", CAPACITY, body)).json
            assert problem["field"] == "hosts[0]"
            assert problem["limit"] == "str of length <= 63"
            assert len(problem["value"]) < 300

    run(main())


def test_a_large_body_is_not_read() -> None:
    async def main() -> None:
        async with world() as w:
            large = b" " * (REQUEST_BODY_BYTES_MAX + 1)
            answer = await w.call("PUT", CAPACITY, body=large)
            assert (answer.status, answer.json["outcome"]) == (413, "body_is_too_large")
            assert answer.headers["connection"] == "close"
            undeclared = await w.call("PUT", CAPACITY, body=large, headers={"content-length": "5"})
            assert undeclared.status == 413

    run(main())


def test_wrong_method_says_which_are_right() -> None:
    async def main() -> None:
        async with world() as w:
            answer = await w.call("POST", CAPACITY)
            assert answer.headers["allow"] == "DELETE, GET, PUT, HEAD"

    run(main())


def test_a_full_disk_is_said_and_nothing_is_kept() -> None:
    async def main() -> None:
        async with world() as w:
            w.store.refusal = "the file system is full"
            answer = await w.call("PUT", CAPACITY, {"size_bytes": SIZE})
            assert (answer.status, answer.json["outcome"]) == (503, "storage_failed")
            assert answer.json["transient"] is True
            assert answer.headers["retry-after"] == "1"
            w.store.refusal = None
            assert (await w.call("GET", CAPACITY)).status == 404
            assert (await w.call("PUT", CAPACITY, {"size_bytes": SIZE})).status == 201

    run(main())
