"""A frozen chord that is applied again, with a real worker over the embedded AWS."""

from __future__ import annotations

from pathlib import Path

from celery import chord

from mdstore.queue.app import SqsApp
from tests.integration.test_queue import Environ, worker
from tests.integration.test_transport import app, environ, journal, left, lines
from tests.waiting import until

__all__ = ["app", "environ", "journal"]  # fixtures


def test_a_body_runs_as_often_as_its_frozen_chord_is_applied(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """Three times in a row, and once more when all of that is done."""
    made = chord([app.signature("echo", (number,)) for number in range(3)], app.signature("touch"), app=app)
    made.freeze()
    for _ in range(3):
        made.apply_async()
    with worker(environ, tmp_path / "worker.log", "tests.integration.transport_app"):
        until(lambda: lines(journal) == ["[0, 1, 2]"] * 3)
        until(lambda: left(app) == 0)
        made.apply_async()
        until(lambda: lines(journal) == ["[0, 1, 2]"] * 4)
        until(lambda: left(app) == 0)
    assert lines(journal) == ["[0, 1, 2]"] * 4
