"""A worker's child processes: their clients are built before the first message, and their garbage is collected rarely."""

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
    """An app made by `create_app`."""

    tasks: Mapping[str, Any]

    def warm_up(self) -> None:
        """Build what tasks use."""


def connect_signals() -> None:
    """Have each child process of this process's worker prepared; connecting twice is harmless."""
    worker_process_init.connect(_prepare, dispatch_uid=__name__)


def _prepare(**_kwargs: Any) -> None:
    """Build the process's clients, then freeze what is there, so that collections skip these long-lived objects.

    Walking over them takes 60 ms a collection, which adds up to a fourth of the CPU that applying operations takes.
    """
    app = current_app._get_current_object()
    if not isinstance(app, _Warmable):  # an app of Celery's own, in a process that only imported this package
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

    Python collects by the number of new objects. A retry or an error leaves six of them, and 90 KB, so hundreds of megabytes
    would gather first. What is frozen is skipped, so a collection takes a millisecond.
    """

    def __init__(self) -> None:
        self._tasks = itertools.count(1)

    def __call__(self, **_kwargs: Any) -> None:
        if next(self._tasks) % _COLLECT_EVERY == 0:
            gc.collect()
