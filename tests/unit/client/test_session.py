"""The API's client against real HTTP: documents, errors and their facts, repeats, events."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.unit.client.fake_api import MIB, TAG, FakeApi, attachment, capacity

from tagmem.base import errors
from tagmem.client.session import ApiError, Client, RefusedInput, Unreachable, WaitTimeout
from tagmem.domain.outcome import Outcome, Reply
from tagmem.wire import rest

PATH = f"/v1/capacities/{TAG}"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    with FakeApi(tmp_path) as fake:
        yield fake


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with Client(api.url, timeout=5, patience=0.2, absence=0.1) as session:
        yield session


def test_documents_come_typed_over_one_connection(api: FakeApi, client: Client) -> None:
    api.on("GET", PATH, capacity(attachment()))
    assert client.capacity(TAG) == capacity(attachment())
    assert client.capacity(TAG).attachments[0].host == "w1"
    assert len(api.requests) == 2


def test_a_request_is_sent_as_the_api_wants_it(api: FakeApi, client: Client) -> None:
    api.on("PUT", PATH, (201, capacity()))
    request = rest.CapacityRequest(256 * MIB, hosts=("w1",))
    assert client.create(request, TAG).tag == TAG
    sent = api.sent("PUT", PATH)
    assert msgspec.json.decode(sent.body, type=rest.CapacityRequest) == request
    assert sent.headers["Content-Type"] == "application/json"


def test_a_new_tag_is_chosen_by_the_client(api: FakeApi, client: Client) -> None:
    with pytest.raises(ApiError):
        client.create(rest.CapacityRequest(MIB))
    assert api.requests[0].method == "PUT"


def test_lists_are_read_page_by_page(api: FakeApi, client: Client) -> None:
    pages = {"": rest.CapacityPage((capacity(),), TAG), TAG: rest.CapacityPage((capacity(),), None)}
    api.on("GET", "/v1/capacities", lambda request: pages[request.query.get("after", "")])
    assert len(list(client.capacities(host="w1"))) == 2
    assert api.requests[1].query == {"host": "w1", "after": TAG}


def test_release_says_how_far_and_how_long(api: FakeApi, client: Client) -> None:
    api.on("DELETE", f"{PATH}/attachments/w1", (204, None))
    assert client.release(TAG, "w1", up_to="stop", deadlines={"ask": 0.5}, if_match=3) is None
    sent = api.requests[0]
    assert sent.query == {"up_to": "stop", "ask_seconds": "0.5"}
    assert sent.headers["If-Match"] == '"3"'


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome.SIZE_IS_ZERO, errors.InvalidInput),
        (Outcome.HOST_IS_UNKNOWN, errors.NotFound),
        (Outcome.TAG_IS_STILL_HELD, errors.Conflict),
        (Outcome.NOT_ENOUGH_FREE_CAPACITY, errors.RemoteError),
        (Outcome.NOT_SUPPORTED, errors.Unsupported),
    ],
)
def test_problems_are_errors_of_ours(
    api: FakeApi, client: Client, outcome: Outcome, kind: type[Exception]
) -> None:
    api.on("GET", PATH, outcome)
    with pytest.raises(kind) as caught:
        client.capacity(TAG)
    assert isinstance(caught.value, ApiError)
    assert caught.value.problem.code == outcome
    assert caught.value.retry is (errors.Retry.LATER if outcome.transient else errors.Retry.NEVER)


def test_a_problem_keeps_field_limit_and_value(api: FakeApi, client: Client) -> None:
    reply = Reply(Outcome.SIZE_IS_NOT_ALIGNED, field="size_bytes", limit="even", value="3")
    api.on("GET", PATH, reply)
    with pytest.raises(RefusedInput, match="size_bytes: must be even, got 3") as caught:
        client.capacity(TAG)
    assert (caught.value.field, caught.value.limit, caught.value.value) == (
        "size_bytes",
        "even",
        "3",
    )


def test_come_back_later_is_tried_again(api: FakeApi, client: Client) -> None:
    answers = [Outcome.QUEUE_IS_FULL, capacity()]
    api.on("GET", PATH, lambda _: answers.pop(0))
    assert client.capacity(TAG).tag == TAG


def test_patience_ends(api: FakeApi, client: Client) -> None:
    api.on("GET", PATH, Outcome.STORAGE_FAILED)
    with pytest.raises(ApiError, match="storage failed"):
        client.capacity(TAG)
    assert 2 <= len(api.requests) <= 5


def test_a_lost_answer_is_asked_for_again(api: FakeApi, client: Client) -> None:
    api.on("GET", PATH, capacity())
    api.drop = 2
    assert client.capacity(TAG).tag == TAG
    assert len(api.requests) == 3


def test_when_no_answer_comes_the_outcome_is_unknown(api: FakeApi, client: Client) -> None:
    api.drop = 3
    with pytest.raises(errors.OutcomeUnknown, match="whether it took effect is unknown"):
        client.capacity(TAG)


def test_nobody_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"no orchestrator answers at unix:.*No such file"):
        Client(f"unix:{tmp_path}/none.sock").health()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(Unreachable, match="Connection refused"):
            Client(f"http://127.0.0.1:{port}").health()


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "https://x", "http://x:port", "unix:relative", "http://x/path"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidInput, match=r"^url: must be http://HOST:PORT or unix:/PATH"):
        Client(url)


def test_another_programs_answers_are_not_believed(api: FakeApi, client: Client) -> None:
    api.on("GET", PATH, {"hello": "world"})
    with pytest.raises(errors.RemoteError, match="no API v1 document"):
        client.capacity(TAG)
    api.on("GET", PATH, (404, "nothing here"))
    with pytest.raises(errors.NotFound, match="without a problem document"):
        client.capacity(TAG)


def test_the_past_is_read_page_by_page(api: FakeApi, client: Client) -> None:
    for number in range(5):
        api.happened("capacity.created", f"t{number}")
    assert [event.id for event in client.history(1)] == [2, 3, 4, 5]
    assert client.last_event() == 5


def test_a_stream_resumes_behind_the_last_event(api: FakeApi, client: Client) -> None:
    api.stream_ends = True
    api.happened("a.b", "x")
    api.happened("a.c", "x")
    seen = []
    for event in client.events(0):
        seen.append(event.id)
        if event.id == 2:
            api.then("a.d", "x")
        if event.id == 3:
            break
    assert seen == [1, 2, 3]
    assert [r.headers["Last-Event-ID"] for r in api.requests] == ["0", "2"]


def test_a_stream_ends_when_asked_to(api: FakeApi, client: Client) -> None:
    api.happened("a.b", "x")
    assert [event.id for event in client.events(0, timeout=0.02)] == [1]


def test_a_stream_that_stays_away_is_told(api: FakeApi, client: Client) -> None:
    api.stream_ends = True
    with pytest.raises(Unreachable, match="stays away"):
        list(client.events(0))


def test_waiting_looks_after_each_event_about_the_subject(api: FakeApi, client: Client) -> None:
    state = ["offered"]
    api.then("capacity.created", "other")
    api.then("attachment.offered", TAG, host="w1")
    api.then("attachment.ready", TAG, lambda: state.append("ready"), host="w1")
    told = []
    looked = []

    def look() -> str | None:
        looked.append(state[-1])
        return state[-1] if state[-1] == "ready" else None

    found = client.wait(
        look,
        subjects=frozenset({TAG}),
        timeout=5,
        on_event=lambda event: told.append(event.type),
    )
    assert found == "ready"
    assert told == ["attachment.offered", "attachment.ready"][: len(told)]


def test_waiting_ends_with_what_is_missing(client: Client) -> None:
    with pytest.raises(WaitTimeout, match="still on its way"):
        client.wait(lambda: None, timeout=0.02, late=lambda: "still on its way")
    with pytest.raises(TimeoutError, match=r"not done in 0 s"):
        client.wait(lambda: None, timeout=0)


def test_waiting_outlasts_a_restart(api: FakeApi, tmp_path: Path) -> None:
    looks = [Unreachable(), errors.OutcomeUnknown(), None]

    def look() -> str | None:
        found = looks.pop(0)
        if found is not None:
            raise found
        return "back"

    for _ in range(3):
        api.then("orchestrator.started", "")
    with Client(api.url, absence=5) as client:
        assert client.wait(look, timeout=5) == "back"


def test_waiting_for_who_stays_away_ends(api: FakeApi, client: Client) -> None:
    api.path.unlink()

    def look() -> str | None:
        raise Unreachable("gone")

    with pytest.raises(Unreachable, match=r"gone|stays away"):
        client.wait(look, after=0, timeout=5)
