"""An app with the tasks of the scenarios that Celery's own integration tests cover."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Task
from celery.contrib.abortable import AbortableTask
from celery.exceptions import Reject, SoftTimeLimitExceeded
from celery.worker.control import control_command
from pydantic import BaseModel

from mdstore.queue import create_app

app = create_app(task_track_started=True, task_acks_on_failure_or_timeout=True)


class Amounts(BaseModel):
    """The argument of a task with type annotations."""

    net: int
    tax: int = 0


class OddError(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


@control_command()
def break_down(_: Any) -> None:
    raise RuntimeError("on purpose")


@app.task(shared=False, name="add")
def add(x: int, y: int, z: int = 0) -> int:
    return x + y + z


@app.task(shared=False, name="total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(shared=False, name="quiet", ignore_result=True)
def quiet(path: str) -> str:
    with open(path, "w") as file:
        file.write("done")
    return "ignored"


@app.task(shared=False, name="untyped", typing=False)
def untyped(x: int, y: int) -> int:
    return x + y


@app.task(shared=False, name="gross", pydantic=True)
def gross(amounts: Amounts) -> Amounts:
    return Amounts(net=amounts.net, tax=amounts.net // 5)


@app.task(shared=False, name="reject", bind=True)
def reject(self: Task, *, requeue: bool) -> str:
    if self.request.headers["receives"] > 1:
        return "second delivery"
    raise Reject("on purpose", requeue=requeue)


@app.task(shared=False, name="nap")
def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "rested"


@app.task(shared=False, name="linger", bind=True)
def linger(self: Task) -> str:
    """Take long at the first delivery only."""
    if self.request.headers["receives"] == 1:
        time.sleep(60)
    return "rested"


@app.task(shared=False, name="fail")
def fail(*_: Any) -> None:
    raise ValueError("on purpose")


@app.task(shared=False, name="fail_oddly")
def fail_oddly() -> None:
    raise OddError("first", "second")


@app.task(shared=False, name="retry", bind=True, max_retries=2)
def retry(self: Task, *, needed: int = 9) -> str:
    if self.request.retries < needed:
        raise self.retry(exc=OSError("not yet"), countdown=1)
    return f"after {self.request.retries}"


@app.task(shared=False, name="retry_with", bind=True, max_retries=1)
def retry_with(self: Task, x: int, y: int, *, args: Any = None, kwargs: Any = None) -> list[int]:
    if not self.request.retries:
        raise self.retry(args=args, kwargs=kwargs, countdown=0)
    return [x, y, self.request.retries]


@app.task(shared=False, name="describe", bind=True, max_retries=1)
def describe(self: Task, *, retries: int) -> dict[str, Any]:
    """Return what a task knows of its message, after some retries."""
    request = self.request
    if request.retries < retries:
        raise self.retry(countdown=0)
    return {
        "app_id": request.properties.get("app_id"),
        "priority": request.delivery_info["priority"],
        "header": (request.headers or {}).get("x-tenant"),
        "limits": list(request.timelimit),
    }


@app.task(shared=False, name="spin", soft_time_limit=1)
def spin() -> str:
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        return "stopped softly"
    return "not stopped"


@app.task(shared=False, name="bad_limits", soft_time_limit=5, time_limit=2)
def bad_limits() -> None:
    """Never run: the soft limit must be the lower one."""


@app.task(shared=False, name="nested", bind=True)
def nested(self: Task, levels: int, seen: list[int]) -> Any:
    seen = [*seen, self.request.replaced_task_nesting]
    return self.replace(nested.s(levels - 1, seen)) if levels else seen


@app.task(shared=False, name="spread", bind=True)
def spread(self: Task, number: int) -> Any:
    """Replace itself with a group."""
    return self.replace(add.s(number, 1) | total_of.s())


@app.task(shared=False, name="total_of")
def total_of(*numbers: int) -> int:
    return sum(numbers)


@app.task(shared=False, name="pid")
def pid() -> int:
    return os.getpid()


@app.task(shared=False, name="die")
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(shared=False, name="abortable", bind=True, base=AbortableTask)
def abortable(self: AbortableTask) -> str:
    for _ in range(300):
        if self.is_aborted():
            return "aborted"
        time.sleep(0.1)
    return "not aborted"


@app.task(shared=False, name="ids", bind=True)
def ids(self: Task, *_: Any) -> list[str | None]:
    return [self.request.root_id, self.request.parent_id]


@app.task(shared=False, name="note")
def note(*words: Any, path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{words[-1]}\n")
