"""Stopping: warm, cold, hard, by command and by two signals at once, as Celery's own tests have it. Nothing is lost."""

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


@pytest.fixture
def node(environ: Environ, app: SqsApp, tmp_path: Path) -> tuple[Environ, str]:
    """Return the environment and the name of a new worker with a queue of its own, so that tests do not wait for others."""
    _ = app, tmp_path
    return {**environ, "MDSTORE_VISIBILITY_TIMEOUT": "600", "MDSTORE_SHUTDOWN_GRACE": "20"}, "stopping@here"


@pytest.mark.parametrize("signals", [[TERM], [TERM, TERM, TERM]])
def test_a_warm_shutdown_waits_for_running_tasks(
    app: SqsApp, node: tuple[Environ, str], tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """However often it is asked for; the exit code is 0, and no message is left."""
    log = tmp_path / "worker.log"
    with worker(node[0], log, APP, "-c", "2", "-n", node[1]) as process:
        results = [app.send_task("nap", (3,)) for _ in range(2)]
        until(lambda: all(one.status == states.STARTED for one in results))
        for one in signals:
            process.send_signal(one)
        assert process.wait(WAIT) == 0
        assert [one.get(timeout=1) for one in results] == ["rested", "rested"]
    assert "worker: Warm shutdown (MainProcess)" in log.read_text()


@pytest.mark.parametrize("signals", [[QUIT], [QUIT, QUIT], [TERM, QUIT], [TERM, QUIT, QUIT]])
def test_a_cold_or_hard_shutdown_gives_its_tasks_back(
    app: SqsApp, node: tuple[Environ, str], tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """The worker ends without waiting for the task, and the next worker gets the message at once, not after 600 s."""
    log = tmp_path / "worker.log"
    with worker(node[0], log, APP, "-c", "2", "-n", node[1]) as process:
        result = app.send_task("nap", (12,))
        until(lambda: result.status == states.STARTED)
        for one in signals:
            process.send_signal(one)
        assert process.wait(10) != -signal.SIGKILL
        assert result.status == states.STARTED
    with worker(node[0], log, APP, "-c", "1", "-n", node[1]):
        assert result.get(timeout=WAIT) == "rested"


def test_sigterm_may_mean_a_cold_shutdown(app: SqsApp, node: tuple[Environ, str], tmp_path: Path) -> None:
    """With Celery's variable `REMAP_SIGTERM`, for platforms that only send SIGTERM."""
    log = tmp_path / "worker.log"
    with worker({**node[0], "REMAP_SIGTERM": "SIGQUIT"}, log, APP, "-n", node[1]) as process:
        result = app.send_task("nap", (12,))
        until(lambda: result.status == states.STARTED)
        process.terminate()
        process.wait(10)
        assert result.status == states.STARTED
    with worker(node[0], log, APP, "-n", node[1]):
        assert result.get(timeout=WAIT) == "rested"
    assert "worker: Cold shutdown (MainProcess)" in log.read_text()


def test_a_worker_is_shut_down_by_command(app: SqsApp, node: tuple[Environ, str], tmp_path: Path) -> None:
    """Its exit code is 0, its running task ends, and it is not there any more."""
    with worker(node[0], tmp_path / "worker.log", APP, "-c", "2", "-n", node[1]) as process:
        result = app.send_task("nap", (3,))
        until(lambda: result.status == states.STARTED)
        app.control.shutdown(destination=[node[1]])
        assert process.wait(WAIT) == 0
        assert result.get(timeout=1) == "rested"
        assert app.control.inspect(timeout=1).ping() is None


@pytest.mark.parametrize("between", [True, False])
def test_a_restarted_worker_goes_on_with_a_chain(
    app: SqsApp, node: tuple[Environ, str], tmp_path: Path, between: bool
) -> None:
    """The worker is killed while the first task runs, or stops between the two."""
    log = tmp_path / "worker.log"
    environ = {**node[0], "MDSTORE_VISIBILITY_TIMEOUT": "4"}
    result = (app.signature("nap", (2,)) | app.signature("add", (1, 1), immutable=True)).apply_async()
    with worker(environ, log, APP, "-n", node[1]) as process:
        until(lambda: result.parent.status == (states.SUCCESS if between else states.STARTED))
        process.send_signal(TERM if between else signal.SIGKILL)
        process.wait(WAIT)
    with worker(environ, log, APP, "-n", node[1]):
        assert result.get(timeout=60) == 2
