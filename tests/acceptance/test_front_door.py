"""The HTTP API follows HTTP's rules for methods, headers and bodies."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from uuid import uuid4

import httpx
import pytest

from mdstore.local.stack import Stack
from tests.waiting import until

OPERATION = {"op": "upsert", "entity": "door", "key": "k", "data": {"n": 1}}
JSON, NDJSON = "application/json", "application/x-ndjson"


@pytest.fixture(scope="module")
def door() -> Iterator[Stack]:
    """A stack with an HTTP API and a worker."""
    with Stack(environ={"MDSTORE_WAIT_TIME": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def http(door: Stack) -> Iterator[httpx.Client]:
    """A client that sends a key."""
    with httpx.Client(base_url=door.api_url, headers={"Authorization": f"Bearer {door.api_key}"}, timeout=90) as client:
        yield client


def post(http: httpx.Client, body: bytes | str, *headers: tuple[str, str], form: str = JSON, **query: Any) -> Any:
    return http.post("/v1/requests", content=body, headers=[("Content-Type", form), *headers], params=query)


def body_of(*operations: Any) -> str:
    return json.dumps({"operations": operations})


def error_fields(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 422, answer.text
    return [error["field"] for error in answer.json()["errors"]]


# -- HEAD


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/livez",
        "/readyz",
        "/v1/records/door/head",
        "/v1/records/door",
        "/v1/requests/none",
    ],
)
def test_head_is_answered_like_get(http: httpx.Client, path: str) -> None:
    """HEAD has the status and the headers of GET, and no body."""
    post(http, body_of({**OPERATION, "key": "head"}), wait=30)
    get, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert get.content or path == "/"
    for name in ("content-type", "content-length", "etag", "location"):
        assert head.headers.get(name) == get.headers.get(name)


def test_head_honours_if_none_match(http: httpx.Client) -> None:
    """HEAD answers 304 for a record that has not changed, and the connection stays usable."""
    post(http, body_of({**OPERATION, "key": "head-tag"}), wait=30)
    path = "/v1/records/door/head-tag"
    tag = http.head(path).headers["etag"]
    assert http.head(path, headers={"If-None-Match": tag}).status_code == 304
    assert http.get(path).status_code == 200


def test_allowed_methods_include_head(http: httpx.Client) -> None:
    """405 names HEAD beside GET, and HEAD is not allowed where GET is not."""
    answer = http.delete("/v1/records/door/k")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    answer = http.head("/v1/requests")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# -- headers and parameters


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Idempotency-Key", ("a", "b")),
        ("Content-Type", (JSON, NDJSON)),
        ("Content-Encoding", ("identity", "gzip")),
        ("Authorization", ("Bearer x", "Bearer y")),
    ],
)
def test_a_header_with_two_values_is_refused(http: httpx.Client, name: str, values: tuple[str, str]) -> None:
    """Two different values are 422, and the header is named; its values, which may be secret, are not repeated."""
    headers = [(name, value) for value in values]
    if name != "Content-Type":
        headers.append(("Content-Type", JSON))
    answer = http.post("/v1/requests", content=body_of(OPERATION), headers=headers)
    assert error_fields(answer) == [name]
    assert "Bearer" not in answer.text


def test_a_header_with_the_same_value_twice_is_accepted(http: httpx.Client) -> None:
    """Some proxies repeat a header; the same value twice is one value."""
    key = uuid4().hex
    answer = post(http, body_of(OPERATION), ("Idempotency-Key", key), ("Idempotency-Key", key))
    assert (answer.status_code, answer.json()["request_id"]) == (202, f"local:{key}")


@pytest.mark.parametrize("query", ["wait=0&wait=1", "newest_wins=true&newest_wins=false"])
def test_a_parameter_with_two_values_is_refused(http: httpx.Client, query: str) -> None:
    """Two different values of a query parameter are 422, and the parameter is named."""
    answer = http.post(f"/v1/requests?{query}", content=body_of(OPERATION), headers={"Content-Type": JSON})
    assert error_fields(answer) == [query.partition("=")[0]]
    answer = http.get("/v1/records/door?limit=1&limit=2")
    assert error_fields(answer) == ["limit"]


def test_several_if_none_match_lines_are_one_list(http: httpx.Client) -> None:
    """A record is unchanged if any line names its version."""
    post(http, body_of({**OPERATION, "op": "insert", "key": "tags"}), wait=30)
    path = "/v1/records/door/tags"
    assert http.get(path, headers=[("If-None-Match", '"7"'), ("If-None-Match", '"1"')]).status_code == 304
    assert http.get(path, headers=[("If-None-Match", '"1"'), ("If-None-Match", 'W/"7", "8"')]).status_code == 304
    assert http.get(path, headers=[("If-None-Match", '"7"'), ("If-None-Match", '"8"')]).status_code == 200


def test_a_quoted_idempotency_key_is_the_text_inside(http: httpx.Client) -> None:
    """The form of the IETF's draft, a string in quotes, is the key inside of the quotes."""
    key = uuid4().hex
    quoted = post(http, body_of(OPERATION), ("Idempotency-Key", f'"{key}"'))
    plain = post(http, body_of(OPERATION), ("Idempotency-Key", key))
    assert quoted.json() == plain.json() == {"request_id": f"local:{key}", "status_url": f"/v1/requests/local:{key}"}


