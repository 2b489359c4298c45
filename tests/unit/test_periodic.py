"""Work that a worker does every few seconds: errors, pauses, and its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from mdstore.errors import Unavailable
from mdstore.queue.worker.periodic import Periodic

HOUR = 3_600.0


class Looks:
    """Says what each look finds, and that it was made."""

    def __init__(self, *finds: bool | Exception, held: threading.Event | None = None) -> None:
        self.finds = list(finds)
        self.made = threading.Semaphore(0)
        self.stopping: Callable[[], bool] = lambda: False
        self._held = held

    def __call__(self, stopping: Callable[[], bool]) -> bool:
        self.stopping = stopping
        found = self.finds.pop(0) if self.finds else False
        self.made.release()
        if self._held:
            self._held.wait(60)
        if isinstance(found, Exception):
            raise found
        return found


def periodic(looks: Looks, *, interval: float) -> Periodic:
    return Periodic("due", looks, interval=interval, uniform=lambda low, _: low)


def test_an_error_is_logged_and_the_work_done_again(caplog: pytest.LogCaptureFixture) -> None:
    """The thread outlives whatever a look raises; started twice it is one."""
    looks = Looks(Unavailable("no table yet", code="NoAnswer"), ValueError("a fault"), False)
    running = periodic(looks, interval=0.001)
    with caplog.at_level(logging.ERROR, "mdstore.events"):
        running.start()
        running.start()
        for _ in range(4):
            assert looks.made.acquire(timeout=10)
        assert running.stop()
    assert [text.split(" ")[0] for text in caplog.messages] == ["due.failed", "due.failed"]


def test_while_there_is_something_no_time_is_lost() -> None:
    """After a look that found something the next one is at once; after one that did not, an interval later."""
    looks = Looks(True, True, True, False)
    running = periodic(looks, interval=HOUR)
    running.start()
    for _ in range(4):
        assert looks.made.acquire(timeout=10)
    assert running.stop(10)
    assert not looks.made.acquire(blocking=False)
    assert looks.stopping()


def test_it_stops_promptly_twice_and_starts_again() -> None:
    """A stop does not wait for the interval; one that never ran has nothing to stop."""
    looks = Looks()
    running = periodic(looks, interval=HOUR)
    assert running.stop()
    for _ in range(2):
        running.start()
        assert looks.made.acquire(timeout=10)
        assert running.stop(10)
        assert running.stop()


def test_a_look_that_does_not_end_is_not_waited_for_longer_than_asked() -> None:
    """Stop says that it has not ended, and the thread does not keep the process alive."""
    held = threading.Event()
    looks = Looks(held=held)
    running = periodic(looks, interval=HOUR)
    running.start()
    assert looks.made.acquire(timeout=10)
    assert not running.stop(0.01)
    held.set()
