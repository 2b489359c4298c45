"""What tasks with small work share with the worker that runs them side by side: see `mdstore.queue.worker.jobs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

#: The most small tasks that one process runs side by side.
SMALL_PER_JOB = 32

_prepared: ContextVar[Any] = ContextVar("prepared", default=None)


def prepared() -> Any:
    """Return what the task's `prepare` returned for the current message, or None if the task runs alone."""
    return _prepared.get()


@contextmanager
def being_prepared(outcome: Any) -> Iterator[None]:
    """Make `prepared` return an outcome inside the context."""
    token = _prepared.set(outcome)
    try:
        yield
    finally:
        _prepared.reset(token)
