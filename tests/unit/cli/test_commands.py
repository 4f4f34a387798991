"""Every command against an API that does as it is told: what is sent, shown, told, and the exit
code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from tests.unit.client.fake_api import MIB, TAG, FakeApi, attachment, capacity, workload
from tests.unit.client.tags import surface

from tagmem.cli.main import invoke
from tagmem.domain.outcome import Outcome, Reply
from tagmem.wire import rest

PATH = f"/v1/capacities/{TAG}"
WORKLOAD = f"{PATH}/attachments/w1/workload"
OTHER_TAG = "00000000-0000-4000-8000-000000000001"


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def plain(document: Any) -> Any:
    return json.loads(msgspec.json.encode(document))


Tagmem = Callable[..., Ended]


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No endpoint, state folder or run directory of the machine that tests run on."""
    monkeypatch.delenv("TAGMEM_URL", raising=False)
    monkeypatch.setenv("TAGMEM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TAGMEM_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with FakeApi(tmp_path) as fake:
        monkeypatch.setenv("TAGMEM_URL", fake.url)
        yield fake


@pytest.fixture
def tagmem(capfd: pytest.CaptureFixture[str]) -> Tagmem:
    def call(*arguments: str) -> Ended:
        code = invoke(list(arguments))
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return call


# ---- capacity


def test_create_waits_until_the_tag_can_be_opened(api: FakeApi, tagmem: Tagmem) -> None:
    offered = capacity(attachment(state="offered", ready=False))
    api.on("PUT", PATH, (201, offered))
    api.on("GET", PATH, offered)
    api.then("attachment.offered", TAG, host="w1")
    ready = capacity(attachment())
    api.then("attachment.ready", TAG, lambda: api.on("GET", PATH, ready), host="w1")
    ended = tagmem("capacity", "create", "--size", "256MiB", "--host", "w1", "--tag", TAG)
    assert ended.code == 0
    assert ended.json == plain(ready)
    lines = [line.split("s  ", 1)[1] for line in ended.err.splitlines()]
    assert lines[0] == "attachment offered  host=w1"
    assert lines[-1] == "ready  host=w1  dax_path=/run/tagmem/dax0.1/dax0.1"
    request = msgspec.json.decode(api.sent("PUT", PATH).body)
    assert request == {"size_bytes": 256 * MIB, "hosts": ["w1"]}


def test_create_sends_what_was_asked_for(api: FakeApi, tagmem: Tagmem) -> None:
    api.on("PUT", PATH, (201, capacity()))
    arguments = (
        "--size 0x1000 --host w1,w2 --host w3 --share read-only --owner me --appliance a0 "
        "--region 1 --scatter --untagged --no-wait"
    )
    assert tagmem("capacity", "create", "--tag", TAG, *arguments.split()).code == 0
    assert msgspec.json.decode(api.sent("PUT", PATH).body) == {
        "size_bytes": 4096,
        "hosts": ["w1", "w2", "w3"],
        "tagged": False,
        "sharing": "read-only",
        "owner": "me",
        "appliance": "a0",
        "region": 1,
        "contiguous": False,
    }


def test_a_reservation_is_not_waited_for(api: FakeApi, tagmem: Tagmem) -> None:
    api.on("PUT", PATH, (201, capacity(state="reserved")))
    assert tagmem("capacity", "create", "1G", "--tag", TAG).json["state"] == "reserved"


def test_a_refused_offer_ends_the_wait_with_its_reason(api: FakeApi, tagmem: Tagmem) -> None:
    refused = capacity(attachment(state="refused", ready=False, reason="no free slot (limit 16)"))
    api.on("PUT", PATH, (201, refused))
    api.on("GET", PATH, refused)
    ended = tagmem("capacity", "create", "--size", "1G", "--host", "w1", "--tag", TAG)
    assert ended.code == 4
    assert f"host w1 refused tag {TAG}: no free slot (limit 16)" in ended.err


def test_a_wait_that_is_too_long_says_for_what(api: FakeApi, tagmem: Tagmem) -> None:
    offered = capacity(attachment(state="offered", ready=False))
    api.on("PUT", PATH, (201, offered))
    api.on("GET", PATH, offered)
    arguments = ("--size", "1G", "--host", "w1", "--tag", TAG, "--timeout", "20ms")
    ended = tagmem("capacity", "create", *arguments)
    assert ended.code == 5
    assert f"not ready in 0.02 s: tag {TAG} is active; on w1 it is offered" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "4GB"], "write 4GiB"),
        (["--size", "lots"], "a size such as 4096, 64M or 4GiB"),
        (["--size", "1G", "--tag", "nil"], "tag: must be a UUID, got 'nil'"),
        (["--size", "1G", "--timeout", "soon"], "a duration such as 10"),
        (["--size", "1G", "--share", "wildly"], "'wildly' is not one of"),
        (["--size", "1G", "--region", "999"], "region"),
        ([], "say the size once: as SIZE, or with --size"),
        (["1G", "--size", "1G"], "say the size once"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    api: FakeApi, tagmem: Tagmem, arguments: list[str], said: str
) -> None:
    ended = tagmem("capacity", "create", *arguments)
    assert ended.code == 2
    assert ended.err.startswith("tagmem: error: ")
    assert len(ended.err.splitlines()) == 1
    assert said in ended.err
    assert not [r for r in api.requests if r.method != "GET"]


