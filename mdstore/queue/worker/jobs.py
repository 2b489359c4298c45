"""Run small tasks side by side: while all pool processes are busy, the requests of small tasks gather in a job.

A job takes one pool process, like a task. There its task's `prepare` makes the calls to AWS of all its messages at the same
time, and then Celery's own tracer executes each message in turn. So signals, retries, rejects and results are those of
Celery. Each message is acknowledged, sent again or dead-lettered on its own account.

A request that arrives while a process is free never waits for others: it starts at once, alone, as Celery starts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

from billiard.einfo import ExceptionInfo
from celery import current_app
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import TaskRevokedError
from celery.utils.functional import maybe
from celery.utils.log import get_logger

from mdstore.aws.concurrent import Task
from mdstore.errors import ResultNotRecorded
from mdstore.queue.results.results import DynamoResults
from mdstore.queue.small_tasks import SMALL_PER_JOB, being_prepared
from mdstore.queue.worker.request import SqsRequest

logger = get_logger(__name__)


class _Message(NamedTuple):
    """What a pool process needs of a message: the task's id, the request, and the decoded body."""

    id: str
    request: dict[str, Any]
    body: Any


class _Ended(NamedTuple):
    """How one message of a job ended: as Celery's tracer reports it, or with an error that the tracer raised."""

    traced: tuple[int, Any, float] | None
    error: ExceptionInfo | None = None


# -- in the main process


class Jobs:
    """Starts requests through `execute`, which gives them to the pool. Requests of small tasks gather in jobs."""

    def __init__(self, execute: Callable[[Any], Any]) -> None:
        self._execute = execute
        # A job waits for a process in the worker's semaphore. If that is cleared, its requests must be gone, too.
        self._waiting: Callable[[], Job | None] = lambda: None

    def execute(self, request: SqsRequest) -> Any:
        """Start a request, or let it join the job that waits for a free process."""
        if not request.is_small:
            return self._execute(request)
        waiting = self._waiting()
        if waiting is not None and waiting.join(request):
            return None
        job = Job(request)
        self._waiting = ref(job)
        return self._execute(job)


class Job:
    """Requests of one task that one pool process runs side by side. Celery's worker starts it like a request."""

    def __init__(self, request: SqsRequest) -> None:
        self._requests = [request]
        self._is_started = False

    def join(self, request: SqsRequest) -> bool:
        """Add a request. Return False if the job is full, has started, or is for another task or another time limit."""
        if self._is_started or len(self._requests) >= SMALL_PER_JOB or _kind(request) != _kind(self._requests[0]):
            return False
        self._requests.append(request)
        return True

    def execute_using_pool(self, pool: Any, **_: Any) -> Any:
        """Give the requests to a pool process. Raises `TaskRevokedError` if all of them are revoked."""
        self._is_started = True
        first = self._requests[0]
        if len(self._requests) == 1:
            return first.execute_using_pool(pool)
        self._requests = [one for one in self._requests if not one.revoked()]
        if not self._requests:
            raise TaskRevokedError(first.id)
        task, (time_limit, soft_time_limit) = first.task, first.time_limits
        result = pool.apply_async(
            run_job,
            args=(task.name, [_Message(one.id, one.request_dict, one.message.payload) for one in self._requests]),
            accept_callback=self._on_accepted,
            timeout_callback=self._on_timeout,
            callback=self._on_success,
            error_callback=self._on_failure,
            soft_timeout=soft_time_limit or task.soft_time_limit,
            timeout=time_limit or task.time_limit,
            correlation_id=first.id,
        )
        for request in self._requests:
            request._apply_result = maybe(ref, result)
        return result

    def _on_accepted(self, pid: int, time_accepted: float) -> None:
        _call_all([partial(one.on_accepted, pid, time_accepted) for one in self._requests])

    def _on_timeout(self, soft: bool, timeout: float) -> None:
        _call_all([partial(one.on_timeout, soft, timeout) for one in self._requests])

    def _on_failure(self, exc_info: ExceptionInfo) -> None:
        _call_all([partial(one.on_failure, exc_info) for one in self._requests])

    def _on_success(self, ended: Sequence[_Ended]) -> None:
        _call_all(
            [
                partial(request.on_failure, how.error) if how.error else partial(request.on_success, how.traced)
                for request, how in zip(self._requests, ended, strict=True)
            ]
        )


def _kind(request: SqsRequest) -> tuple[str, tuple[float | None, ...]]:
    return request.task.name, tuple(request.time_limits)


def _call_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Make all calls, even if some fail, and then raise the first error."""
    errors = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    for other in errors[1:]:
        logger.error("another message of the job could not be told how it went", exc_info=other)
    if errors:
        raise errors[0]


# -- in a pool process


def run_job(name: str, messages: Sequence[_Message]) -> list[_Ended]:
    """Prepare all messages side by side, execute each in turn, and store their results side by side."""
    task = current_app.tasks[name]
    began = time.monotonic()
    try:
        outcomes = task.prepare([message.request["args"] for message in messages])
    except Exception:
        logger.exception("%s: the messages of a job could not be prepared; each runs on its own", name)
        outcomes = [None] * len(messages)
    took = time.monotonic() - began
    ended, writes = [], []
    for message, outcome in zip(messages, outcomes, strict=True):
        with being_prepared(outcome), _results_of(task.backend) as results:
            ended.append(_execute(task, message, took))
        writes.append(results)
    return _stored(task, ended, writes)


@contextmanager
def _results_of(backend: Any) -> Iterator[list[Task[Any]]]:
    """Collect the writes of results inside the context. A backend that is not this project's writes them itself."""
    if not isinstance(backend, DynamoResults):
        yield []
        return
    with backend.storing_later() as writes:
        yield writes


def _execute(task: Any, message: _Message, took: float) -> _Ended:
    """Let Celery's tracer execute a message, which has been at work for `took` seconds already."""
    trace = fast_trace_task if task.app.use_fast_trace_task else trace_task_ret
    try:
        traced = trace(task.name, message.id, message.request, message.body, None, None, app=task.app)
    except Exception:
        return _Ended(None, ExceptionInfo())
    failed, value, runtime = traced
    return _Ended((failed, value, (runtime or 0.0) + took))


def _stored(task: Any, ended: Sequence[_Ended], writes: Sequence[Sequence[Task[Any]]]) -> list[_Ended]:
    """Store the results side by side. Return how the messages ended: one whose result is not stored is delivered again."""
    owners = [number for number, some in enumerate(writes) for _ in some]
    if not owners:
        return list(ended)
    found = list(ended)
    outcomes = task.app.aws.dynamo.outcomes((write for some in writes for write in some), in_flight=SMALL_PER_JOB)
    for number, outcome in zip(owners, outcomes, strict=True):
        if isinstance(outcome, Exception):
            found[number] = _Ended((1, _not_recorded(outcome), 0.0))
    return found


def _not_recorded(error: Exception) -> ExceptionInfo:
    not_recorded = ResultNotRecorded(str(error))
    not_recorded.__cause__ = error
    return ExceptionInfo((ResultNotRecorded, not_recorded, error.__traceback__))
