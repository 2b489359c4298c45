"""A process reports a request that was checked against other models than its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.settings import load_settings
from tests.integration.test_queue import ROOT, Environ, namespace, worker

OPERATION = {"op": "upsert", "entity": "airport", "key": "KJFK", "data": {"lat": "40.6"}}


@pytest.fixture
def environ(aws: EmbeddedAws) -> Environ:
    return namespace(aws, with_store=True)


@pytest.fixture
def bare(environ: Environ, tmp_path: Path) -> Environ:
    """Return the environment of a process that knows no models. All others know those of the repository's configuration."""
    empty = tmp_path / "empty.toml"
    empty.touch()
    return {**environ, "MDSTORE_CONFIG": str(empty)}


def client(environ: Environ) -> Client:
    return Client(load_settings(environ).settings)


def other_models(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of the events that were logged in this process."""
    found = [record.mdstore for record in caplog.records if hasattr(record, "mdstore")]
    return [fields for fields in found if fields["event"] == "request.other_models"]


def test_a_worker_says_that_a_producer_had_no_models(environ: Environ, tmp_path: Path) -> None:
    """The producer's working directory has no configuration. The request is applied, and the worker warns once a source."""
    log = tmp_path / "worker.log"
    with worker(environ, log):
        script = (
            "import mdstore\n"
            "for name in ('first', 'second'):\n"
            f"    mdstore.submit([{OPERATION!r}], request_id=name, source='erp').wait(timeout=60)\n"
            "print(mdstore.get('airport', 'KJFK').data)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env={**environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout.strip()) == (0, "{'lat': '40.6'}"), ran.stderr
    warnings = [line for line in log.read_text().splitlines() if "request.other_models" in line]
    assert len(warnings) == 1
    own = client(environ).store.entities.digest
    assert f"request_id=first source=erp models=none own={own} entities=airport" in warnings[0]
    assert "WARNING" in warnings[0]


def test_a_worker_with_the_same_models_says_nothing(environ: Environ, tmp_path: Path) -> None:
    """Both know the models of the repository's configuration, and a request of several lanes is no exception."""
    log = tmp_path / "worker.log"
    operations = [{**OPERATION, "key": str(number)} for number in range(250)]
    with worker(environ, log):
        assert client(environ).submit(operations).wait(timeout=60).status().state == "completed"
    assert "request.other_models" not in log.read_text()


def test_a_worker_warns_of_a_request_of_several_lanes(environ: Environ, bare: Environ, tmp_path: Path) -> None:
    """It warns once, as for a request of one lane."""
    log = tmp_path / "worker.log"
    operations = [{**OPERATION, "key": str(number)} for number in range(250)]
    with worker(environ, log):
        assert client(bare).submit(operations, request_id="lanes").wait(timeout=60).status().state == "completed"
    assert log.read_text().count("request.other_models request_id=lanes") == 1


def test_a_repeat_says_that_the_first_producer_had_other_models(
    environ: Environ, bare: Environ, caplog: pytest.LogCaptureFixture
) -> None:
    """The HTTP API repeats requests in the same way: what is stored was made by the first producer's models."""
    client(bare).submit([OPERATION], request_id="repeated")
    again = client(environ)
    with caplog.at_level(logging.WARNING, "mdstore.events"):
        assert again.submit([OPERATION], request_id="repeated").new is False
    assert [(one["request_id"], one["models"]) for one in other_models(caplog)] == [("repeated", "none")]


def test_verify_says_that_it_knows_other_models(environ: Environ, bare: Environ, tmp_path: Path) -> None:
    """The models decide what a patch makes of a record, so faults that verify finds may come from the difference."""
    with worker(environ, tmp_path / "worker.log"):
        client(environ).submit([OPERATION], request_id="verified").wait(timeout=60)

    def verify(environ: Environ, *options: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "mdstore", "verify", "verified", *options],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return ran.stdout

    assert json.loads(verify(environ, "--json"))["same_models"] is True
    assert json.loads(verify(bare, "--json"))["same_models"] is False
    assert "the request was checked against other models" in verify(bare)
    assert "other models" not in verify(environ)
