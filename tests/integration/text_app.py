"""An app whose tasks take, return and raise any text, on the queue of the settings and on a FIFO queue."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Task
from kombu import Exchange, Queue

from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import Settings, load_settings

#: Names of tasks that SQS does not accept as the id of a message group.
ODD_NAMES = ("move a record", "Datensätze prüfen", "x" * 200, "\uffff", "move-a-record")


def text_app(settings: Settings) -> SqsApp:
    """Make the app; its FIFO queue is for those who name it."""
    names = (settings.queue, f"{settings.namespace}.fifo")
    queues = [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names]
    made = create_app(settings, task_queues=queues)

    @made.task(name="echo", shared=False)
    def echo(value: Any) -> Any:
        return value

    @made.task(name="fail", shared=False)
    def fail(text: str) -> None:
        raise ValueError(text)

    @made.task(name="wait", shared=False)
    def wait(text: str, seconds: float) -> str:
        time.sleep(seconds)
        return text

    @made.task(name="headers", shared=False, bind=True)
    def headers(self: Task) -> list[Any]:
        return [self.request.shadow, self.request.stamps, self.request.own]

    @made.task(name="returns", shared=False)
    def returns() -> Any:
        return {"__type__": "nobody", "__value__": 1}

    @made.task(name="raises", shared=False)
    def raises() -> None:
        raise ValueError({"__type__": "nobody", "__value__": 1})

    def same(value: Any) -> Any:
        return value

    for name in ODD_NAMES:
        made.task(name=name, shared=False)(same)
    return made


if "MDSTORE_NAMESPACE" in os.environ:
    app = text_app(load_settings().settings)
