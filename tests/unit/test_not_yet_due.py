"""A message that comes before its task is due goes back, by SQS's clock; a worker holds none, whatever its own clock says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from kombu import Consumer, Queue
from kombu.message import Message

from mdstore.aws.http import SignedHttp
from mdstore.errors import Unavailable
from mdstore.queue.broker.channel import Channel
from mdstore.queue.broker.encoding import DELAYED
from tests.unit.endpoint import Endpoint, Keys
from tests.unit.fake_sqs import FakeSqs
from tests.unit.test_transport import (
    DeadLetters,
    FakeDelayedTable,
    channel,
    consume,
    delayed_table,
    letters,
    objects,
    sqs,
    text,
)
from tests.waiting import until

__all__ = ["channel", "delayed_table", "letters", "objects", "sqs"]  # fixtures

HOUR = 3_600


def due_in(seconds: float, **headers: Any) -> str:
    return text(eta=(datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(), **headers)


def from_here(seconds: float) -> str:
    """A message that this channel's own sender delayed."""
    message = json.loads(due_in(seconds))
    message["properties"][DELAYED] = True
    return json.dumps(message)


def eta(message: Message) -> float:
    return datetime.fromisoformat(message.headers["eta"]).timestamp()


def nothing(channel: Channel, found: list[Message]) -> None:
    poller = channel._poller
    assert poller is not None
    until(lambda: poller.count() == 0)
    assert poller.take(timeout=0.2) is None
    assert found == []


@pytest.mark.parametrize("ahead", [0, -HOUR, HOUR])
def test_a_message_due_in_hours_goes_to_the_table(
    channel: Channel, sqs: FakeSqs, delayed_table: FakeDelayedTable, ahead: float
) -> None:
    """SQS's clock is `ahead` of this machine's."""
    sqs.ahead = ahead
    sqs.arrive("url of work", due_in(3 * HOUR + ahead), handle="h")
    found = consume(channel)
    until(lambda: sqs.all_deleted == ["h"])
    ((queue, task_id, wait, _, _),) = delayed_table
    assert (queue, task_id, wait) == ("work", "1-2", pytest.approx(3 * HOUR + ahead, abs=2))
    nothing(channel, found)


@pytest.mark.parametrize("ahead", [0, -HOUR, HOUR])
def test_a_message_due_in_minutes_goes_back_to_sqs(channel: Channel, sqs: FakeSqs, ahead: float) -> None:
    sqs.ahead = ahead
    sqs.arrive("url of work", due_in(60 + ahead), handle="h")
    found = consume(channel)
    until(lambda: sqs.all_deleted == ["h"])
    ((entry,),) = sqs.sent
    assert entry.delay_seconds in (59, 60, 61)
    assert json.loads(entry.message_body)["properties"][DELAYED] is True
    nothing(channel, found)


def test_on_a_fifo_queue_it_is_no_duplicate_of_itself(
    channel: Channel, sqs: FakeSqs, delayed_table: FakeDelayedTable
) -> None:
    """SQS would drop it within five minutes."""
    message = json.loads(due_in(30))
    message["properties"] |= {"MessageDeduplicationId": "former", "MessageGroupId": "g"}
    sqs.arrive("url of work.fifo", json.dumps(message), message_id="m")
    Consumer(channel, [Queue("work.fifo")]).consume()
    until(lambda: delayed_table)
    assert delayed_table[0][3:] == ("m", "g")


@pytest.mark.parametrize("ahead", [0, -HOUR, HOUR])
@pytest.mark.parametrize("seconds", [-5, 0, 900, 14 * 86_400 - 60])
def test_a_message_that_was_delayed_is_due_when_it_comes(
    channel: Channel, sqs: FakeSqs, seconds: float, ahead: float
) -> None:
    sqs.ahead = ahead
    sqs.arrive("url of work", from_here(seconds))
    found = consume(channel)
    channel.drain_events(timeout=5)
    assert eta(found[0]) <= time.time()
    assert sqs.sent == []


@pytest.mark.parametrize("seconds", [HOUR, HOUR + 1.5, 60])
def test_a_clock_that_is_behind_delays_nothing(channel: Channel, sqs: FakeSqs, seconds: float) -> None:
    sqs.ahead = HOUR
    sqs.arrive("url of work", due_in(seconds))
    found = consume(channel)
    channel.drain_events(timeout=5)
    assert eta(found[0]) <= time.time() + 2
    assert sqs.sent == []


def test_what_cannot_be_put_back_comes_again(
    channel: Channel, sqs: FakeSqs, delayed_table: FakeDelayedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise Unavailable("down", code="Down")

    monkeypatch.setattr(delayed_table, "put", broken)
    sqs.arrive("url of work", due_in(HOUR), handle="h")
    found = consume(channel)
    until(lambda: sqs.visibility_changes == [("h", 300)])
    assert sqs.deleted == []
    nothing(channel, found)


def test_what_can_never_be_put_back_is_dead_lettered(channel: Channel, sqs: FakeSqs, letters: DeadLetters) -> None:
    message = json.loads(due_in(HOUR))
    message["body"] = json.dumps([["x" * 2**20], {}, None])
    sqs.arrive("url of work", json.dumps(message), handle="h")
    consume(channel)
    until(lambda: sqs.all_deleted == ["h"])
    assert "max_claim_bytes" in letters[0]["reason"]


@pytest.mark.parametrize(
    ("date", "ahead"),
    [
        (lambda: format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), HOUR),
        (lambda: format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), -86_400),
        (lambda: format_datetime(datetime.now(UTC), usegmt=True), 0),
        (lambda: "never", 0),
        (lambda: "", 0),
    ],
    ids=["ahead", "behind", "equal", "no date", "empty"],
)
def test_the_service_s_responses_tell_its_time(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, date: Callable[[], str], ahead: float
) -> None:
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda _: date())
    endpoint.respond_with((200, {}))
    http = SignedHttp(service="sqs", region="us-east-1", credentials=Keys())
    assert http.server_time() == pytest.approx(time.time(), abs=0.1)
    http.send(endpoint.url, body=b"{}")
    assert http.server_time() - time.time() == pytest.approx(ahead, abs=2)
    http.close()
