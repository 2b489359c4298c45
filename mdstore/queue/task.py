"""Adds to every task of an app on SQS what it needs, even where users bring their own base classes and request classes."""

from __future__ import annotations

from functools import wraps
from typing import Any

from celery.app.registry import TaskRegistry
from kombu.utils.imports import symbol_by_name

from mdstore.queue.worker.request import SqsRequest


class SqsTasks(TaskRegistry):
    """Holds an app's tasks. A retry of a task keeps the message group of the current message."""

    def __setitem__(self, name: str, task: Any) -> None:
        """Add a task. This changes the task and not its class, which may be shared with other apps."""
        make_signature = task.signature_from_request

        @wraps(make_signature)
        def signature_from_request(request: Any = None, *args: Any, **kwargs: Any) -> Any:
            signature = make_signature(request, *args, **kwargs)
            properties = (task.request if request is None else request).properties or {}
            if "MessageGroupId" in properties:
                signature.options.setdefault("MessageGroupId", properties["MessageGroupId"])
            return signature

        task.signature_from_request = signature_from_request
        super().__setitem__(name, task)


def sqs_request(request: Any) -> type[SqsRequest]:
    """Return a task's class of requests, or a subclass of it that also counts deliveries. `request` may be its path.

    Methods of a user's own class come first, and call those of `SqsRequest` through `super()`.
    """
    found: type = symbol_by_name(request)
    if issubclass(found, SqsRequest):
        return found
    if issubclass(SqsRequest, found):
        return SqsRequest
    return type(found.__name__, (found, SqsRequest), {"__module__": found.__module__})
