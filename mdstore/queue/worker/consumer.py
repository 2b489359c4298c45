"""The worker's consumer: a message that cannot become a task is dead-lettered with its reason, and never harms the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.message import Message

from mdstore.queue.control.events import HEARTBEAT
from mdstore.queue.control.remote import ControlStep
from mdstore.queue.worker.patches import await_started
from mdstore.queue.worker.request import SqsRequest

logger = get_logger(__name__)

_STEPS = [
    ControlStep if step == "celery.worker.consumer.control:Control" else step
    for step in CeleryConsumer.Blueprint.default_steps
]


class Consumer(CeleryConsumer):
    """Celery's, which would drop some of these messages, loop on others, and end itself on the rest."""

    class Blueprint(CeleryConsumer.Blueprint):
        """Celery's, with a remote control that a worker can do without."""

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
        super().__init__(lambda request: request.begin(on_task_request), *args, worker_options=options, **kwargs)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], Any]:
        """The handler of each message; whatever a message makes it raise ends with that message."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Message) -> Any:
            try:
                return handle(message)
            except self.connection_errors:
                raise
            except Exception as error:
                logger.exception("a message cannot become a task")
                self._bury(message, error)
                return None

        return on_task_received

    def on_close(self) -> None:
        """Close as Celery does, once the pool has acknowledged the tasks that were written to it."""
        await_started(getattr(self.pool, "_pool", None))
        super().on_close()

    def on_unknown_message(self, body: Any, message: Message) -> None:  # noqa: ARG002
        """Not a task at all."""
        self._bury(message, "not a task's message")

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:  # noqa: ARG002
        """A task that Celery cannot read."""
        self._bury(message, exc)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Neither JSON nor allowed."""
        self._bury(message, exc)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:  # noqa: ARG002
        """A task that this worker does not have; its result says so too."""
        headers = message.headers
        canvas = message.payload[2] or {}  # what is linked to the task; the chord that it is a part of fails with it
        request = Context(
            headers,
            task=headers["task"],
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            delivery_info=message.delivery_info or {},
            **{name: canvas.get(name) for name in ("chord", "chain", "callbacks", "errbacks")},
        )
        error = NotRegistered(headers["task"])

        def tell() -> None:
            self.app.backend.mark_as_failure(headers["id"], error, request=request)

        self._bury(message, f"unknown task {headers['task']!r}", then=tell)
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=headers["task"], id=headers["id"])

    def _bury(self, message: Message, reason: Exception | str, *, then: Callable[[], Any] | None = None) -> None:
        signals.task_rejected.send(sender=self, message=message, exc=reason if isinstance(reason, Exception) else None)
        words = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        message.channel.bury(message.delivery_tag, words, then=then)
