"""The smaller parts of the Celery app."""

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
    """250 tasks collect garbage twice."""
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
def test_a_retried_or_replaced_task_sends_the_main_process_no_frames(error: Exception, is_brief: bool) -> None:
    """The text of the traceback is sent in any case. A failure keeps its frames for listeners of signals."""
    app = create_app(load_settings({}).settings, result_backend="cache+memory://")

    def fail() -> None:
        raise error

    task = app.task(name="fail", shared=False)(fail)
    answer = without_frames(build_tracer("fail", task, app=app))("1", (), {}, {"id": "1", "delivery_info": {}})
    assert (answer.retval.tb is None) is is_brief
    assert (len(pickle.dumps(answer.retval)) < 2_000) is is_brief
    assert type(error).__name__ in answer.retval.traceback


@pytest.mark.parametrize(
    ("key", "value"),
    [("task_compression", "gzip"), ("task_serializer", "pickle"), ("accept_content", ["json", "yaml"])],
)
def test_only_json_messages_may_be_configured(key: str, value: Any) -> None:
    """A setting that would let the app send messages that its workers refuse is an error when the app is created."""
    with pytest.raises(ConfigurationError, match=key):
        create_app(load_settings({}).settings, **{key: value})


def test_transport_options_are_merged_with_the_defaults() -> None:
    """Options of the user are added to the transport's own options."""
    app = create_app(load_settings({}).settings, broker_transport_options={"visibility_timeout": 300})
    assert app.conf.broker_transport_options["visibility_timeout"] == 300
    assert "publisher" in app.conf.broker_transport_options


def test_time_limits_apply_only_to_the_data_stores_tasks() -> None:
    """A team's own tasks have the limits of Celery's configuration, which are none by default."""
    app = create_store_app(load_settings({}, task_time_limit=100).settings)

    def nothing() -> None:
        pass

    mine = app.task(name="mine", shared=False)(nothing)
    app.finalize()
    assert [app.tasks[f"mdstore.{name}"].time_limit for name in ("ingest", "apply_lane", "finish")] == [100] * 3
    assert (mine.time_limit, app.conf.task_time_limit, app.conf.worker_concurrency) == (None, None, None)


def test_only_the_data_stores_app_has_the_data_stores_tasks() -> None:
    """Neither an app of `mdstore.queue` nor another app of the process registers the data store's tasks."""
    create_store_app(load_settings({}).settings).finalize()
    apps = [create_app(load_settings({}).settings), Celery("other", broker="memory://", set_as_current=False)]
    for app in apps:
        app.finalize()
        assert [name for name in app.tasks if name.startswith("mdstore.")] == []


def test_the_garbage_collector_of_other_apps_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of another app may import this package only to submit requests; its garbage collector is left alone."""
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("frozen"))
    other = Celery("other", broker="memory://", set_as_current=False)
    monkeypatch.setattr(
        "mdstore.queue.worker.child_process.current_app", SimpleNamespace(_get_current_object=lambda: other)
    )
    _prepare()


def test_a_forked_child_has_no_event_loop() -> None:
    """Otherwise a channel that a task opens would add its pipe to the parent's event loop, where it is never read."""
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


def test_periodic_work_starts_after_the_fork() -> None:
    """A child that is forked while a periodic thread holds a lock would wait for that lock for ever."""
    steps = create_app(load_settings({}).settings).steps["worker"]
    periodic = [step for step in steps if issubclass(step, PeriodicStep)]
    assert len(periodic) == 2
    for step in periodic:  # otherwise the order of Celery's sets decides which of them starts first
        assert symbol_by_name(step.requires[0]) is Pool


def test_an_app_creates_each_of_its_parts_once() -> None:
    """The delayed table remembers that it has written its state; a new one for each message would write it each time."""
    app = create_app(load_settings({}).settings)
    assert app.delayed_table is app.delayed_table
    assert app.claim_checks is app.claim_checks
