"""Work that a worker does every few seconds, beside its tasks."""

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
    """A thread that works every `interval` seconds or so; at once again where `work` says that there is more.

    `work` is given a function that says whether it is to end. An error is logged as `{name}.failed` and the work tried again.
    To be started after a fork, and stopped before its process ends.
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
        """Begin; nothing where it runs already."""
        if self._thread is None:
            self._stopping = threading.Event()
            name = f"mdstore-{self._name}"
            self._thread = threading.Thread(target=self._run, args=(self._stopping,), name=name, daemon=True)
            self._thread.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Tell the work to end, and wait for it up to `timeout` seconds; returns whether it has ended."""
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
    """A step of the worker, whatever queues it consumes from: `work` of a subclass, every `interval` seconds."""

    requires = ("celery.worker.components:Pool",)  # a child that is forked while the work holds a lock never gets it

    work_name: ClassVar[str]
    interval: ClassVar[float]

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.app = worker.app
        self._periodic = Periodic(self.work_name, self.work, interval=self.interval)

    @abstractmethod
    def work(self, stopping: Callable[[], bool]) -> bool:
        """Do what is to be done; returns whether there is more of it."""

    def start(self, parent: Any) -> None:  # noqa: ARG002
        """With the worker."""
        self._periodic.start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002
        """Let what has begun come to its end."""
        self._periodic.stop()

    terminate = stop
