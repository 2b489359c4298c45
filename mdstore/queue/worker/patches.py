"""What relies on Celery's internals, in one place; each function does nothing on a version that it was not tested with."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import celery
from celery import states
from celery.concurrency.asynpool import AsynPool, gen_not_started
from celery.utils.log import get_logger

logger = get_logger(__name__)

_TESTED = ((5, 6), (5, 7))
#: States of a task that was executed and goes on all the same.
_NOT_ENDED = frozenset({states.RETRY, states.IGNORED})
_STARTS_WITHIN = 5.0  # seconds, a task that is being written to an idle process


def is_tested() -> bool:
    """Whether Celery is of a version whose internals are known."""
    return tuple(celery.VERSION[:2]) in _TESTED


if not is_tested():
    logger.warning("Celery %s is not one of the tested versions %s: running without patches", celery.VERSION, _TESTED)


def without_frames(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a task's tracer: a retry or a replacement goes to the main process without the frames of its traceback.

    They are 50 KB, which take a millisecond or two to pickle and to read, and the main process looks at their text only.
    """
    if not is_tested():
        return trace

    @wraps(trace)
    def traced(*args: Any, **kwargs: Any) -> Any:
        answer = trace(*args, **kwargs)
        if answer.info is not None and answer.info.state in _NOT_ENDED:
            answer.retval.tb = None
        return answer

    return traced


def await_started(pool: Any) -> None:
    """Wait until the child processes have acknowledged each task that was written to them.

    On shutdown Celery forgets tasks whose start no process has acknowledged yet. Such a task would run all the same, its
    message would come again, and its process would wait half a minute to be heard.
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
    """Leave a process whose pipe is gone to the pool, which looks after it when it stops."""
