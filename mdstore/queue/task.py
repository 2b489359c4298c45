"""The class of every task of an app that `create_app` makes."""

from __future__ import annotations

from celery import Task


class SqsTask(Task):
    """Celery's, with deliveries that are counted."""

    abstract = True
    Request = "mdstore.queue.request:SqsRequest"
