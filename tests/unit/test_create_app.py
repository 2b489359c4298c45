"""`create_app` takes what `celery.Celery` takes: apps are written as Celery's documentation writes them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Task, current_app, shared_task, signature
from celery.result import AsyncResult
from kombu import Queue

from mdstore.errors import ConfigurationError
from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings


def made(**options: Any) -> SqsApp:
    """An app of the settings' defaults."""
    return create_app(load_settings({}).settings, **options)


def in_a_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_the_app_is_current_unless_told_otherwise() -> None:
    """So `shared_task`, `AsyncResult` and `signature` find it, in every thread."""
    app = made()
    made(set_as_current=False)
    assert current_app._get_current_object() is app
    assert in_a_thread(current_app._get_current_object) is app
    assert AsyncResult("id").app is app
    assert in_a_thread(lambda: AsyncResult("id").app) is app
    assert signature("name").app._get_current_object() is app

    @shared_task(name="shared-by-all")  # type: ignore[untyped-decorator]
    def shared() -> None:
        pass

    assert in_a_thread(lambda: shared.app) is app


def test_another_app_that_is_the_default_stays_it() -> None:
    """Celery's own `set_default` is a user's decision."""
    code = """
from celery import Celery, _state
from mdstore.queue import create_app
from mdstore.tasks import create_store_app
other = Celery("other", broker="memory://")
other.set_default()
mine = create_app()
assert _state.default_app is other and _state.get_current_app() is mine
from mdstore.client import Client
Client().app
assert _state.get_current_app() is mine  # the library's own app is nobody's current one
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_task_class_of_the_app_is_used() -> None:
    class Mine(Task):  # type: ignore[misc]
        abstract = True

    def work() -> None:
        pass

    assert isinstance(made(task_cls=Mine).task(work, name="one", shared=False), Mine)


CONFIGURATION = {
    "task_track_started": True,
    "result_expires": 60,
    "worker_prefetch_multiplier": 4,
    "task_acks_late": False,
    "task_queues": [Queue("one"), Queue("two")],
    "task_default_queue": "two",
    "broker_transport_options": {"visibility_timeout": 77},
}


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_a_user_s_configuration_wins_over_the_defaults(namespace: str | None) -> None:
    """What is configured is read back, and what is not is this package's default."""
    source = {f"{namespace}_{key.upper()}" if namespace else key: value for key, value in CONFIGURATION.items()}
    app = made()
    app.config_from_object(SimpleNamespace(**source), namespace=namespace)
    assert {key: app.conf[key] for key in CONFIGURATION} == CONFIGURATION
    assert (app.conf.task_reject_on_worker_lost, app.conf.worker_enable_prefetch_count_reduction) == (True, False)
    assert app.conf.broker_url == "sqs://"
    options = app.connection_for_write().transport_options
    assert (options["visibility_timeout"], options["ahead"]) == (77, app.settings.prefetch)
    app.config_from_object(SimpleNamespace(**source), namespace=namespace, force=True)  # read a second time
    assert (app.conf.task_track_started, app.conf.broker_url) == (True, "sqs://")


def test_a_default_queue_is_enough() -> None:
    app = made(task_default_queue="emails")
    assert list(app.amqp.queues) == ["emails"]
    assert app.amqp.router.route({}, "any")["queue"].name == "emails"
    assert app.conf.task_default_exchange == app.conf.task_default_routing_key == "emails"
    assert app.queue_names() == ["emails"]
    assert made().queue_names() == ["mdstore"]


REFUSED: list[tuple[str, Any, str]] = [
    ("task_serializer", "pickle", "JSON only"),
    ("result_serializer", "pickle", "JSON only"),
    ("accept_content", ["json", "pickle"], "JSON only"),
    ("task_compression", "gzip", "no compressed"),
    ("task_protocol", 1, "no other messages"),
    ("broker_url", "redis://user:secret@localhost", "'sqs://'"),
    ("result_backend", "redis://user:secret@localhost", "results_table"),
    ("result_backend", "django-db", "results_table"),
    ("event_exchange", "mine", "events_topic"),
    ("broker_transport_options", {"predefined_queues": {}}, "provision --queue"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED)
def test_what_cannot_be_had_is_refused_by_name(key: str, value: Any, said: str) -> None:
    """As an argument at once, and in a configuration object when the app is used."""
    with pytest.raises(ConfigurationError, match=said) as given:
        made(set_as_current=False, **{key: value})
    app = made()
    app.config_from_object({key: value})
    for use in (lambda: app.backend, app.connection_for_write, lambda: app.send_task("name")):
        with pytest.raises(ConfigurationError, match=said) as loaded:
            use()
    for error in (given, loaded):
        assert key.removeprefix("broker_").split("_")[0] in str(error.value)
        assert "secret" not in str(error.value)


def test_a_change_after_the_first_use_is_refused_too() -> None:
    app = made()
    assert app.conf.task_serializer == "json"
    app.conf.task_serializer = "pickle"
    with pytest.raises(ConfigurationError, match="JSON only"):
        app.send_task("name")


def test_the_transport_s_options_may_be_replaced() -> None:
    """As exporters of metrics do: what the channels use is no part of the configuration."""
    app = made()
    app.conf.broker_transport_options = {"visibility_timeout": 99}
    options = app.connection_for_read().transport_options
    assert (options["visibility_timeout"], options["publisher"]) == (99, app.publisher)
    assert app.conf.table()["broker_transport_options"] == {"visibility_timeout": 99}
    assert app.pool is app.pool
    assert app.connection_for_read().__eqhash__() == app.connection_for_read().__eqhash__()  # so they share a pool


@pytest.mark.parametrize("again", [copy.deepcopy, lambda app: pickle.loads(pickle.dumps(app))], ids=["copy", "pickle"])  # noqa: S301
@pytest.mark.parametrize("configured", [True, False])
def test_an_app_can_be_copied(again: Any, configured: bool) -> None:
    app = create_app(load_settings({}, prefetch=3).settings, event_queue="exporter", task_acks_late=False)
    if configured:
        assert app.conf.task_acks_late is False
    found = again(app)
    assert (found.settings, found.conf.task_acks_late) == (app.settings, False)
    assert (found.topics.name_of("mdstore-events.x"), found.connection_for_read().transport_options["ahead"]) == (
        "mdstore-events-exporter",
        3,
    )
    assert found.steps["worker"] == app.steps["worker"]


def test_places_are_named_without_their_passwords() -> None:
    settings = load_settings(
        {"AWS_ENDPOINT_URL": "http://user:secret@127.0.0.1:9", "MDSTORE_NAMESPACE": "shop"}
    ).settings
    app = create_app(settings)
    assert app.connection().as_uri() == "sqs://us-east-1 (http://user:**@127.0.0.1:9)"
    assert app.backend.as_uri() == "dynamodb://us-east-1/shop-results (http://user:**@127.0.0.1:9)"
