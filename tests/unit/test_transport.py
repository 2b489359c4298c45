"""The channel over an in-memory SQS: how messages are settled, and which ones never reach a worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any

import pytest
from kombu import Connection, Consumer, Producer, Queue
from kombu.message import Message

from mdstore.errors import InvalidRequest, Unavailable
from mdstore.queue.broker.channel import Channel
from mdstore.queue.broker.claim_check import ClaimChecks, is_claim
from mdstore.queue.broker.poller import Pace, backoff
from mdstore.queue.broker.publisher import BatchPublisher
from tests.unit.fake_sqs import FakeSqs
from tests.unit.fakes import MemoryObjects
from tests.waiting import until


class DeadLetters(list[dict[str, Any]]):
    """Records dead letters once `may_go` is set. While `is_broken` is set, writing one fails."""

    is_broken = False

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.may_go.set()

    def keep(self, **letter: Any) -> None:
        assert self.may_go.wait(5)
        if self.is_broken:
            raise Unavailable("down", code="Down")
        self.append(letter)


@pytest.fixture
def sqs(monkeypatch: pytest.MonkeyPatch) -> FakeSqs:
    found = FakeSqs()
    monkeypatch.setattr(found, "url", lambda name: f"url of {name}", raising=False)
    return found


class FakeDelayedTable(list[tuple[Any, ...]]):
    """Records what is put into the delayed table."""

    def put(self, queue: str, body: str, due_at: float, *, deduplication_id: str, group_id: str | None = None) -> None:
        task_id, wait = json.loads(body)["headers"]["id"], round(due_at - time.time())
        self.append((queue, task_id, wait, deduplication_id, group_id))


@pytest.fixture
def delayed_table() -> FakeDelayedTable:
    return FakeDelayedTable()


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
def letters() -> DeadLetters:
    return DeadLetters()


@pytest.fixture
def channel(
    sqs: FakeSqs, letters: DeadLetters, objects: MemoryObjects, delayed_table: FakeDelayedTable
) -> Iterator[Channel]:
    options = {
        "sqs": lambda: sqs,
        "publisher": BatchPublisher(lambda: sqs),
        "dead_letter": letters.keep,
        "claim_checks": lambda: ClaimChecks(objects=objects, prefix="claims/", threshold=2_000, max_bytes=2**20),
        "delayed_table": lambda: delayed_table,
        "visibility_timeout": 60,
        "wait_time_seconds": 1,
        "region": "eu-central-1",
    }
    with Connection(
        "sqs://", transport="mdstore.queue.broker.channel:Transport", transport_options=options
    ) as connection:
        yield connection.channel()


def text(**headers: Any) -> str:
    return json.dumps(
        {
            "body": "[[], {}, null]",
            "headers": {"task": "add", "id": "1-2", **headers},
            "properties": {"delivery_tag": "t", "body_encoding": "utf-8", "delivery_info": {}},
            "content-type": "application/json",
            "content-encoding": "utf-8",
        }
    )


def consume(channel: Channel) -> list[Message]:
    """Consume the queue `work`, and return the list to which delivered messages are added."""
    found: list[Message] = []
    Consumer(channel, [Queue("work")], on_message=found.append).consume()
    return found


def first(channel: Channel, found: list[Message]) -> Message:
    channel.drain_events(timeout=5)
    return found[-1]


def test_a_message_has_its_receive_count(channel: Channel, sqs: FakeSqs) -> None:
    sqs.arrive("url of work", text(), message_id="m", receives=3)
    message = first(channel, consume(channel))
    assert (message.delivery_tag, message.headers["receives"], message.body) == ("m", 3, b"[[], {}, null]")
    assert message.delivery_info == {"exchange": "", "routing_key": "work", "priority": 0, "redelivered": True}


def test_an_acknowledged_message_is_deleted(channel: Channel, sqs: FakeSqs) -> None:
    sqs.arrive("url of work", text(), handle="h")
    first(channel, consume(channel)).ack()
    until(lambda: sqs.all_deleted == ["h"])


@pytest.mark.parametrize(("receives", "seconds"), [(1, 5), (2, 10), (7, 300), (5_000, 300)])
def test_the_delay_of_a_requeued_message_grows_with_its_receive_count(
    channel: Channel, sqs: FakeSqs, letters: DeadLetters, receives: int, seconds: int
) -> None:
    sqs.arrive("url of work", text(), handle="h", receives=receives)
    first(channel, consume(channel)).requeue()
    until(lambda: sqs.visibility_changes == [("h", seconds)])
    assert backoff(receives) == seconds
    assert (sqs.deleted, letters) == ([], [])


def test_a_rejected_message_is_dead_lettered(channel: Channel, sqs: FakeSqs, letters: DeadLetters) -> None:
    sqs.arrive("url of work", text(), handle="h", receives=2)
    first(channel, consume(channel)).reject()
    until(lambda: sqs.all_deleted == ["h"])
    assert letters == [{"body": text(), "reason": "rejected", "task": "add", "receives": 2}]


def test_dead_lettering_does_not_block_the_caller(channel: Channel, sqs: FakeSqs, letters: DeadLetters) -> None:
    """The failure is reported and the letter written on a thread. The message is held until both are done."""
    reported = threading.Event()
    letters.may_go.clear()
    sqs.arrive("url of work", text(), handle="h")
    message = first(channel, consume(channel))
    channel.dead_letter(message.delivery_tag, "unknown", report=reported.set)
    assert reported.wait(5)
    assert channel.liveness()["held"] == 1
    letters.may_go.set()
    until(lambda: sqs.all_deleted == ["h"])
    assert [letter["reason"] for letter in letters] == ["unknown"]


def test_closing_gives_back_messages_not_yet_dead_lettered(
    channel: Channel, sqs: FakeSqs, letters: DeadLetters
) -> None:
    """A worker that stops while a letter is written gives back the messages whose letters would follow."""
    letters.may_go.clear()
    for number in range(3):
        sqs.arrive("url of work", text(), message_id=f"m{number}", handle=f"h{number}")
    found = consume(channel)
    for _ in range(3):
        channel.dead_letter(first(channel, found).delivery_tag, "unknown")
    threading.Timer(0.3, letters.may_go.set).start()
    channel.close()
    assert sqs.all_deleted == ["h0"]
    assert sorted(sqs.visibility_changes) == [("h1", 0), ("h2", 0)]


def test_a_message_that_cannot_be_dead_lettered_is_redelivered(
    channel: Channel, sqs: FakeSqs, letters: DeadLetters
) -> None:
    sqs.arrive("url of work", text(), handle="h")
    letters.is_broken = True
    message = first(channel, consume(channel))
    channel.dead_letter(message.delivery_tag, "why")
    until(lambda: sqs.visibility_changes == [("h", 5)])
    assert sqs.deleted == []


def test_an_invalid_message_never_reaches_the_worker(channel: Channel, sqs: FakeSqs, letters: DeadLetters) -> None:
    sqs.arrive("url of work", "hello", handle="h")
    found = consume(channel)
    with pytest.raises(Empty):
        channel.drain_events(timeout=0.5)
    until(lambda: sqs.all_deleted == ["h"])
    ((letter,), handed) = letters, found
    assert (letter["body"], letter["task"], handed) == ("hello", "", [])


def test_an_invalid_message_that_cannot_be_dead_lettered_is_redelivered(
    channel: Channel, sqs: FakeSqs, letters: DeadLetters
) -> None:
    letters.is_broken = True
    sqs.arrive("url of work", "hello", handle="h")
    consume(channel)
    until(lambda: sqs.visibility_changes == [("h", 300)])
    assert sqs.deleted == []


def test_a_consumer_that_raises_keeps_neither_the_message_nor_its_room(channel: Channel, sqs: FakeSqs) -> None:
    def broken(_: Message) -> None:
        raise ZeroDivisionError

    sqs.arrive("url of work", text(), handle="h")
    channel.basic_qos(prefetch_count=1)
    Consumer(channel, [Queue("work")], on_message=broken).consume()
    channel.drain_events(timeout=5)
    until(lambda: sqs.visibility_changes == [("h", 5)])
    assert channel.qos.can_consume()


def test_settling_a_message_that_is_not_held_does_nothing(channel: Channel, sqs: FakeSqs) -> None:
    consume(channel)
    channel.basic_ack("unknown")
    channel.basic_reject("unknown", requeue=True)
    channel.dead_letter("unknown", "why")
    time.sleep(0.3)
    assert (sqs.deleted, sqs.visibility_changes) == ([], [])


def test_a_cancelled_consumer_gives_back_its_waiting_messages(channel: Channel, sqs: FakeSqs) -> None:
    sqs.arrive("url of work", text(), handle="h")
    consumer = Consumer(channel, [Queue("work")], on_message=lambda _: None)
    consumer.consume()
    until(lambda: channel.liveness().get("held") == 1)
    consumer.cancel()
    until(lambda: sqs.visibility_changes == [("h", 0)])


def test_a_single_message_can_be_fetched(channel: Channel, sqs: FakeSqs) -> None:
    sqs.arrive("url of work", text(), message_id="m", handle="h")
    message = Queue("work")(channel).get()
    assert message.delivery_tag == "m"
    message.ack()
    until(lambda: sqs.all_deleted == ["h"])
    assert Queue("work")(channel).get() is None
    sqs.arrive("url of work", text(), message_id="n", handle="i")
    assert Queue("work")(channel).get(no_ack=True).delivery_tag == "n"
    until(lambda: sqs.all_deleted == ["h", "i"])


def publish(channel: Channel, body: Any, queue: str = "work", *, seconds: float = 0, **properties: Any) -> None:
    eta = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat() if seconds else None
    headers = {"task": "add", "id": "1-2", "eta": eta}
    Producer(channel).publish([[body], {}, {}], routing_key=queue, serializer="json", headers=headers, **properties)


def test_the_body_of_a_message_is_sent_as_json_without_base64(channel: Channel, sqs: FakeSqs) -> None:
    publish(channel, "ü")
    ((entry,),) = sqs.sent
    sent = json.loads(entry.message_body)
    assert json.loads(sent["body"]) == [["ü"], {}, {}]
    assert entry.delay_seconds is None


@pytest.mark.parametrize(
    ("body", "headers", "why"),
    [
        (float("nan"), {}, "body: JSON is malformed"),
        ("x", {"shadow": ""}, "shadow"),
        ("x", {"timelimit": [None, 0.5]}, "timelimit"),
        ("x", {"compression": "application/x-gzip"}, "compression"),
    ],
)
def test_a_message_that_no_worker_accepts_is_not_sent(
    channel: Channel, sqs: FakeSqs, body: Any, headers: dict[str, Any], why: str
) -> None:
    """A worker would dead-letter it when the sender no longer waits, so the sender gets the reason instead."""
    made = {"task": "add", "id": "1-2", **headers}
    with pytest.raises(InvalidRequest, match="message: expected a task that a worker takes") as raised:
        Producer(channel).publish([[body], {}, {}], routing_key="work", serializer="json", headers=made)
    assert why in str(raised.value)
    assert sqs.sent == []


def test_a_large_message_is_sent_through_s3(channel: Channel, sqs: FakeSqs) -> None:
    publish(channel, "x" * 5_000)
    ((entry,),) = sqs.sent
    assert is_claim(entry.message_body)
    assert len(entry.message_body) < 500
    sqs.arrive("url of work", entry.message_body)
    message = first(channel, consume(channel))
    assert message.payload == [["x" * 5_000], {}, {}]


def test_a_claim_that_cannot_be_loaded_is_dead_lettered_with_the_reason(
    channel: Channel, sqs: FakeSqs, letters: DeadLetters, objects: MemoryObjects
) -> None:
    publish(channel, "x" * 5_000)
    ((entry,),) = sqs.sent
    objects.stored.clear()
    sqs.arrive("url of work", entry.message_body, handle="h")
    consume(channel)
    until(lambda: sqs.all_deleted == ["h"])
    (letter,) = letters
    assert (letter["task"], letter["body"]) == ("add", entry.message_body)
    assert "claim" in letter["reason"]


@pytest.mark.parametrize(
    ("queue", "seconds", "delay", "is_in_table"),
    [
        ("work", 30, 30, False),
        ("work", 900, 900, False),
        ("work", 902, None, True),
        ("work", 10**7, None, True),
        ("work.fifo", 30, None, True),
    ],
)
def test_messages_that_sqs_cannot_delay_go_to_the_delayed_table(
    channel: Channel,
    sqs: FakeSqs,
    delayed_table: FakeDelayedTable,
    queue: str,
    seconds: int,
    delay: int | None,
    is_in_table: bool,
) -> None:
    publish(channel, "x", queue, seconds=seconds, MessageGroupId="erp")
    sent = [entry.delay_seconds for call in sqs.sent for entry in call]
    if not is_in_table:
        assert sent == [pytest.approx(delay, abs=1)]
        assert delayed_table == []
        return
    assert sent == []
    ((name, task_id, wait, deduplication_id, group),) = delayed_table
    assert (name, task_id, len(deduplication_id), group) == (queue, "1-2", 64, "erp")
    assert wait == pytest.approx(seconds, abs=1)


def test_a_delayed_message_of_a_fifo_queue_keeps_its_deduplication_id(
    channel: Channel, delayed_table: FakeDelayedTable
) -> None:
    """A message that is sent twice with one id is executed once, however long it is delayed."""
    publish(channel, "x", "work.fifo", seconds=30, MessageGroupId="erp", MessageDeduplicationId="order-7")
    ((*_, deduplication_id, _group),) = delayed_table
    assert deduplication_id == "order-7"


# -- small messages


def test_small_messages_have_room_of_their_own(channel: Channel, sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither wait for others nor take their room. Each process has 32, and 32 wait for the first one that is free."""
    monkeypatch.setattr(Pace, "rate", lambda _: 1_000.0)
    channel.connection.client.transport_options |= {
        "ahead": 100,
        "is_small": lambda headers: bool(headers.get("small")),
    }
    channel.basic_qos(prefetch_count=1)
    for number in range(80):
        sqs.arrive("url of work", text(small=True), message_id=f"s{number}")
    for number in range(2):
        sqs.arrive("url of work", text(), message_id=f"m{number}")
    found = consume(channel)
    with suppress(Empty):
        while True:
            channel.drain_events(timeout=0.5)
    large = [message for message in found if not message.headers.get("small")]
    assert (len(found) - len(large), len(large)) == (64, 1)
    for message in (next(one for one in found if one not in large), large[0]):
        message.ack()
    until(lambda: len(sqs.all_deleted) == 2)
    for _ in range(2):
        channel.drain_events(timeout=5)
    assert sum(bool(message.headers.get("small")) for message in found[-2:]) == 1
    assert not channel.qos.can_consume()
    assert not channel.qos.can_consume_small()
