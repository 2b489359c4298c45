"""Consume messages in a worker. One that cannot become a task is dead-lettered, and its task fails with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import signals
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.message import Message

from mdstore.queue.control.events import HEARTBEAT
from mdstore.queue.control.remote import ControlStep
from mdstore.queue.task import sqs_request
from mdstore.queue.worker.jobs import Jobs
from mdstore.queue.worker.patches import await_started
from mdstore.queue.worker.request import SqsRequest
from mdstore.queue.worker.unexecuted import fail_message

logger = get_logger(__name__)

_STEPS = [
    ControlStep if step == "celery.worker.consumer.control:Control" else step
    for step in CeleryConsumer.Blueprint.default_steps
]


class Consumer(CeleryConsumer):
    """Dead-letters malformed messages, which Celery's own consumer drops, loops on or crashes on."""

    class Blueprint(CeleryConsumer.Blueprint):
        """Replaces one of Celery's steps, so that a worker can run without remote control."""

        default_steps = _STEPS

    def __init__(
        self,
        on_task_request: Callable[[SqsRequest], Any],
        *args: Any,
        worker_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = worker_options or {}
        options["heartbeat_interval"] = options.get("heartbeat_interval") or HEARTBEAT
        jobs = Jobs(on_task_request)
        super().__init__(lambda request: request.begin(jobs.execute), *args, worker_options=options, **kwargs)

    def update_strategies(self) -> None:
        """Make the requests of all tasks count deliveries, whatever the class of a task or of its requests."""
        for task in self.app.tasks.values():
            task.Request = sqs_request(task.Request)
        super().update_strategies()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], Any]:
        """Return a handler that dead-letters each message on which Celery's fails.

        It reraises connection errors and `MemoryError`, which the message did not cause; the channel then requeues it.
        """
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Message) -> Any:
            try:
                return handle(message)
            except (*self.connection_errors, MemoryError):
                raise
            except Exception as error:
                logger.exception("a message cannot become a task")
                self._dead_letter(message, error, error)
                return None

        return on_task_received

    def on_close(self) -> None:
        """Wait until the pool has acknowledged the tasks written to it, then close as Celery does."""
        await_started(getattr(self.pool, "_pool", None))
        super().on_close()

    def on_unknown_message(self, body: Any, message: Message) -> None:  # noqa: ARG002
        """Dead-letter a message that is not a task."""
        self._dead_letter(message, "not a task's message")

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:  # noqa: ARG002
        """Dead-letter a task that Celery cannot read, and store the failure as its result."""
        self._dead_letter(message, exc, exc)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Dead-letter a message that cannot be decoded, or whose content type is not allowed."""
        self._dead_letter(message, exc)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:  # noqa: ARG002
        """Dead-letter a task that this worker does not have."""
        headers = message.headers
        self._dead_letter(message, f"unknown task {headers['task']!r}", NotRegistered(headers["task"]))
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=headers["task"], id=headers["id"])

    def _dead_letter(self, message: Message, reason: Exception | str, failure: Exception | None = None) -> None:
        """Dead-letter a message, and fail its task with `failure`, or else with the reason."""
        signals.task_rejected.send(sender=self, message=message, exc=reason if isinstance(reason, Exception) else None)
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        error = failure or InvalidTaskError(text)
        properties = {**message.properties, "delivery_info": message.delivery_info}

        def fail() -> None:
            fail_message(self.app, message.headers, message.body, properties, error)

        message.channel.dead_letter(message.delivery_tag, text, report=fail)
