"""The Celery app's own small parts."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.components import Pool
from kombu.utils.imports import symbol_by_name

from mdstore.errors import ConfigurationError
from mdstore.queue import create_app
from mdstore.queue.worker.child_process import _CollectGarbage, _prepare
from mdstore.queue.worker.patches import without_frames
from mdstore.queue.worker.periodic import PeriodicStep
from mdstore.settings import load_settings
from mdstore.tasks import create_store_app


def test_garbage_is_collected_every_hundred_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[None] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(None))
    tidy = _CollectGarbage()
    for _ in range(250):
        tidy(sender=None)
    assert len(collected) == 2


@pytest.mark.parametrize(
    ("error", "is_brief"),
    [
        (Ignore("replaced"), True),
        (Retry("later", exc=ValueError("wrong"), when=3), True),
        (Reject("no"), False),
        (ValueError("wrong"), False),
    ],
    ids=repr,
)
def test_what_goes_on_sends_the_main_process_no_frames(error: Exception, is_brief: bool) -> None:
    """The text of the traceback goes with it all the same, and a failure keeps its frames for whoever listens to signals."""
    app = create_app(load_settings({}).settings, result_backend="cache+memory://")

    def goes_on() -> None:
        raise error

    task = app.task(name="goes_on", shared=False)(goes_on)
    answer = without_frames(build_tracer("goes_on", task, app=app))("1", (), {}, {"id": "1", "delivery_info": {}})
    assert (answer.retval.tb is None) is is_brief
    assert (len(pickle.dumps(answer.retval)) < 2_000) is is_brief
    assert type(error).__name__ in answer.retval.traceback


@pytest.mark.parametrize(
    ("key", "value"),
    [("task_compression", "gzip"), ("task_serializer", "pickle"), ("accept_content", ["json", "yaml"])],
)
def test_messages_are_json_and_nothing_else(key: str, value: Any) -> None:
    """What a worker would refuse is refused when the app is made."""
    with pytest.raises(ConfigurationError, match=key):
        create_app(load_settings({}).settings, **{key: value})


def test_options_of_the_transport_are_added_to_its_own() -> None:
    app = create_app(load_settings({}).settings, broker_transport_options={"visibility_timeout": 300})
    options = app.connection_for_write().transport_options
    assert options["visibility_timeout"] == 300
    assert (options["ahead"], options["publisher"]) == (app.settings.prefetch, app.publisher)
    assert app.conf.broker_transport_options == {"visibility_timeout": 300}


def test_only_the_stores_own_tasks_have_its_limits() -> None:
    """A team that takes the transport alone has the limits that Celery's configuration says: none."""
    app = create_store_app(load_settings({}, task_time_limit=100).settings)

    def nothing() -> None:
        pass

    mine = app.task(name="mine", shared=False)(nothing)
    app.finalize()
    assert [app.tasks[f"mdstore.{name}"].time_limit for name in ("ingest", "apply_lane", "finish")] == [100] * 3
    assert (mine.time_limit, app.conf.task_time_limit, app.conf.worker_concurrency) == (None, None, None)


def test_only_the_data_stores_app_has_the_data_stores_tasks() -> None:
    """An app of `mdstore.queue` has none of them, nor has any other app of the process."""
    create_store_app(load_settings({}).settings).finalize()
    apps = [create_app(load_settings({}).settings), Celery("other", broker="memory://", set_as_current=False)]
    for app in apps:
        app.finalize()
        assert [name for name in app.tasks if name.startswith("mdstore.")] == []


def test_other_apps_collect_their_garbage_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only imports this package to submit runs a worker of his own."""
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("frozen"))
    other = Celery("other", broker="memory://", set_as_current=False)
    monkeypatch.setattr(
        "mdstore.queue.worker.child_process.current_app", SimpleNamespace(_get_current_object=lambda: other)
    )
    _prepare()


def test_a_forked_child_has_no_loop() -> None:
    """A channel that a task makes would put its pipe on the worker's own loop, where nobody reads it."""
    code = """
import os
from kombu.asynchronous import get_event_loop, set_event_loop
import mdstore.queue.broker.channel
set_event_loop(object())
child = os.fork()
if not child:
    os._exit(get_event_loop() is not None)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert get_event_loop() is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_works_every_few_seconds_begins_after_the_fork() -> None:
    """A child that is forked while such work holds a lock would never get it."""
    steps = create_app(load_settings({}).settings).steps["worker"]
    periodic = [step for step in steps if issubclass(step, PeriodicStep)]
    assert len(periodic) == 2
    for step in periodic:  # without this, Celery starts the one or the other first, as its sets have it
        assert symbol_by_name(step.requires[0]) is Pool


def test_a_process_has_one_of_each_part() -> None:
    """The due-time table remembers what it has noted, and would write it again for each message."""
    app = create_app(load_settings({}).settings)
    assert app.delayed_table is app.delayed_table
    assert app.claim_checks is app.claim_checks