def test_list_gives_an_array_of_objects(api: FakeApi, tagmem: Tagmem) -> None:
    page = rest.CapacityPage((capacity(attachment()),), None)
    api.on("GET", "/v1/capacities", page)
    ended = tagmem("capacity", "list", "--host", "w1", "--state", "active")
    assert ended.json[0]["size_bytes"] == 256 * MIB
    assert api.requests[-1].query == {"host": "w1", "state": "active"}
    human = tagmem("capacity", "list", "--human").json[0]
    assert human["size_bytes"] == "256.00 MiB (268.44 MB)"
    assert human["extents"] == [{"sequence": 0, "start": "0x0", "length": "256.00 MiB (268.44 MB)"}]
    assert human["attachments"][0]["dpas"] == [["0x1000", "256.00 MiB (268.44 MB)"]]
    assert human["revision"] == 3


def test_tables_have_more_columns_when_wide(api: FakeApi, tagmem: Tagmem) -> None:
    first = capacity(attachment(), attachment("w2", state="offered", ready=False))
    api.on("GET", "/v1/capacities", rest.CapacityPage((first,), None))
    head, row = tagmem("capacity", "list", "-o", "table").out.splitlines()
    assert head.split() == [
        "TAG",
        "SIZE",
        "STATE",
        "HOSTS",
        "SHARING",
        "GUARANTEED",
        "APPLIANCE",
        "OWNER",
    ]
    assert f"{TAG}  256 MiB  active  w1, w2 (offered)  none     yes         a0" in row
    wide = tagmem("capacity", "list", "-o", "wide").out.splitlines()[0].split()
    assert wide[-3:] == ["CREATED", "REVISION", "FAULT"]
    assert tagmem("capacity", "list", "-o", "table", "--human").out.count("(268.44 MB)") == 1


def test_show_names_holders_and_what_runs(api: FakeApi, tagmem: Tagmem) -> None:
    held = attachment(
        rung="stop",
        holders=(rest.HolderDocument(4711, "memcached", "maps"),),
        workload=workload(command=("memcached", "-m", "a b"), log_path="/log"),
    )
    api.on("GET", PATH, capacity(held, fault="none known"))
    out = tagmem("capacity", "show", TAG, "-o", "table").out
    assert "w1: attached, ready, rung stop" in out
    assert "held by pid 4711 memcached (maps)" in out
    assert "workload running: memcached -m 'a b'" in out


