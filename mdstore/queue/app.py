"""The Celery app: JSON only, late acknowledgement, and times that fit together."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from mdstore.aws import make_client
from mdstore.settings import Settings, load_settings
from mdstore.store import Store

#: Seconds that a busy worker waits before it looks again whether a process is free.
_POLLING_INTERVAL = 0.02


class MdstoreApp(Celery):
    """A Celery app that gives its tasks the process's own `Store`."""

    settings: Settings
    _store: Store | None = None
    _lock = threading.RLock()

    @property
    def store(self) -> Store:
        """The store of this process; a forked child builds its own, because connections do not survive a fork."""
        with self._lock:
            if self._store is None or self._store.aws.owner_pid != os.getpid():
                self._store = Store(self.settings)
            return self._store


def create_app(settings: Settings | None = None, *, name: str = "mdstore", **conf: Any) -> MdstoreApp:
    """Make an app with SQS as broker and DynamoDB as result backend. Opens no connection.

    `conf` overrides Celery's configuration. Visibility, time limits and prefetch were checked against each other by the
    settings.
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
    defaults: dict[str, Any] = {
        "broker_transport": "mdstore.queue.transport:Transport",
        "broker_transport_options": _transport_options(settings),
        "broker_connection_retry_on_startup": True,
        "task_default_queue": settings.queue,
        "task_queues": [Queue(settings.queue, Exchange(settings.queue, type="direct"), routing_key=settings.queue)],
        "task_default_exchange": settings.queue,
        "task_default_routing_key": settings.queue,
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "result_expires": settings.result_hours * 3_600,
        "task_acks_late": True,
        "task_acks_on_failure_or_timeout": False,
        "task_reject_on_worker_lost": True,
        "task_time_limit": settings.task_time_limit,
        "task_track_started": False,
        "worker_prefetch_multiplier": settings.prefetch,
        "worker_concurrency": settings.concurrency,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
    }
    app.conf.update({**defaults, **conf})
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    return {
        "region": settings.region,
        "client_factory": partial(make_client, settings, "sqs"),
        "queues": {settings.queue: {}},
        "visibility_timeout": settings.visibility_timeout,
        "wait_time_seconds": settings.wait_time,
        "polling_interval": _POLLING_INTERVAL,
        "sqs_base64_encoding": False,
    }
