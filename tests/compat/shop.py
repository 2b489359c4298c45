"""The plain Celery app whose messages are recorded and replayed: `celery -A tests.compat.shop worker`.

Every version must register these tasks under these names, because recorded messages name them. Executions are noted in
the file that `NOTES` names. While `SHOP_IS_BROKEN` is set, `fragile` and `brittle` do not work.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Task
from celery.exceptions import Reject
from celery.signals import task_prerun
from kombu import Exchange, Queue

from mdstore.queue import create_app
from mdstore.settings import Settings

BROKEN = "SHOP_IS_BROKEN"
BIG = 200_000  # characters of a result that does not stand in its item


def add(x: int, y: int) -> int:
    """Add two numbers."""
    return x + y


def total(numbers: list[int]) -> int:
    """Add all numbers."""
    return sum(numbers)


def seen(*args: Any, **kwargs: Any) -> Any:
    """Return what it was given."""
    return [list(args), kwargs]


def quiet(value: int) -> int:
    """Return a value that nobody stores."""
    return value


def size(text: str) -> int:
    """Count characters."""
    return len(text)


def big() -> str:
    """Return a large result."""
    return "x" * BIG


def fail(reason: str) -> None:
    """Fail with the task's own error."""
    raise ValueError(reason, 3)


def brittle(value: int) -> int:
    """Fail while the shop is broken."""
    if BROKEN in os.environ:
        raise ValueError("broken")
    return value


def fragile(value: int) -> int:
    """Reject the message while the shop is broken."""
    if BROKEN in os.environ:
        raise Reject("the shop is broken", requeue=False)
    return value


def again(self: Task) -> int:
    """Succeed at the second try."""
    if self.request.retries < 1:
        raise self.retry(countdown=1)
    retries: int = self.request.retries
    return retries


def more(self: Task, value: int) -> int:
    """Add a part to the chord that this task is a part of."""
    self.add_to_chord(self.app.tasks["shop.add"].s(value, 100).set(task_id=f"{self.request.id}-more"))
    return value


def shop_app(settings: Settings | None = None) -> Any:
    """Make the app: a standard queue and a FIFO queue, and everything periodic each second."""
    made = create_app(settings, name="shop")
    for function in (add, total, seen, size, big, fail, brittle, fragile):
        made.task(name=f"shop.{function.__name__}", shared=False)(function)
    made.task(name="shop.quiet", shared=False, ignore_result=True)(quiet)
    for bound in (again, more):
        made.task(name=f"shop.{bound.__name__}", shared=False, bind=True)(bound)
    names = (made.settings.queue, fifo(made.settings.queue))
    made.conf.task_queues = [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names]
    for step in made.steps["worker"]:
        if hasattr(step, "interval"):
            step.interval = 1.0
    return made


def fifo(queue: str) -> str:
    """Name the FIFO queue beside a queue."""
    return f"{queue}.fifo"


def _note(task_id: str, **_: Any) -> None:
    if notes := os.environ.get("NOTES"):
        with Path(notes).open("a") as file:
            file.write(f"{task_id}\n")


task_prerun.connect(_note, weak=False)
app = shop_app()
