"""Celery's configuration of an app on SQS: the defaults from the settings, and checks for values that it does not support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kombu import Exchange, Queue
from kombu.utils.imports import symbol_by_name
from kombu.utils.url import maybe_sanitize_url

from mdstore.errors import ConfigurationError
from mdstore.settings import Settings

BROKER = "sqs://"
BACKEND = "mdstore.queue.results.backend:DynamoBackend"
#: Backends that keep results out of DynamoDB on purpose: Celery's own backends that store nothing, and the one for tests.
_OTHER_BACKENDS = ("disabled", "disabled://", "cache+memory://")
_JSON = "JSON only: a worker accepts nothing else"
#: Keys that support a single value, each with that value and the reason.
_FIXED: Mapping[str, tuple[Any, str]] = {
    "task_serializer": ("json", _JSON),
    "result_serializer": ("json", _JSON),
    "event_serializer": ("json", _JSON),
    "accept_content": (["json"], _JSON),
    "result_accept_content": (["json"], _JSON),
    "task_compression": (None, "a worker accepts no compressed messages, and large ones go through S3"),
    "result_compression": (None, "results are not compressed, and large ones are in S3"),
    "task_protocol": (2, "a worker accepts no other messages"),
}
#: Options of kombu's SQS transport that this transport does not use, and what replaces them.
_REPLACED_OPTIONS: Mapping[str, str] = {
    "predefined_queues": "queues by their names, which `mdstore provision --queue NAME` creates",
    "region": "the setting region (AWS_REGION)",
    "endpoint_url": "the setting endpoint_url (AWS_ENDPOINT_URL)",
    "is_secure": "the setting endpoint_url (AWS_ENDPOINT_URL)",
    "port": "the setting endpoint_url (AWS_ENDPOINT_URL)",
    "client-config": "the settings, e.g. endpoint_url (AWS_ENDPOINT_URL)",
    "sts_role_arn": "a role in the profile that the setting aws_profile (AWS_PROFILE) names",
    "backoff_policy": "nothing: a message that failed is hidden for 5, 10, 20 ... 300 s",
    "backoff_tasks": "nothing: a message that failed is hidden for 5, 10, 20 ... 300 s",
    "queue_tags": "tags where queues are created: a worker creates none",
    "sqs-creation-attributes": "attributes where queues are created: a worker creates none",
}


def celery_defaults(settings: Settings, conf: Any) -> dict[str, Any]:
    """Return the defaults of Celery's configuration. They depend on a user's configuration `conf`, which overrides them."""
    named = conf["task_default_queue"]
    queue = named if named != "celery" or conf.value_set_for("task_default_queue") else settings.queue
    return {
        "broker_url": BROKER,
        "broker_transport": "mdstore.queue.broker.channel:Transport",
        "broker_connection_retry_on_startup": True,
        "result_backend": BACKEND,
        "task_default_queue": queue,
        "task_queues": [Queue(queue, Exchange(queue, type="direct"), routing_key=queue)],
        "result_expires": settings.result_hours * 3_600,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": False,
        "worker_enable_prefetch_count_reduction": False,
        "worker_prefetch_multiplier": 1,  # the poller prefetches instead, and gives its messages back when the worker stops
        "worker_consumer": "mdstore.queue.worker.consumer:Consumer",
        **_topics(settings),
        "worker_enable_remote_control": settings.remote_control,
        "worker_send_task_events": settings.events,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        **{key: value for key, (value, _) in _FIXED.items()},
    }


def _topics(settings: Settings) -> dict[str, str]:
    return {
        "control_exchange": settings.control_topic,
        "event_exchange": settings.events_topic,
        "event_queue_prefix": settings.events_topic,
    }


def default_options(settings: Settings) -> dict[str, Any]:
    """Return the defaults of the transport's options, which `broker_transport_options` changes."""
    return {
        "ahead": settings.prefetch,
        "weights": settings.queue_weights,
        "visibility_timeout": settings.visibility_timeout,
        "wait_time_seconds": settings.wait_time,
    }


def check(settings: Settings, conf: Any) -> None:
    """Raise `ConfigurationError`, which names the key, if Celery's configuration has an unsupported value."""
    keys = (*_FIXED, *_topics(settings), "broker_transport", "broker_transport_options")
    attributes = (
        "broker_read_url",
        "broker_write_url",
        "result_backend",
    )  # read as attributes, because environment variables override them
    check_values(settings, {key: conf.get(key) for key in keys} | {key: getattr(conf, key) for key in attributes})


def check_values(settings: Settings, given: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` if one of some values of a configuration is unsupported."""
    topics = "the settings control_topic and events_topic name them"
    fixed = {**_FIXED, **{key: (topic, topics) for key, topic in _topics(settings).items()}}
    for key in fixed.keys() & given.keys():
        _check_value(key, given[key], *fixed[key])
    for key in ("broker_url", "broker_read_url", "broker_write_url"):
        url = given.get(key, BROKER)
        if url != BROKER and given.get("broker_transport") != "memory":  # Celery's transport for tests
            expected = f"{BROKER!r} (the settings name region, endpoint and credentials)"
            raise ConfigurationError(key=key, value=_masked(url), expected=expected)
    if "result_backend" in given:
        _check_backend(given["result_backend"])
    for option in given.get("broker_transport_options") or ():
        if option in _REPLACED_OPTIONS:
            shown = f"broker_transport_options[{option!r}]"
            raise ConfigurationError(key=shown, value="...", expected=_REPLACED_OPTIONS[option])


def _check_backend(backend: Any) -> None:
    """Raise `ConfigurationError` for a result backend that does not support chords on SQS."""
    if backend in (BACKEND, *_OTHER_BACKENDS):
        return
    if not isinstance(backend, str) or ("://" not in backend and ":" in backend):
        from mdstore.queue.results.backend import DynamoBackend  # noqa: PLC0415  it takes long to import

        found = symbol_by_name(backend)
        if isinstance(found, type) and issubclass(found, DynamoBackend):
            return
    expected = f"{BACKEND!r}, which keeps results in the table that the setting results_table names, or 'disabled://'"
    raise ConfigurationError(key="result_backend", value=_masked(backend), expected=expected)


def _check_value(key: str, found: Any, value: Any, reason: str) -> None:
    if key.endswith("accept_content") and (found is None or set(found) <= {"json", "application/json"}):
        return
    if found != value:
        raise ConfigurationError(key=key, value=found, expected=f"{value!r} ({reason})")


def _masked(url: Any) -> Any:
    return maybe_sanitize_url(url) if isinstance(url, str) else url


def where(settings: Settings, service: Literal["sqs", "dynamodb"]) -> str:
    """Return the endpoint of a service as people read it."""
    endpoint = settings.endpoint(service)
    return str(maybe_sanitize_url(endpoint)).rstrip("/") if endpoint else "AWS"
