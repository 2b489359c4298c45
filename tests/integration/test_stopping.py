"""How workers stop, and what commands cannot stop them: real workers over the embedded AWS."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from celery import chain, states
from celery.exceptions import WorkerLostError

from mdstore.queue.app import SqsApp
from tests.integration.test_queue import Environ, worker
from tests.integration.test_transport import app, environ, journal, left, lines
from tests.waiting import until

__all__ = ["app", "environ", "journal"]  # fixtures

APP = "tests.integration.stopping_app"


def test_a_soft_shutdown_longer_than_the_watchdogs_limit_is_not_cut(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """The task ends within it. Its message is kept meanwhile, and another worker takes what had not begun."""
    environ |= {"SOFT_SHUTDOWN": "14", "MDSTORE_SHUTDOWN_GRACE": "2"}
    with worker(environ, tmp_path / "1.log", APP) as process:
        result = app.tasks["nap"].delay(10)
        until(lambda: lines(journal) == ["begins"])
        process.send_signal(signal.SIGQUIT)
        with worker(environ, tmp_path / "2.log", APP):
            assert app.tasks["echo"].delay("meanwhile").get(timeout=9) == "meanwhile"
            assert lines(journal) == ["begins"]
            assert result.get(timeout=30) == "rested"
            until(lambda: process.poll() is not None)
            until(lambda: left(app) == 0)
    assert "exit" not in (tmp_path / "1.log").read_text()
    assert lines(journal) == ["begins", "ends"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
def test_a_killed_task_that_was_acknowledged_early_has_failed(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Nobody delivers it again, so whoever waits for it, or for what follows it, must learn that it is gone."""
    environ |= {"MDSTORE_SHUTDOWN_GRACE": "2"}
    result = chain(app.signature("early", (60,)), app.signature("echo"), app=app).apply_async()
    with worker(environ, tmp_path / "worker.log", APP) as process:
        until(lambda: lines(journal) == ["begins"])
        until(lambda: left(app) == 0)  # the message is deleted
        process.send_signal(how)
        with pytest.raises(WorkerLostError, match="acknowledged early"):
            result.parent.get(timeout=20)
        until(lambda: result.state == states.FAILURE)
        until(lambda: process.poll() is not None)
    assert left(app) == 0
    assert lines(journal) == ["begins"]


def test_a_consumer_of_a_missing_queue_is_refused_and_the_worker_lives(
    app: SqsApp, environ: Environ, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    with worker(environ, log, APP) as process:
        assert app.tasks["echo"].delay(1).get(timeout=30) == 1
        (answer,) = app.control.add_consumer("nosuchqueue", reply=True, timeout=10, limit=1)
        (said,) = [one["error"] for one in answer.values()]
        assert "mdstore provision --queue nosuchqueue" in said
        assert app.tasks["echo"].delay(2).get(timeout=30) == 2
        assert process.poll() is None
    assert "nosuchqueue cannot be consumed" in log.read_text()
