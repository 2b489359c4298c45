"""Tell failures of the infrastructure from those of a task: a message was not sent, or a result not recorded."""

from __future__ import annotations

from celery.exceptions import Reject

from mdstore.errors import ResultNotRecorded
from mdstore.queue.broker.publisher import Unsent


def is_redelivered(error: object) -> bool:
    """Return whether SQS redelivers a task's message after `error`. Any other error is the task's own failure."""
    if isinstance(error, Reject):  # Celery raises this for a retry that could not be sent
        error = error.reason
    if isinstance(error, Unsent):
        return not error.is_refused
    return isinstance(error, ResultNotRecorded)
