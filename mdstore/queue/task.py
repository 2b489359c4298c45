"""Define the base class of the tasks of an app that `create_app` makes."""

from __future__ import annotations

from typing import Any

from celery import Task


class SqsTask(Task):
    """Extends a Celery task: its worker counts the deliveries of its messages."""

    abstract = True
    Request: Any = "mdstore.queue.worker.request:SqsRequest"

    def signature_from_request(self, request: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return a signature that sends the task again, e.g. for a retry. It keeps the message group of the current message."""
        signature = super().signature_from_request(request, *args, **kwargs)
        properties = (self.request if request is None else request).properties or {}
        if "MessageGroupId" in properties:
            signature.options.setdefault("MessageGroupId", properties["MessageGroupId"])
        return signature
