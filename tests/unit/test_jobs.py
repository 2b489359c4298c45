"""Small tasks run side by side: when their requests gather in a job, and how each message of a job ends on its own."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionWithTraceback
from celery import states
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError
from kombu.asynchronous.semaphore import LaxBoundedSemaphore

from mdstore.errors import MdstoreError, ResultNotRecorded, Unavailable
from mdstore.queue.small_tasks import SMALL_PER_JOB, prepared
from mdstore.queue.worker.jobs import Jobs, _Ended, _Message, run_job
from tests.unit.canvas import Canvas

TASK = SimpleNamespace(name="small", soft_time_limit=5, time_limit=7)
OTHER_TASK = SimpleNamespace(name="other")


class Request:
    """A request that records what it is told."""

    def __init__(
        self, number: int, *, is_small: bool = True, task: Any = TASK, time_limits: Any = (None, None)
    ) -> None:
        self.id = f"id-{number}"
        self.task = task
        self.is_small = is_small
        self.time_limits = time_limits
        self.request_dict = {"args": [number]}
        self.message = SimpleNamespace(payload=[[number], {}, {}])
        self.is_revoked = False
        self.told: list[Any] = []
        self.fails = False

    def revoked(self) -> bool:
        return self.is_revoked

    def execute_using_pool(self, pool: Any) -> None:
        pool.alone.append(self)

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        if self.fails:
            raise ZeroDivisionError

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self._tell("accepted", pid, time_accepted)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        self._tell("timeout", soft, timeout)

    def on_success(self, traced: Any) -> None:
        self._tell("success", traced)

    def on_failure(self, error: Any) -> None:
        self._tell("failure", error)


class Pool:
    """Records what it is given. Like the worker's, its semaphore has a place for each of its processes."""

    def __init__(self, processes: int) -> None:
        self.alone: list[Request] = []
        self.given: list[dict[str, Any]] = []
        self.semaphore = LaxBoundedSemaphore(processes)
        self.jobs: Any = Jobs(lambda request: self.semaphore.acquire(partial(self._process, request)))

    def _process(self, request: Any) -> None:
        try:
            request.execute_using_pool(self)
        except TaskRevokedError:
            self.semaphore.release()

    def apply_async(self, target: Any, **options: Any) -> Any:
        self.given.append({"target": target, **options})
        return self

    def sizes(self) -> list[int]:
        return [len(given["args"][1]) for given in self.given]


def test_a_request_that_finds_a_free_process_starts_at_once_and_alone() -> None:
    """Celery executes it as any other request."""
    pool, first, second = Pool(2), Request(1), Request(2)
    pool.jobs.execute(first)
    assert pool.alone == [first]
    pool.jobs.execute(second)
    assert (pool.alone, pool.given) == ([first, second], [])


def test_what_arrives_while_all_processes_are_busy_forms_the_next_jobs() -> None:
    """A process takes up to 32 of the waiting requests, in their order; the next process takes the rest."""
    pool, requests = Pool(1), [Request(number) for number in range(42)]
    for one in requests:
        pool.jobs.execute(one)
    assert pool.alone == requests[:1]
    pool.semaphore.release()
    pool.semaphore.release()
    assert pool.sizes() == [SMALL_PER_JOB, 41 - SMALL_PER_JOB] == [32, 9]
    messages = [message for given in pool.given for message in given["args"][1]]
    assert messages == [_Message(one.id, one.request_dict, one.message.payload) for one in requests[1:]]
    first = pool.given[0]
    assert (first["target"], first["args"][0], first["timeout"], first["soft_timeout"]) == (run_job, "small", 7, 5)


def test_a_request_does_not_join_a_job_that_has_started() -> None:
    pool = Pool(1)
    for number in range(3):
        pool.jobs.execute(Request(number))
    pool.semaphore.release()
    late = Request(3)
    pool.jobs.execute(late)
    assert pool.sizes() == [2]
    pool.semaphore.release()
    assert pool.alone[1:] == [late]


