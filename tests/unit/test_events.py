"""Events are published by a thread of their own: one message a second, bounded, truncated, and flushed when closed."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.queue import create_app
from mdstore.queue.control.broadcasts import MAX_BYTES, wrap
from mdstore.queue.control.events import HEARTBEAT, MAX_FIELD, EventPublisher
from mdstore.settings import load_settings


class Topic:
    """Records what is published. It first raises the given errors, and blocks while `may_go` is not set."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.lists: list[list[dict[str, Any]]] = []
        self.sizes: list[int] = []
        self.entered, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def __call__(self, events: str) -> None:
        self.entered.set()
        assert self.may_go.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        self.lists.append(json.loads(events))
        self.sizes.append(len(wrap(events).encode()))

    @property
    def numbers(self) -> list[int]:
        return [event["n"] for events in self.lists for event in events]


def test_a_producer_drops_events_that_cannot_be_sent() -> None:
    """Celery would buffer them without bound."""
    tried: list[dict[str, Any]] = []

    class Broken:
        def publish(self, event: dict[str, Any], **_: Any) -> None:
            tried.append(event)
            raise Unavailable("down", code="Down")

    app = create_app(load_settings({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).settings)
    with app.connection() as connection:
        dispatcher = app.events.Dispatcher(connection, enabled=False)
        dispatcher.publish("task-sent", {"uuid": "1"}, producer=Broken())
    assert [event["uuid"] for event in tried] == ["1"]
    assert not dispatcher._outbound_buffer


def test_events_of_one_interval_are_one_message() -> None:
    """100 events put in one interval are one publish, in order."""
    topic = Topic()
    publisher = EventPublisher(topic, interval=0.05)
    for n in range(100):
        publisher.put({"n": n})
    publisher.close()
    assert [len(events) for events in topic.lists] == [100]
    assert topic.numbers == list(range(100))


def test_a_full_batch_does_not_wait_for_the_interval() -> None:
    """300 events are published at once, whatever the interval is."""
    topic = Topic()
    publisher = EventPublisher(topic, interval=60)
    for n in range(300):
        publisher.put({"n": n})
    assert topic.entered.wait(5)
    publisher.close()
    assert topic.numbers == list(range(300))


def test_the_caller_never_waits_and_the_buffer_is_bounded() -> None:
    """While a publish hangs, 10,000 more events are taken at once. The oldest ones over the limit are dropped and counted."""
    topic = Topic()
    topic.may_go.clear()
    publisher = EventPublisher(topic, interval=0, size=1_000)
    publisher.put({"n": -1})
    assert topic.entered.wait(5)
    began = time.perf_counter()
    for n in range(10_000):
        publisher.put({"n": n})
    assert time.perf_counter() - began < 2
    topic.may_go.set()
    publisher.close()
    assert publisher.dropped == 9_000
    assert topic.numbers == [-1, *range(9_000, 10_000)]


def test_events_are_kept_while_sns_is_unavailable() -> None:
    """Events that could not be published are published later, in order and before newer ones."""
    topic = Topic(Unavailable("unavailable", code="NoAnswer"))
    publisher = EventPublisher(topic, interval=0)
    publisher.put({"n": 1})
    assert topic.entered.wait(5)
    publisher.put({"n": 2})
    while not topic.lists:  # the retry follows a second after the failure
        time.sleep(0.01)
    publisher.close()
    assert topic.numbers == [1, 2]
    assert publisher.dropped == 0


def test_events_that_sns_refuses_are_dropped() -> None:
    """SNS would refuse them again and again; later events are published."""
    topic = Topic(DeploymentBroken("too large", code="InvalidParameter"))
    publisher = EventPublisher(topic, interval=0)
    publisher.put({"n": 1})
    while not publisher.dropped:
        time.sleep(0.01)
    publisher.put({"n": 2})
    while not topic.lists:
        time.sleep(0.01)
    publisher.close()
    assert (topic.numbers, publisher.dropped) == ([2], 1)


def test_no_message_exceeds_the_limit_of_sns() -> None:
    """Long events, even with characters that JSON escapes, fill messages of up to 256 KiB; one that fits none is dropped."""
    topic = Topic()
    publisher = EventPublisher(topic, interval=0.05)
    for n in range(60):
        publisher.put({"n": n, "args": '"\\\n' * 3_000, "result": "é💥" * 2_000})
    publisher.put({"n": -1, "nested": ["x" * MAX_BYTES]})
    publisher.close()
    assert topic.numbers == list(range(60))
    assert publisher.dropped == 1
    assert max(topic.sizes) <= MAX_BYTES
    assert max(topic.sizes) > 0.8 * MAX_BYTES


def test_a_closed_publisher_reopens_and_hands_over_its_events() -> None:
    """Closing twice is safe. A closed publisher accepts events again, and another one can take over its unpublished events."""
    stuck = Topic(*[Unavailable("unavailable", code="NoAnswer")] * 2)
    publisher = EventPublisher(stuck, interval=0)
    publisher.put({"n": 1})
    publisher.close()
    publisher.close(0)
    topic = Topic()
    another = EventPublisher(topic, interval=0.05)
    another.take_over(publisher)
    another.put({"n": 2})
    another.close()
    another.put({"n": 3})
    another.close()
    assert topic.numbers == [1, 2, 3]


def test_a_dispatcher_truncates_long_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field is cut after 2,000 characters. A heartbeat that a client asked for does not announce the next one in 5 s."""
    app = create_app(load_settings({}).settings)
    published: list[dict[str, Any]] = []
    monkeypatch.setattr(app.topics, "publish", lambda _, text: published.extend(json.loads(json.loads(text)["body"])))
    with app.events.Dispatcher(app.connection_for_write(), hostname="w@h") as dispatcher:
        dispatcher.send("task-failed", uuid="u", traceback="x" * 300_000, exception=ValueError("y" * 9_000))
        dispatcher.send("worker-heartbeat", freq=5)
        assert published == []  # the caller does not wait for the publish
    failed, heartbeat = published
    assert len(failed["traceback"]) == MAX_FIELD
    assert len(failed["exception"]) == MAX_FIELD
    assert (failed["hostname"], failed["clock"]) == ("w@h", 1)
    assert heartbeat["freq"] == HEARTBEAT


def test_a_disabled_dispatcher_sends_nothing() -> None:
    """With MDSTORE_EVENTS=false it does not send heartbeats either."""
    app = create_app(load_settings({"MDSTORE_EVENTS": "false"}).settings)
    with app.events.Dispatcher(app.connection_for_write(), hostname="w@h") as dispatcher:
        assert not dispatcher.enabled
        dispatcher.send("worker-heartbeat")
        assert dispatcher._publisher._thread is None
