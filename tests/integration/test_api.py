"""The HTTP API as its callers see it: real uvicorn and worker processes over the embedded AWS."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi.openapi.models import OpenAPI

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings
from tests.integration import api_process
from tests.waiting import until

MAX_BODY = 2**20
PROBLEM = "application/problem+json"
UNKNOWN_KEY = "mds_" + "A" * 43


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment in a namespace of its own in the embedded AWS."""

    environ: Mapping[str, str]
    settings: Settings
    client: Client

    def key(self, *scopes: str, source: str = "erp") -> str:
        return self.client.store.api_keys.create(source=source, scopes=scopes)


def deployment_at(endpoint: str) -> Deployment:
    environ = {
        **os.environ,
        "MDSTORE_PROFILE": "local",
        "MDSTORE_NAMESPACE": f"api-{uuid4().hex[:12]}",
        "AWS_ENDPOINT_URL": endpoint,
        "MDSTORE_WAIT_TIME": "1",
        "MDSTORE_API_MAX_BODY_BYTES": str(MAX_BODY),
    }
    settings = load_settings(environ).settings
    return Deployment(environ=environ, settings=settings, client=Client(settings))


@contextmanager
def served(deployment: Deployment, log: Path) -> Iterator[httpx.Client]:
    """Run the HTTP API; yields a client without a key once it serves."""
    with api_process.served(deployment.environ, log) as (_, http):
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def deployment(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Yield a provisioned deployment with a running worker."""
    made = deployment_at(aws.url)
    list(provision(made.settings))
    command = ("celery", "-A", "workers.celery_app", "worker", "-l", "WARNING", "-c", "1")
    with api_process.process(*command, environ=made.environ, log=tmp_path_factory.mktemp("worker") / "log"):
        yield made


@pytest.fixture(scope="module")
def api(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of the HTTP API that sends no key."""
    with served(deployment, tmp_path_factory.mktemp("api") / "log") as http:
        yield http


@pytest.fixture(scope="module")
def auth(deployment: Deployment) -> dict[str, str]:
    """Return the header of a key that may write and read for the source `erp`."""
    return bearer(deployment.key("write", "read"))


@pytest.fixture
def key() -> str:
    """Return a record's key, used as an idempotency key too, that no other test uses."""
    return uuid4().hex


def upsert(key: str, **data: Any) -> dict[str, Any]:
    return {"op": "upsert", "entity": "item", "key": key, "data": data}


def insert(key: str, **data: Any) -> dict[str, Any]:
    return {**upsert(key, **data), "op": "insert"}


def post(
    api: httpx.Client, auth: Mapping[str, str], *operations: Any, wait: float = 0, **headers: str
) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.post("/v1/requests", params={"wait": wait}, json={"operations": operations}, headers={**auth, **headers})


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Check that an answer is a problem document with this status; returns the document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    document: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "instance"} <= document.keys()
    assert document["status"] == status
    return document


# -- submitting


