"""A plain Celery app on this project's transport and backend. It sends each message `DELIVERIES` times (default 1)."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Task, group

from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.queue.broker.channel import Channel, Transport
from mdstore.queue.results.recovery import RecoveryStep
from mdstore.settings import Settings


class RepeatingChannel(Channel):
    """A channel that puts each message into the queue `DELIVERIES` times."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        for _ in range(int(os.environ.get("DELIVERIES", "1"))):
            super()._put(queue, message, **kwargs)


class RepeatingTransport(Transport):
    """The transport that uses `RepeatingChannel`."""

    Channel = RepeatingChannel


RecoveryStep.interval = 1.0


def plain_app(settings: Settings | None = None) -> SqsApp:
    """Return an app with the tasks that the tests send."""
    made = create_app(settings, broker_transport="tests.integration.plain_app:RepeatingTransport")

    @made.task(name="add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    @made.task(name="total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @made.task(name="fail", shared=False, acks_on_failure_or_timeout=True)
    def fail(reason: str) -> None:
        raise ValueError(reason)

    @made.task(name="ask", shared=False, bind=True)
    def ask(self: Task) -> list[str]:
        answers = self.app.control.inspect(timeout=5, limit=2).ping() or {}
        return sorted(answers)

    @made.task(name="nap", shared=False)
    def nap(seconds: float) -> None:
        time.sleep(seconds)

    @made.task(name="seen", shared=False)
    def seen(values: Any) -> Any:
        return values

    @made.task(name="quiet", shared=False, ignore_result=True)
    def quiet(value: int) -> int:
        return value

    @made.task(name="more", shared=False, bind=True)
    def more(self: Task, value: int) -> int:
        # The id is fixed, so a second delivery of this task adds the same part again.
        self.add_to_chord(made.tasks["seen"].s(value + 1).set(task_id=f"{self.request.id}-more"))
        return value

    @made.task(name="spread", shared=False, bind=True)
    def spread(self: Task, value: int) -> Any:
        tasks = made.tasks
        return self.replace(group([tasks["add"].s(value, n) for n in range(3)], app=made) | tasks["total"].s())

    return made


app = plain_app()
