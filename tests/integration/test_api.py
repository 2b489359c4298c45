"""The HTTP API as its callers see it: real processes of uvicorn and the worker, over the embedded AWS."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
from tests.waiting import until

ROOT = Path(__file__).parents[2]
MAX_BODY = 2**20
PROBLEM = "application/problem+json"
UNKNOWN_KEY = "mds_" + "A" * 43


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A namespace of its own in the embedded AWS."""

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
def process(*command: str, environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=dict(environ), stdout=output, stderr=output
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(15)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def served(deployment: Deployment, log: Path) -> Iterator[httpx.Client]:
    """A client of an HTTP API that serves, without a key."""
    port = free_port()
    # Longer than the client's 5 s, as behind a load balancer: the side that sends must be the first to let go.
    command = ("uvicorn", "--factory", "mdstore.api:create_api", "--port", str(port), "--timeout-keep-alive", "75")
    with (
        process(*command, environ=deployment.environ, log=log) as running,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http,
    ):

        def serves() -> bool:
            assert running.poll() is None, log.read_text()
            try:
                return http.get("/livez").status_code == 200
            except httpx.TransportError:
                return False

        until(serves)
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def aws() -> Iterator[EmbeddedAws]:
    with EmbeddedAws(port=free_port()) as running:
        yield running


@pytest.fixture(scope="module")
def deployment(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A provisioned deployment with a worker."""
    made = deployment_at(aws.url)
    list(provision(made.settings))
    command = ("celery", "-A", "workers.celery_app", "worker", "-l", "WARNING", "-c", "1")
    with process(*command, environ=made.environ, log=tmp_path_factory.mktemp("worker") / "log"):
        yield made


@pytest.fixture(scope="module")
def door(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The HTTP API, called without a key."""
    with served(deployment, tmp_path_factory.mktemp("api") / "log") as http:
        yield http


@pytest.fixture(scope="module")
def auth(deployment: Deployment) -> dict[str, str]:
    """The header of a key of the source erp that may write and read."""
    return bearer(deployment.key("write", "read"))


@pytest.fixture
def key() -> str:
    """A key of a record, and an idempotency key, that no other test uses."""
    return uuid4().hex


def upsert(key: str, **data: Any) -> dict[str, Any]:
    return {"op": "upsert", "entity": "item", "key": key, "data": data}


def insert(key: str, **data: Any) -> dict[str, Any]:
    return {**upsert(key, **data), "op": "insert"}


def post(
    door: httpx.Client, auth: Mapping[str, str], *operations: Any, wait: float = 0, **headers: str
) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return door.post(
        "/v1/requests", params={"wait": wait}, json={"operations": operations}, headers={**auth, **headers}
    )


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of an answer, its form checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    document: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "instance"} <= document.keys()
    assert document["status"] == status
    return document


# -- submitting


def test_a_request_is_applied_and_read_back(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """202 with where to look; there the request completes, and the record is there with version 1 and its writer."""
    answer = post(door, auth, insert(key, name="Ångström", empty=""), idempotency_key=key)
    assert answer.status_code == 202
    assert answer.json() == {"request_id": f"erp:{key}", "status_url": f"/v1/requests/erp:{key}"}
    assert answer.headers["location"] == f"/v1/requests/erp:{key}"

    until(lambda: bool(door.get(answer.headers["location"], headers=auth).json()["state"] == "completed"))

    state = door.get(answer.headers["location"], headers=auth).json()
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
    record = door.get(f"/v1/records/item/{key}", headers=auth).json()
    assert record.pop("updated_at").endswith("Z")
    assert record == {
        "entity": "item",
        "key": key,
        "version": 1,
        "data": {"name": "Ångström", "empty": ""},
        "updated_by": f"erp:{key}/0/0",
    }


def test_waiting_gives_the_final_state(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """200 with the summary once the request is final within the wait."""
    answer = post(door, auth, insert(key), insert(f"{key}-2"), wait=30)
    assert answer.status_code == 200
    summary = answer.json()
    assert (summary["state"], summary["applied"], summary["applied_by_op"]) == ("completed", 2, {"insert": 2})
    assert summary["status_url"] == answer.headers["location"]
    assert door.get(summary["status_url"], headers=auth).json()["request_id"] == summary["request_id"]


def test_the_same_again_gets_the_same_answer(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """The same idempotency key and operations, once or at the same moment, are one request with one effect."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(door, auth, upsert(key, n=1), idempotency_key=key), range(8)))
    answers.append(post(door, auth, upsert(key, n=1), idempotency_key=key))
    assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}

    assert post(door, auth, upsert(key, n=1), wait=30, idempotency_key=key).json()["applied"] == 1
    assert door.get(f"/v1/records/item/{key}", headers=auth).json()["version"] == 1


def test_the_same_key_with_another_body_is_a_conflict(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """409, and the first body is what counts."""
    assert post(door, auth, upsert(key, n=1), idempotency_key=key).status_code == 202
    document = problem(post(door, auth, upsert(key, n=2), idempotency_key=key), 409)
    assert document["type"] == "urn:mdstore:problem:request-conflict"
    post(door, auth, upsert(key, n=1), wait=30, idempotency_key=key)
    assert door.get(f"/v1/records/item/{key}", headers=auth).json()["data"] == {"n": 1}


def test_two_sources_may_use_the_same_idempotency_key(
    door: httpx.Client, deployment: Deployment, auth: dict[str, str], key: str
) -> None:
    """The source is the namespace of idempotency keys."""
    other = bearer(deployment.key("write", source="crm"))
    assert post(door, auth, upsert(key, n=1), idempotency_key=key).json()["request_id"] == f"erp:{key}"
    assert post(door, other, upsert(key, n=2), idempotency_key=key).json()["request_id"] == f"crm:{key}"


def test_without_idempotency_key_each_call_is_a_request(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Two calls without the header get two ids, both beginning with the source."""
    ids = {post(door, auth, upsert(key)).json()["request_id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(one.startswith("erp:") for one in ids)


@pytest.mark.parametrize("name", ["", "a b", "a/../b", "a//b", "x" * 197, "ü", "a#b"])
def test_a_bad_idempotency_key_is_named(door: httpx.Client, auth: dict[str, str], name: str) -> None:
    """422 names the header."""
    headers = httpx.Headers({**auth, "Idempotency-Key": name}, encoding="utf-8")
    answer = door.post("/v1/requests", json={"operations": []}, headers=headers)
    assert [flaw["field"] for flaw in problem(answer, 422)["errors"]] == ["Idempotency-Key"]


def test_many_at_once_are_all_accepted(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """32 different requests from 16 threads are all durable and all applied."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: post(door, auth, insert(f"{key}-{n}"), wait=60), range(32)))
    assert [(answer.status_code, answer.json()["applied"]) for answer in answers] == [(200, 1)] * 32


def test_invalid_operations_are_named_and_nothing_is_stored(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """422 has index, field and reason of each; the good operation among them is not applied, and the key stays free."""
    bad = [insert(key), {"op": "insert", "entity": "item", "key": "k"}, {**insert("k"), "key": 7}, {"op": "grow"}, 5]
    document = problem(post(door, auth, *bad, idempotency_key=key), 422)
    assert document["type"] == "urn:mdstore:problem:invalid-operations"
    assert document["count"] == 4
    assert [(flaw["index"], flaw["field"]) for flaw in document["errors"]][:2] == [(1, "data"), (2, "key")]
    assert [flaw["index"] for flaw in document["errors"]] == [1, 2, 3, 4]
    assert all(flaw["reason"] for flaw in document["errors"])
    problem(door.get(f"/v1/requests/erp:{key}", headers=auth), 404)

    assert post(door, auth, insert(f"{key}-good"), wait=30, idempotency_key=key).json()["applied"] == 1
    problem(door.get(f"/v1/records/item/{key}", headers=auth), 404)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"operations":{}}', b'{"operations":[],"more":1}', b'{"operations":[1 2]}', b"[" * 100_000],
)
def test_a_malformed_body_is_refused(door: httpx.Client, auth: dict[str, str], body: bytes) -> None:
    """422 for what is not the envelope of operations."""
    answer = door.post("/v1/requests", content=body, headers={**auth, "Content-Type": "application/json"})
    assert [(flaw["index"], flaw["field"]) for flaw in problem(answer, 422)["errors"]] == [(None, "body")]


def ndjson(door: httpx.Client, auth: Mapping[str, str], body: bytes, **parameters: Any) -> httpx.Response:
    headers = {**auth, "Content-Type": "application/x-ndjson; charset=utf-8"}
    return door.post("/v1/requests", content=body, headers=headers, params=parameters)


def test_ndjson_is_one_operation_a_line(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Lines of either ending, the last one without, empty ones between."""
    lines = [json.dumps(insert(f"{key}-{n}")).encode() for n in range(3)]
    answer = ndjson(door, auth, lines[0] + b"\n\n" + lines[1] + b"\r\n" + lines[2], wait=30)
    assert (answer.status_code, answer.json()["operations"], answer.json()["applied"]) == (200, 3, 3)


def test_a_malformed_line_is_an_invalid_operation(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """422 names the line by its index, and the lines around it are not applied."""
    good = json.dumps(insert(key)).encode()
    document = problem(ndjson(door, auth, good + b'\n{"op":\n' + good.replace(b"insert", b"upsert")), 422)
    assert (document["count"], document["errors"][0]["index"], document["errors"][0]["field"]) == (1, 1, "line")
    problem(door.get(f"/v1/records/item/{key}", headers=auth), 404)


NUMBERS = (
    b'{"big":1234567890123456789,"digits":12345678901234567890.123456789012345678,"deep":[-0.1,{"n":9007199254740993}]}'
)


@pytest.mark.parametrize("form", ["application/json", "application/x-ndjson"])
def test_numbers_come_back_exactly(door: httpx.Client, auth: dict[str, str], key: str, form: str) -> None:
    """A 19-digit integer and a 38-digit decimal are byte for byte in the record, and in the listing."""
    operation = b'{"op":"insert","entity":"exact","key":"%b","data":%b}' % (key.encode(), NUMBERS)
    body = b'{"operations":[%b]}' % operation if form == "application/json" else operation
    headers = {**auth, "Content-Type": form}
    assert door.post("/v1/requests?wait=30", content=body, headers=headers).json()["applied"] == 1
    record = door.get(f"/v1/records/exact/{key}", headers=auth)
    assert b'"data":' + NUMBERS in record.content
    assert record.content in door.get("/v1/records/exact", headers=auth).content


def test_a_sequence_is_shown(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """A record that was written with a sequence says so, exactly."""
    post(door, auth, {**upsert(key), "sequence": 10**30}, wait=30)
    assert b'"sequence":1000000000000000000000000000000,' in door.get(f"/v1/records/item/{key}", headers=auth).content


def test_a_body_too_large_is_refused_when_announced(door: httpx.Client, auth: dict[str, str]) -> None:
    """413 on the Content-Length."""
    assert problem(ndjson(door, auth, b" " * (MAX_BODY + 1)), 413)["type"] == "urn:mdstore:problem:too-large"


def test_a_body_too_large_is_refused_as_it_comes(door: httpx.Client, auth: dict[str, str]) -> None:
    """413 without a Content-Length, before the body has ended."""
    headers = {**auth, "Content-Type": "application/x-ndjson"}
    chunks = (b" " * 65_536 for _ in range(MAX_BODY // 65_536 + 1))
    problem(door.post("/v1/requests", content=chunks, headers=headers), 413)


def test_a_body_of_just_the_limit_is_taken(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """The limit itself is allowed, and such a body goes through the temporary file."""
    line = json.dumps(insert(key)).encode()
    assert ndjson(door, auth, line + b" " * (MAX_BODY - len(line)), wait=30).json()["applied"] == 1


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/csv"}, {"Content-Type": "application/json", "Content-Encoding": "gzip"}]
)
def test_another_content_type_is_refused(door: httpx.Client, auth: dict[str, str], headers: dict[str, str]) -> None:
    """415 for what is neither JSON nor NDJSON, or is compressed."""
    assert (
        "application/x-ndjson"
        in problem(door.post("/v1/requests", content=b"x", headers={**auth, **headers}), 415)["detail"]
    )


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon"])
def test_a_wait_out_of_range_is_refused(door: httpx.Client, auth: dict[str, str], wait: str) -> None:
    """422 names the parameter."""
    answer = ndjson(door, auth, b"", wait=wait)
    assert [flaw["field"] for flaw in problem(answer, 422)["errors"]] == ["wait"]


# -- keys


@pytest.mark.parametrize(
    "headers", [{}, bearer(UNKNOWN_KEY), bearer("x"), {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}]
)
@pytest.mark.parametrize("call", [("POST", "/v1/requests"), ("GET", "/v1/requests/x"), ("GET", "/v1/records/item/x")])
def test_without_a_known_key_nothing_is_answered(
    door: httpx.Client, headers: dict[str, str], call: tuple[str, str]
) -> None:
    """401 asks for a bearer."""
    answer = door.request(*call, headers=headers)
    problem(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_is_good_for_its_scopes_only(door: httpx.Client, deployment: Deployment) -> None:
    """403 names the scope that is missing: neither write nor read nor operate gives another."""
    writer, reader, operator = (bearer(deployment.key(scope)) for scope in ("write", "read", "operate"))
    assert "write" in problem(post(door, reader, upsert("k")), 403)["detail"]
    assert "write" in problem(post(door, operator, upsert("k")), 403)["detail"]
    for path in ("/v1/requests/x", "/v1/requests/x/outcomes", "/v1/records/item/k", "/v1/records/item"):
        assert "read" in problem(door.get(path, headers=writer), 403)["detail"]
        assert "read" in problem(door.get(path, headers=operator), 403)["detail"]


def test_a_revoked_key_that_was_not_used_is_refused(door: httpx.Client, deployment: Deployment) -> None:
    """Revoking takes effect in other processes."""
    key = deployment.key("read")
    deployment.client.store.api_keys.revoke(key)
    problem(door.get("/v1/records/item", headers=bearer(key)), 401)


def test_a_request_of_another_source_is_not_there(
    door: httpx.Client, deployment: Deployment, auth: dict[str, str], key: str
) -> None:
    """404 to another source's key, the same as for a request that does not exist; a key that operates sees it."""
    place = post(door, auth, upsert(key), idempotency_key=key).json()["status_url"]
    other = bearer(deployment.key("read", "write", source="crm"))
    operator = bearer(deployment.key("read", "operate", source="ops"))
    for path in (place, f"{place}/outcomes"):
        assert door.get(path, headers=operator).status_code == 200
        hidden = problem(door.get(path, headers=other), 404)
        absent = problem(door.get(path.replace(key, "0" * 32), headers=other), 404)
        assert {**absent, "detail": "", "instance": ""} == {**hidden, "detail": "", "instance": ""}
        assert absent["detail"].replace("0" * 32, key) == hidden["detail"]


# -- looking up


def test_outcomes_come_by_page(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Following the cursors gives every operation once; `only` picks by outcome, refusals have their reason."""
    post(door, auth, insert(f"{key}-1"), insert(f"{key}-3"), wait=30)
    place = post(door, auth, *(insert(f"{key}-{n}") for n in range(5)), wait=30).json()["status_url"]

    pages: list[list[dict[str, Any]]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = door.get(f"{place}/outcomes", params={"limit": 2, "cursor": cursor}, headers=auth).json()
        pages.append(page["outcomes"])
        cursor = page["cursor"]
    assert [len(page) for page in pages] == [2, 2, 1]
    found = [outcome for page in pages for outcome in page]
    assert [outcome["index"] for outcome in found] == [0, 1, 2, 3, 4]
    assert found[0] == {"index": 0, "outcome": "applied", "op": "insert", "entity": "item", "key": f"{key}-0"}

    refused = door.get(f"{place}/outcomes", params={"only": "refused"}, headers=auth).json()
    assert [(one["index"], one["reason"]) for one in refused["outcomes"]] == [(1, "exists"), (3, "exists")]
    assert refused["cursor"] is None


@pytest.mark.parametrize("parameters", [{"only": "some"}, {"limit": "0"}, {"limit": "x"}, {"cursor": "1:x"}])
def test_bad_parameters_of_outcomes_are_named(
    door: httpx.Client, auth: dict[str, str], key: str, parameters: dict[str, str]
) -> None:
    """422 names the parameter."""
    place = post(door, auth, upsert(key)).json()["status_url"]
    document = problem(door.get(f"{place}/outcomes", params=parameters, headers=auth), 422)
    assert [flaw["field"] for flaw in document["errors"]] == list(parameters)


@pytest.mark.parametrize("name", ["2026/11:23@x+y=z", "outcomes", "a/outcomes", "a/outcomes/outcomes"])
def test_any_request_id_can_be_looked_up(door: httpx.Client, auth: dict[str, str], key: str, name: str) -> None:
    """An id may hold what has a meaning in a URL, and may even end like the path of its outcomes."""
    answer = post(door, auth, upsert(key), wait=30, idempotency_key=f"{key}/{name}")
    place = answer.json()["status_url"]
    assert door.get(place, headers=auth).json()["request_id"] == f"erp:{key}/{name}"
    assert [one["key"] for one in door.get(f"{place}/outcomes", headers=auth).json()["outcomes"]] == [key]


def test_an_etag_saves_sending_what_is_known(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """304 without a body while the version is the named one; after an update the record again, with another tag."""
    path = f"/v1/records/item/{key}"
    post(door, auth, upsert(key, n=1), wait=30)
    assert door.get(path, headers=auth).headers["etag"] == '"1"'
    for names in ('"1"', 'W/"1"', '"7", "1"', "*"):
        answer = door.get(path, headers={**auth, "If-None-Match": names})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"1"')
    assert door.get(path, headers={**auth, "If-None-Match": '"7", 1'}).status_code == 200
    post(door, auth, upsert(key, n=2), wait=30)
    answer = door.get(path, headers={**auth, "If-None-Match": '"1"'})
    assert (answer.status_code, answer.json()["data"], answer.headers["etag"]) == (200, {"n": 2}, '"2"')


@pytest.mark.parametrize("name", ["a/b", "../x", "a?b=c#d", "100%", "ü 東京 🛫", "a%2Fb", "x/"])
def test_any_key_of_a_record_can_be_looked_up(door: httpx.Client, auth: dict[str, str], key: str, name: str) -> None:
    """A record's key may be any text; in the path it is percent-encoded."""
    name = f"{key}{name}"
    post(door, auth, upsert(name), wait=30)
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    assert door.get(f"/v1/records/item/{encoded}", headers=auth).json()["key"] == name


def test_an_absent_record_is_a_problem(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """404 for what never was and for what was deleted."""
    problem(door.get(f"/v1/records/item/{key}", headers=auth), 404)
    post(door, auth, upsert(key), {"op": "delete", "entity": "item", "key": key}, wait=30)
    problem(door.get(f"/v1/records/item/{key}", headers=auth), 404)


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
def test_a_name_that_cannot_be_is_refused(door: httpx.Client, auth: dict[str, str], path: str, field: str) -> None:
    """422 says which part of the path is wrong."""
    assert [flaw["field"] for flaw in problem(door.get(path, headers=auth), 422)["errors"]] == [field]


def test_records_are_listed_by_page(door: httpx.Client, auth: dict[str, str], key: str) -> None:
    """Following the cursors gives every record of the entity once and no other's."""
    entity = f"listed-{key}"
    wanted = {f"{n}#/ü" for n in range(5)}
    post(door, auth, *({**insert(name), "entity": entity} for name in wanted), insert(key), wait=30)
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = door.get(f"/v1/records/{entity}", params={"limit": 2, "cursor": cursor}, headers=auth).json()
        assert len(page["records"]) <= 2
        found += [record["key"] for record in page["records"]]
        cursor = page["cursor"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("cursor", ["x", "!", "e30", "eyJwayI6eyJTIjoibm9uZSJ9fQ", "eyJwayI6eyJOIjoiMSJ9fQ", "e\u00fc"])
def test_a_cursor_that_was_never_given_is_refused(door: httpx.Client, auth: dict[str, str], cursor: str) -> None:
    """422 for what does not decode to a record's primary key."""
    document = problem(door.get("/v1/records/item", params={"cursor": cursor}, headers=auth), 422)
    assert [flaw["field"] for flaw in document["errors"]] == ["cursor"]


# -- the rest


def test_a_deployment_that_works_is_ready(door: httpx.Client) -> None:
    """Health needs no key."""
    assert (door.get("/livez").status_code, door.get("/readyz").status_code) == (200, 200)


def test_every_error_is_a_problem_document(door: httpx.Client) -> None:
    """Unknown routes and methods too; 405 says what is allowed."""
    assert problem(door.get("/v1/nothing"), 404)["instance"] == "/v1/nothing"
    answer = door.delete("/v1/requests")
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_the_root_leads_to_the_documentation(door: httpx.Client) -> None:
    """`/` redirects to the page that shows the OpenAPI document."""
    answer = door.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    page = door.get("/docs").text
    assert "/openapi.json" in page
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(parts) >= 3
    assert all(part.startswith("/") and door.get(part).status_code == 200 for part in parts), "fetched from elsewhere"


def test_the_openapi_document_is_whole(door: httpx.Client) -> None:
    """It is valid OpenAPI, all its references resolve, and it has body, bearer and problems."""
    document = door.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    names = document["components"]["schemas"].keys()
    assert {place.removeprefix("#/components/schemas/") for place in references(document)} <= names
    submit = document["paths"]["/v1/requests"]["post"]
    assert set(submit["requestBody"]["content"]) == {"application/json", "application/x-ndjson"}
    assert set(submit["responses"]) == {"200", "202", "401", "403", "409", "413", "415", "422", "503"}
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


# -- deployments that do not work


@pytest.fixture
def broken(aws: EmbeddedAws) -> Deployment:
    """A provisioned deployment without worker, to take parts from."""
    made = deployment_at(aws.url)
    list(provision(made.settings))
    return made


def withheld(answer: httpx.Response, deployment: Deployment) -> None:
    """Check that a call was not acknowledged, says when to come back and tells nothing of the inside."""
    document = problem(answer, 503)
    assert document.keys() == {"type", "title", "status", "detail", "instance"}
    assert document["detail"].startswith("The call was not acknowledged. ")
    assert "error occurred" not in document["detail"]
    assert int(answer.headers["retry-after"]) > 0
    assert "location" not in answer.headers
    assert deployment.settings.namespace not in answer.text
    assert "request_id" not in answer.text


def test_a_missing_table_is_not_ready(broken: Deployment, tmp_path: Path) -> None:
    """/readyz names the ledger and nothing else; /livez is content; a call that needs the table gets 503."""
    auth = bearer(broken.key("write", "read"))
    with served(broken, tmp_path / "log") as door:
        assert door.get("/readyz").status_code == 200
        broken.client.store.aws.dynamodb.delete_table(TableName=broken.settings.ledger_table)
        assert problem(door.get("/readyz"), 503)["failing"] == ["ledger"]
        assert door.get("/livez").status_code == 200
        withheld(post(door, auth, upsert("k")), broken)


def test_a_missing_queue_acknowledges_nothing(broken: Deployment, tmp_path: Path) -> None:
    """503 where the payload is stored and its message cannot be sent; the same again is accepted once it can."""
    auth = bearer(broken.key("write", "read"))
    sqs, queue = broken.client.store.aws.sqs, broken.settings.queue
    with served(broken, tmp_path / "log") as door:
        sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=queue)["QueueUrl"])
        assert problem(door.get("/readyz"), 503)["failing"] == ["queue"]
        withheld(post(door, auth, upsert("k"), idempotency_key="again"), broken)
        list(provision(broken.settings))
        assert door.get("/readyz").status_code == 200
        assert post(door, auth, upsert("k"), idempotency_key="again").status_code == 202
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])["Attributes"]
    assert counts == {"ApproximateNumberOfMessages": "1"}


def test_a_missing_bucket_acknowledges_nothing(broken: Deployment, tmp_path: Path) -> None:
    """503 where the payload cannot be stored, and no message is sent."""
    auth = bearer(broken.key("write"))
    sqs = broken.client.store.aws.sqs
    broken.client.store.aws.s3.delete_bucket(Bucket=broken.settings.bucket)
    with served(broken, tmp_path / "log") as door:
        assert problem(door.get("/readyz"), 503)["failing"] == ["bucket"]
        withheld(post(door, auth, upsert("k")), broken)
    url = sqs.get_queue_url(QueueName=broken.settings.queue)["QueueUrl"]
    assert "Messages" not in sqs.receive_message(QueueUrl=url)


def test_without_aws_the_process_lives_and_is_not_ready(tmp_path: Path) -> None:
    """/readyz answers within its patience though nothing answers it, and names all parts."""
    with served(deployment_at(f"http://127.0.0.1:{free_port()}"), tmp_path / "log") as door:
        began = time.monotonic()
        assert problem(door.get("/readyz"), 503)["failing"] == ["bucket", "ledger", "queue"]
        assert time.monotonic() - began < 10
        assert door.get("/livez").status_code == 200


def test_a_wait_that_is_too_short_gets_the_acknowledgement(broken: Deployment, tmp_path: Path) -> None:
    """202 when the request is not final within the wait; here no worker runs."""
    with served(broken, tmp_path / "log") as door:
        answer = post(door, bearer(broken.key("write")), upsert("k"), wait=0.3)
    assert (answer.status_code, set(answer.json())) == (202, {"request_id", "status_url"})


def test_keys_are_not_logged(broken: Deployment, tmp_path: Path) -> None:
    """Neither a known nor an unknown key is in the log of an HTTP API that failed."""
    key = broken.key("write")
    with served(broken, tmp_path / "log") as door:
        broken.client.store.aws.dynamodb.delete_table(TableName=broken.settings.ledger_table)
        withheld(post(door, bearer(key), upsert("k")), broken)
        problem(post(door, bearer(UNKNOWN_KEY), upsert("k")), 503)
    log = (tmp_path / "log").read_text()
    assert "deployment-broken" in log
    assert "mds_" not in log
