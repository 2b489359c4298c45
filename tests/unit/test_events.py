"""Events off the loop: one message a second, bounded, clipped, flushed at the end."""

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
    """Takes what is published; raises the errors it was given first, and waits where it is told to."""

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


def test_a_producer_keeps_no_event_that_cannot_be_sent() -> None:
    """Celery would, for ever."""
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
    """100 events put at once are one publish, in order."""
    topic = Topic()
    publisher = EventPublisher(topic, interval=0.05)
    for n in range(100):
        publisher.put({"n": n})
    publisher.close()
    assert [len(events) for events in topic.lists] == [100]
    assert topic.numbers == list(range(100))


def test_a_full_buffer_does_not_wait_for_the_interval() -> None:
    """300 events go at once, whatever the interval."""
    topic = Topic()
    publisher = EventPublisher(topic, interval=60)
    for n in range(300):
        publisher.put({"n": n})
    assert topic.entered.wait(5)
    publisher.close()
    assert topic.numbers == list(range(300))


def test_the_caller_never_waits_and_the_buffer_is_bounded() -> None:
    """While a publish hangs, 10,000 more events are taken at once; the oldest of what does not fit are dropped, and counted."""
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


def test_events_wait_while_sns_is_away() -> None:
    """What could not be published is published later, in order and before what came after it."""
    topic = Topic(Unavailable("away", code="NoAnswer"))
    publisher = EventPublisher(topic, interval=0)
    publisher.put({"n": 1})
    assert topic.entered.wait(5)
    publisher.put({"n": 2})
    while not topic.lists:  # a second after it was refused
        time.sleep(0.01)
    publisher.close()
    assert topic.numbers == [1, 2]
    assert publisher.dropped == 0


def test_events_that_sns_refuses_are_dropped() -> None:
    """They would be refused again, for ever; what comes after them goes through."""
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


def test_no_message_is_larger_than_sns_takes() -> None:
    """Long events, also of characters that JSON escapes, are spread over messages of 256 KiB; one that fits none is dropped."""
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


def test_a_publisher_that_was_closed_opens_again_and_hands_over_what_is_left() -> None:
    """Closing twice is safe, a closed publisher takes events again, and another takes over what the first could not publish."""
    stuck = Topic(*[Unavailable("away", code="NoAnswer")] * 2)
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


def test_a_dispatcher_clips_what_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field is cut after 2,000 characters; a heartbeat that was asked for does not promise another in 5 s."""
    app = create_app(load_settings({}).settings)
    published: list[dict[str, Any]] = []
    monkeypatch.setattr(app.topics, "publish", lambda _, text: published.extend(json.loads(json.loads(text)["body"])))
    with app.events.Dispatcher(app.connection_for_write(), hostname="w@h") as dispatcher:
        dispatcher.send("task-failed", uuid="u", traceback="x" * 300_000, exception=ValueError("y" * 9_000))
        dispatcher.send("worker-heartbeat", freq=5)
        assert published == []  # not in the caller's time
    failed, heartbeat = published
    assert len(failed["traceback"]) == MAX_FIELD
    assert len(failed["exception"]) == MAX_FIELD
    assert (failed["hostname"], failed["clock"]) == ("w@h", 1)
    assert heartbeat["freq"] == HEARTBEAT


def test_no_events_where_they_are_off() -> None:
    """With MDSTORE_EVENTS=false a dispatcher sends nothing, heartbeats included."""
    app = create_app(load_settings({"MDSTORE_EVENTS": "false"}).settings)
    with app.events.Dispatcher(app.connection_for_write(), hostname="w@h") as dispatcher:
        assert not dispatcher.enabled
        dispatcher.send("worker-heartbeat")
        assert dispatcher._publisher._thread is None
