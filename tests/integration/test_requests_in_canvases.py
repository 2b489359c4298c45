"""`ingest` in canvases: the operations of a follow-up are stored by the producer, and the message holds a reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from mdstore.client import Client
from mdstore.errors import InvalidRequest
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.settings import load_settings
from mdstore.tasks import create_store_app
from tests.integration.test_queue import dead_letters, namespace, operations, worker
from tests.integration.transport_app import journaling_app
from tests.waiting import until


@pytest.fixture(scope="module")
def client(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Yield a producer of a store app with tasks of its own, whose worker runs."""
    environ = namespace(aws, with_store=True) | {"JOURNAL": str(tmp_path_factory.mktemp("canvases") / "journal")}
    with worker(environ, Path(environ["JOURNAL"]).with_name("worker.log"), "tests.integration.store_app"):
        app = journaling_app(load_settings(environ).settings, make=create_store_app)
        yield Client(app=app)


def test_a_chain_of_requests_is_applied_in_order(client: Client) -> None:
    """Of one lane and of several, as the first task and as a later one, alone and in a group."""
    ingest = client.ingest
    first, second, third = (operations(count, f"chained-{count}") for count in (3, 250, 2))
    echo = client.app.tasks["echo"]
    result = chain(
        echo.si("begin"),
        ingest.si(first, request_id="c1"),
        ingest.si(second, source="erp"),
        group(ingest.si(third), echo.si(1)),
    ).apply_async()
    assert [one.get(timeout=60) for one in result.results] == [{**result.results[0].get(), "applied": 2}, 1]
    assert client.status("c1").counts.applied == {"upsert": 3}
    assert result.parent.get(timeout=60)["applied"] == 250
    assert client.status(result.parent.id).source == "erp"


def test_callbacks_and_bodies_of_chords_are_applied(client: Client) -> None:
    ingest, echo = client.ingest, client.app.tasks["echo"]
    callback = ingest.si(operations(2, "linked"), request_id="linked")
    echo.apply_async((1,), link=callback)
    until(lambda: _state(client, "linked") is State.COMPLETED)
    assert callback.args == (operations(2, "linked"),), "the caller's signature is as it was"
    client.app.tasks["fail"].apply_async(link_error=ingest.si(operations(2, "failed"), request_id="error"))
    until(lambda: _state(client, "error") is State.COMPLETED)
    body = chord([echo.si(n) for n in range(3)], ingest.si(operations(4, "body"))).apply_async()
    assert body.get(timeout=60)["applied"] == 4
    nested = chain(echo.si(1), chord([echo.si(2), echo.si(3)], ingest.si(operations(5, "nested")))).apply_async()
    assert nested.get(timeout=60)["applied"] == 5


def _state(client: Client, request_id: str) -> State | None:
    found = client.status(request_id)
    return found.state


def test_a_signature_without_an_id_is_a_new_request_each_time(client: Client) -> None:
    callback = client.ingest.si([{"op": "upsert", "entity": "counted", "key": "k", "data": {}}])
    for _ in range(2):
        client.app.tasks["echo"].apply_async((1,), link=callback)
    until(lambda: _version(client) == 2)


def _version(client: Client) -> int:
    return next((record.version for record in client.export("counted")), 0)


def test_a_request_whose_predecessor_fails_is_not_applied(client: Client) -> None:
    result = chain(client.app.tasks["fail"].si(), client.ingest.si(operations(2, "never"))).apply_async()
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=60)
    assert result.state == "FAILURE"
    assert list(client.export("never")) == []


@pytest.mark.parametrize(
    "options", [{"args": ()}, {"args": (operations(1),), "immutable": False}], ids=["a result", "a result before them"]
)
def test_a_result_cannot_be_ingested_by_a_follow_up(client: Client, options: dict[str, Any]) -> None:
    """Whoever may send to the queue could choose that result, so the producer is told what to do instead."""
    follow_up = client.ingest.signature(**options)
    with pytest.raises(InvalidRequest, match=r"a task whose result is to be ingested calls mdstore\.submit itself"):
        chain(client.app.tasks["echo"].si(operations(1)), follow_up).apply_async()
    with pytest.raises(InvalidRequest, match=r"ingest\.si"):
        chord([client.app.tasks["echo"].si(1)], follow_up).apply_async()


def test_a_revoke_does_not_drop_an_accepted_request(client: Client) -> None:
    """Neither before its message comes nor while it waits: an operator's revoke is a message, too."""
    client.app.control.revoke("revoked", reply=True, timeout=10)
    result = client.ingest.delay(operations(2, "revoked"), request_id="revoked")
    assert result.get(timeout=60)["applied"] == 2
    client.app.control.revoke("revoked", terminate=True)
    again = client.ingest.apply_async((operations(2, "revoked"),), task_id="revoked")
    assert again.get(timeout=60)["applied"] == 2


def test_an_expired_task_drops_no_other_message_with_its_id(client: Client) -> None:
    echo = client.app.tasks["echo"]
    echo.apply_async((1,), task_id="expired", expires=-1)
    until(lambda: client.app.AsyncResult("expired").state == "REVOKED")
    echo.apply_async((2,), task_id="expired")
    until(lambda: client.app.AsyncResult("expired").state == "SUCCESS")


def test_a_refused_or_expired_message_replaces_no_failure_of_the_task_itself(client: Client) -> None:
    """Anyone may send a message with the id of a task that has failed."""
    app = client.app
    result = app.tasks["fail"].delay()
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=60)
    app.send_task("nobody", task_id=result.id)
    (letter,) = dead_letters(app, count=1)
    assert "nobody" in letter["reason"]
    app.tasks["echo"].apply_async((1,), task_id=result.id, expires=-1)
    assert app.tasks["echo"].delay(2).get(timeout=60) == 2
    fresh = app.AsyncResult(result.id)
    assert (fresh.state, str(fresh.result)) == ("FAILURE", "on purpose")
