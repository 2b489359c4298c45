"""What a worker does when there is no memory: nobody takes the message for the cause, and the ledger says what happened."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker import consumer as celery_consumer

from mdstore.model import Reference, State
from mdstore.queue.worker.consumer import Consumer
from mdstore.tasks.task import StoreTask


def test_a_message_that_there_is_no_memory_for_is_not_dead_lettered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error reaches the channel, which gives the message back to the queue."""

    def starved(*_: Any, **__: Any) -> Callable[[Any], None]:
        def handle(_: Any) -> None:
            raise MemoryError

        return handle

    monkeypatch.setattr(celery_consumer.Consumer, "create_task_handler", starved)
    app = Celery("mdstore", broker="memory://", set_as_current=False)
    consumer = Consumer(lambda _: None, app=app, controller=SimpleNamespace(use_eventloop=True))
    letters: list[Any] = []
    monkeypatch.setattr(consumer, "_dead_letter", lambda *found: letters.append(found))
    handle = consumer.create_task_handler()
    with pytest.raises(MemoryError):
        handle(SimpleNamespace())
    assert letters == []
    app.close()


def test_a_failure_is_recorded_though_its_lane_does_not_fit() -> None:
    """The operations of the lane are not counted, and yet the request does not stay `running`."""
    reference = Reference(v=1, request_id="r1", payload="payloads/r1", digest="d", lanes=1, source="shop")
    failed: list[tuple[str, str]] = []

    def give_up(*_: Any) -> None:
        raise MemoryError

    ledger = SimpleNamespace(
        progress=lambda _: SimpleNamespace(state=State.RUNNING, reference=reference),
        fail=lambda request_id, error: failed.append((request_id, error)),
    )
    store = SimpleNamespace(
        ledger=ledger, writer=SimpleNamespace(give_up=give_up), payloads=SimpleNamespace(is_batch=lambda _: False)
    )
    task: Any = SimpleNamespace(store=store, name="mdstore.ingest")
    StoreTask._record_failure(task, reference, 0, "MemoryError()")
    assert failed == [("r1", "MemoryError()")]
