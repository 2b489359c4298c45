"""The batch publisher, and the encoding of messages as entries of SQS."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mdstore.aws.sqs import Entry, Failed
from mdstore.queue.broker.encoding import deduplication_id, delay_of, entry_of
from mdstore.queue.broker.publisher import BatchPublisher, Unsent
from tests.unit.fake_sqs import FakeSqs


@pytest.fixture
def sqs() -> FakeSqs:
    return FakeSqs()


@pytest.fixture
def publisher(sqs: FakeSqs) -> BatchPublisher:
    return BatchPublisher(lambda: sqs)


def entry(text: str) -> Entry:
    return Entry(message_body=text)


def bodies(sqs: FakeSqs) -> list[list[str]]:
    return [[one.message_body for one in call] for call in sqs.sent]


def test_a_single_message_is_sent_at_once(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    with publisher.context():
        publisher.add("u", entry("a"), "1")
        assert bodies(sqs) == [["a"]]
        publisher.add("u", entry("b"), "2")
    assert bodies(sqs) == [["a"], ["b"]]


def test_the_outer_context_sends_the_messages_of_inner_contexts_together(
    sqs: FakeSqs, publisher: BatchPublisher
) -> None:
    with publisher.context():
        for text in "abc":
            with publisher.context():
                publisher.add("u", entry(text), text)
        assert sqs.sent == []
    assert bodies(sqs) == [["a", "b", "c"]]


def test_a_hundred_messages_are_sent_without_waiting_for_more(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    with publisher.context(), publisher.context():
        for number in range(250):
            publisher.add("u", entry(str(number)), str(number))
        assert [len(call) for call in sqs.sent] == [100, 100]
    assert [len(call) for call in sqs.sent] == [100, 100, 50]


def test_the_first_messages_of_a_slow_group_do_not_wait_for_its_last(
    sqs: FakeSqs, publisher: BatchPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdstore.queue.broker.publisher._FLUSH_AFTER", 0.05)
    with publisher.context(), publisher.context():
        publisher.add("u", entry("a"), "1")
        time.sleep(0.1)
        publisher.add("u", entry("b"), "2")
        assert bodies(sqs) == [["a"]]
    assert bodies(sqs) == [["a"], ["b"]]


def test_each_queue_gets_its_own_messages(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    with publisher.context(), publisher.context():
        for url, text in (("u", "a"), ("v", "b"), ("u", "c")):
            publisher.add(url, entry(text), text)
    assert bodies(sqs) == [["a", "c"], ["b"]]


def test_the_error_names_the_messages_that_were_not_sent(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    sqs.refuse["b"] = Failed(code="InvalidMessageContents", sender_fault=True, message="no such character")
    with pytest.raises(Unsent, match=r"1 of 3 messages were not sent: task-b: InvalidMessageContents: no such"):  # noqa: PT012, SIM117
        with publisher.context(), publisher.context():
            for text in "abc":
                publisher.add("u", entry(text), f"task-{text}")
    with publisher.context():
        publisher.add("u", entry("d"), "task-d")  # the next context does not raise the error again
    assert bodies(sqs) == [["a", "b", "c"], ["d"]]


def test_messages_published_before_an_error_are_sent(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117
        with publisher.context(), publisher.context():
            publisher.add("u", entry("a"), "1")
            raise ZeroDivisionError
    assert bodies(sqs) == [["a"]]


def test_threads_do_not_wait_for_each_other(sqs: FakeSqs, publisher: BatchPublisher) -> None:
    def other() -> None:
        with publisher.context():
            publisher.add("u", entry("other"), "1")

    with publisher.context(), publisher.context():
        publisher.add("u", entry("mine"), "1")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert bodies(sqs) == [["other"]]


def message(**more: Any) -> dict[str, Any]:
    headers = {"task": "add", "id": "1-2", "retries": 0, **more.pop("headers", {})}
    written = {"content-type": "application/json", "content-encoding": "utf-8"}
    return {"body": "[[], {}, {}]", **written, "headers": headers, "properties": {"delivery_tag": "t", **more}}


def test_a_message_is_encoded_as_one_envelope() -> None:
    sent = entry_of("q", message())
    assert json.loads(sent.message_body) == message()
    assert (sent.delay_seconds, sent.message_group_id, sent.message_deduplication_id) == (None, None, None)


@pytest.mark.parametrize(
    ("seconds", "delay"),
    [(-5.0, 0), (0.0, 0), (0.2, 1), (30.0, 30), (900.0, 900), (100_000.0, 100_000)],
)
def test_the_delay_lasts_until_the_eta(seconds: float, delay: int) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=seconds)
    assert delay_of(message(headers={"eta": eta.isoformat()})) == pytest.approx(delay, abs=1)
    assert entry_of("q", message(headers={"eta": eta.isoformat()})).delay_seconds in (
        {None, 1} if delay <= 1 else {min(900, delay), min(900, delay) - 1}
    )


def test_an_eta_without_a_time_zone_is_in_utc() -> None:
    eta = (datetime.now(UTC) + timedelta(seconds=60)).replace(tzinfo=None)
    assert delay_of(message(headers={"eta": eta.isoformat()})) == pytest.approx(60, abs=1)


def test_kombu_s_delay_is_kept() -> None:
    assert entry_of("q", message(delay_seconds=7)).delay_seconds == 7


def test_a_group_id_is_passed_on() -> None:
    assert entry_of("q", message(MessageGroupId="erp")).message_group_id == "erp"


def test_a_fifo_queue_s_message_has_a_group_and_a_stable_deduplication_id() -> None:
    sent = entry_of("q.fifo", message(headers={"retries": 2}))
    assert (sent.message_group_id, sent.delay_seconds) == ("add", None)
    assert sent == entry_of("q.fifo", message(headers={"retries": 2}))
    chosen = entry_of("q.fifo", message(MessageGroupId="key", MessageDeduplicationId="once"))
    assert (chosen.message_group_id, chosen.message_deduplication_id) == ("key", "once")


def test_a_retry_has_another_deduplication_id() -> None:
    assert deduplication_id(message()) != deduplication_id(message(headers={"retries": 1}))


def test_a_replacing_task_has_another_deduplication_id() -> None:
    """It has the id and the retries of the task that it replaces, so a FIFO queue would otherwise drop it."""
    assert deduplication_id(message()) != deduplication_id(message(headers={"replaced_task_nesting": 1}))
    assert deduplication_id(message()) != deduplication_id(message(headers={"task": "mdstore.finish"}))
    assert len(deduplication_id(message(headers={"id": "x" * 500}))) <= 128


def test_a_send_that_raises_leaves_no_messages_for_the_next_context(
    sqs: FakeSqs, publisher: BatchPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqs.refuse["a"] = Failed(code="InvalidMessageContents", sender_fault=True)
    monkeypatch.setattr("mdstore.queue.broker.publisher._FLUSH_AT", 1)
    with pytest.raises(Unsent, match="1 of 2"):  # noqa: PT012, SIM117
        with publisher.context(), publisher.context():
            publisher.add("u", entry("a"), "1")
            monkeypatch.setattr(sqs, "send", lambda *_, **__: 1 // 0)
            publisher.add("u", entry("b"), "2")
    monkeypatch.undo()
    with publisher.context():
        publisher.add("u", entry("c"), "3")
    assert bodies(sqs)[-1] == ["c"]
