"""Prepare a worker's child processes: build their clients before the first message, and collect garbage rarely."""

from __future__ import annotations

import gc
import itertools
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from celery import current_app
from celery.signals import task_postrun, worker_process_init

from mdstore.queue.worker.patches import without_frames

if TYPE_CHECKING:
    from collections.abc import Mapping

_COLLECT_EVERY = 100  # tasks


@runtime_checkable
class _Warmable(Protocol):
    """Matches an app that `create_app` made."""

    tasks: Mapping[str, Any]

    def warm_up(self) -> None:
        """Build what tasks use, before the first message."""


def connect_signals() -> None:
    """Prepare each child process that a worker in this process starts. Connecting twice is harmless."""
    worker_process_init.connect(_prepare, dispatch_uid=__name__)


def _prepare(**_kwargs: Any) -> None:
    """Build the process's clients, then freeze all objects, so that collections skip these long-lived ones.

    Scanning them takes 60 ms per collection; in total that is a quarter of the CPU time that applying operations takes.
    """
    app = current_app._get_current_object()
    if not isinstance(app, _Warmable):  # a plain Celery app, whose process only imported this package
        return
    app.warm_up()
    for task in app.tasks.values():
        if task.__trace__ is not None:
            task.__trace__ = without_frames(task.__trace__)
    gc.collect()
    gc.freeze()
    task_postrun.connect(_CollectGarbage(), weak=False)


class _CollectGarbage:
    """Collects garbage after every hundredth task of a child process.

    Python counts new objects to decide when to collect. A retry or an error leaves only six, but these hold 90 KB, so
    hundreds of megabytes would pile up first. Frozen objects are skipped, so a collection takes a millisecond.
    """

    def __init__(self) -> None:
        self._tasks = itertools.count(1)

    def __call__(self, **_kwargs: Any) -> None:
        if next(self._tasks) % _COLLECT_EVERY == 0:
            gc.collect()
