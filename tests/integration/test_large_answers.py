"""A worker's answer to a command arrives, however large it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mdstore.local.emulator import EmbeddedAws
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, namespace, worker
from tests.waiting import until


@pytest.fixture
def environ(aws: EmbeddedAws, monkeypatch: pytest.MonkeyPatch) -> Environ:
    monkeypatch.setenv("QUEUES", "1")
    return namespace(aws, with_store=False) | {"QUEUES": "1"}


@pytest.fixture
def app(environ: Environ) -> SqsApp:
    from tests.integration.queues_app import queues_app  # noqa: PLC0415  importing it makes an app of the defaults

    return queues_app(load_settings(environ).settings)


def test_inspect_shows_tasks_with_large_arguments(
    app: SqsApp, environ: Environ, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def active() -> list[Any]:
        answers = app.control.inspect(timeout=10, limit=1).active() or {}
        return [task for tasks in answers.values() for task in tasks]

    with worker(environ, tmp_path / "log", "tests.integration.queues_app"), caplog.at_level(logging.WARNING):
        until(lambda: app.control.inspect(timeout=5, limit=1).ping())
        text = "é" * 2**20  # twice what SQS takes
        result = app.tasks["hold"].delay(15, text)
        until(lambda: result.state != "PENDING" or active(), within=15)
        (task,) = active()
        assert task["id"] == result.id
        assert task["args"] == [15, text]
        assert result.get(timeout=60) == len(text)
    assert "refused" not in caplog.text
