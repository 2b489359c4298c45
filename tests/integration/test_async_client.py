"""The client for coroutines, with a real worker."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import uvloop

from mdstore import AsyncClient, Client, InvalidOperations, NotFound, RequestConflict, Unavailable
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings
from tests.integration.api_process import process


@pytest.fixture(scope="module")
def settings(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Yield the settings of a provisioned namespace with a worker."""
    environ = {
        **os.environ,
        "MDSTORE_PROFILE": "local",
        "MDSTORE_NAMESPACE": f"aio-{uuid4().hex[:12]}",
        "AWS_ENDPOINT_URL": aws.url,
        "MDSTORE_WAIT_TIME": "1",
    }
    found = load_settings(environ).settings
    list(provision(found))
    command = ("celery", "-A", "workers.celery_app", "worker", "-l", "WARNING", "-c", "1")
    with process(*command, environ=environ, log=tmp_path_factory.mktemp("worker") / "log"):
        yield found


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, settings: Settings) -> Callable[[Callable[[AsyncClient], Awaitable[Any]]], Any]:
    """Return what runs a scene with a client, on each event loop."""

    def scene_with_client(scene: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
        async def framed() -> Any:
            async with AsyncClient(settings) as client:
                return await scene(client)

        return request.param(framed())

    return scene_with_client


def operation(op: str, key: str, **data: Any) -> dict[str, Any]:
    return {"op": op, "entity": "item", "key": key, "data": data}


def test_a_request_is_submitted_waited_for_and_read_back(run: Any) -> None:
    """The receipt has the id, the outcomes come one by one, and the record is there."""

    async def scene(client: AsyncClient) -> None:
        key = uuid4().hex
        receipt = await client.submit(
            (operation("insert", f"{key}{n % 3}", n=n) for n in range(4)), request_id=f"{key}/x", source="erp"
        )
        assert (receipt.request_id, receipt.operations, receipt.new) == (f"{key}/x", 4, True)
        assert repr(receipt) == f"<AsyncSubmission '{key}/x', 4 operations>"
        assert await receipt.wait(timeout=60) is receipt
        assert [(one.index, one.outcome) async for one in receipt.outcomes()] == [
            *[(n, "applied") for n in range(3)],
            (3, "refused"),
        ]
        assert [one.reason async for one in client.outcomes(receipt.request_id, only="refused")] == ["exists"]
        status = await receipt.status()
        assert (status.state, status.source, status.counts.total) == (State.COMPLETED, "erp", 4)
        assert await client.wait(receipt.request_id) == status
        found = await client.get("item", f"{key}0")
        assert (found.data, found.version) == ({"n": 0}, 1)

    run(scene)


def test_many_reads_share_calls(run: Any, settings: Settings) -> None:
    """Two hundred at a time are made without a thread for each, and absent and deleted records are `NotFound`."""

    async def scene(client: AsyncClient) -> None:
        key = uuid4().hex
        operations = [operation("insert", f"{key}{n}", n=n) for n in range(200)]
        operations += [operation("insert", f"{key}-large", text="x" * 500_000), operation("insert", f"{key}-gone")]
        operations.append({"op": "delete", "entity": "item", "key": f"{key}-gone"})
        await (await client.submit(operations)).wait()
        threads = threading.active_count()
        found = await asyncio.gather(*(client.get("item", f"{key}{n}") for n in range(200)))
        assert [record.data for record in found] == [{"n": n} for n in range(200)]
        assert threading.active_count() == threads
        assert found[7] == Client(settings).get("item", f"{key}7")
        assert (await client.get("item", f"{key}-large")).data == {"text": "x" * 500_000}
        for absent in (f"{key}-gone", f"{key}-none"):
            with pytest.raises(NotFound, match=f"no record 'item/{absent}'"):
                await client.get("item", absent)

    run(scene)


def test_a_read_sees_what_was_written_before_it(run: Any) -> None:
    """So it is while other reads are under way."""

    async def scene(client: AsyncClient) -> None:
        key = uuid4().hex

        async def disturb() -> None:
            while True:
                await client.get("item", key)

        await (await client.submit([operation("upsert", key, n=0)])).wait()
        others = [asyncio.ensure_future(disturb()) for _ in range(10)]
        for n in range(1, 4):
            await (await client.submit([operation("upsert", key, n=n)])).wait()
            assert (await client.get("item", key)).data == {"n": n}
        for one in others:
            one.cancel()

    run(scene)


def test_errors_are_those_of_the_blocking_client(run: Any) -> None:
    """Invalid operations, a conflict, an unknown request, and a wait that is too short."""

    async def scene(client: AsyncClient) -> None:
        key = uuid4().hex
        with pytest.raises(InvalidOperations):
            await client.submit([{"op": "grow"}])
        refused = await client.submit([{"op": "grow"}, operation("upsert", key)], on_invalid="refuse", request_id=key)
        with pytest.raises(RequestConflict):
            await client.submit([operation("upsert", key, n=2)], request_id=key)
        for call in (client.status, client.wait):
            with pytest.raises(NotFound):
                await call("none")
        assert (await (await refused.wait()).status()).counts.refused == {"invalid": 1}

    run(scene)


def test_a_wait_ends_in_time(aws: EmbeddedAws) -> None:
    """It raises `Unavailable`, and says which state the request has; here no worker runs."""
    other = load_settings({"AWS_ENDPOINT_URL": aws.url, "MDSTORE_NAMESPACE": f"aio-{uuid4().hex[:12]}"}).settings
    list(provision(other))

    async def scene() -> None:
        async with AsyncClient(other) as client:
            receipt = await client.submit([operation("upsert", "k")])
            with pytest.raises(Unavailable, match=r"is still accepted after 0\.2 s"):
                await receipt.wait(timeout=0.2)

    asyncio.run(scene())


def test_aget_works_in_one_event_loop_after_the_other(settings: Settings) -> None:
    """The blocking client keeps nothing of an event loop that has ended."""
    client = Client(settings)
    key = uuid4().hex
    client.submit([operation("upsert", key, n=1)]).wait()

    async def scene() -> list[Any]:
        return [record.data for record in await asyncio.gather(*(client.aget("item", key) for _ in range(20)))]

    for runs in (asyncio.run, uvloop.run, asyncio.run):
        assert runs(scene()) == [{"n": 1}] * 20
