"""Calls, results, retries, limits and processes do over SQS what Celery's own integration tests expect of them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import states
from celery.exceptions import Reject, TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from celery.signals import after_task_publish, before_task_publish

from mdstore.queue.app import SqsApp
from tests.integration.scenarios import app, environ, logs, workers
from tests.waiting import until

__all__ = ["app", "environ", "logs", "workers"]  # fixtures
pytestmark = pytest.mark.usefixtures("workers")

WAIT = 30


def test_calls_with_all_kinds_of_arguments(app: SqsApp) -> None:
    """Arguments may be positional, keywords or both. Each result is ready and successful."""
    calls: list[tuple[tuple[int, ...], dict[str, int], int]] = [((n, n), {}, 2 * n) for n in range(8)]
    calls += [((n,), {"y": n, "z": n}, 3 * n) for n in range(8)]
    results = [(app.send_task("add", args, kwargs), value) for args, kwargs, value in calls]
    for result, value in results:
        assert result.get(timeout=WAIT) == value
        assert (result.status, result.ready(), result.successful(), result.failed()) == ("SUCCESS", True, True, False)


def test_threads_send_at_the_same_time(app: SqsApp) -> None:
    """Twenty threads share the app, its connection and its publisher."""
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda n: app.send_task("add", (n, n)).get(timeout=WAIT), range(60)))
    assert found == [2 * n for n in range(60)]


def test_an_ignored_result_is_not_stored(app: SqsApp, tmp_path: Path) -> None:
    """Either the task or the call says so. A task that is called by name follows its own setting."""
    done = tmp_path / "done"
    by_task = app.send_task("quiet", (str(done),))
    by_call = app.send_task("add", (1, 2), ignore_result=True)
    assert by_call.get() is None
    until(done.exists)
    assert app.send_task("add", (1, 2)).get(timeout=WAIT) == 3  # the calls before are over
    for result in (by_task, by_call):
        assert app.backend.get_task_meta(result.id)["status"] in (states.PENDING, states.STARTED)


def test_a_rejected_message_fails_or_comes_again(app: SqsApp) -> None:
    refused, again = (app.send_task("reject", kwargs={"requeue": requeue}) for requeue in (False, True))
    with pytest.raises(Reject):
        refused.get(timeout=WAIT)
    assert (refused.status, refused.failed()) == ("FAILURE", True)
    assert again.get(timeout=WAIT) == "second delivery"


def test_pydantic_arguments_and_results(app: SqsApp) -> None:
    """A task that is annotated with a model gets it, and its result is the model's JSON."""
    assert app.send_task("gross", ({"net": 100},)).get(timeout=WAIT) == {"net": 100, "tax": 20}


def test_a_caller_waits_no_longer_than_its_timeout(app: SqsApp) -> None:
    result = app.send_task("nap", (3,))
    with pytest.raises(CeleryTimeoutError):
        result.get(timeout=0.5)
    assert result.get(timeout=WAIT) == "rested"


@pytest.mark.parametrize("as_date", [False, True])
def test_an_expired_task_is_revoked(app: SqsApp, as_date: bool) -> None:
    """It expires while it waits in SQS."""
    expires = datetime.now(UTC) + timedelta(seconds=1) if as_date else 1
    result = app.send_task("add", (1, 1), countdown=2, expires=expires)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT)
    assert (result.status, result.ready(), result.failed(), result.successful()) == ("REVOKED", True, False, False)


def test_a_task_runs_at_its_time_and_not_before(app: SqsApp) -> None:
    began = time.monotonic()
    by_countdown = app.send_task("add", (1, 1), countdown=2)
    by_eta = app.send_task("add", (2, 2), eta=datetime.now(UTC) + timedelta(seconds=2))
    assert [one.status for one in (by_countdown, by_eta)] == ["PENDING", "PENDING"]
    assert [one.get(timeout=WAIT) for one in (by_countdown, by_eta)] == [2, 4]
    assert time.monotonic() - began >= 2


def test_errors_reach_the_caller(app: SqsApp) -> None:
    """An error that cannot be made again from its arguments comes with its name and its first argument."""
    plain, odd = (app.send_task(name) for name in ("fail", "fail_oddly"))
    with pytest.raises(ValueError, match="on purpose"):
        plain.get(timeout=WAIT)
    assert "ValueError: on purpose" in plain.traceback
    with pytest.raises(Exception, match="first") as found:
        odd.get(timeout=WAIT)
    assert "OddError" in repr(found.value)


