"""Fixtures for the scenarios of Celery's own integration tests: two workers with two processes each."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, namespace, worker
from tests.waiting import until

APP = "tests.integration.scenario_app"
NODES = ("one@here", "two@here")


@pytest.fixture(scope="module")
def environ() -> Iterator[Environ]:
    """Yield the environment of a provisioned namespace."""
    with EmbeddedAws(port=free_port()) as aws:
        yield namespace(aws, with_store=False)


@pytest.fixture(scope="module")
def app(environ: Environ) -> Iterator[SqsApp]:
    """Yield a client's app, which knows no task."""
    made = create_app(load_settings(environ).settings, set_as_current=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(environ: Environ, app: SqsApp, logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run two workers; yields their processes once both answer."""
    with ExitStack() as stack:
        processes = [stack.enter_context(worker(environ, logs / node, APP, "-c", "2", "-n", node)) for node in NODES]
        until(lambda: len(app.control.inspect(timeout=2, limit=2).ping() or {}) == 2)
        yield processes
