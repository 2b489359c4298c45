"""Ends of tasks that are not the tasks' own: a message could not be sent, or the end itself could not be noted."""

from __future__ import annotations

from celery.exceptions import Reject

from mdstore.errors import ResultNotRecorded
from mdstore.queue.broker.publisher import Unsent


def comes_again(error: object) -> bool:
    """Whether what ended a task keeps its message, which is delivered again. Any other error of its body is the task's own."""
    if isinstance(error, Reject):  # as Celery calls a retry that could not be sent
        error = error.reason
    if isinstance(error, Unsent):
        return not error.is_refused
    return isinstance(error, ResultNotRecorded)
