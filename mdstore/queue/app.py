"""The Celery app: JSON only, late acknowledgement, and the parts that a process of it has."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NamedTuple

from celery import Celery, current_app, states
from celery.signals import task_postrun, worker_process_init
from kombu import Exchange, Queue
from kombu.utils.objects import cached_property

from mdstore.errors import ConfigurationError
from mdstore.log import event
from mdstore.queue.claims import Claims
from mdstore.queue.deadletters import dead_letter
from mdstore.queue.draining import Drain
from mdstore.queue.due import DueTable
from mdstore.queue.janitor import Janitor
from mdstore.queue.outbox import Outbox
from mdstore.queue.repairing import Repair
from mdstore.queue.topics import Topics
from mdstore.queue.watchdog import Watchdog
from mdstore.settings import Settings, load_settings
from mdstore.store import Store

_TIDY_EVERY = 100  # tasks
#: States of a task that has been executed and goes on all the same.
_NO_END = frozenset({states.RETRY, states.IGNORED})
#: What a message must be.
_KEPT: dict[str, Any] = {
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "result_accept_content": ["json"],
    "task_compression": None,
}


class _Parts(NamedTuple):
    """What the queue has over a process's store."""

    store: Store
    claims: Claims
    due_table: DueTable


class MdstoreApp(Celery):
    """A Celery app that gives its tasks the process's own `Store`, and sends their messages in batches."""

    task_cls = "mdstore.queue.task:SqsTask"
    control_cls = "mdstore.queue.control:Control"
    events_cls = "mdstore.queue.events:Events"
    settings: Settings
    topics: Topics
    _store: Store | None = None
    _parts: _Parts | None = None
    _lock = threading.RLock()

    @property
    def store(self) -> Store:
        """The store of this process; a forked child builds its own, because connections do not survive a fork."""
        store = self._store
        # Without the lock, which a thread could hold while a worker forks: the child would wait for it for ever.
        if store is not None and store.aws.owner_pid == os.getpid():
            return store
        with self._lock:
            if self._store is None or self._store.aws.owner_pid != os.getpid():
                self._store = Store(self.settings)
            return self._store

    @property
    def claims(self) -> Claims:
        """Where messages too large for SQS are checked in."""
        return self._own_parts.claims

    @property
    def due_table(self) -> DueTable:
        """Where messages wait that are due later than SQS can delay them."""
        return self._own_parts.due_table

    @property
    def _own_parts(self) -> _Parts:
        """Made once for each store: the table remembers what it has noted, and a message is no time to make parts."""
        store, settings = self.store, self.settings
        if self._parts is None or self._parts.store is not store:
            claims = Claims(
                objects=store.objects,
                prefix=settings.claim_prefix,
                threshold=settings.claim_threshold,
                max_bytes=settings.max_claim_bytes,
            )
            self._parts = _Parts(store, claims, DueTable(dynamo=store.aws.dynamo, table=settings.due_table))
        return self._parts

    @cached_property  # type: ignore[untyped-decorator]
    def GroupResult(self) -> Any:  # noqa: N802  celery's name
        """The class of groups' results."""
        return self.subclass_with_self("mdstore.queue.results:BatchedGroupResult", reverse="GroupResult")

    @cached_property  # type: ignore[untyped-decorator]
    def outbox(self) -> Outbox:
        """Messages on their way out."""
        return Outbox(lambda: self.store.aws.queues)

    def batched(self) -> AbstractContextManager[None]:
        """Tasks that are sent inside of the context go out ten a call, at its end at the latest. Raises `Unsent` there."""
        context: AbstractContextManager[None] = self.outbox.context()
        return context

    @contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        """Celery's, where the outermost context sends what was added in those inside of it: a group's tasks, in batches."""
        with self.outbox.context(), super().producer_or_acquire(producer) as acquired:
            yield acquired

    def dead_letter(self, *, body: str, reason: str, task: str, receives: int) -> None:
        """Keep a message that must not be executed. Raises `Unavailable` or `DeploymentBroken`."""
        queue = self.settings.dead_letter_queue
        dead_letter(self.store.aws.queues, queue, body=body, reason=reason, task=task, receives=receives)
        event(
            "message.dead_lettered", level=logging.ERROR, task=task, receives=receives, error=reason.partition("\n")[0]
        )


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _warm_up(**_kwargs: Any) -> None:
    """Make a worker process's clients before its first message; what is there by then is garbage collected no more.

    Walking over it takes 60 ms each time, which adds up to a fourth of the CPU that applying operations takes.
    """
    app = current_app._get_current_object()
    if not isinstance(app, MdstoreApp):
        return
    _ = app.store
    for task in app.tasks.values():
        if task.__trace__ is not None:
            task.__trace__ = _brief(task.__trace__)
    gc.collect()
    gc.freeze()
    task_postrun.connect(_Tidy(), weak=False)


