"""Celery on this project's transport, with tasks that only record that they ran."""

from __future__ import annotations

from celery import Task

from benchmarks.peers import writing
from benchmarks.peers.ran import record_run
from mdstore.queue import create_app

app = create_app(task_ignore_result=True, worker_concurrency=writing.PROCESSES)


@app.task(name="noop", shared=False)
def noop(number: int) -> None:
    """Do nothing but record the run."""
    record_run(number)


@app.task(name="mixed", shared=False, bind=True)
def mixed(self: Task, number: int, padding: str = "") -> None:  # noqa: ARG001
    """Do nothing but record the run. One task in ten is retried once, and one in fifty of the retries has large arguments."""
    if number % 10 == 0 and self.request.retries == 0:
        large = "x" * 300_000 if number % 500 == 0 else ""
        raise self.retry(args=(number,), kwargs={"padding": large}, countdown=1)
    record_run(number)
