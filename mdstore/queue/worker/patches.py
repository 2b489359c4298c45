"""All code that relies on Celery's internals. It does nothing on a version of Celery with which it was not tested."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import celery
from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.trace import TraceInfo
from celery.concurrency.asynpool import AsynPool, gen_not_started
from celery.utils.log import get_logger
from celery.utils.serialization import get_pickleable_exception

from mdstore.queue.worker.outages import is_redelivered

logger = get_logger(__name__)

_TESTED = ((5, 6), (5, 7))
#: States of a task that ran but is not finished: it is retried or replaced.
_NOT_FINISHED = frozenset({states.RETRY, states.IGNORED})
#: Since 5.7, Celery records a failure for a task that raises `Reject(requeue=False)`.
RECORDS_REJECTION = tuple(celery.VERSION[:2]) >= (5, 7)
_STARTS_WITHIN = 5.0  # seconds for an idle process to acknowledge a task that is being written to it


def is_tested() -> bool:
    """Return whether the patches were tested with this version of Celery."""
    return tuple(celery.VERSION[:2]) in _TESTED


if not is_tested():
    logger.warning("Celery %s is not one of the tested versions %s: running without patches", celery.VERSION, _TESTED)


def without_frames(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a task's tracer, so that a retry or a replacement reaches the main process without the frames of its traceback.

    The frames are 50 KB, which take one or two milliseconds to pickle and unpickle. The main process uses only their text.
    """
    if not is_tested():
        return trace

    @wraps(trace)
    def traced(*args: Any, **kwargs: Any) -> Any:
        result = trace(*args, **kwargs)
        if result.info is not None and result.info.state in _NOT_FINISHED:
            result.retval.tb = None
        return result

    return traced


def _handle_failure(self: TraceInfo, task: Any, req: Any, **kwargs: Any) -> ExceptionInfo:
    """Handle the failure of a task, unless its message will be delivered again.

    Such a delivery is not the task's end, so it calls neither `on_failure` and `after_return` nor the receivers of
    `task_failure`. The worker's main process gives the message back, as it does for any such error.
    """
    error = self.retval
    if not is_redelivered(error) or not task.acks_late or req.is_eager:
        return _celery_handle_failure(self, task, req, **kwargs)
    self.state = states.REJECTED
    return ExceptionInfo((type(error), get_pickleable_exception(error), error.__traceback__))


_celery_handle_failure = TraceInfo.handle_failure
if is_tested():
    TraceInfo.handle_failure = _handle_failure


def await_started(pool: Any) -> None:
    """Wait until the child processes have acknowledged each task that was written to them, for 5 seconds at most.

    On shutdown Celery forgets tasks whose start no process has acknowledged yet. Such a task would still run, its message
    would be redelivered, and its process, on exit, would wait half a minute for the main process to read its result.
    """
    if not is_tested() or not isinstance(pool, AsynPool):
        return
    results = pool._result_handler
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline:
        for writer in [one for one in pool._active_writers if not gen_not_started(one)]:
            with suppress(StopIteration, OSError, EOFError):
                next(writer)
        written = [job._write_to for job in tuple(pool._cache.values()) if job._write_to and not job._accepted]
        waiting = [process for process in written if process._is_alive()]
        if not waiting:
            return
        for process in waiting:
            if process.outq._reader.poll(0.05):
                results._flush_outqueue(process.outqR_fd, _ignore, results.fileno_to_outq, results.on_state_change)


def _ignore(_: object) -> None:
    """Do nothing about a process whose pipe is gone: the pool handles it when it stops."""
