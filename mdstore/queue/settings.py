"""Build Celery's configuration from the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kombu import Exchange, Queue

from mdstore.errors import ConfigurationError
from mdstore.queue.control.reaper import Reaper

if TYPE_CHECKING:
    from mdstore.queue.app import SqsApp

#: Values that an app cannot override, because a worker accepts only JSON.
_FIXED: Mapping[str, Any] = {
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "result_accept_content": ["json"],
    "task_compression": None,
}


def celery_configuration(app: SqsApp, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return Celery's configuration: the settings' values, updated with `overrides`.

    Raises `ConfigurationError` if an override asks for anything but JSON.
    """
    for key, fixed in _FIXED.items():
        if overrides.get(key, fixed) != fixed:
            raise ConfigurationError(
                key=key, value=overrides[key], expected=f"{fixed!r}, because a worker accepts nothing else"
            )
    settings = app.settings
    queue = Queue(settings.queue, Exchange(settings.queue, type="direct"), routing_key=settings.queue)
    return {
        "broker_url": "sqs://",
        "broker_transport": "mdstore.queue.broker.channel:Transport",
        "broker_connection_retry_on_startup": True,
        "result_backend": "mdstore.queue.results.backend:DynamoBackend",
        "task_default_queue": settings.queue,
        "task_queues": [queue],
        "task_default_exchange": settings.queue,
        "task_default_routing_key": settings.queue,
        "task_create_missing_queues": False,
        **_FIXED,
        "result_expires": settings.result_hours * 3_600,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": False,
        "worker_enable_prefetch_count_reduction": False,
        "worker_prefetch_multiplier": 1,  # the poller prefetches instead, and gives its messages back when the worker stops
        "worker_consumer": "mdstore.queue.worker.consumer:Consumer",
        "control_exchange": settings.control_topic,
        "event_exchange": settings.events_topic,
        "event_queue_prefix": settings.events_topic,
        "worker_enable_remote_control": settings.remote_control,
        "worker_send_task_events": settings.events,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        **overrides,
        "broker_transport_options": {**_transport_options(app), **overrides.get("broker_transport_options", {})},
    }


def _transport_options(app: SqsApp) -> dict[str, Any]:
    settings = app.settings
    fanout = {"topics": app.topics, "reaper": Reaper(app.topics)} if settings.remote_control or settings.events else {}
    return {
        **fanout,
        "sqs": lambda: app.aws.queues,
        "publisher": app.publisher,
        "dead_letter": app.dead_letter,
        "fail_unexecuted": app.fail_unexecuted,
        "max_receives": settings.max_receives,
        "claim_checks": lambda: app.claim_checks,
        "delayed_table": lambda: app.delayed_table,
        "ahead": settings.prefetch,
        "weights": settings.queue_weights,
        "visibility_timeout": settings.visibility_timeout,
        "wait_time_seconds": settings.wait_time,
    }