def test_wrong_arguments_are_refused_by_the_caller_or_by_the_worker(app: SqsApp) -> None:
    """A process that knows the task refuses at once, unless the task has `typing=False`."""
    from tests.integration import scenario_app as known  # noqa: PLC0415  importing it makes an app with default settings

    for args, kwargs in (((5,), {}), ((5, 5), {"other": 1})):
        with pytest.raises(TypeError):
            known.add.delay(*args, **kwargs)
        result = app.send_task("untyped", args, kwargs)
        with pytest.raises(TypeError):
            result.get(timeout=WAIT)
        assert result.status == "FAILURE"
    with pytest.raises(ValueError, match="soft_time_limit must be less than or equal to time_limit"):
        known.bad_limits.delay()


def test_retries(app: SqsApp) -> None:
    """Between two tries the state is RETRY, with the error; the last try's error is the result."""
    succeeds = app.send_task("retry", kwargs={"needed": 1})
    fails = app.send_task("retry")
    until(lambda: succeeds.status == states.RETRY)
    assert isinstance(succeeds.result, OSError)
    assert succeeds.get(timeout=WAIT) == "after 1"
    with pytest.raises(OSError, match="not yet"):
        fails.get(timeout=WAIT)
    assert fails.status == "FAILURE"


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"kwargs": {"x": 1, "y": 2, "args": [3, 4], "kwargs": {}}}, [3, 4, 1]),
        ({"args": (1, 2), "kwargs": {"args": [], "kwargs": {"x": 5, "y": 6}}}, [5, 6, 1]),
    ],
)
def test_a_retry_may_change_how_arguments_are_given(app: SqsApp, given: dict[str, Any], value: list[int]) -> None:
    assert app.send_task("retry_with", **given).get(timeout=WAIT) == value


@pytest.mark.parametrize(("retries", "app_id"), [(0, "shop"), (1, None)])
def test_a_task_knows_what_came_with_its_message(app: SqsApp, retries: int, app_id: str | None) -> None:
    """A retry keeps priority, own headers and time limits, but no property, as in Celery."""
    options = {"app_id": "shop", "priority": 7, "headers": {"x-tenant": "t1"}, "time_limit": 9, "soft_time_limit": 8}
    found = app.send_task("describe", kwargs={"retries": retries}, **options).get(timeout=WAIT)
    assert found == {"app_id": app_id, "priority": 7, "header": "t1", "limits": [9, 8]}


def test_time_limits(app: SqsApp) -> None:
    """A soft limit raises in the task. A hard one ends the process, and the worker goes on with another."""
    assert app.send_task("spin").get(timeout=WAIT) == "stopped softly"
    with pytest.raises(TimeLimitExceeded):
        app.send_task("nap", (30,), time_limit=1).get(timeout=WAIT)
    assert app.send_task("add", (1, 1)).get(timeout=WAIT) == 2


def test_a_process_that_dies_is_replaced(app: SqsApp) -> None:
    """Its task comes again, and fails after the last delivery. All four processes work afterwards."""
    with pytest.raises(WorkerLostError):
        app.send_task("die").get(timeout=60)
    naps = [app.send_task("nap", (1,)) for _ in range(4)]
    assert [one.get(timeout=WAIT) for one in naps] == ["rested"] * 4


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_replaced_tasks_count_their_nesting(app: SqsApp, levels: int) -> None:
    assert app.send_task("nested", (levels, [])).get(timeout=WAIT) == list(range(levels + 1))


def test_a_running_task_can_be_aborted(app: SqsApp) -> None:
    """`celery.contrib.abortable` stores the state ABORTED, which the task looks for."""
    from tests.integration import scenario_app as known  # noqa: PLC0415  as above

    result = known.abortable.AsyncResult(app.send_task("abortable").id)
    result.backend = app.backend
    until(lambda: result.state == states.STARTED)
    result.abort()
    until(lambda: AsyncResult(result.id, app=app).result == "aborted")


def test_publishing_sends_signals(app: SqsApp) -> None:
    """Both signals of the producer have the task's name, and the one before may change the headers."""
    seen: list[str] = []

    def before(sender: str = "", headers: Any = None, **_: Any) -> None:
        seen.append(f"before {sender}")
        headers["x-tenant"] = "by signal"

    def after(sender: str = "", **_: Any) -> None:
        seen.append(f"after {sender}")

    before_task_publish.connect(before)
    after_task_publish.connect(after)
    try:
        result = app.send_task("describe", kwargs={"retries": 0}, priority=1)
    finally:
        before_task_publish.disconnect(before)
        after_task_publish.disconnect(after)
    assert seen == ["before describe", "after describe"]
    assert result.get(timeout=WAIT)["header"] == "by signal"
