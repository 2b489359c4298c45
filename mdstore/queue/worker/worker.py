"""The class behind `celery worker`."""

from __future__ import annotations

import time

from celery.apps.worker import Worker
from celery.utils.log import get_logger

logger = get_logger(__name__)


class SqsWorker(Worker):
    """In a soft shutdown, gives back the messages that no task has begun, and then waits for the running tasks."""

    #: The time at which a soft shutdown under way ends, in monotonic seconds.
    soft_shutdown_ends = 0.0

    def wait_for_soft_shutdown(self) -> None:
        """Stop receiving, then wait up to `worker_soft_shutdown_timeout` seconds.

        Celery stops receiving only afterwards. Its loop does not run while it waits, so a worker that still received would
        seem to hang, and would hold messages that others could work on.
        """
        self.soft_shutdown_ends = time.monotonic() + self.app.conf.worker_soft_shutdown_timeout
        try:
            if self.app.conf.worker_soft_shutdown_timeout > 0 and self.consumer.task_consumer:
                self.consumer.task_consumer.cancel()
        except Exception:
            logger.exception("the worker could not stop receiving before its soft shutdown")
        super().wait_for_soft_shutdown()
