"""Run work every few seconds in a worker, beside its tasks."""

from __future__ import annotations

import logging
import random
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from celery import bootsteps

from mdstore.log import event


class Periodic:
    """Calls `work` on a thread about every `interval` seconds, and again at once if it returns that there is more to do.

    `work` receives a function that returns whether it must stop. An error is logged as `{name}.failed`, and the work is tried
    again after the interval. Start it after a fork, and stop it before the process ends.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Callable[[], bool]], bool],
        *,
        interval: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._name = name
        self._work = work
        self._interval = interval
        self._uniform = uniform
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread, unless it runs already."""
        if self._thread is None:
            self._stopping = threading.Event()
            name = f"mdstore-{self._name}"
            self._thread = threading.Thread(target=self._run, args=(self._stopping,), name=name, daemon=True)
            self._thread.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Tell the work to stop, and wait up to `timeout` seconds for it. Return whether it has stopped."""
        thread, self._thread = self._thread, None
        self._stopping.set()
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _run(self, stopping: threading.Event) -> None:
        pause = self._uniform(0, self._interval)
        while not stopping.wait(pause):
            pause = self._uniform(0.75, 1.25) * self._interval
            try:
                if self._work(stopping.is_set):
                    pause = 0.0
            except Exception as error:
                event(f"{self._name}.failed", level=logging.ERROR, error=repr(error))


class PeriodicStep(bootsteps.StartStopStep):
    """Runs as a step of the worker: calls the subclass's `work` every `interval` seconds, whichever queues are consumed."""

    # Start after the pool forks: a child that is forked while the work holds a lock could never take that lock.
    requires = ("celery.worker.components:Pool",)

    work_name: ClassVar[str]
    interval: ClassVar[float]

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.app = worker.app
        self._periodic = Periodic(self.work_name, self.work, interval=self.interval)

    @abstractmethod
    def work(self, stopping: Callable[[], bool]) -> bool:
        """Do one round of work. Return whether there is more to do."""

    def start(self, parent: Any) -> None:  # noqa: ARG002
        """Start the work when the worker starts."""
        self._periodic.start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002
        """Stop the work, but let a round that has begun finish."""
        self._periodic.stop()

    terminate = stop
