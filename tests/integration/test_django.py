"""A Django project, with tasks of celery-once and celery-singleton: a real worker, over the embedded AWS."""

from __future__ import annotations

import json
from pathlib import Path

from mdstore.local.emulator import EmbeddedAws
from tests.integration.test_configured_app import provisioned, run
from tests.integration.test_queue import namespace, worker
from tests.waiting import until

PROJECT = "tests.integration.django_project"


def test_a_django_project_runs_as_celery_s_documentation_has_it(aws: EmbeddedAws, tmp_path: Path) -> None:
    """Its settings configure the app, its tasks are discovered, and `delay_on_commit` waits for the commit."""
    environ = {**namespace(aws, with_store=False), "LOCKS": str(tmp_path)}
    assert ("queue", "emails") in provisioned(environ, "--app", PROJECT)
    log = tmp_path / "worker.log"
    with worker(environ, log, PROJECT):
        done = run(environ, "-m", f"{PROJECT}.shell")
        assert done.returncode == 0, done.stderr + log.read_text()
        until(lambda: "hello committed" in log.read_text())
    assert json.loads(done.stdout) == [
        "hello main", "hello thread", True, "once", "once", True, "single", "single",
    ]  # fmt: skip
    assert "rolled back" not in log.read_text()