def test_attach_waits_for_the_new_host_only(api: FakeApi, tagmem: Tagmem) -> None:
    before = capacity(attachment("w1", ready=False), attachment("w2", ready=False))
    after = capacity(attachment("w1", ready=False), attachment("w2"))
    api.on("PUT", f"{PATH}/attachments/w2", (201, before))
    api.on("GET", PATH, before)
    api.then("attachment.ready", TAG, lambda: api.on("GET", PATH, after))
    assert tagmem("capacity", "attach", TAG, "--host", "w2").code == 0


def test_release_waits_until_nothing_is_left(api: FakeApi, tagmem: Tagmem) -> None:
    releasing = capacity(attachment(state="releasing"), state="releasing")
    api.on("DELETE", PATH, (202, releasing))
    api.on("GET", PATH, releasing)
    sanitising = capacity(state="sanitising")
    api.then("capacity.sanitising", TAG, lambda: api.on("GET", PATH, sanitising))
    api.then("capacity.free", TAG, lambda: api.on("GET", PATH, Outcome.TAG_IS_UNKNOWN))
    ended = tagmem("capacity", "release", TAG, "--up-to", "stop", "--rung-timeout", "ask=500ms")
    assert ended.code == 0
    assert ended.json == {"tag": TAG, "host": None, "state": "released"}
    assert "s  sanitising\n" in ended.err
    assert api.sent("DELETE", PATH).query == {"up_to": "stop", "ask_seconds": "0.5"}


def test_release_from_one_host_leaves_the_others(api: FakeApi, tagmem: Tagmem) -> None:
    left = capacity(attachment("w2"))
    api.on("DELETE", f"{PATH}/attachments/w1", (202, capacity(attachment(), attachment("w2"))))
    api.on("GET", PATH, left)
    ended = tagmem("capacity", "release", TAG, "--host", "w1", "-q")
    assert ended.json == plain(left)
    assert ended.err == ""


def test_a_stuck_release_names_the_holder(api: FakeApi, tagmem: Tagmem) -> None:
    holder = rest.HolderDocument(4711, "redis", "open")
    stuck = capacity(
        attachment(state="releasing", rung="stop", holders=(holder,)), state="releasing"
    )
    api.on("DELETE", PATH, (202, stuck))
    api.on("GET", PATH, stuck)
    ended = tagmem("capacity", "release", TAG, "--timeout", "0.02")
    assert ended.code == 5
    assert "on w1 it is releasing (rung stop), held by pid 4711 redis (open)" in ended.err


@pytest.mark.parametrize("text", ["stop", "jump=1s", "=1", "ask=-1", "ask="])
def test_a_rung_that_is_none_is_refused(api: FakeApi, tagmem: Tagmem, text: str) -> None:
    ended = tagmem("capacity", "release", TAG, "--rung-timeout", text)
    assert ended.code == 2
    assert "rung-timeout: must be RUNG=DURATION" in ended.err


# ---- errors


@pytest.mark.parametrize("outcome", [o for o in Outcome if not o.ok])
def test_exit_codes_are_the_outcomes_own(api: FakeApi, tagmem: Tagmem, outcome: Outcome) -> None:
    # QUEUE_IS_FULL and its like are retried for a while first; 501 and 507 are not.
    status = 507 if outcome.facts.http_status == 503 else outcome.facts.http_status
    document = rest.Problem(
        "about:blank", outcome.title, status, "d", int(outcome), outcome.name.lower()
    )
    api.on("GET", PATH, (status, document))
    ended = tagmem("capacity", "show", TAG)
    assert ended.code == outcome.facts.exit_code
    assert ended.err.startswith("tagmem: error: d")
    assert ended.out == ""


def test_the_problem_document_is_for_those_who_ask(api: FakeApi, tagmem: Tagmem) -> None:
    api.on("GET", PATH, Reply(Outcome.TAG_IS_UNKNOWN, detail="no such tag"))
    ended = tagmem("capacity", "show", TAG, "-o", "json")
    assert ended.json["outcome"] == "tag_is_unknown"
    assert ended.json["exit_code"] == ended.code == 3
    assert ended.err == "tagmem: error: no such tag; see `tagmem capacity list`\n"


