"""Tasks of any class: what the transport needs of a task does not hang on it. A real worker, over the embedded AWS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, states

from mdstore.local.emulator import EmbeddedAws
from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import dead_letters, namespace, worker


@pytest.fixture(scope="module")
def app(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqsApp]:
    """A producer of the app whose worker runs."""
    environ = namespace(aws, with_store=False)
    with worker(environ, tmp_path_factory.mktemp("classes") / "worker.log", "tests.integration.class_app"):
        yield create_app(load_settings(environ).settings, set_as_current=False)


@pytest.mark.parametrize(
    ("task", "args", "value"),
    [
        ("counted", [1], 2),
        ("shared", [1], 11),
        ("doubling", [21], 42),
        ("abortable", [], "ran"),
        ("flasks", [], "Flask's shop"),
    ],
)
def test_a_task_of_any_class_runs(app: SqsApp, task: str, args: list[Any], value: Any) -> None:
    assert app.send_task(task, args).get(timeout=30) == value


def test_a_chain_of_such_tasks_ends(app: SqsApp) -> None:
    steps = [app.signature("counted", (1,)), app.signature("doubling"), app.signature("shared")]
    assert chain(*steps, app=app).apply_async().get(timeout=30) == 14


def test_a_retry_keeps_its_message_group(app: SqsApp) -> None:
    assert app.send_task("retrying", MessageGroupId="tenant-3").get(timeout=30) == "tenant-3"


def test_a_task_s_own_request_class_is_used_and_counts_deliveries(app: SqsApp, tmp_path: Path) -> None:
    result = app.send_task("noting", kwargs={"notes": str(tmp_path / "notes")})
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=30)
    assert (tmp_path / "notes").read_text() == "1: ValueError('on purpose')\n"


def test_a_request_that_cannot_be_made_is_a_failure_and_a_dead_letter(app: SqsApp) -> None:
    """Whoever waits learns the reason, and so do the tasks that should follow."""
    result = chain(app.signature("broken"), app.signature("counted"), app=app).apply_async()
    with pytest.raises(LookupError, match="no such tenant"):
        result.parent.get(timeout=30)
    assert result.get(timeout=30, propagate=False, disable_sync_subtasks=False).args == ("no such tenant",)
    assert result.state == states.FAILURE
    (letter,) = dead_letters(app, count=1)
    assert letter["reason"] == "LookupError: no such tenant"
