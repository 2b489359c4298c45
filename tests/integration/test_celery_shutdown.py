"""A worker that is stopped warm, cold, hard, by command or by repeated signals loses nothing, as in Celery's own tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from celery import states

from mdstore.queue.app import SqsApp
from tests.integration.scenarios import APP, app, environ
from tests.integration.test_queue import Environ, worker
from tests.waiting import until

__all__ = ["app", "environ"]  # fixtures

WAIT = 30
TERM, QUIT = signal.SIGTERM, signal.SIGQUIT
NODE = "stopping@here"


@pytest.fixture
def patient(environ: Environ) -> Environ:
    """Return the environment of a worker whose messages come again after 600 s, unless it gives them back."""
    return {**environ, "MDSTORE_VISIBILITY_TIMEOUT": "600", "MDSTORE_SHUTDOWN_GRACE": "20"}


def test_a_warm_shutdown_waits_for_running_tasks(app: SqsApp, patient: Environ, tmp_path: Path) -> None:
    """The exit code is 0, however often the worker is asked to stop."""
    log = tmp_path / "worker.log"
    with worker(patient, log, APP, "-c", "2", "-n", NODE) as process:
        results = [app.send_task("nap", (2,)) for _ in range(2)]
        until(lambda: all(one.status == states.STARTED for one in results))
        for _ in range(3):
            process.terminate()
        assert process.wait(WAIT) == 0
        assert [one.get(timeout=1) for one in results] == ["rested", "rested"]
    assert "worker: Warm shutdown (MainProcess)" in log.read_text()


@pytest.mark.parametrize("signals", [[QUIT], [TERM, QUIT, QUIT]])
def test_a_cold_or_hard_shutdown_gives_its_tasks_back(
    app: SqsApp, patient: Environ, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """The worker ends without waiting for the task, and the next worker gets the message at once, not after 600 s."""
    log = tmp_path / "worker.log"
    with worker(patient, log, APP, "-c", "2", "-n", NODE) as process:
        result = app.send_task("linger")
        until(lambda: result.status == states.STARTED)
        for one in signals:
            process.send_signal(one)
        assert process.wait(10) != -signal.SIGKILL
        assert result.status == states.STARTED
    with worker(patient, log, APP, "-c", "1", "-n", NODE):
        assert result.get(timeout=WAIT) == "rested"


def test_sigterm_may_mean_a_cold_shutdown(app: SqsApp, patient: Environ, tmp_path: Path) -> None:
    """Celery's variable `REMAP_SIGTERM` is for platforms that send only SIGTERM."""
    log = tmp_path / "worker.log"
    with worker({**patient, "REMAP_SIGTERM": "SIGQUIT"}, log, APP, "-n", NODE) as process:
        result = app.send_task("linger")
        until(lambda: result.status == states.STARTED)
        process.terminate()
        process.wait(10)
        assert result.status == states.STARTED
    with worker(patient, log, APP, "-n", NODE):
        assert result.get(timeout=WAIT) == "rested"
    assert "worker: Cold shutdown (MainProcess)" in log.read_text()


def test_a_worker_is_shut_down_by_command(app: SqsApp, patient: Environ, tmp_path: Path) -> None:
    """Its running task ends, its exit code is 0, and it answers no ping any more."""
    with worker(patient, tmp_path / "worker.log", APP, "-c", "2", "-n", NODE) as process:
        result = app.send_task("nap", (2,))
        until(lambda: result.status == states.STARTED)
        app.control.shutdown(destination=[NODE])
        assert process.wait(WAIT) == 0
        assert result.get(timeout=1) == "rested"
        assert app.control.inspect(timeout=1).ping() is None


@pytest.mark.parametrize("between", [True, False])
def test_a_restarted_worker_goes_on_with_a_chain(app: SqsApp, patient: Environ, tmp_path: Path, between: bool) -> None:
    """The worker is killed while the first task runs, or stops between the two."""
    log = tmp_path / "worker.log"
    environ = {**patient, "MDSTORE_VISIBILITY_TIMEOUT": "4"}
    result = (app.signature("nap", (2,)) | app.signature("add", (1, 1), immutable=True)).apply_async()
    with worker(environ, log, APP, "-n", NODE) as process:
        until(lambda: result.parent.status == (states.SUCCESS if between else states.STARTED))
        process.send_signal(TERM if between else signal.SIGKILL)
        process.wait(WAIT)
    with worker(environ, log, APP, "-n", NODE):
        assert result.get(timeout=60) == 2
