"""Calls to AWS that an event loop drives behave like those of a thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time as clock
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from botocore.credentials import ReadOnlyCredentials

from mdstore.aws.dynamodb.attributes import is_small, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.event_loop import EventLoopRunner
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.local.emulator import free_port
from tests.unit.endpoint import Endpoint, Keys

QUICK = Retry(base=0.001, cap=0.01, patience=5)
ITEM = to_item({"pk": "a"})
FOUND = (200, {"Responses": {"t": [ITEM]}, "UnprocessedKeys": {}})
NOTHING = (200, {"Responses": {"t": []}, "UnprocessedKeys": {"t": {"Keys": [ITEM]}}})


def client_of(url: str, *, retry: Retry = QUICK, credentials: Any = None, timeout: float = 5.0) -> DynamoClient:
    http = SignedHttp(service="dynamodb", region="x", credentials=credentials or Keys(), timeout=timeout)
    return DynamoClient(http=http, endpoint=url, retry=retry)


def run(client: DynamoClient, scene: Callable[[EventLoopRunner], Awaitable[Any]]) -> Any:
    """Run a scene with a runner that is closed at its end."""

    async def framed() -> Any:
        runner = client.event_loop_runner()
        try:
            return await scene(runner)
        finally:
            runner.close()

    return asyncio.run(framed())


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test on both event loops."""
    if request.param == "uvloop":
        monkeypatch.setattr(asyncio, "run", uvloop.run)


def test_unprocessed_keys_are_asked_for_again(endpoint: Endpoint) -> None:
    """A throttle, a response without any processed key and a lost one are repeated, in one connection where it is kept."""
    endpoint.respond_with((400, {"__type": "x#ThrottlingException"}), NOTHING, (0, b""), FOUND)
    client = client_of(endpoint.url)
    assert run(client, lambda runner: runner.run(client.batch_get("t", [ITEM]))) == [ITEM]
    assert len(endpoint.requests) == 4


def test_calls_run_at_the_same_time(endpoint: Endpoint) -> None:
    """Twenty are made from one thread, and their connections are used again."""
    endpoint.respond_with(FOUND)
    client = client_of(endpoint.url)

    async def scene(runner: EventLoopRunner) -> None:
        for _ in range(3):
            found = await asyncio.gather(*(runner.run(client.batch_get("t", [ITEM])) for _ in range(20)))
            assert found == [[ITEM]] * 20

    threads = threading.active_count()
    run(client, scene)
    assert threading.active_count() <= threads + 20  # the endpoint's
    assert len(endpoint.requests) == 60
    assert len(endpoint.peers) <= 20


def test_errors_reach_the_task(endpoint: Endpoint) -> None:
    """An error that is no "not now" is raised at once."""
    endpoint.respond_with((400, {"__type": "x#ResourceNotFoundException", "message": "no table"}))
    client = client_of(endpoint.url)
    with pytest.raises(DeploymentBroken, match="no table"):
        run(client, lambda runner: runner.run(client.batch_get("t", [ITEM])))
    assert len(endpoint.requests) == 1


def test_without_an_answer_the_retries_end() -> None:
    """A refused connection is `Unavailable`."""
    client = client_of(f"http://127.0.0.1:{free_port()}", retry=Retry(base=0.01, cap=0.05, patience=0.2))
    with pytest.raises(Unavailable):
        run(client, lambda runner: runner.run(client.batch_get("t", [ITEM])))


def test_a_call_ends_in_time() -> None:
    """A service that takes the connection and says nothing makes a call fail after its time."""
    import socket  # noqa: PLC0415

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = client_of(url, retry=Retry(patience=0.0), timeout=0.2)
        began = clock.monotonic()
        with pytest.raises(Unavailable, match=r"(?i)time"):
            run(client, lambda runner: runner.run(client.batch_get("t", [ITEM])))
        assert clock.monotonic() - began < 5


def test_a_cancelled_caller_leaves_the_others_alone(endpoint: Endpoint) -> None:
    """The connection of its call is used again."""
    endpoint.respond_with(FOUND)
    client = client_of(endpoint.url)

    async def scene(runner: EventLoopRunner) -> Any:
        cancelled = asyncio.ensure_future(runner.run(client.batch_get("t", [ITEM])))
        other = asyncio.ensure_future(runner.run(client.batch_get("t", [ITEM])))
        await asyncio.sleep(0)
        cancelled.cancel()
        return await other

    assert run(client, scene) == [ITEM]


def test_a_large_response_is_decoded_in_a_thread(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding it would block the event loop."""
    item = to_item({"pk": "a", "data": "x" * 300_000})
    endpoint.respond_with((200, {"Responses": {"t": [item]}, "UnprocessedKeys": {}}))
    client = client_of(endpoint.url)
    used: list[object] = []
    original = asyncio.to_thread

    async def to_thread(call: Any, *arguments: Any) -> Any:
        used.append(call)
        return await original(call, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    assert run(client, lambda runner: runner.run(client.batch_get("t", [ITEM]))) == [item]
    assert len(used) == 1


class Role:
    """Keys of a role that are due once."""

    def __init__(self) -> None:
        self.renewed_by: list[threading.Thread] = []

    def refresh_needed(self) -> bool:
        return not self.renewed_by

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        self.renewed_by.append(threading.current_thread())
        return ReadOnlyCredentials("AKIDEXAMPLE", "secret", None)


def test_keys_of_a_role_are_renewed_in_a_thread(endpoint: Endpoint) -> None:
    """That takes a call to another service, which would block the event loop."""
    endpoint.respond_with(FOUND)
    role = Role()
    client = client_of(endpoint.url, credentials=role)
    assert run(client, lambda runner: runner.run(client.batch_get("t", [ITEM]))) == [ITEM]
    assert role.renewed_by[0] is not threading.current_thread()


def test_a_runner_goes_with_its_event_loop(endpoint: Endpoint) -> None:
    """Neither keeps the other: many event loops after each other leave nothing behind."""
    endpoint.respond_with(FOUND)
    client = client_of(endpoint.url)

    runners: list[weakref.ref[EventLoopRunner]] = []

    async def scene() -> None:
        runner = client.event_loop_runner()
        runners.append(weakref.ref(runner))
        await runner.run(client.batch_get("t", [ITEM]))

    for _ in range(3):
        asyncio.run(scene())
    gc.collect()
    assert [one() for one in runners] == [None] * 3


@pytest.mark.parametrize(
    ("data", "small"),
    [
        ({}, True),
        ({"a": "x" * 100_000, "b": [1, {"c": []}]}, True),
        ({"a": list(range(3_000))}, False),
        ({str(n): {"a": 1} for n in range(1_500)}, False),
    ],
)
def test_an_item_is_small_if_it_has_few_values(data: dict[str, Any], small: bool) -> None:
    """The length of texts does not count."""
    assert is_small(to_item({"pk": "a", "data": data})) is small