def _brief(trace: Callable[..., Any]) -> Callable[..., Any]:
    """A task's tracer, where a retry or a replacement goes to the main process without the frames of its traceback.

    They are 50 KB, which take a millisecond or two to pickle and to read, and the main process looks at their text only.
    """

    @wraps(trace)
    def traced(*args: Any, **kwargs: Any) -> Any:
        answer = trace(*args, **kwargs)
        if answer.info is not None and answer.info.state in _NO_END:
            answer.retval.tb = None
        return answer

    return traced


class _Tidy:
    """Collects garbage every hundred tasks of a worker process.

    Python does so by the number of new objects. What remains of a retry or an error is six of them and 90 KB, so that there
    would be hundreds of megabytes before it began; what is frozen is not walked over, so it takes a millisecond.
    """

    def __init__(self) -> None:
        self._tasks = itertools.count(1)

    def __call__(self, **_kwargs: Any) -> None:
        if next(self._tasks) % _TIDY_EVERY == 0:
            gc.collect()


def create_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **conf: Any
) -> MdstoreApp:
    """Make an app with SQS as broker and DynamoDB as result backend. Opens no connection.

    `conf` overrides Celery's configuration; raises `ConfigurationError` where it asks for anything but JSON. `event_queue`
    (20 characters at most) names the queue of the process's one event listener; without it, each listener has a queue that
    ends with it.
    """
    settings = settings or load_settings().settings
    app = MdstoreApp(
        name,
        broker="sqs://",
        backend="mdstore.queue.backend:DynamoBackend",
        include=["mdstore.queue.tasks"],
        set_as_current=False,
    )
    app.settings = settings
    app.topics = Topics(settings, lambda: app.store.aws, event_queue=event_queue)
    defaults: dict[str, Any] = {
        "broker_transport": "mdstore.queue.transport:Transport",
        "broker_transport_options": _transport_options(app),
        "broker_connection_retry_on_startup": True,
        "task_default_queue": settings.queue,
        "task_queues": [Queue(settings.queue, Exchange(settings.queue, type="direct"), routing_key=settings.queue)],
        "task_default_exchange": settings.queue,
        "task_default_routing_key": settings.queue,
        "task_create_missing_queues": False,
        **_KEPT,
        "result_expires": settings.result_hours * 3_600,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": False,
        "worker_enable_prefetch_count_reduction": False,
        "worker_prefetch_multiplier": 1,  # the transport holds more, and gives them back when the worker stops
        "worker_consumer": "mdstore.queue.consumer:Consumer",
        "control_exchange": settings.control_topic,
        "event_exchange": settings.events_topic,
        "event_queue_prefix": settings.events_topic,
        "worker_enable_remote_control": settings.remote_control,
        "worker_send_task_events": settings.events,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
    }
    for key, kept in _KEPT.items():
        if conf.get(key, kept) != kept:
            raise ConfigurationError(key=key, value=conf[key], expected=f"{kept!r}: a worker takes nothing else")
    defaults["broker_transport_options"] |= conf.pop("broker_transport_options", {})
    app.conf.update({**defaults, **conf})
    app.steps["worker"] |= {Watchdog, Drain, Repair}
    return app


def _transport_options(app: MdstoreApp) -> dict[str, Any]:
    settings = app.settings
    fanout = (
        {"topics": app.topics, "janitor": Janitor(app.topics)} if settings.remote_control or settings.events else {}
    )
    return {
        **fanout,
        "sqs": lambda: app.store.aws.queues,
        "outbox": app.outbox,
        "dead_letter": app.dead_letter,
        "claims": lambda: app.claims,
        "due_table": lambda: app.due_table,
        "ahead": settings.prefetch,
        "visibility_timeout": settings.visibility_timeout,
        "wait_time_seconds": settings.wait_time,
    }
