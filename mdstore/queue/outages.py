"""Failures that are not a task's own: AWS said "not now", or "never like this", which the deployer mends."""

from __future__ import annotations

from celery.exceptions import Reject

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.queue.outbox import Unsent


def comes_again(error: object) -> bool:
    """Whether what ended a task, in its body or while its end was noted, keeps its message, which is delivered again."""
    if isinstance(error, Reject):  # as Celery calls a retry that could not be sent
        error = error.reason
    if isinstance(error, Unsent):
        return not error.is_refused
    return isinstance(error, Unavailable | DeploymentBroken)
