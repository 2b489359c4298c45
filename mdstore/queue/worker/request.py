"""How a worker holds one delivery of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import Reject, WorkerLostError
from celery.worker.request import Request
from celery.worker.state import task_ready

from mdstore.errors import DeliveriesExhausted
from mdstore.queue.worker.outages import comes_again


class SqsRequest(Request):
    """A delivery that counts: after the last one that is allowed, a message goes to the dead letters with its reason."""

    acknowledged: bool
    _failure: Any = None

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        # Any thread may settle; the loop, over which Celery would, does not turn while a stopping worker waits.
        kwargs |= {"on_ack": message.ack_log_error, "on_reject": message.reject_log_error}
        super().__init__(message, *args, **kwargs)
        message.channel.watch(message.delivery_tag, self)

    @property
    def receives(self) -> int:
        """How often SQS has delivered the message, this time included."""
        return int(self.request_dict.get("receives") or 1)

    def begin(self, execute: Callable[[Request], Any]) -> Any:
        """Execute, unless that was tried as often as is allowed and nobody knows what became of it: it may kill workers."""
        if self.receives <= self.app.settings.max_receives:
            with self.message.channel.executing():
                return execute(self)
        task_ready(self)
        return self.reject(requeue=True)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember why, for the dead letter. Where the task is not to blame, its message comes again, if there still is one."""
        self._failure = exc_info
        if comes_again(self._error()) and not self.acknowledged:
            task_ready(self)
            return self.reject(requeue=True)
        return super().on_failure(exc_info, *args, **kwargs)

    def reject(self, requeue: bool = False) -> None:
        """Give the message back; the last time, and where the task itself rejects it, it is dead-lettered."""
        is_last = self.receives >= self.app.settings.max_receives
        if self.acknowledged or (requeue and not is_last):
            super().reject(requeue=requeue)
            return
        self.acknowledged = True
        tell = self._end if requeue else None  # what the task itself rejects, Celery 5.7 has noted
        self.message.channel.bury(self.message.delivery_tag, self._reason(), then=tell)
        self.send_event("task-rejected", requeue=False)

    def _reason(self) -> str:
        attempts = f"delivered {self.receives} times"
        if self._failure is None:
            return f"{attempts} without an end"
        error = self._error()
        words = error.reason if isinstance(error, Reject) else f"{type(error).__name__}: {error}"
        return f"{words} ({attempts})\n{self._failure.traceback}"

    def _error(self) -> Any:
        error = self._failure.exception
        return error.exc if isinstance(error, ExceptionWithTraceback) else error

    def _end(self) -> None:
        """A task that will not run again has failed, and whoever waits for it is told."""
        error = self._error() if self._failure is not None else WorkerLostError(self._reason())
        if comes_again(error):
            error = DeliveriesExhausted(self._reason())
        self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)
