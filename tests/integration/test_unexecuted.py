"""A message that no worker can execute, in the queue of a real worker: whoever waits for its task is told the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord
from celery.exceptions import ChordError, InvalidTaskError, NotRegistered
from kombu.exceptions import EncodeError

from mdstore.aws.sqs import Entry
from mdstore.errors import InvalidRequest
from mdstore.queue.app import SqsApp
from mdstore.queue.broker import encoding
from tests.integration.test_queue import Environ, dead_letters
from tests.integration.test_text import app, environ, log, worker
from tests.waiting import until

__all__ = ["app", "environ", "log"]  # fixtures

NOBODY = {"__type__": "nobody", "__value__": 1}


@pytest.fixture(scope="module", autouse=True)
def working(environ: Environ, app: SqsApp, log: Path) -> Iterator[None]:
    """A worker of the settings' queue."""
    with worker(environ, log, "-Q", app.settings.queue):
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sends what it would refuse, as a program of another library does."""
    monkeypatch.setattr(encoding, "check", lambda _: None)


def send(app: SqsApp, text: str) -> None:
    url = app.aws.queues.url(app.settings.queue)
    assert app.aws.queues.send(url, [Entry(message_body=text)]) == [None]


def message(task_id: str, body: Any = "[[1],{},{}]", **headers: Any) -> dict[str, Any]:
    """A task's message as other libraries write it."""
    return {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "echo", "id": task_id, **headers},
        "properties": {"delivery_tag": "tag"},
    }


@pytest.mark.parametrize(
    "value",
    [NOBODY, [{"a": NOBODY}], {"__type__": "uuid", "__value__": "no"}, {"__type__": "decimal", "__value__": "x"}],
    ids=str,
)
def test_what_no_worker_can_decode_is_not_sent(app: SqsApp, value: Any) -> None:
    """As an argument, and inside of what follows the task."""
    echo = app.tasks["echo"]
    with pytest.raises(InvalidRequest, match=r"a task that a worker takes \(.*body: kombu cannot decode it"):
        echo.delay(value)
    with pytest.raises(InvalidRequest, match="body: kombu cannot decode it"):
        echo.apply_async((1,), link=echo.s(value))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        (NOBODY, {}, "Unsupported type"),
        (1, {"time_limit": 60, "soft_time_limit": 0.5}, "timelimit"),
        (float("nan"), {}, "body: JSON is malformed"),
    ],
    ids=["type", "header", "no JSON"],
)
def test_what_comes_from_elsewhere_fails_with_the_reason(
    app: SqsApp,
    value: Any,
    options: dict[str, Any],
    reason: str,
) -> None:
    """Alone, in a chain, and as a part of a chord; each message is dead-lettered with the reason."""
    echo = app.tasks["echo"]
    bad = echo.si(value).set(**options)
    with pytest.raises(InvalidTaskError, match=reason):
        bad.apply_async().get(timeout=60)
    with pytest.raises(InvalidTaskError, match=reason):
        chain(bad, echo.s()).apply_async().get(timeout=60)
    chorded = chord([echo.si(1), bad], echo.s()).apply_async()
    with pytest.raises((ChordError, InvalidTaskError), match=reason):
        chorded.get(timeout=60)
    letters = dead_letters(app, count=3)
    assert all(reason in letter["reason"] for letter in letters)


def test_a_body_that_escapes_hide_is_refused_by_the_consumer(app: SqsApp) -> None:
    """The check does not see such a type, but Celery's decoder does."""
    task_id = str(uuid4())
    send(app, json.dumps(message(task_id, '[[{"\\u005f_type__":"nobody","__value__":1}],{},{}]')))
    with pytest.raises(InvalidTaskError, match="Unsupported type"):
        app.AsyncResult(task_id).get(timeout=60)
    (letter,) = dead_letters(app, count=1)
    assert "Unsupported type" in letter["reason"]


def test_a_claim_without_its_object_fails_its_task(app: SqsApp) -> None:
    """The claim says which task it is of."""
    task_id = str(uuid4())
    claim = {"mdstore-claim": 1, "digest": "0" * 64, "size": 9, "days": 45, "stored": "2026-11-01"}
    send(app, json.dumps({**claim, "task": "echo", "id": task_id}))
    with pytest.raises(InvalidTaskError, match="0" * 64):
        app.AsyncResult(task_id).get(timeout=60)
    dead_letters(app, count=1)


def test_a_success_stays_and_a_later_one_replaces_the_failure(app: SqsApp) -> None:
    """Whoever may send can name any task: what was done stays done, and calls nobody."""
    done = app.tasks["echo"].delay("genuine")
    assert done.get(timeout=60) == "genuine"
    errback = app.signature("echo", args=("called",), immutable=True, task_id=str(uuid4()))
    follow_up = json.dumps([[1], {}, {"errbacks": [errback]}])
    send(app, json.dumps(message(done.id, follow_up, task="nobody")))
    send(app, json.dumps(message(done.id, follow_up, retries="x")))
    dead_letters(app, count=2)
    assert app.AsyncResult(done.id).get(timeout=5) == "genuine"

    early = str(uuid4())
    send(app, json.dumps(message(early, task="nobody")))
    with pytest.raises(NotRegistered):
        app.AsyncResult(early).get(timeout=60)
    app.tasks["echo"].apply_async(("genuine",), task_id=early)
    until(lambda: app.AsyncResult(early).state == "SUCCESS")
    dead_letters(app, count=1)
    assert app.AsyncResult(errback.options["task_id"]).state == "PENDING"


def test_a_result_that_nobody_could_decode_is_a_failure(app: SqsApp) -> None:
    """It was stored, and raised in whoever read it, a chord too; an error with such an argument shows it as text."""
    with pytest.raises(EncodeError, match="Unsupported type"):
        app.tasks["returns"].delay().get(timeout=60)
    with pytest.raises((ChordError, EncodeError), match="Unsupported type"):
        chord([app.tasks["returns"].si()], app.tasks["echo"].s()).apply_async().get(timeout=60)
    with pytest.raises(ValueError, match="nobody"):
        app.tasks["raises"].delay().get(timeout=60)
