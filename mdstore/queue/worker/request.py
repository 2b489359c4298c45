"""Handle one delivery of a task's message."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Reject, WorkerLostError
from celery.utils.log import get_logger
from celery.worker.request import Request
from celery.worker.state import task_ready

from mdstore.errors import DeliveriesExhausted
from mdstore.queue.worker.outages import is_redelivered
from mdstore.queue.worker.patches import RECORDS_REJECTION

logger = get_logger(__name__)


class SqsRequest(Request):
    """Counts the deliveries of a message. After the last one allowed, the message is dead-lettered with the reason."""

    acknowledged: bool
    _failure: Any = None

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        # Acknowledge and reject on the calling thread: the loop, which Celery uses, does not run while a stopping worker waits.
        kwargs |= {"on_ack": message.ack_log_error, "on_reject": message.reject_log_error}
        super().__init__(message, *args, **kwargs)
        message.channel.watch(message.delivery_tag, self)

    @property
    def receives(self) -> int:
        """Return how often SQS has delivered the message, this time included."""
        return int(self.request_dict.get("receives") or 1)

    @property
    def is_small(self) -> bool:
        """Return whether the task may run side by side with others like it: see `mdstore.queue.worker.jobs`."""
        return False

    def maybe_expire(self) -> bool:
        """Return whether the task has expired.

        Celery would also revoke the task's id, and so drop every later message with this id, whoever sent it.
        """
        return self.expires is not None and datetime.now(UTC if self.expires.tzinfo else None) > self.expires

    def begin(self, execute: Callable[[Request], Any]) -> Any:
        """Execute the task, or dead-letter its message if the allowed deliveries are used up.

        No delivery ended with a result, so the task may be one that kills workers. If the task cannot be started, e.g.
        because the pool has stopped, give its message back.
        """
        if self.receives <= self.app.settings.max_receives:
            try:
                with self.message.channel.executing():
                    return execute(self)
            except self.connection_errors:
                raise
            except Exception:
                logger.exception("task %s[%s] could not be started", self.name, self.id)
                self._failure = ExceptionInfo()
        task_ready(self)
        return self.reject(requeue=True)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the failure as the reason for a dead letter.

        If the infrastructure failed and the message is not acknowledged yet, give it back, to be delivered again.
        """
        self._failure = exc_info
        if is_redelivered(self._error()) and not self.acknowledged:
            task_ready(self)
            return self.reject(requeue=True)
        return super().on_failure(exc_info, *args, **kwargs)

    def reject(self, requeue: bool = False) -> None:
        """Give the message back. Dead-letter it instead after its last delivery, or if the task itself rejects it."""
        is_last = self.receives >= self.app.settings.max_receives
        if self.acknowledged or (requeue and not is_last):
            super().reject(requeue=requeue)
            return
        self.acknowledged = True
        is_recorded = not requeue and RECORDS_REJECTION
        report = _do_nothing if is_recorded else self._record_failure
        self.message.channel.dead_letter(self.message.delivery_tag, self._reason(), report=report)
        self.send_event("task-rejected", requeue=False)

    def record_lost(self) -> None:
        """Record that the task was killed. SQS will not redeliver it, because its message was deleted before."""
        error = WorkerLostError("the worker stopped before the task had finished; its message was acknowledged early")
        self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        """Announce a task that a cold shutdown kills. Celery calls it RETRY even if no message is left."""
        super()._announce_cancelled(emit_retry=emit_retry and not self.acknowledged)
        if emit_retry and self.acknowledged:
            self.record_lost()

    def _reason(self) -> str:
        attempts = f"delivered {self.receives} times"
        if self._failure is None:
            return f"{attempts} without finishing"
        error = self._error()
        text = error.reason if isinstance(error, Reject) else f"{type(error).__name__}: {error}"
        return f"{text} ({attempts})\n{self._failure.traceback}"

    def _error(self) -> Any:
        error = self._failure.exception
        return error.exc if isinstance(error, ExceptionWithTraceback) else error

    def _record_failure(self) -> None:
        """Record the task as failed, because it will not run again; this tells everyone who waits for its result."""
        error = self._error() if self._failure is not None else WorkerLostError(self._reason())
        if is_redelivered(error):
            error = DeliveriesExhausted(self._reason())
        self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)


def _do_nothing() -> None:
    """Record nothing, because Celery has recorded the failure."""
