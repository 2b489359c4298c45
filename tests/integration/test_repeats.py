"""Requests that are submitted again, with real workers: no lane runs twice, and every caller is answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TimeoutError as CeleryTimeoutError

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, namespace, worker
from tests.waiting import until


@pytest.fixture
def environ(aws: EmbeddedAws) -> Environ:
    return namespace(aws, with_store=True)


@pytest.fixture
def client(environ: Environ) -> Client:
    return Client(load_settings(environ).settings)


def operations(count: int) -> list[dict[str, Any]]:
    return [{"op": "upsert", "entity": "thing", "key": f"k{n}", "data": {"n": n}} for n in range(count)]


def lanes_received(log: Path) -> int:
    return len(re.findall(r"Task mdstore\.apply_lane\[\S+ received", log.read_text()))


def forget_results(client: Client) -> None:
    """Remove all results from the backend, as their expiry does."""
    dynamo, table = client.store.aws.dynamo, client.settings.results_table
    for page in dynamo.pages("Scan", {"TableName": table}):
        for item in page:
            dynamo.call("DeleteItem", {"TableName": table, "Key": {"id": item["id"]}})


def test_tasks_for_a_request_under_way_wait_for_it_and_start_no_lane(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """Each of three messages of one request gets the request's summary as its result; its lanes run once."""
    log = tmp_path / "worker.log"
    given = operations(500)
    first = client.ingest.delay(given, request_id="r")
    others = [client.ingest.apply_async((given,), {"request_id": "r"}, task_id=f"other{n}") for n in range(2)]
    with worker(environ, log):
        summaries = [result.get(timeout=120) for result in (first, *others)]
    assert [summary["applied"] for summary in summaries] == [500, 500, 500]
    assert lanes_received(log) == client.status("r").lanes > 1


def test_a_request_that_was_left_running_is_started_again(environ: Environ, tmp_path: Path) -> None:
    """If the messages of its lanes are lost, a repeat sends nothing during the lease, and completes the request after it."""
    environ |= {"MDSTORE_VISIBILITY_TIMEOUT": "2", "MDSTORE_TASK_TIME_LIMIT": "3", "MDSTORE_LANE_BUDGET": "2"}
    client = Client(load_settings(environ).settings)
    given = operations(500)
    accepted = client.store.ingestor.accept(given, publish=lambda _: "lost", request_id="r")
    client.store.ledger.start(accepted.reference, operations=500, refused={}, by="lost")
    assert not client.submit(given, request_id="r").sent
    until(lambda: client.submit(given, request_id="r").sent, within=20)
    assert not client.submit(given, request_id="r").sent
    with worker(environ, tmp_path / "worker.log"):
        assert client.submit(given, request_id="r").wait(60).status().state is State.COMPLETED


def test_a_waiting_task_starts_the_lanes_that_nobody_works_on(environ: Environ, tmp_path: Path) -> None:
    """The task that waits is there when the lease ends, so no other repeat is needed."""
    environ |= {"MDSTORE_VISIBILITY_TIMEOUT": "4", "MDSTORE_TASK_TIME_LIMIT": "8", "MDSTORE_LANE_BUDGET": "6"}
    client = Client(load_settings(environ).settings)
    given = operations(500)
    accepted = client.store.ingestor.accept(given, publish=lambda _: "lost", request_id="r")
    client.store.ledger.start(accepted.reference, operations=500, refused={}, by="lost")
    waiting = client.ingest.apply_async((given,), {"request_id": "r"}, task_id="waiting")
    with worker(environ, tmp_path / "worker.log"):
        assert waiting.get(timeout=120)["applied"] == 500


@pytest.mark.parametrize("count", [1, 500], ids=["one lane", "several lanes"])
def test_a_known_request_is_answered_though_its_result_has_expired(
    client: Client, environ: Environ, tmp_path: Path, count: int
) -> None:
    """The ledger keeps a request's summary for longer than the backend keeps results."""
    given = operations(count)
    with worker(environ, tmp_path / "worker.log"):
        summary = client.ingest.delay(given, request_id="r").get(timeout=60)
    forget_results(client)
    again = client.ingest.delay(given, request_id="r")
    assert again.get(timeout=10) == summary
    assert (again.state, again.ready(), again.successful(), again.result) == ("SUCCESS", True, True, summary)


def test_a_request_that_came_as_a_signature_is_answered_by_its_request_id(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """Its result is stored under the signature's task id, and nothing ever is under the request's."""
    given = operations(3)
    signature = client.ingest.s(given, request_id="r")
    signature.freeze("of-the-signature")
    first = signature.apply_async()
    again = client.ingest.delay(given, request_id="r")
    with pytest.raises(CeleryTimeoutError):
        again.get(timeout=1)
    with worker(environ, tmp_path / "worker.log"):
        assert again.get(timeout=60)["applied"] == first.get(timeout=60)["applied"] == 3


def test_a_failed_request_that_is_sent_again_is_not_answered_with_its_old_failure(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """Whoever repeats a failed request waits for its new run."""
    given = operations(3)
    broken = {**environ, "MDSTORE_RECORDS_TABLE": "missing", "MDSTORE_VISIBILITY_TIMEOUT": "2"}
    first = client.ingest.delay(given, request_id="r")
    with worker(broken, tmp_path / "1.log"):
        until(lambda: client.status("r").state is State.FAILED, within=90)
        until(first.ready, within=60)
    again = client.ingest.delay(given, request_id="r")
    assert not again.ready()
    with worker(environ, tmp_path / "2.log"):
        assert again.get(timeout=60)["applied"] == 3