def test_errors_of_this_side_have_the_same_form(tagmem: Tagmem) -> None:
    ended = tagmem("capacity", "show", TAG, "-o", "json", "--url", "ftp://x")
    assert ended.code == 2
    assert ended.json["field"] == "url"
    assert ended.json["value"] == "ftp://x"


def test_without_an_orchestrator_it_says_how_to_get_one(tagmem: Tagmem, tmp_path: Path) -> None:
    ended = tagmem("capacity", "list")
    assert ended.code == 6
    assert "start one with `tagmem up`" in ended.err
    assert f"{tmp_path}/state/url" in ended.err


def test_the_state_folder_names_the_endpoint(
    api: FakeApi, tagmem: Tagmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAGMEM_URL")
    api.on("GET", "/v1/hosts", rest.HostList(()))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "url").write_text(api.url + "\n")
    assert tagmem("host", "list", "--state-dir", str(tmp_path / "here")).json == []
    monkeypatch.setenv("TAGMEM_STATE_DIR", str(tmp_path / "here"))
    assert tagmem("host", "list").json == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["capcity"], "did you mean capacity"),
        (["capacity", "lst"], "did you mean list"),
        (["capacity", "zzzzzz"], "see tagmem capacity -h"),
        (["host"], "--config FILE starts the agent"),
        (["host", "--config", __file__, "list"], "--config belongs to"),
        (["capacity", "list", "--hst", "x"], "--host"),
        (["run", TAG], "missing argument"),
        (["host", "--config", "/does/not/exist"], "does not exist"),
    ],
)
def test_wrong_usage_is_explained(tagmem: Tagmem, arguments: list[str], said: str) -> None:
    ended = tagmem(*arguments)
    assert ended.code == 2
    assert said in ended.err


# ---- hosts, appliances, events, explain


def test_hosts_are_listed_shown_and_registered(api: FakeApi, tagmem: Tagmem) -> None:
    w1 = rest.HostDocument("w1", True, "b1", {"a0": 1}, (TAG,))
    api.on("GET", "/v1/hosts", rest.HostList((w1,)))
    api.on("GET", "/v1/hosts/w1", w1)
    api.on("PUT", "/v1/hosts/w1", (201, w1))
    assert tagmem("host", "list").json == [plain(w1)]
    assert "w1    yes        1     a0=1" in tagmem("host", "list", "-o", "table").out
    assert tagmem("host", "show", "w1").json["tags"] == [TAG]
    assert f"tags       {TAG}" in tagmem("host", "show", "w1", "-o", "table").out
    assert tagmem("host", "register", "w1", "--link", "a0=1").code == 0
    assert msgspec.json.decode(api.requests[-1].body) == {"links": {"a0": 1}}
    assert "link: must be APPLIANCE=LD" in tagmem("host", "register", "w1", "--link", "a0").err


def appliance_document() -> rest.ApplianceDocument:
    region = rest.RegionDocument(
        0, 0, 1024 * MIB, 768 * MIB, 512 * MIB, 2 * MIB, True, False, False, True
    )
    return rest.ApplianceDocument(
        "a0", "unix:/a0", "ready", (region,), {"w1": 1}, 1024 * MIB, 768 * MIB, ""
    )