def test_a_request_is_applied_and_read_back(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """The answer is 202 with a status URL; there the request completes, and the record has version 1 and names its writer."""
    answer = post(api, auth, insert(key, name="Ångström", empty=""), idempotency_key=key)
    assert answer.status_code == 202
    assert answer.json() == {"request_id": f"erp:{key}", "status_url": f"/v1/requests/erp:{key}"}
    assert answer.headers["location"] == f"/v1/requests/erp:{key}"

    until(lambda: bool(api.get(answer.headers["location"], headers=auth).json()["state"] == "completed"))

    state = api.get(answer.headers["location"], headers=auth).json()
    times = [state.pop(name) for name in ("accepted_at", "started_at", "finished_at")]
    assert times == sorted(times)
    assert all(moment.endswith("Z") for moment in times)
    assert state == {
        "request_id": f"erp:{key}",
        "state": "completed",
        "operations": 1,
        "applied": 1,
        "refused": 0,
        "failed": 0,
        "applied_by_op": {"insert": 1},
        "refused_by_reason": {},
        "source": "erp",
        "lanes": 1,
        "error": "",
    }
    record = api.get(f"/v1/records/item/{key}", headers=auth).json()
    assert record.pop("updated_at").endswith("Z")
    assert record == {
        "entity": "item",
        "key": key,
        "version": 1,
        "data": {"name": "Ångström", "empty": ""},
        "updated_by": f"erp:{key}/0/0",
    }


def test_waiting_returns_the_final_state(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """A request that ends within the wait is answered with 200 and its summary."""
    answer = post(api, auth, insert(key), insert(f"{key}-2"), wait=30)
    assert answer.status_code == 200
    summary = answer.json()
    assert (summary["state"], summary["applied"], summary["applied_by_op"]) == ("completed", 2, {"insert": 2})
    assert summary["status_url"] == answer.headers["location"]
    assert api.get(summary["status_url"], headers=auth).json()["request_id"] == summary["request_id"]


def test_a_repeated_request_gets_the_same_answer(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Calls with the same idempotency key and operations, at the same time or later, are one request with one effect."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(api, auth, upsert(key, n=1), idempotency_key=key), range(8)))
    answers.append(post(api, auth, upsert(key, n=1), idempotency_key=key))
    assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}

    assert post(api, auth, upsert(key, n=1), wait=30, idempotency_key=key).json()["applied"] == 1
    assert api.get(f"/v1/records/item/{key}", headers=auth).json()["version"] == 1


def test_the_same_key_with_another_body_is_a_conflict(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """The second body is answered with 409, and only the first takes effect."""
    assert post(api, auth, upsert(key, n=1), idempotency_key=key).status_code == 202
    document = problem(post(api, auth, upsert(key, n=2), idempotency_key=key), 409)
    assert document["type"] == "urn:mdstore:problem:request-conflict"
    post(api, auth, upsert(key, n=1), wait=30, idempotency_key=key)
    assert api.get(f"/v1/records/item/{key}", headers=auth).json()["data"] == {"n": 1}


def test_two_sources_may_use_the_same_idempotency_key(
    api: httpx.Client, deployment: Deployment, auth: dict[str, str], key: str
) -> None:
    """Each source has its own namespace of idempotency keys."""
    other = bearer(deployment.key("write", source="crm"))
    assert post(api, auth, upsert(key, n=1), idempotency_key=key).json()["request_id"] == f"erp:{key}"
    assert post(api, other, upsert(key, n=2), idempotency_key=key).json()["request_id"] == f"crm:{key}"


def test_without_idempotency_key_each_call_is_a_request(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Two calls without the header get two different ids, and both ids begin with the source."""
    ids = {post(api, auth, upsert(key)).json()["request_id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(one.startswith("erp:") for one in ids)


@pytest.mark.parametrize("name", ["", "a b", "a/../b", "a//b", "x" * 197, "ü", "a#b"])
def test_a_bad_idempotency_key_is_named(api: httpx.Client, auth: dict[str, str], name: str) -> None:
    """The answer is 422 and names the header."""
    headers = httpx.Headers({**auth, "Idempotency-Key": name}, encoding="utf-8")
    answer = api.post("/v1/requests", json={"operations": []}, headers=headers)
    assert [error["field"] for error in problem(answer, 422)["errors"]] == ["Idempotency-Key"]


def test_concurrent_requests_are_all_applied(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """32 different requests from 16 threads are all accepted and applied."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: post(api, auth, insert(f"{key}-{n}"), wait=60), range(32)))
    assert [(answer.status_code, answer.json()["applied"]) for answer in answers] == [(200, 1)] * 32


def test_invalid_operations_are_named_and_nothing_is_stored(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """422 gives index, field and reason of each; the valid operation beside them is not applied, and the key stays free."""
    bad = [insert(key), {"op": "insert", "entity": "item", "key": "k"}, {**insert("k"), "key": 7}, {"op": "grow"}, 5]
    document = problem(post(api, auth, *bad, idempotency_key=key), 422)
    assert document["type"] == "urn:mdstore:problem:invalid-operations"
    assert document["count"] == 4
    assert [(error["index"], error["field"]) for error in document["errors"]][:2] == [(1, "data"), (2, "key")]
    assert [error["index"] for error in document["errors"]] == [1, 2, 3, 4]
    assert all(error["reason"] for error in document["errors"])
    problem(api.get(f"/v1/requests/erp:{key}", headers=auth), 404)

    assert post(api, auth, insert(f"{key}-good"), wait=30, idempotency_key=key).json()["applied"] == 1
    problem(api.get(f"/v1/records/item/{key}", headers=auth), 404)


@pytest.mark.parametrize("body", [b"[]", b'{"operations":{}}', b'{"operations":[],"more":1}', b"[" * 100_000])
def test_a_body_of_another_shape_is_refused(api: httpx.Client, auth: dict[str, str], body: bytes) -> None:
    """JSON that is not `{"operations": [...]}` is answered with 422."""
    answer = api.post("/v1/requests", content=body, headers={**auth, "Content-Type": "application/json"})
    assert [(error["index"], error["field"]) for error in problem(answer, 422)["errors"]] == [(None, "body")]


@pytest.mark.parametrize("body", [b"", b"{", b'{"operations":[1 2]}'])
def test_a_malformed_body_is_refused(api: httpx.Client, auth: dict[str, str], body: bytes) -> None:
    """A body that is not JSON is answered with 400."""
    answer = api.post("/v1/requests", content=body, headers={**auth, "Content-Type": "application/json"})
    assert "The body is not JSON" in problem(answer, 400)["detail"]


def ndjson(api: httpx.Client, auth: Mapping[str, str], body: bytes, **parameters: Any) -> httpx.Response:
    headers = {**auth, "Content-Type": "application/x-ndjson; charset=utf-8"}
    return api.post("/v1/requests", content=body, headers=headers, params=parameters)


def test_ndjson_has_one_operation_per_line(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Lines may end with LF or CRLF, the last line needs no ending, and empty lines are skipped."""
    lines = [json.dumps(insert(f"{key}-{n}")).encode() for n in range(3)]
    answer = ndjson(api, auth, lines[0] + b"\n\n" + lines[1] + b"\r\n" + lines[2], wait=30)
    assert (answer.status_code, answer.json()["operations"], answer.json()["applied"]) == (200, 3, 3)


def test_a_malformed_line_is_an_invalid_operation(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """422 gives the index of the line, and the lines around it are not applied."""
    good = json.dumps(insert(key)).encode()
    document = problem(ndjson(api, auth, good + b'\n{"op":\n' + good.replace(b"insert", b"upsert")), 422)
    assert (document["count"], document["errors"][0]["index"], document["errors"][0]["field"]) == (1, 1, "line")
    problem(api.get(f"/v1/records/item/{key}", headers=auth), 404)


NUMBERS = (
    b'{"big":1234567890123456789,"digits":12345678901234567890.123456789012345678,"deep":[-0.1,{"n":9007199254740993}]}'
)


@pytest.mark.parametrize("form", ["application/json", "application/x-ndjson"])
def test_numbers_come_back_exactly(api: httpx.Client, auth: dict[str, str], key: str, form: str) -> None:
    """A 19-digit integer and a 38-digit decimal are byte for byte the same in the record and in the listing."""
    operation = b'{"op":"insert","entity":"exact","key":"%b","data":%b}' % (key.encode(), NUMBERS)
    body = b'{"operations":[%b]}' % operation if form == "application/json" else operation
    headers = {**auth, "Content-Type": form}
    assert api.post("/v1/requests?wait=30", content=body, headers=headers).json()["applied"] == 1
    record = api.get(f"/v1/records/exact/{key}", headers=auth)
    assert b'"data":' + NUMBERS in record.content
    assert record.content in api.get("/v1/records/exact", headers=auth).content


def test_a_record_shows_its_sequence(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """A sequence of 31 digits comes back exactly."""
    post(api, auth, {**upsert(key), "sequence": 10**30}, wait=30)
    assert b'"sequence":1000000000000000000000000000000,' in api.get(f"/v1/records/item/{key}", headers=auth).content


def test_a_too_large_content_length_is_refused(api: httpx.Client, auth: dict[str, str]) -> None:
    """A `Content-Length` over the limit is answered with 413."""
    assert problem(ndjson(api, auth, b" " * (MAX_BODY + 1)), 413)["type"] == "urn:mdstore:problem:too-large"


def test_a_too_large_body_is_refused_while_it_arrives(api: httpx.Client, auth: dict[str, str]) -> None:
    """A body without a `Content-Length` is answered with 413 as soon as it exceeds the limit."""
    headers = {**auth, "Content-Type": "application/x-ndjson"}
    chunks = (b" " * 65_536 for _ in range(MAX_BODY // 65_536 + 1))
    problem(api.post("/v1/requests", content=chunks, headers=headers), 413)


def test_a_body_of_exactly_the_limit_is_accepted(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """A body of exactly the limit is allowed; it passes through a temporary file."""
    line = json.dumps(insert(key)).encode()
    assert ndjson(api, auth, line + b" " * (MAX_BODY - len(line)), wait=30).json()["applied"] == 1


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/csv"}, {"Content-Type": "application/json", "Content-Encoding": "gzip"}]
)
def test_another_content_type_is_refused(api: httpx.Client, auth: dict[str, str], headers: dict[str, str]) -> None:
    """A body that is neither JSON nor NDJSON, or that is compressed, is answered with 415."""
    assert (
        "application/x-ndjson"
        in problem(api.post("/v1/requests", content=b"x", headers={**auth, **headers}), 415)["detail"]
    )


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon"])
def test_a_wait_out_of_range_is_refused(api: httpx.Client, auth: dict[str, str], wait: str) -> None:
    """The answer is 422 and names the parameter."""
    answer = ndjson(api, auth, b"", wait=wait)
    assert [error["field"] for error in problem(answer, 422)["errors"]] == ["wait"]


# -- keys


@pytest.mark.parametrize(
    "headers", [{}, bearer(UNKNOWN_KEY), bearer("x"), {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}]
)
@pytest.mark.parametrize("call", [("POST", "/v1/requests"), ("GET", "/v1/requests/x"), ("GET", "/v1/records/item/x")])
def test_a_call_without_a_known_key_is_refused(
    api: httpx.Client, headers: dict[str, str], call: tuple[str, str]
) -> None:
    """The answer is 401 and asks for a bearer token."""
    answer = api.request(*call, headers=headers)
    problem(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_allows_its_scopes_only(api: httpx.Client, deployment: Deployment) -> None:
    """403 names the missing scope; none of `write`, `read` and `operate` includes another."""
    writer, reader, operator = (bearer(deployment.key(scope)) for scope in ("write", "read", "operate"))
    assert "write" in problem(post(api, reader, upsert("k")), 403)["detail"]
    assert "write" in problem(post(api, operator, upsert("k")), 403)["detail"]
    for path in ("/v1/requests/x", "/v1/requests/x/outcomes", "/v1/records/item/k", "/v1/records/item"):
        assert "read" in problem(api.get(path, headers=writer), 403)["detail"]
        assert "read" in problem(api.get(path, headers=operator), 403)["detail"]


def test_a_key_revoked_before_its_first_use_is_refused(api: httpx.Client, deployment: Deployment) -> None:
    """A key that one process revoked is refused by another."""
    key = deployment.key("read")
    deployment.client.store.api_keys.revoke(key)
    problem(api.get("/v1/records/item", headers=bearer(key)), 401)


def test_a_request_of_another_source_is_hidden(
    api: httpx.Client, deployment: Deployment, auth: dict[str, str], key: str
) -> None:
    """Another source's key gets the same 404 as for a request that does not exist; a key with `operate` sees the request."""
    status_url = post(api, auth, upsert(key), idempotency_key=key).json()["status_url"]
    other = bearer(deployment.key("read", "write", source="crm"))
    operator = bearer(deployment.key("read", "operate", source="ops"))
    for path in (status_url, f"{status_url}/outcomes"):
        assert api.get(path, headers=operator).status_code == 200
        hidden = problem(api.get(path, headers=other), 404)
        absent = problem(api.get(path.replace(key, "0" * 32), headers=other), 404)
        assert {**absent, "detail": "", "instance": ""} == {**hidden, "detail": "", "instance": ""}
        assert absent["detail"].replace("0" * 32, key) == hidden["detail"]


# -- looking up


def test_outcomes_come_in_pages(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Following the cursors lists every operation once; `only` filters by outcome, and a refusal has its reason."""
    post(api, auth, insert(f"{key}-1"), insert(f"{key}-3"), wait=30)
    status_url = post(api, auth, *(insert(f"{key}-{n}") for n in range(5)), wait=30).json()["status_url"]

    pages: list[list[dict[str, Any]]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.get(f"{status_url}/outcomes", params={"limit": 2, "cursor": cursor}, headers=auth).json()
        pages.append(page["outcomes"])
        cursor = page["cursor"]
    assert [len(page) for page in pages] == [2, 2, 1]
    found = [outcome for page in pages for outcome in page]
    assert [outcome["index"] for outcome in found] == [0, 1, 2, 3, 4]
    assert found[0] == {"index": 0, "outcome": "applied", "op": "insert", "entity": "item", "key": f"{key}-0"}

    refused = api.get(f"{status_url}/outcomes", params={"only": "refused"}, headers=auth).json()
    assert [(one["index"], one["reason"]) for one in refused["outcomes"]] == [(1, "exists"), (3, "exists")]
    assert refused["cursor"] is None


@pytest.mark.parametrize("parameters", [{"only": "some"}, {"limit": "0"}, {"limit": "x"}, {"cursor": "1:x"}])
def test_bad_parameters_of_outcomes_are_named(
    api: httpx.Client, auth: dict[str, str], key: str, parameters: dict[str, str]
) -> None:
    """The answer is 422 and names the parameter."""
    status_url = post(api, auth, upsert(key)).json()["status_url"]
    document = problem(api.get(f"{status_url}/outcomes", params=parameters, headers=auth), 422)
    assert [error["field"] for error in document["errors"]] == list(parameters)


@pytest.mark.parametrize("name", ["2026/11:23@x+y=z", "outcomes", "a/outcomes", "a/outcomes/outcomes"])
def test_any_request_id_can_be_looked_up(api: httpx.Client, auth: dict[str, str], key: str, name: str) -> None:
    """An id may contain characters that mean something in a URL, and may even end like the path of its outcomes."""
    answer = post(api, auth, upsert(key), wait=30, idempotency_key=f"{key}/{name}")
    status_url = answer.json()["status_url"]
    assert api.get(status_url, headers=auth).json()["request_id"] == f"erp:{key}/{name}"
    assert [one["key"] for one in api.get(f"{status_url}/outcomes", headers=auth).json()["outcomes"]] == [key]


def test_an_etag_saves_sending_an_unchanged_record(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """While a tag names the record's version the answer is 304 without a body; after an update it is 200 with a new tag."""
    path = f"/v1/records/item/{key}"
    post(api, auth, upsert(key, n=1), wait=30)
    assert api.get(path, headers=auth).headers["etag"] == '"1"'
    for names in ('"1"', 'W/"1"', '"7", "1"', "*"):
        answer = api.get(path, headers={**auth, "If-None-Match": names})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"1"')
    assert api.get(path, headers={**auth, "If-None-Match": '"7", 1'}).status_code == 200
    post(api, auth, upsert(key, n=2), wait=30)
    answer = api.get(path, headers={**auth, "If-None-Match": '"1"'})
    assert (answer.status_code, answer.json()["data"], answer.headers["etag"]) == (200, {"n": 2}, '"2"')


@pytest.mark.parametrize("name", ["a/b", "../x", "a?b=c#d", "100%", "ü 東京 🛫", "a%2Fb", "x/"])
def test_any_key_of_a_record_can_be_looked_up(api: httpx.Client, auth: dict[str, str], key: str, name: str) -> None:
    """A record's key may be any text, percent-encoded in the path."""
    name = f"{key}{name}"
    post(api, auth, upsert(name), wait=30)
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    assert api.get(f"/v1/records/item/{encoded}", headers=auth).json()["key"] == name


def test_an_absent_record_is_a_problem(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """A record that never existed, and one that was deleted, are answered with a 404 problem."""
    problem(api.get(f"/v1/records/item/{key}", headers=auth), 404)
    post(api, auth, upsert(key), {"op": "delete", "entity": "item", "key": key}, wait=30)
    problem(api.get(f"/v1/records/item/{key}", headers=auth), 404)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/records/1x/k", "entity"),
        ("/v1/records/it%23em", "entity"),
        ("/v1/records/item/", "key"),
        ("/v1/records/item/a%00b", "key"),
        ("/v1/records/item/" + "k" * 1_025, "key"),
        ("/v1/requests/a%23b", "request_id"),
    ],
)
def test_an_impossible_name_in_the_path_is_refused(
    api: httpx.Client, auth: dict[str, str], path: str, field: str
) -> None:
    """The answer is 422 and says which part of the path is wrong."""
    assert [error["field"] for error in problem(api.get(path, headers=auth), 422)["errors"]] == [field]


def test_records_are_listed_in_pages(api: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Following the cursors lists every record of the entity once, and no record of another entity."""
    entity = f"listed-{key}"
    wanted = {f"{n}#/ü" for n in range(5)}
    post(api, auth, *({**insert(name), "entity": entity} for name in wanted), insert(key), wait=30)
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.get(f"/v1/records/{entity}", params={"limit": 2, "cursor": cursor}, headers=auth).json()
        assert len(page["records"]) <= 2
        found += [record["key"] for record in page["records"]]
        cursor = page["cursor"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("cursor", ["x", "!", "e30", "eyJwayI6eyJTIjoibm9uZSJ9fQ", "eyJwayI6eyJOIjoiMSJ9fQ", "e\u00fc"])
def test_a_cursor_that_was_never_given_is_refused(api: httpx.Client, auth: dict[str, str], cursor: str) -> None:
    """A cursor that does not decode to a record's primary key is answered with 422."""
    document = problem(api.get("/v1/records/item", params={"cursor": cursor}, headers=auth), 422)
    assert [error["field"] for error in document["errors"]] == ["cursor"]


# -- health, errors and documentation


def test_a_working_deployment_is_ready(api: httpx.Client) -> None:
    """`/livez` and `/readyz` answer 200, and need no key."""
    assert (api.get("/livez").status_code, api.get("/readyz").status_code) == (200, 200)


def test_every_error_is_a_problem_document(api: httpx.Client) -> None:
    """Unknown routes and methods are answered with problem documents too; 405 says which method is allowed."""
    assert problem(api.get("/v1/nothing"), 404)["instance"] == "/v1/nothing"
    answer = api.delete("/v1/requests")
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_the_root_redirects_to_the_documentation(api: httpx.Client) -> None:
    """`/` redirects to the page that shows the OpenAPI document, and the page loads nothing from other hosts."""
    answer = api.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    page = api.get("/docs").text
    assert "/openapi.json" in page
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(parts) >= 3
    assert all(part.startswith("/") and api.get(part).status_code == 200 for part in parts), "fetched from elsewhere"


def test_the_openapi_document_is_complete(api: httpx.Client) -> None:
    """The document is valid OpenAPI, its references resolve, and it describes the body, the bearer token and the problems."""
    document = api.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    names = document["components"]["schemas"].keys()
    assert {name.removeprefix("#/components/schemas/") for name in references(document)} <= names
    submit = document["paths"]["/v1/requests"]["post"]
    assert set(submit["requestBody"]["content"]) == {"application/json", "application/x-ndjson"}
    assert set(submit["responses"]) == {
        *("200", "202", "400", "401", "403", "408", "409", "413", "415", "422", "429", "503"),
    }
    assert set(submit["responses"]["422"]["content"]) == {PROBLEM}
    assert submit["security"] == [{"HTTPBearer": []}]
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "security" not in document["paths"]["/livez"]["get"]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


# -- broken deployments


@pytest.fixture
def broken(aws: EmbeddedAws) -> Deployment:
    """Return a provisioned deployment without a worker, for tests that delete parts of it."""
    made = deployment_at(aws.url)
    list(provision(made.settings))
    return made


def check_not_acknowledged(answer: httpx.Response, deployment: Deployment) -> None:
    """Check that the answer is 503, says when to try again, and reveals nothing about the deployment."""
    document = problem(answer, 503)
    assert document.keys() == {"type", "title", "status", "detail", "instance"}
    assert document["detail"].startswith("The call was not acknowledged. ")
    assert "error occurred" not in document["detail"]
    assert int(answer.headers["retry-after"]) > 0
    assert "location" not in answer.headers
    assert deployment.settings.namespace not in answer.text
    assert "request_id" not in answer.text


def test_a_missing_table_is_not_ready(broken: Deployment, tmp_path: Path) -> None:
    """`/readyz` names only the ledger, `/livez` still answers 200, and a call that needs the table gets 503."""
    auth = bearer(broken.key("write", "read"))
    with served(broken, tmp_path / "log") as api:
        assert api.get("/readyz").status_code == 200
        broken.client.store.aws.dynamodb.delete_table(TableName=broken.settings.ledger_table)
        until(lambda: api.get("/readyz").status_code == 503)  # an answer counts for a second
        assert problem(api.get("/readyz"), 503)["failing"] == ["ledger"]
        assert api.get("/livez").status_code == 200
        check_not_acknowledged(post(api, auth, upsert("k")), broken)


def test_a_missing_queue_acknowledges_nothing(broken: Deployment, tmp_path: Path) -> None:
    """If the payload is stored but its message cannot be sent, the answer is 503; once it can be, a repeat is accepted."""
    auth = bearer(broken.key("write", "read"))
    sqs, queue = broken.client.store.aws.sqs, broken.settings.queue
    with served(broken, tmp_path / "log") as api:
        sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=queue)["QueueUrl"])
        assert problem(api.get("/readyz"), 503)["failing"] == ["queue"]
        check_not_acknowledged(post(api, auth, upsert("k"), idempotency_key="again"), broken)
        list(provision(broken.settings))
        until(lambda: api.get("/readyz").status_code == 200)  # its answer counts for a second
        assert post(api, auth, upsert("k"), idempotency_key="again").status_code == 202
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])["Attributes"]
    assert counts == {"ApproximateNumberOfMessages": "1"}


def test_a_missing_bucket_acknowledges_nothing(broken: Deployment, tmp_path: Path) -> None:
    """If the payload cannot be stored, the answer is 503 and no message is sent."""
    auth = bearer(broken.key("write"))
    sqs = broken.client.store.aws.sqs
    broken.client.store.aws.s3.delete_bucket(Bucket=broken.settings.bucket)
    with served(broken, tmp_path / "log") as api:
        assert problem(api.get("/readyz"), 503)["failing"] == ["bucket"]
        check_not_acknowledged(post(api, auth, upsert("k")), broken)
    url = sqs.get_queue_url(QueueName=broken.settings.queue)["QueueUrl"]
    assert "Messages" not in sqs.receive_message(QueueUrl=url)


def test_without_aws_the_process_is_alive_but_not_ready(tmp_path: Path) -> None:
    """`/readyz` answers within 10 s although AWS does not answer it, and names all parts."""
    with served(deployment_at(f"http://127.0.0.1:{free_port()}"), tmp_path / "log") as api:
        began = time.monotonic()
        assert problem(api.get("/readyz"), 503)["failing"] == ["bucket", "ledger", "queue"]
        assert time.monotonic() - began < 10
        assert api.get("/livez").status_code == 200


def test_a_wait_that_is_too_short_returns_the_acknowledgement(broken: Deployment, tmp_path: Path) -> None:
    """A request that does not end within the wait is answered with 202; here no worker runs."""
    with served(broken, tmp_path / "log") as api:
        answer = post(api, bearer(broken.key("write")), upsert("k"), wait=0.3)
    assert (answer.status_code, set(answer.json())) == (202, {"request_id", "status_url"})


def test_keys_are_not_logged(broken: Deployment, tmp_path: Path) -> None:
    """Neither a known nor an unknown key appears in the log of an HTTP API that failed."""
    key = broken.key("write")
    with served(broken, tmp_path / "log") as api:
        broken.client.store.aws.dynamodb.delete_table(TableName=broken.settings.ledger_table)
        check_not_acknowledged(post(api, bearer(key), upsert("k")), broken)
        problem(post(api, bearer(UNKNOWN_KEY), upsert("k")), 503)
    log = (tmp_path / "log").read_text()
    assert "deployment-broken" in log
    assert "mds_" not in log
