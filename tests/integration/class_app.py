"""An app whose tasks have classes of all the kinds that Celery's documentation and well-known packages show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Task, shared_task
from celery.contrib.abortable import AbortableTask
from celery.worker.request import Request
from flask import Flask, current_app

from mdstore.queue import create_app

app = create_app(include=["tests.integration.class_app"])
flask = Flask("shop")
flask.config["SHOP"] = "Flask's shop"


class Counting(Task):
    """Counts its calls, as Celery's documentation does."""

    abstract = True
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


class FlaskTask(Task):
    """The task of Flask's documentation."""

    abstract = True

    def __call__(self, *args: object, **kwargs: object) -> object:
        with flask.app_context():
            return self.run(*args, **kwargs)


class NotingRequest(Request):
    """A request that notes failures, as Celery's documentation shows."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        with Path(self.kwargs["notes"]).open("a") as notes:
            notes.write(f"{self.receives}: {exc_info.exception!r}\n")
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)


class Noting(Task):
    """A task with such requests."""

    abstract = True
    Request = NotingRequest


class BrokenRequest(Request):
    """A request that cannot be made."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise LookupError("no such tenant")


class Broken(Task):
    """A task with such requests."""

    abstract = True
    Request = "tests.integration.class_app:BrokenRequest"


class Doubling(Task):
    """A task that is a class."""

    name = "doubling"

    def run(self, number: int) -> int:
        return 2 * number


app.register_task(Doubling())


@app.task(name="counted", base=Counting, bind=True)
def counted(self: Counting, number: int) -> int:
    assert self.calls
    return number + 1


@shared_task(name="shared", base=Counting)
def shared(number: int) -> int:
    return number + 10


@app.task(name="abortable", base=AbortableTask, bind=True)
def abortable(self: AbortableTask) -> str:
    return "aborted" if self.is_aborted() else "ran"


@app.task(name="flasks", base=FlaskTask)
def flasks() -> str:
    found: str = current_app.config["SHOP"]
    return found


@app.task(name="noting", base=Noting)
def noting(*, notes: str) -> None:  # noqa: ARG001  the request writes there
    raise ValueError("on purpose")


@app.task(name="broken", base=Broken)
def broken() -> None:
    """Do nothing: this never runs."""


@app.task(name="retrying", base=Counting, bind=True, max_retries=1)
def retrying(self: Counting) -> str:
    if not self.request.retries:
        raise self.retry(countdown=0)
    return str(self.request.properties.get("MessageGroupId"))