def test_appliances_are_listed_and_shown_with_a_map(api: FakeApi, tagmem: Tagmem) -> None:
    document = appliance_document()
    pieces = (
        rest.MapPiece(0, 256 * MIB, "accepted", TAG, ("w1",)),
        rest.MapPiece(256 * MIB, 768 * MIB, "free", "", ()),
    )
    pool = rest.PoolMapDocument(0, (0,), 1024 * MIB, 2 * MIB, pieces)
    api.on("GET", "/v1/appliances", rest.ApplianceList((document,)))
    api.on("GET", "/v1/appliances/a0", document)
    api.on("GET", "/v1/appliances/a0/map", rest.ApplianceMapDocument("a0", (pool,)))
    assert tagmem("appliance", "list").json[0]["free_bytes"] == 768 * MIB
    assert "1 GiB  768 MiB  512 MiB  w1" in tagmem("appliance", "list", "-o", "table").out
    assert tagmem("appliance", "show", "a0").json["pools"][0]["pieces"][0]["tag"] == TAG
    out = tagmem("appliance", "show", "a0", "-o", "table").out
    assert "0: 1 GiB, 768 MiB free (512 MiB in one piece), block 2 MiB, pool 0, sharable" in out
    assert f"A {TAG}  256 MiB  accepted on w1" in out


def test_appliances_are_registered_and_refreshed(api: FakeApi, tagmem: Tagmem) -> None:
    api.on("PUT", "/v1/appliances/a0", (201, appliance_document()))
    api.on("POST", "/v1/appliances/a0/refresh", (202, appliance_document()))
    assert tagmem("appliance", "register", "a0", "--address", "unix:/a0").json["id"] == "a0"
    assert msgspec.json.decode(api.requests[-1].body) == {"address": "unix:/a0"}
    assert "state      ready" in tagmem("appliance", "refresh", "a0", "-o", "table").out


def test_quarantine_is_shown(api: FakeApi, tagmem: Tagmem) -> None:
    found = rest.QuarantineDocument("q", "a0", 1, 0, TAG, ((0, MIB), (MIB, MIB)), "not ours", 1)
    api.on("GET", "/v1/quarantine", rest.QuarantineList((found,)))
    assert tagmem("appliance", "quarantine").json[0]["reason"] == "not ours"
    assert "2 MiB  not ours" in tagmem("appliance", "quarantine", "-o", "table").out


def test_events_are_one_array_or_a_line_each(api: FakeApi, tagmem: Tagmem) -> None:
    for number in range(3):
        api.happened("capacity.created", f"t{number}", tag=TAG, host=f"w{number}")
    assert [event["id"] for event in tagmem("events").json] == [1, 2, 3]
    assert [event["id"] for event in tagmem("events", "--since", "2").json] == [3]
    assert [e["id"] for e in tagmem("events", "--subject", "t1").json] == [2]
    assert tagmem("events", "--since", "1h").json == []
    lines = tagmem("events", "-o", "table").out.splitlines()
    assert lines[1].endswith("     2  t1  capacity created  host=w1")
    assert tagmem("events", "--since", "now-").code == 2


def test_explain_says_where_and_why(api: FakeApi, tagmem: Tagmem) -> None:
    candidate = rest.CandidateDocument("a0", 0, "chosen", MIB, MIB)
    extents = (rest.ExtentDocument(0, 0, MIB),)
    document = rest.ExplanationDocument(True, "It goes to a0.", (candidate,), extents)
    api.on("POST", "/v1/explain", document)
    ended = tagmem("explain", "1M", "--host", "w1", "-o", "table")
    assert ended.code == 0
    assert ended.out.splitlines()[0] == "It goes to a0."
    assert "a0         0       1 MiB  1 MiB    chosen" in ended.out
    api.on("POST", "/v1/explain", msgspec.structs.replace(document, fits=False))
    assert tagmem("explain", "1M").code == 6


# ---- run and stop


def launch(api: FakeApi, *ends: tuple[str, dict[str, Any]]) -> None:
    """What the host does once the command was posted: one step each."""

    def answer(request: Any) -> Any:
        name = msgspec.json.decode(request.body)["id"]
        pending = capacity(attachment(workload=workload(name, state="pending", pid=None)))
        api.on("GET", PATH, pending)
        for event, fields in ends:
            document = capacity(attachment(workload=workload(name, **fields)))
            api.then(event, TAG, partial(api.on, "GET", PATH, document))
        return 201, pending

    api.on("GET", PATH, capacity(attachment()))
    api.on("POST", WORKLOAD, answer)


