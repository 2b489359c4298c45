"""No error ends a thread that a worker depends on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mdstore.queue.broker.channel import Channel
from mdstore.queue.broker.leases import LeaseExtender
from mdstore.queue.control.events import EventPublisher
from tests.unit.fake_sqs import FakeSqs
from tests.unit.test_poller import QUEUE, SHORT, poller, take
from tests.unit.test_transport import channel, consume, delayed_table, first, letters, objects, sqs, text
from tests.waiting import until

__all__ = ["channel", "delayed_table", "letters", "objects", "sqs"]  # fixtures


@pytest.mark.parametrize("method", ["_send", "_next"])
def test_the_lease_extender_goes_on(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    errors: list[Exception] = [KeyError("x"), ValueError("y")]
    original = getattr(LeaseExtender, method)

    def broken(self: LeaseExtender, *args: Any) -> Any:
        if errors:
            raise errors.pop()
        return original(self, *args)

    monkeypatch.setattr(LeaseExtender, method, broken)
    sqs = FakeSqs()
    sqs.arrive(QUEUE, "m")
    sqs.arrive(QUEUE, "n")
    with poller(sqs, visibility=SHORT) as made:
        made.delete(take(made))
        until(lambda: sqs.all_deleted == ["handle of m"])
        until(lambda: ("handle of n", SHORT) in sqs.visibility_changes)
        assert made.liveness()["leases"] < 5


def test_liveness_shows_that_the_lease_extender_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    sqs = FakeSqs()
    monkeypatch.setattr(sqs, "delete", lambda _, handles: [None] * len(handles) * over.wait(10.0))
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        made.delete(take(made))
        until(lambda: made.liveness()["leases"] > 1.0)
        over.set()
        until(lambda: made.liveness()["leases"] < 1.0)


def test_a_message_that_cannot_be_dead_lettered_for_any_reason_comes_again(
    channel: Channel, sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("not an error of AWS")

    monkeypatch.setitem(channel.transport_options, "dead_letter", broken)
    sqs.arrive("url of work", text(), handle="h")
    found = consume(channel)
    first(channel, found).reject()
    until(lambda: sqs.visibility_changes == [("h", 5)])


def test_events_are_published_after_any_error() -> None:
    published: list[str] = []
    errors = [RuntimeError("x")]

    def publish(events: str) -> None:
        if errors:
            raise errors.pop()
        published.append(events)

    publisher = EventPublisher(publish, interval=0.01)
    publisher.put({"type": "one"})
    until(lambda: not errors)
    publisher.put({"type": "two"})
    until(lambda: published)
    publisher.close()
