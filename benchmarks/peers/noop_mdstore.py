"""Celery on this project's transport: a task that does nothing but say that it ran."""

from __future__ import annotations

from celery import Task

from benchmarks.peers import writing
from benchmarks.peers.ran import note
from mdstore.queue import create_app

app = create_app(task_ignore_result=True, worker_concurrency=writing.PROCESSES)


@app.task(name="noop", shared=False)
def noop(number: int) -> None:
    """Do nothing."""
    note(number)


@app.task(name="mixed", shared=False, bind=True)
def mixed(self: Task, number: int, padding: str = "") -> None:  # noqa: ARG001
    """Do nothing; one in ten at the second try, and one in fifty of those with large arguments."""
    if number % 10 == 0 and self.request.retries == 0:
        large = "x" * 300_000 if number % 500 == 0 else ""
        raise self.retry(args=(number,), kwargs={"padding": large}, countdown=1)
    note(number)