def test_run_relays_output_and_exit_code(api: FakeApi, tagmem: Tagmem, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"hello from the workload\n")
    launch(
        api,
        ("workload.started", {"log_path": str(log)}),
        ("workload.exited", {"state": "exited", "exit_code": 7, "log_path": str(log)}),
    )
    ended = tagmem("run", TAG, "-e", "A=1", "--", "app", "--size", "{size}")
    assert ended.code == 7
    assert ended.out == "hello from the workload\n"
    sent = msgspec.json.decode(api.sent("POST", WORKLOAD).body)
    assert sent["command"] == ["app", "--size", "{size}"]
    assert sent["environment"] == {"A": "1"}


def test_run_detached_returns_when_it_runs(api: FakeApi, tagmem: Tagmem) -> None:
    launch(api, ("workload.started", {}))
    assert tagmem("run", "-d", TAG, "sleep", "-e", "1").json["pid"] == 4711
    sent = msgspec.json.decode(api.sent("POST", WORKLOAD).body)
    assert sent["command"] == ["sleep", "-e", "1"]


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"state": "exited", "exit_code": -9}, 137, ""),
        ({"state": "failed", "reason": "no such file: app"}, 1, "no such file: app"),
    ],
)
def test_run_tells_how_it_ended(
    api: FakeApi, tagmem: Tagmem, fields: dict[str, Any], code: int, said: str
) -> None:
    launch(api, ("workload.ended", fields))
    ended = tagmem("run", TAG, "--", "app")
    assert ended.code == code
    assert said in ended.err


def test_run_wants_to_know_where_when_several_hold_it(api: FakeApi, tagmem: Tagmem) -> None:
    api.on("GET", PATH, capacity(attachment("w1"), attachment("w2")))
    assert "host: must be one of w1, w2" in tagmem("run", TAG, "--", "app").err
    assert "held by w1, w2, not by w3" in tagmem("run", "--host", "w3", TAG, "--", "app").err


def test_stop_waits_for_the_end(api: FakeApi, tagmem: Tagmem) -> None:
    running = capacity(attachment(workload=workload()))
    ended_ = capacity(attachment(workload=workload(state="exited", exit_code=0)))
    api.on("GET", PATH, running)
    api.on("DELETE", WORKLOAD, (202, running))
    api.then("workload.exited", TAG, lambda: api.on("GET", PATH, ended_))
    assert tagmem("stop", TAG).json["exit_code"] == 0
    api.on("GET", PATH, capacity(attachment()))
    assert tagmem("stop", TAG).code == 4


def test_run_needs_the_tag_here_without_an_orchestrator(tagmem: Tagmem, tmp_path: Path) -> None:
    assert tagmem("run", TAG, "--", "true").code == 6
    surface(tmp_path / "run", tag=OTHER_TAG)
    ended = tagmem("run", "--local", "--timeout", "10ms", TAG, "--", "true")
    assert ended.code == 5
    assert f"has {OTHER_TAG}, not this one" in ended.err


def test_local_errors_have_shell_codes(tagmem: Tagmem, tmp_path: Path) -> None:
    surface(tmp_path / "run", tag=TAG)
    assert tagmem("run", "--local", TAG, "--", "no-such-command-here").code == 127
    assert tagmem("run", "--local", TAG, "--", str(tmp_path)).code == 126


def test_a_tag_without_a_path_has_no_dax_to_fill_in(tagmem: Tagmem, tmp_path: Path) -> None:
    surface(tmp_path / "run", tag=TAG, pieces=[(0, 2 * MIB)])
    ended = tagmem("run", "--local", TAG, "--", "cat", "{dax}")
    assert ended.code == 4
    assert "comes as a descriptor" in ended.err or "come as a descriptor" in ended.err
