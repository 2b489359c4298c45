"""An app of many queues, whose tasks say in a file, `JOURNAL`, which queue they came from. `QUEUES` is the number of queues."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Task
from kombu import Queue

from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import Settings
from tests.integration.transport_app import record


def names(settings: Settings) -> list[str]:
    """The app's queues: the settings' first."""
    return [settings.queue, *(f"{settings.queue}-{n}" for n in range(1, int(os.environ.get("QUEUES", "2"))))]


def queues_app(settings: Settings | None = None) -> SqsApp:
    """The app."""
    made = create_app(settings)
    made.conf.task_queues = [Queue(name, routing_key=name) for name in names(made.settings)]

    @made.task(name="add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    @made.task(name="origin", shared=False, bind=True, ignore_result=True)
    def origin(self: Task, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        route: dict[str, Any] = self.request.delivery_info
        record(str(route["routing_key"]))

    @made.task(name="hold", shared=False)
    def hold(seconds: float, text: str) -> int:
        time.sleep(seconds)
        return len(text)

    return made


app = queues_app()
