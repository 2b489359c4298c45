"""Inspection and revocation: what Celery's own tests expect of two workers holds over SNS and SQS."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import chord, states
from celery.app.control import Inspect
from celery.exceptions import TaskRevokedError

from mdstore.local.emulator import free_port
from mdstore.local.stack import stop_process
from mdstore.queue.app import SqsApp
from tests.integration.scenarios import APP, NODES, app, environ, logs, workers
from tests.integration.test_queue import ROOT, Environ
from tests.waiting import until

__all__ = ["app", "environ", "logs", "workers"]  # fixtures
pytestmark = pytest.mark.usefixtures("workers")

WAIT = 30
Workers = list[subprocess.Popen[bytes]]


@pytest.fixture
def inspect(app: SqsApp) -> Inspect:
    found: Inspect = app.control.inspect(timeout=10, limit=2)
    return found


def test_both_workers_describe_themselves(inspect: Inspect, app: SqsApp, workers: Workers) -> None:
    """Both answer with clock, tasks, queues, statistics, configuration and report."""
    assert inspect.ping() == {node: {"ok": "pong"} for node in NODES}
    assert all(answer["clock"] > 0 for answer in inspect.clock().values())
    stats, registered, conf = inspect.stats(), inspect.registered(), inspect.conf()
    for node, process in zip(NODES, workers, strict=True):
        assert {"add", "abortable", "gross"} <= set(registered[node])
        (queue,) = inspect.active_queues()[node]
        assert (queue["name"], queue["routing_key"]) == (app.settings.queue, app.settings.queue)
        assert (stats[node]["pid"], stats[node]["pool"]["max-concurrency"]) == (process.pid, 2)
        assert conf[node]["task_track_started"] is True
        assert "celery:5.7.0" in inspect.report()[node]["ok"]


def test_what_runs_and_what_waits_is_shown(inspect: Inspect, app: SqsApp) -> None:
    """A running task is shown with its arguments and process, and found by its id. A later task waits in SQS."""
    running = app.send_task("nap", (4,))
    later = app.send_task("nap", (0,), countdown=5)
    until(lambda: running.status == states.STARTED)
    (found,) = [task for tasks in inspect.active().values() for task in tasks]
    assert (found["id"], found["name"], found["args"], found["acknowledged"]) == (running.id, "nap", [4], False)
    assert found["worker_pid"] > 0
    (state, task), *_ = [one for answers in inspect.query_task(running.id).values() for one in answers.values()]
    assert (state, task["id"]) == ("active", running.id)
    assert not any(inspect.scheduled().values())
    assert not any(inspect.query_task(later.id).values())
    assert [running.get(timeout=WAIT), later.get(timeout=WAIT)] == ["rested", "rested"]


def test_a_command_that_fails_is_answered_again_and_again(inspect: Inspect, app: SqsApp, workers: Workers) -> None:
    for _ in range(3):
        answers: dict[str, Any] = inspect._request("break_down")
        assert all("on purpose" in answers[node]["error"] for node in NODES)
    assert [process.poll() for process in workers] == [None, None]
    assert app.send_task("add", (1, 1)).get(timeout=WAIT) == 2


def test_consumers_are_cancelled_and_added(inspect: Inspect, app: SqsApp) -> None:
    """A task that is sent while nobody consumes the queue waits."""
    queue = app.settings.queue

    def consumed() -> list[int]:
        return [len(queues) for queues in inspect.active_queues().values()]

    app.control.cancel_consumer(queue, reply=True, timeout=10, limit=2)
    until(lambda: consumed() == [0, 0])
    time.sleep(1.5)  # a long poll that is under way would receive the message, and give it back
    result = app.send_task("add", (1, 1))
    assert result.status == "PENDING"
    app.control.add_consumer(queue, reply=True, timeout=10, limit=2)
    until(lambda: consumed() == [1, 1])
    assert result.get(timeout=WAIT) == 2


def test_a_running_task_that_is_revoked_goes_on(app: SqsApp) -> None:
    """Each worker gets the command, and only one of them runs the task: without `terminate` its state must not change."""
    result = app.send_task("nap", (3,))
    until(lambda: result.status == states.STARTED)
    app.control.revoke(result.id, reply=True, timeout=10, limit=2)
    assert result.status == states.STARTED
    assert result.get(timeout=WAIT) == "rested"


def test_a_running_task_that_is_terminated_is_revoked(app: SqsApp) -> None:
    """The pool replaces its process."""
    result = app.send_task("nap", (60,))
    until(lambda: result.status == states.STARTED)
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT)
    assert result.status == states.REVOKED
    assert [app.send_task("nap", (0.5,)).get(timeout=WAIT) for _ in range(4)] == ["rested"] * 4


def test_a_task_that_waits_in_sqs_can_be_revoked(app: SqsApp, inspect: Inspect) -> None:
    """It is REVOKED at once, and does not run when its time comes."""
    result = app.send_task("nap", (0,), countdown=4)
    app.control.revoke(result.id, reply=True, timeout=10, limit=2)
    assert result.status == states.REVOKED
    assert all(result.id in ids for ids in inspect.revoked().values())
    until(lambda: not _visible_or_delayed(app))
    assert result.status == states.REVOKED


def _visible_or_delayed(app: SqsApp) -> int:
    sqs = app.aws.sqs
    url = sqs.get_queue_url(QueueName=app.settings.queue)["QueueUrl"]
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return sum(int(value) for name, value in counts.items() if name.startswith("ApproximateNumberOfMessages"))


@pytest.mark.parametrize("matches", [True, False])
def test_tasks_are_revoked_by_a_stamp(app: SqsApp, matches: bool) -> None:
    """Only tasks with the stamp are revoked, including those that are sent later."""
    tenant = uuid4().hex
    answers = app.control.revoke_by_stamped_headers({"tenant": [tenant]}, reply=True, timeout=10, limit=2)
    assert len(answers) == 2
    stamped = app.signature("add", (1, 1))
    stamped.stamp(tenant=tenant if matches else uuid4().hex)
    result = stamped.apply_async()
    if matches:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WAIT)
        assert result.status == states.REVOKED
    else:
        assert result.get(timeout=WAIT) == 2


def test_a_revoked_part_fails_its_chord(app: SqsApp) -> None:
    """Whoever waits for the body learns it, instead of waiting for ever."""
    part = app.signature("add", (1, 1)).set(task_id=str(uuid4()))
    app.control.revoke(part.options["task_id"], reply=True, timeout=10, limit=2)
    result = chord([part, app.signature("add", (2, 2))], app.signature("total"), app=app).apply_async()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT)
    until(lambda: result.state == states.FAILURE)


def test_flower_answers_with_results(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    """Flower's API reads results of an app of `create_app`: with its tasks, and with none that it knows."""
    result, failed = app.send_task("add", (20, 22)), app.send_task("fail")
    assert result.get(timeout=WAIT) == 42
    until(failed.ready, what="the failure")
    password = base64.b64encode(b"operator:made-up").decode()

    def answer(path: str) -> dict[str, Any]:
        request = urllib.request.Request(f"{url}{path}", headers={"Authorization": f"Basic {password}"})  # noqa: S310
        with suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=10) as found:  # noqa: S310
            text: dict[str, Any] = json.load(found)
            return text
        return {}

    for number, options in enumerate(([], ["--app", APP])):
        url = f"http://127.0.0.1:{free_port()}"
        with (tmp_path / "flower.log").open("ab") as log:
            flower = subprocess.Popen(
                [sys.executable, "-m", "mdstore", "flower", "--name", f"api-{number}", *options,
                 f"--port={url.rpartition(':')[2]}"],
                cwd=ROOT, env={**environ, "FLOWER_BASIC_AUTH": "operator:made-up"}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            found = until(lambda: answer(f"/api/task/result/{result.id}"), what="Flower's answer")
            assert found == {"task-id": result.id, "state": "SUCCESS", "result": 42}
            found = answer(f"/api/task/result/{failed.id}")
            assert (found["state"], "on purpose" in found["result"]) == ("FAILURE", True)
        finally:
            stop_process(flower)
