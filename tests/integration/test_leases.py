"""A worker whose lease extender fails goes on, and one whose lease extender hangs ends, to be restarted."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, namespace, worker
from tests.integration.test_transport import left, lines
from tests.waiting import until

APP = "tests.integration.broken_leases_app"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.touch()
    return path


@pytest.fixture
def environ(aws: EmbeddedAws, journal: Path, monkeypatch: pytest.MonkeyPatch) -> Environ:
    monkeypatch.setenv("JOURNAL", str(journal))
    return namespace(aws, with_store=False) | {"JOURNAL": str(journal), "MDSTORE_VISIBILITY_TIMEOUT": "3"}


@pytest.fixture
def app(environ: Environ) -> SqsApp:
    from tests.integration.transport_app import journaling_app  # noqa: PLC0415  importing it makes an app of the defaults

    return journaling_app(load_settings(environ).settings)


def test_after_an_error_leases_are_renewed_and_messages_deleted(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    environ |= {"LEASES": "fail"}
    with worker(environ, tmp_path / "1.log", APP), worker(environ, tmp_path / "2.log", APP):
        assert app.tasks["nap"].delay(0).get(timeout=30) == "rested"  # its delete fails at first
        until(lambda: left(app) == 0)
        journal.write_text("")
        assert app.tasks["nap"].delay(8).get(timeout=30) == "rested"
        until(lambda: left(app) == 0)
    assert lines(journal) == ["begins", "ends"]


def test_a_worker_whose_lease_extender_hangs_ends(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    port = free_port()
    environ |= {"LEASES": "hang", "MDSTORE_WORKER_PORT": str(port)}
    log = tmp_path / "log"

    def wrong() -> list[str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5) as answer:
                found: list[str] = json.load(answer)["wrong"]
        except urllib.error.HTTPError as error:
            found = json.load(error)["wrong"]
        except OSError:
            found = []
        return found

    with worker(environ, log, APP) as process:
        app.tasks["touch"].delay(1)
        until(lambda: wrong() == ["leases"], within=30)
        began = time.monotonic()
        assert process.wait(30) == 70
        assert time.monotonic() - began < 20
    assert "sqs leases" in log.read_text()  # the stack of the thread that hangs
