"""With real workers, a caller that waits for a chord reads the chord's state, and not its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group
from celery.exceptions import TimeoutError as CeleryTimeoutError

from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.local.emulator import EmbeddedAws
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, namespace, worker
from tests.integration.transport_app import journaling_app

PARTS = 1_000


@pytest.fixture
def environ(aws: EmbeddedAws, tmp_path: Path) -> Environ:
    return {**namespace(aws, with_store=False), "JOURNAL": str(tmp_path / "journal")}


@pytest.fixture
def app(environ: Environ) -> SqsApp:
    return journaling_app(load_settings({name: value for name, value in environ.items() if name != "JOURNAL"}).settings)


@pytest.fixture
def items_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of items of each `batch_get` of this process."""
    sizes: list[int] = []
    original = DynamoClient.batch_get

    def counted(self: DynamoClient, table: str, keys: Sequence[Mapping[str, Any]]) -> Any:
        sizes.append(len(keys))
        return original(self, table, keys)

    monkeypatch.setattr(DynamoClient, "batch_get", counted)
    return sizes


def test_waiting_for_a_chord_reads_its_state(
    app: SqsApp, environ: Environ, items_read: list[int], tmp_path: Path
) -> None:
    """Twice a second, a waiting caller reads a few items, however many parts are open; it gets the body's result."""
    echo = app.tasks["echo"]
    result = chord(echo.si(number) for number in range(PARTS))(echo.s())
    items_read.clear()
    with pytest.raises(CeleryTimeoutError):
        result.get(timeout=3)
    assert 0 < sum(items_read) < PARTS / 10
    items_read.clear()
    with worker(environ, tmp_path / "worker.log", "tests.integration.transport_app"):
        assert result.get(timeout=120) == list(range(PARTS))
        assert sum(items_read) < PARTS


def test_a_failed_part_is_raised_while_others_are_open(
    app: SqsApp, environ: Environ, items_read: list[int], tmp_path: Path
) -> None:
    """The caller does not wait for the other parts; nested groups are parts of the chord too."""
    echo, fail = app.tasks["echo"], app.tasks["fail"]
    late = [echo.si(number).set(countdown=600) for number in range(300)]
    result = chord([*late, group(echo.si(1), fail.si())])(echo.s())
    with worker(environ, tmp_path / "worker.log", "tests.integration.transport_app"):
        items_read.clear()
        with pytest.raises(ValueError, match="on purpose"):
            result.get(timeout=60)
    assert sum(items_read) < 300