@pytest.mark.parametrize("key", ['"', '""', '"a', 'a"', '"a"b"', '"a";x=1', "a, a"])
def test_a_badly_quoted_idempotency_key_is_refused(http: httpx.Client, key: str) -> None:
    """What is not one quoted key is 422."""
    assert error_fields(post(http, body_of(OPERATION), ("Idempotency-Key", key))) == ["Idempotency-Key"]


# -- bodies


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", "line 1, column 1: the text ends too early"),
        (b"{", "line 1, column 2: the text ends too early"),
        (b'{"operations":[1 2]}', "line 1, column 18: expected ',' or ']'"),
        ('{"operations":[\n {"key":"ü東🛫" "op":1}]}'.encode(), "line 2, column 15: expected ',' or '}'"),
        (b'{"operations":[]}}', "line 1, column 18: trailing characters"),
        (b'{"operations":["\xff"]}', "line 1, column 17: not UTF-8"),
        (b'{"operations":' + b"[" * 100_000, "nested too deeply"),
        (b'{"operations":[01]}', "line 1, column 17: "),
    ],
)
def test_malformed_json_is_400(http: httpx.Client, body: bytes, where: str) -> None:
    """The problem names line and column in plain words."""
    answer = post(http, body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert where in answer.json()["detail"]
    for python in ("b'", "byte", "Expecting", "char "):
        assert python not in answer.text


@pytest.mark.parametrize(
    "body", ["[]", "1", "null", '{"operations":{}}', '{"operations":[],"more":1}', '{"ops":[]}', "{}"]
)
def test_json_of_another_shape_is_422(http: httpx.Client, body: str) -> None:
    """JSON that is well formed and not `{"operations": [...]}` is 422; the detail has no Python in it."""
    answer = post(http, body)
    assert error_fields(answer) == ["body"]
    assert "b'" not in answer.text


def test_a_malformed_line_names_its_column(http: httpx.Client) -> None:
    """A line of NDJSON is an operation, so the operation is named, and the column in plain words."""
    line = json.dumps(OPERATION)
    answer = post(http, f'{line}\n{{"op":"insert" "key":1}}\n{{"op":\n', form=NDJSON)
    assert error_fields(answer) == ["line", "line"]
    assert [error["index"] for error in answer.json()["errors"]] == [1, 2]
    reasons = [error["reason"] for error in answer.json()["errors"]]
    assert "column 16: expected ',' or '}'" in reasons[0]
    assert "column 7: the text ends too early" in reasons[1]


@pytest.mark.parametrize(("form", "body"), [(JSON, '{"operations":[]}'), (NDJSON, ""), (NDJSON, "\n \n\r\n")])
def test_a_request_without_operations_is_422(http: httpx.Client, form: str, body: str) -> None:
    """Nothing is stored for it: the key can be used for a request with operations."""
    key = uuid4().hex
    assert error_fields(post(http, body, ("Idempotency-Key", key), form=form)) == ["operations"]
    assert http.get(f"/v1/requests/local:{key}").status_code == 404
    assert post(http, body_of(OPERATION), ("Idempotency-Key", key)).status_code == 202


@pytest.mark.parametrize("path", ["/v1/requests", "/livez", "/docs"])
def test_content_length_with_transfer_encoding_is_refused(door: Stack, path: str) -> None:
    """Such a message may be one request for a proxy and two for a server (RFC 9112, 6.1), so its connection ends."""
    smuggled = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", door.settings.api_port), timeout=10) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.api_key}\r\nContent-Type: {JSON}\r\n"
            f"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
            + smuggled
        )
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


# -- waiting


def _is_accepted(http: httpx.Client, request_id: str) -> bool:
    return http.get(f"/v1/requests/{request_id}").status_code == 200


def test_waiting_clients_do_not_slow_reads() -> None:
    """While 800 clients wait for requests that no worker takes, half of all reads take less than a second."""
    with Stack(with_worker=False, environ={"MDSTORE_WAIT_TIME": "1"}) as stack, ExitStack() as waiting:
        auth = f"Authorization: Bearer {stack.api_key}"
        body = body_of(OPERATION)
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        http = waiting.enter_context(httpx.Client(base_url=stack.api_url, headers=headers, timeout=90))
        for number in range(1, 801):
            connection = socket.create_connection(("127.0.0.1", stack.settings.api_port), timeout=10)
            waiting.enter_context(connection)
            connection.sendall(
                f"POST /v1/requests?wait=60 HTTP/1.1\r\nHost: x\r\n{auth}\r\nContent-Type: {JSON}\r\n"
                f"Idempotency-Key: {number}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if number % 50 == 0:  # a source may have a hundred bodies under way
                until(partial(_is_accepted, http, f"local:{number}"))
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert http.get("/v1/records/door/nothing").status_code == 404
            took.append(time.monotonic() - began)
    assert median(took) < 1, took
