"""The class of every task of an app that `create_app` makes."""

from __future__ import annotations

from typing import Any

from celery import Task


class SqsTask(Task):
    """Celery's, with deliveries that are counted."""

    abstract = True
    Request: Any = "mdstore.queue.worker.request:SqsRequest"

    def signature_from_request(self, request: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The task again, as for a retry: in the message group of its own message, where that has one."""
        signature = super().signature_from_request(request, *args, **kwargs)
        properties = (self.request if request is None else request).properties or {}
        if "MessageGroupId" in properties:
            signature.options.setdefault("MessageGroupId", properties["MessageGroupId"])
        return signature
