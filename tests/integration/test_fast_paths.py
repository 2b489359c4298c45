"""The fast paths of the HTTP API give the answers of FastAPI's routes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from starlette.types import Message, Receive, Scope, Send

from mdstore.api import create_api
from mdstore.api.fast_paths import FastPaths
from mdstore.local.emulator import EmbeddedAws
from tests.integration.api_process import ApiProcess, api_process, process

#: No call with a header that comes twice is served by the fast paths.
TWICE = [("X-Twice", "1"), ("X-Twice", "1")]
JSON, NDJSON = "application/json", "application/x-ndjson"
GOOD = b'{"operations":[{"op":"upsert","entity":"item","key":"k","data":{"n":1.50,"text":"\xc3\xbc"}}]}'


@pytest.fixture(scope="module")
def api(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """Yield an API with a worker; its store has a record, a deleted one, and one whose data is in S3."""
    with api_process(aws.url, tmp_path_factory.mktemp("api") / "log") as running:
        environ = running.environ
        command = ("celery", "-A", "workers.celery_app", "worker", "-l", "WARNING", "-c", "1")
        with process(*command, environ=environ, log=tmp_path_factory.mktemp("worker") / "log"):
            operations: list[dict[str, Any]] = [
                {"op": "upsert", "entity": "item", "key": "k/ü", "data": {"n": 1}, "sequence": 10**30},
                {"op": "upsert", "entity": "item", "key": "gone", "data": {}},
                {"op": "delete", "entity": "item", "key": "gone"},
                {"op": "upsert", "entity": "item", "key": "large", "data": {"text": "x" * 500_000}},
                {"op": "upsert", "entity": "item", "key": "many", "data": {"numbers": list(range(20_000))}},
                {"op": "insert", "entity": "item", "key": "k/ü", "data": {}},
            ]
            running.client.submit(operations, request_id="erp:a/outcomes", source="erp").wait()
            running.client.submit(operations[:1], request_id="crm:b", source="crm").wait()
            yield running


def answers(api: ApiProcess, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> list[Any]:
    """Make a call on both ways; returns the answers without what differs between any two calls."""
    both = []
    for more in ([], TWICE):
        answer = api.http.request(method, path, headers=[*headers, *more], content=body)
        kept = {name: value for name, value in answer.headers.items() if name != "date"}
        both.append((answer.status_code, kept, answer.content))
    return both


GETS = [
    "/v1/records/item/k%2F%C3%BC",
    "/v1/records/item/k/%C3%BC",
    "/v1/records/item/large",
    "/v1/records/item/many",
    "/v1/records/item/gone",
    "/v1/records/item/none",
    "/v1/records/item/",
    "/v1/records/item/a%00b",
    "/v1/records/item/a%0Ab",
    "/v1/records/1x/k",
    "/v1/records//k",
    "/v1/records/item",
    "/v1/records/item/none?x=1",
    "/v1/requests/erp:a%2Foutcomes",
    "/v1/requests/erp:a/outcomes",
    "/v1/requests/erp:a/outcomes/outcomes",
    "/v1/requests/crm:b",
    "/v1/requests/crm:none",
    "/v1/requests/a%23b",
    "/v1/requests/",
    "/v1/requests",
    "/v1/nothing",
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", GETS)
def test_reads_have_the_same_answers(api: ApiProcess, method: str, path: str) -> None:
    """Status, headers and body are the same."""
    fast, slow = answers(api, method, path, [], b"")
    assert fast == slow


@pytest.mark.parametrize("tags", ['"1"', '"7", W/"1"', "*", '"7"', ""])
def test_conditional_reads_have_the_same_answers(api: ApiProcess, tags: str) -> None:
    """So it is with If-None-Match."""
    fast, slow = answers(api, "GET", "/v1/records/item/large", [("If-None-Match", tags)], b"")
    assert fast == slow
    assert fast[0] == (200 if tags in ('"7"', "") else 304)


SUBMITS: list[tuple[str, list[tuple[str, str]], bytes]] = [
    ("", [("Content-Type", JSON)], GOOD),
    ("?wait=0", [("Content-Type", JSON)], GOOD),
    ("?wait=1.5", [("Content-Type", JSON)], GOOD),
    ("?wait=30", [("Content-Type", JSON)], GOOD),
    ("?wait=61", [("Content-Type", JSON)], GOOD),
    ("?wait=-1", [("Content-Type", JSON)], GOOD),
    ("?wait=9999", [("Content-Type", JSON)], GOOD),
    ("?wait=", [("Content-Type", JSON)], GOOD),
    ("?newest_wins=true", [("Content-Type", JSON)], GOOD),
    ("", [("Content-Type", NDJSON)], b'{"op":"delete","entity":"item","key":"x"}\n\n'),
    ("", [("Content-Type", NDJSON)], b"x"),
    ("", [("Content-Type", JSON)], b"{"),
    ("", [("Content-Type", JSON)], b"[]"),
    ("", [("Content-Type", JSON)], b'{"operations":[]}'),
    ("", [("Content-Type", JSON)], b'{"operations":[{"op":"grow"}]}'),
    ("", [("Content-Type", "text/csv")], GOOD),
    ("", [], GOOD),
    ("", [("Content-Type", JSON), ("Content-Encoding", "gzip")], GOOD),
]


@pytest.mark.parametrize(("query", "headers", "body"), SUBMITS)
def test_submits_have_the_same_answers(
    api: ApiProcess, query: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    """The second call repeats the first, so even the request's id and its final state are the same."""
    headers = [*headers, ("Idempotency-Key", uuid4().hex)]
    fast, slow = answers(api, "POST", f"/v1/requests{query}", headers, body)
    assert fast == slow


