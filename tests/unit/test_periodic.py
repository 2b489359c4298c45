"""Work that a worker repeats every few seconds: errors, pauses and stopping."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from mdstore.errors import Unavailable
from mdstore.queue.worker.periodic import Periodic

HOUR = 3_600.0


class ScriptedWork:
    """Returns or raises the next of `results` at each run, then returns False. Each run releases `runs`."""

    def __init__(self, *results: bool | Exception, held: threading.Event | None = None) -> None:
        self.results = list(results)
        self.runs = threading.Semaphore(0)
        self.stopping: Callable[[], bool] = lambda: False
        self._held = held

    def __call__(self, stopping: Callable[[], bool]) -> bool:
        self.stopping = stopping
        found = self.results.pop(0) if self.results else False
        self.runs.release()
        if self._held:
            self._held.wait(60)
        if isinstance(found, Exception):
            raise found
        return found


def periodic(work: ScriptedWork, *, interval: float) -> Periodic:
    return Periodic("due", work, interval=interval, uniform=lambda low, _: low)


def test_an_error_is_logged_and_the_work_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """The thread survives any error of the work. Starting it twice starts one thread."""
    work = ScriptedWork(Unavailable("no table yet", code="NoAnswer"), ValueError("a fault"), False)
    running = periodic(work, interval=0.001)
    with caplog.at_level(logging.ERROR, "mdstore.events"):
        running.start()
        running.start()
        for _ in range(4):
            assert work.runs.acquire(timeout=10)
        assert running.stop()
    assert [text.split(" ")[0] for text in caplog.messages] == ["due.failed", "due.failed"]


def test_work_that_found_something_is_repeated_at_once() -> None:
    """The next run follows at once if a run found something, and after an interval if it did not."""
    work = ScriptedWork(True, True, True, False)
    running = periodic(work, interval=HOUR)
    running.start()
    for _ in range(4):
        assert work.runs.acquire(timeout=10)
    assert running.stop(10)
    assert not work.runs.acquire(blocking=False)
    assert work.stopping()


def test_periodic_work_can_be_stopped_twice_and_restarted() -> None:
    """Stopping does not wait for the interval, and may precede the first start."""
    work = ScriptedWork()
    running = periodic(work, interval=HOUR)
    assert running.stop()
    for _ in range(2):
        running.start()
        assert work.runs.acquire(timeout=10)
        assert running.stop(10)
        assert running.stop()


def test_stopping_waits_no_longer_than_the_timeout() -> None:
    """`stop` returns False if a run has not ended, and the thread does not keep the process alive."""
    held = threading.Event()
    work = ScriptedWork(held=held)
    running = periodic(work, interval=HOUR)
    running.start()
    assert work.runs.acquire(timeout=10)
    assert not running.stop(0.01)
    held.set()
