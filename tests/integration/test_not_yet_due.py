"""Real workers and messages that come before they are due, or that a worker with a wrong clock takes for such."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mdstore.local.emulator import EmbeddedAws
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import ROOT, Environ, namespace, worker
from tests.integration.test_transport import APP, left, lines
from tests.waiting import until

HOUR = 3_600
#: Python imports this module before all others. Celery's timer and the transport read `time.time`.
_WRONG_CLOCK = f"""
import time
real = time.time
time.time = lambda: real() - {HOUR}
"""


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.touch()
    return path


@pytest.fixture
def environ(aws: EmbeddedAws, journal: Path, monkeypatch: pytest.MonkeyPatch) -> Environ:
    monkeypatch.setenv("JOURNAL", str(journal))
    return namespace(aws, with_store=False) | {"JOURNAL": str(journal)}


@pytest.fixture
def app(environ: Environ) -> SqsApp:
    from tests.integration.transport_app import journaling_app  # noqa: PLC0415  importing it makes an app of the defaults

    return journaling_app(load_settings(environ).settings)


def foreign(number: int, seconds: float) -> str:
    """A message as a sender that delays nothing makes it."""
    eta = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    return json.dumps({
        "body": json.dumps([[number], {}, None]),
        "headers": {"lang": "py", "task": "touch", "id": f"foreign-{number}", "eta": eta, "retries": 0},
        "properties": {"delivery_tag": "t", "body_encoding": "utf-8", "delivery_info": {}},
        "content-type": "application/json",
        "content-encoding": "utf-8",
    })  # fmt: skip


def send(app: SqsApp, messages: list[str]) -> None:
    sqs = app.aws.sqs
    url = sqs.get_queue_url(QueueName=app.settings.queue)["QueueUrl"]
    for start in range(0, len(messages), 10):
        entries: list[Any] = [{"Id": str(n), "MessageBody": one} for n, one in enumerate(messages[start : start + 10])]
        sqs.send_message_batch(QueueUrl=url, Entries=entries)


def test_a_worker_holds_nothing_that_is_due_in_hours(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    send(app, [foreign(number, HOUR) for number in range(200)] + [foreign(number, 20) for number in range(200, 210)])
    with worker(environ, tmp_path / "log", APP):
        until(lambda: left(app) == 10, within=120)  # and those of twenty seconds are delayed by SQS
        app.tasks["touch"].delay(7)
        until(lambda: "7" in lines(journal), within=20)
        until(lambda: len(lines(journal)) == 11)
    assert sorted(map(int, lines(journal))) == [7, *range(200, 210)]
    table = app.aws.dynamodb.scan(TableName=app.settings.delayed_table, Select="COUNT")
    assert table["Count"] == 201  # and the table's state
    assert left(app) == 0


def test_a_worker_whose_clock_is_an_hour_behind_delays_nothing(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_WRONG_CLOCK)
    with worker({**environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, tmp_path / "log", APP):
        began = time.monotonic()
        app.tasks["touch"].apply_async((1,), countdown=2)
        send(app, [foreign(2, 0)])
        until(lambda: sorted(lines(journal)) == ["1", "2"], within=30)
        assert time.monotonic() - began > 1.5