@pytest.mark.parametrize("key", ["", "a b", '"quoted"', "x" * 197])
def test_idempotency_keys_have_the_same_answers(api: ApiProcess, key: str) -> None:
    """Valid and invalid ones."""
    fast, slow = answers(api, "POST", "/v1/requests", [("Content-Type", JSON), ("Idempotency-Key", key)], GOOD)
    assert fast == slow


def test_keys_have_the_same_answers(api: ApiProcess) -> None:
    """Unknown keys and missing scopes are refused, also once the key is cached."""
    reader, writer = api.key("read", source="erp"), api.key("write", source="erp")
    for credentials in (reader, writer, {"Authorization": "Basic eDp5"}, {"Authorization": "bearer x"}):
        headers = [*credentials.items(), ("Content-Type", JSON), ("Idempotency-Key", "keys")]
        for _ in range(2):
            for method, path, body in (("GET", "/v1/records/item/large", b""), ("POST", "/v1/requests", GOOD)):
                fast, slow = answers(api, method, path, headers, body)
                assert fast == slow


def test_a_call_without_anything_unusual_takes_the_fast_path(api: ApiProcess) -> None:
    """Otherwise these tests would compare FastAPI's routes with themselves."""
    import asyncio  # noqa: PLC0415

    key = api.key("read", source="erp")["Authorization"]
    app = create_api(client=api.client)
    passed: list[str] = []

    async def fastapi(scope: Scope, _receive: Receive, _send: Send) -> None:
        passed.append(scope["path"])

    async def call(*headers: tuple[bytes, bytes]) -> list[Message]:
        sent: list[Message] = []
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/records/item/large",
            "query_string": b"",
            "headers": [(b"authorization", key.encode()), *headers],
            "app": app,
        }

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request"}

        await FastPaths(fastapi)(scope, receive, send)
        return sent

    async def scene() -> None:
        async with app.router.lifespan_context(app):
            assert await call() == []  # the key is not cached yet
            assert api.client.store.api_keys.find(key.removeprefix("Bearer ")) is not None
            assert (await call())[0]["status"] == 200
            assert await call((b"x-twice", b"1"), (b"x-twice", b"1")) == []
        assert len(passed) == 2

    asyncio.run(scene())


def test_calls_below_a_prefix_have_the_same_answers(aws: EmbeddedAws, tmp_path: Path) -> None:
    """A proxy's prefix is part of the path and of the status URL."""
    with api_process(aws.url, tmp_path / "log", with_uvicorn=True, options=("--root-path", "/store")) as api:
        for path in ("/v1/records/item/k", "/v1/requests/erp:none"):
            fast, slow = answers(api, "GET", path, [], b"")
            assert fast == slow
            assert fast[0] == 404
        answer = api.http.post("/v1/requests", content=GOOD, headers={"Content-Type": JSON})
        assert answer.json()["status_url"].startswith("/store/v1/requests/erp:")