def test_other_requests_wait_on_their_own() -> None:
    """One that is not small leaves the waiting job open for others. Another task or time limit needs a job of its own."""
    pool, large = Pool(1), Request(2, is_small=False)
    other, shorter = Request(3, task=OTHER_TASK), Request(5, time_limits=[1, None])
    for one in (Request(0), Request(1), large, Request(4), other, shorter):
        pool.jobs.execute(one)
    for _ in range(4):
        pool.semaphore.release()
    assert pool.sizes() == [2]
    assert pool.alone[1:] == [large, other, shorter]


def test_the_time_limit_of_the_messages_is_that_of_their_job() -> None:
    """Celery sends a task's time limits with each of its messages."""
    pool = Pool(1)
    for number in range(3):
        pool.jobs.execute(Request(number, time_limits=[120, 60]))
    pool.semaphore.release()
    assert (pool.given[0]["timeout"], pool.given[0]["soft_timeout"]) == (120, 60)


def test_revoked_requests_are_left_out() -> None:
    """If all are revoked, the next waiting request gets the process."""
    pool, requests, last = Pool(1), [Request(number) for number in range(4)], Request(9, is_small=False)
    for one in (*requests, last):
        pool.jobs.execute(one)
    requests[2].is_revoked = True
    pool.semaphore.release()
    assert [message.id for message in pool.given[0]["args"][1]] == ["id-1", "id-3"]
    more = [Request(number) for number in range(5, 7)]
    for one in more:
        one.is_revoked = True
        pool.jobs.execute(one)
    pool.semaphore.release()
    pool.semaphore.release()
    assert (len(pool.given), pool.alone[1:]) == (1, [last])


