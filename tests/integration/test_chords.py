"""Chords of a plain Celery app: a real worker process over the embedded AWS, with each message in the queue twice."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from mdstore.aws.json_protocol import JsonProtocol
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.queue.app import SqsApp
from mdstore.queue.results.backend import DynamoBackend
from mdstore.settings import load_settings
from tests.integration.plain_app import plain_app
from tests.integration.test_queue import Environ, worker

TIMEOUT = 60


@pytest.fixture(scope="module")
def environ() -> Iterator[Environ]:
    """Yield the environment of a provisioned emulator."""
    with EmbeddedAws(port=free_port()) as aws:
        made = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": "chords",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_VISIBILITY_TIMEOUT": "12",
            "MDSTORE_TASK_TIME_LIMIT": "10",
            "MDSTORE_LANE_BUDGET": "8",
        }
        for _ in provision(load_settings(made).settings, with_store=False):
            pass
        yield made


@pytest.fixture(scope="module")
def app(environ: Environ) -> SqsApp:
    """Return the plain app in the test's own process; it sends each message once."""
    return plain_app(load_settings(environ).settings)


@pytest.fixture(scope="module")
def running(environ: Environ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a worker that sends each message twice."""
    log = tmp_path_factory.mktemp("chords") / "worker.log"
    with worker({**environ, "DELIVERIES": "2"}, log, "tests.integration.plain_app"):
        yield


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test, too, send each message twice."""
    monkeypatch.setenv("DELIVERIES", "2")


@pytest.mark.usefixtures("running", "twice")
def test_canvases(app: SqsApp) -> None:
    """A chord of any kind of canvas has the result that Celery documents."""
    add, total, seen, quiet, more, spread = (
        app.tasks[name] for name in ("add", "total", "seen", "quiet", "more", "spread")
    )

    def made(header: Any, body: Any) -> Any:
        return chord(header, body, app=app)()

    pair = group([add.s(1, 1), add.s(2, 2)], app=app)
    results: dict[str, tuple[Any, Any]] = {
        "generated": (made((add.s(n, 1) for n in range(5)), total.s()), 15),
        "of groups": (made([group([add.s(1, 1), add.s(2, 2)], app=app), add.s(3, 3)], total.s()), 12),
        "of chains": (made([chain(add.s(1, 1), add.s(n), app=app) for n in range(3)], total.s()), 9),
        "of chords": (made([chord([add.s(1, 1), add.s(2, 2)], total.s(), app=app), add.s(3, 3)], total.s()), 12),
        "of replaced tasks": (made([spread.s(1), spread.s(2)], seen.s()), [6, 9]),
        "of tasks that ignore their results": (made([quiet.s(1), quiet.s(2)], total.s()), 3),
        "whose parts add parts": (made([more.s(1), add.s(5, 5)], total.s()), 13),
        "whose body is a chain": (made([add.s(1, 1), add.s(2, 2)], chain(total.s(), add.s(4), app=app)), 10),
        "whose body is a group": (made([add.s(1, 1)], group([total.s(), seen.s()], app=app)), [2, [2]]),
        "that wants_results no results": (made([quiet.s(1), quiet.s(2)], add.si(7, 7)), 14),
        "chained": ((pair | group([total.s(), seen.s()], app=app) | seen.s())(), [6, [2, 4]]),
        "no chord": (group([add.s(n, n) for n in range(5)], app=app)(), [0, 2, 4, 6, 8]),
    }  # fmt: skip
    got = {name: result.get(timeout=TIMEOUT) for name, (result, _) in results.items()}
    assert got == {name: expected for name, (_, expected) in results.items()}

    saved, _ = results["no chord"]
    saved.save(backend=app.backend)
    restored = app.GroupResult.restore(saved.id, backend=app.backend)
    assert restored.get() == [0, 2, 4, 6, 8]
    restored.forget()
    assert app.AsyncResult(saved.results[0].id).state == "PENDING"


@pytest.mark.usefixtures("running", "twice")
def test_join_policies(app: SqsApp) -> None:
    """When parts fail, the body fails (`all`), gets the other results (`any`), or gets the failures as data (`always`)."""
    add, fail, seen = (app.tasks[name] for name in ("add", "fail", "seen"))
    header = [add.s(1, 1), fail.s("on purpose"), add.s(2, 2)]
    errback = seen.si("called").set(task_id=str(uuid4()))
    results = {
        policy: chord(header, seen.s().set(join=policy, link_error=[errback] if policy == "all" else []), app=app)()
        for policy in ("all", "any", "always")
    }
    none = chord([fail.s("a"), fail.s("b")], seen.s().set(join="any"), app=app)()
    with pytest.raises(ChordError, match="on purpose"):
        results["all"].get(timeout=TIMEOUT, follow_parents=False)
    assert app.AsyncResult(errback.options["task_id"]).get(timeout=TIMEOUT) == "called"
    assert results["any"].get(timeout=TIMEOUT, follow_parents=False) == [2, 4]
    two, failure, four = results["always"].get(timeout=TIMEOUT, follow_parents=False)
    assert (two, four) == (2, 4)
    assert (failure["exc_type"], failure["exc_message"]) == ("ValueError", ["on purpose"])
    with pytest.raises(ChordError, match="Dependency"):
        none.get(timeout=TIMEOUT, follow_parents=False)


@pytest.mark.usefixtures("running")
def test_a_worker_dispatches_a_callback_that_another_left(
    app: SqsApp, environ: Environ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a worker dies before it publishes a callback, and no message is redelivered, another worker's repair publishes it."""
    parts = [app.AsyncResult(str(uuid4())) for _ in range(2)]
    body = app.tasks["total"].s()
    result = body.freeze()
    app.backend.apply_chord(("left", parts), body)
    app.backend.set_chord_size("left", 2)

    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DynamoBackend, "_dispatch", dying)
    finish_part(app, "left", 0, parts[0], body)
    with pytest.raises(KeyboardInterrupt):
        finish_part(app, "left", 1, parts[1], body)
    monkeypatch.undo()
    settings = load_settings(environ).settings
    root, shard = "chord-join-left", "chord-join-left#0"
    for key, name in ((shard, "at"), (root, "at"), (root, "look_at")):  # as if two minutes had passed
        app.aws.dynamodb.update_item(
            TableName=settings.results_table,
            Key={"id": {"S": key}},
            UpdateExpression="ADD #name :change",
            ExpressionAttributeNames={"#name": name},
            ExpressionAttributeValues={":change": {"N": "-120"}},
        )
    assert result.get(timeout=TIMEOUT) == 1
    assert app.backend.repair(now=time.time() + 3_600) == []


def finish_part(app: SqsApp, chord_id: str, index: int, part: Any, body: Any, *, ignored: bool = False) -> None:
    """Record, as a worker does, that a part returned its index."""
    request = SimpleNamespace(
        id=part.id, group=chord_id, group_index=index, chord=body, ignore_result=ignored, children=[], task="add"
    )
    app.backend.mark_as_done(part.id, index, request)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the calls to DynamoDB by operation, counted where each request is built."""
    counted: Counter[str] = Counter()
    original: Callable[..., Any] = JsonProtocol.request

    def request(self: JsonProtocol, operation: str, body: bytes) -> Any:
        counted[operation] += 1
        return original(self, operation, body)

    monkeypatch.setattr(JsonProtocol, "request", request)
    return counted


@pytest.mark.parametrize(("wants_results", "most"), [(True, 2.05), (False, 1.05)], ids=["results", "no results"])
def test_calls_to_dynamodb_per_part(app: SqsApp, calls: Counter[str], wants_results: bool, most: float) -> None:
    """A chord of 1,000 parts makes about two calls per part from publishing to callback; one if results are ignored."""
    size, chord_id = 1_000, f"calls-{wants_results}"
    parts = [app.AsyncResult(str(uuid4())) for _ in range(size)]
    body = app.tasks["total"].s() if wants_results else app.tasks["total"].si([1])
    body.freeze()
    sent: list[Any] = []
    app.backend.apply_chord((chord_id, parts), body)
    app.backend.set_chord_size(chord_id, size)
    callback = json.loads(json.dumps(body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(app.tasks["total"]), "apply_async", lambda _, args, *__, **___: sent.append(args))
        for index, part in enumerate(parts):
            finish_part(app, chord_id, index, part, callback, ignored=not wants_results)
    assert len(sent) == 1
    if wants_results:
        assert sent[0][0] == list(range(size))
    assert size < calls.total() <= most * size, calls
    items = app.aws.dynamodb.scan(TableName=app.settings.results_table)["Items"]
    prefix = f"chord-join-{chord_id}"
    sizes = [len(json.dumps(item, default=repr)) for item in items if item["id"]["S"].startswith(prefix)]
    assert len(sizes) == 6
    assert max(sizes) < 30_000  # characters of JSON: a shard holds 200 parts of 20 bytes, escaped
