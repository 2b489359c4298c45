"""An app of plain tasks that record what they do in the file that `JOURNAL` names."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Task
from celery.exceptions import Reject

from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import Settings


def record(text: str) -> None:
    """Append a line to the journal."""
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(f"{text}\n")


def journaling_app(settings: Settings | None = None, *, make: Callable[..., SqsApp] = create_app) -> SqsApp:
    """Return an app, made by `make`, with tasks that record what they do."""
    made = make(settings)

    @made.task(name="touch", shared=False, ignore_result=True)
    def touch(number: int) -> None:
        record(f"{number}")

    @made.task(name="nap", shared=False)
    def nap(seconds: float) -> str:
        record("begins")
        time.sleep(seconds)
        record("ends")
        return "rested"

    @made.task(name="die", shared=False)
    def die() -> None:
        record("dies")
        os.kill(os.getpid(), signal.SIGKILL)

    @made.task(name="refuse", shared=False)
    def refuse() -> None:
        record("refuses")
        raise Reject("not for me", requeue=False)

    @made.task(name="fail", shared=False)
    def fail() -> None:
        record("fails")
        raise ValueError("on purpose")

    @made.task(name="later", shared=False, bind=True, max_retries=2)
    def later(self: Task) -> int:
        record(f"try {self.request.retries} at {time.time()}")
        if self.request.retries < 1:
            raise self.retry(countdown=2)
        retries: int = self.request.retries
        return retries

    @made.task(name="echo", shared=False)
    def echo(value: Any) -> Any:
        return value

    @made.task(name="imported", shared=False)
    def imported(prefix: str) -> list[str]:
        rooms = ("store", "tasks", "api", "client")
        return sorted(name for name in sys.modules if name.startswith(tuple(prefix + room for room in rooms)))

    @made.task(name="size", shared=False)
    def size(text: str) -> int:
        return len(text)

    return made


app = journaling_app()