def test_each_request_is_told_how_its_job_goes() -> None:
    """Acceptance, time limits and a lost process concern all of them; a request that fails to take it disturbs no other."""
    pool, requests = Pool(1), [Request(number) for number in range(4)]
    for one in requests:
        pool.jobs.execute(one)
    pool.semaphore.release()
    (given,), job = pool.given, requests[1:]
    job[0].fails = True
    for call in (
        partial(given["accept_callback"], 11, 2.5),
        partial(given["timeout_callback"], soft=True, timeout=5),
        partial(given["error_callback"], "lost"),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert [one.told for one in job] == [[("accepted", 11, 2.5), ("timeout", True, 5), ("failure", "lost")]] * 3


def test_each_request_is_told_how_its_message_ended() -> None:
    pool, requests = Pool(1), [Request(number) for number in range(4)]
    for one in requests:
        pool.jobs.execute(one)
    pool.semaphore.release()
    error: Any = object()
    pool.given[0]["callback"]([_Ended((0, "ok", 1.0)), _Ended(None, error), _Ended((1, error, 2.0))])
    assert [one.told for one in requests[1:]] == [
        [("success", (0, "ok", 1.0))], [("failure", error)], [("success", (1, error, 2.0))],
    ]  # fmt: skip


def test_a_job_that_the_worker_drops_keeps_no_request() -> None:
    """When the worker loses its connection, it forgets what waits. So the channel sees that nobody works on the messages."""
    pool, request = Pool(1), Request(1)
    pool.jobs.execute(Request(0))
    pool.jobs.execute(request)
    pool.semaphore.clear()
    kept = weakref.ref(request)
    del request
    gc.collect()
    assert kept() is None
    pool.jobs.execute(Request(2))
    assert len(pool.alone) == 2


# -- in a pool process


class Worker:
    """A pool process with one small task, over a results table in memory."""

    def __init__(self) -> None:
        self.canvas = Canvas(backend="mdstore.queue.results.backend:DynamoBackend")
        self.table = self.canvas.table
        self.log: list[Any] = []
        self.outcomes: list[Any] | Exception = []

        @self.canvas.app.task(name="small", bind=True, acks_late=True, shared=False)  # type: ignore[untyped-decorator]
        def small(_task: Any, number: int) -> Any:
            outcome = prepared()
            self.log.append((number, outcome))
            if isinstance(outcome, Exception):
                raise outcome
            return {"number": number}

        small.prepare = self._prepare

    def _prepare(self, arguments: list[Any]) -> list[Any]:
        self.log.append(arguments)
        if isinstance(self.outcomes, Exception):
            raise self.outcomes
        return self.outcomes

    def run(self, *outcomes: Any) -> list[_Ended]:
        """Run a job with a message for each outcome."""
        self.outcomes = list(outcomes)
        return self.run_messages(len(outcomes))

    def run_messages(self, count: int, **headers: Any) -> list[_Ended]:
        messages = [
            _Message(f"id-{n}", {"id": f"id-{n}", "task": "small", "args": [n], "kwargs": {}, "delivery_info": {}, **headers},
                     [[n], {}, {}])
            for n in range(count)
        ]  # fmt: skip
        return run_job("small", messages)

    def stored(self) -> dict[str, str]:
        """Return the state of each task that has one stored, by its id."""
        return {
            key.removeprefix("celery-task-meta-"): json.loads(item["result"]["S"])["status"]
            for key, item in self.table.items.items()
        }


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()
    monkeypatch.setattr("mdstore.queue.worker.jobs.current_app", made.canvas.app)
    return made


def kind(ended: _Ended) -> Any:
    """Return the class of a message's error, or its result's text."""
    assert ended.traced is not None
    failed, value, _ = ended.traced
    error = value.exception if failed else value
    if isinstance(error, ExceptionWithTraceback):
        error = error.exc
    return type(error) if failed else error


def test_each_message_gets_what_was_prepared_for_it_and_ends_on_its_own(worker: Worker) -> None:
    """A success, a failure, a retry, a message that is given back, and one that is ignored: each as if it had run alone."""
    outcomes = [
        "one", ValueError("no"), Retry("later", exc=Unavailable("busy", code="x")), Reject("not now", requeue=True),
        Ignore(), None,
    ]  # fmt: skip
    ended = worker.run(*outcomes)
    assert worker.log == [[[n] for n in range(6)], *((n, outcome) for n, outcome in enumerate(outcomes))]
    assert [kind(one) for one in ended] == ["{'number': 0}", ValueError, Retry, Reject, Ignore, "{'number': 5}"]
    assert worker.stored() == {
        "id-0": states.SUCCESS, "id-1": states.FAILURE, "id-2": states.RETRY, "id-5": states.SUCCESS,
    }  # fmt: skip
    assert prepared() is None


def test_the_time_of_a_message_includes_its_preparation(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls to AWS were made then."""
    times = iter([100.0, 107.0])
    monkeypatch.setattr("mdstore.queue.worker.jobs.time", SimpleNamespace(monotonic=lambda: next(times)))
    (ended,) = worker.run("one")
    assert ended.traced is not None
    assert 7.0 <= ended.traced[2] < 8.0


def test_a_result_that_cannot_be_stored_has_only_its_own_message_delivered_again(worker: Worker) -> None:
    """The others' results are stored, and their messages are done."""
    puts = iter(range(3))

    def fail_second(operation: str) -> None:
        if operation == "PutItem" and next(puts) == 1:
            raise Unavailable("down", code="x")

    worker.table.before_call = fail_second
    ended = worker.run("a", "b", "c")
    assert [kind(one) for one in ended] == ["{'number': 0}", ResultNotRecorded, "{'number': 2}"]
    assert worker.stored().keys() == {"id-0", "id-2"}


def test_a_result_that_nobody_wants_is_not_stored(worker: Worker) -> None:
    worker.outcomes = ["a", "b"]
    assert [kind(one) for one in worker.run_messages(2, ignore_result=True)] == ["{'number': 0}", "{'number': 1}"]
    assert worker.table.calls == []


@pytest.mark.parametrize("error", [MdstoreError("all fail"), MemoryError()])
def test_if_the_preparation_fails_each_message_runs_alone(
    worker: Worker, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The tasks then do the work themselves."""
    worker.outcomes = error
    assert [kind(one) for one in worker.run_messages(2)] == ["{'number': 0}", "{'number': 1}"]
    assert worker.log[1:] == [(0, None), (1, None)]
    assert "could not be prepared" in caplog.text


def test_an_error_that_celery_s_tracer_raises_is_the_message_s_own(worker: Worker) -> None:
    """As in a pool without jobs, the request then handles it as a failure."""
    worker.outcomes = ["a", MemoryError(), "c"]
    first, second, third = worker.run_messages(3)
    assert (kind(first), kind(third)) == ("{'number': 0}", "{'number': 2}")
    assert second.traced is None or kind(second) is MemoryError
