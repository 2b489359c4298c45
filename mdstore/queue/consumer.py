"""The worker's consumer: a message that cannot become a task is dead-lettered with its reason, and never harms the worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.concurrency.asynpool import AsynPool, gen_not_started
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.message import Message

from mdstore.queue.control import ControlStep
from mdstore.queue.events import HEARTBEAT
from mdstore.queue.request import SqsRequest

logger = get_logger(__name__)

_BEGINS_WITHIN = 5.0  # seconds, a task that is being written to a process that has nothing else to do
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
        """Celery's, which forgets the tasks that no process has said to have begun: what is on its way to one says so first.

        Forgotten, it would run all the same, and its message come again; its process would wait for half a minute to be heard.
        """
        pool = getattr(self.pool, "_pool", None)
        if isinstance(pool, AsynPool):
            _hear_what_has_begun(pool)
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


def _hear_what_has_begun(pool: Any) -> None:
    """Wait until the processes have said of each task that was written to them that they begin it: no loop turns any more."""
    results = pool._result_handler
    deadline = time.monotonic() + _BEGINS_WITHIN
    while time.monotonic() < deadline:
        for writer in [one for one in pool._active_writers if not gen_not_started(one)]:
            with suppress(StopIteration, OSError, EOFError):
                next(writer)
        written = [job._write_to for job in tuple(pool._cache.values()) if job._write_to and not job._accepted]
        waiting = [process for process in written if process._is_alive()]
        if not waiting:
            return
        for process in waiting:
            if process.outq._reader.poll(0.05):
                results._flush_outqueue(process.outqR_fd, _ignore, results.fileno_to_outq, results.on_state_change)


def _ignore(_: object) -> None:
    """A process whose pipe is gone is looked after when the pool stops."""
