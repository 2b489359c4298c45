"""The poller and its lease extender, with an in-memory SQS and real threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mdstore.aws.sqs import Failed, Message
from mdstore.errors import Unavailable
from mdstore.queue.broker.poller import Held, Pace, Poller
from tests.unit.fake_sqs import FakeSqs
from tests.waiting import until

QUEUE = "work"
SHORT = 1  # second of visibility timeout, in which a lease is renewed three times


@pytest.fixture
def sqs() -> FakeSqs:
    return FakeSqs()


@contextmanager
def poller(sqs: FakeSqs, *, room: int = 0, ahead: int = 1, visibility: int = 60, **options: Any) -> Iterator[Poller]:
    options.setdefault("open_message", lambda _, message: message.body)
    poll = Poller(
        sqs=sqs, wait_time=1, visibility=visibility, ahead=ahead, room=lambda: room, wake=lambda: None, **options
    )
    poll.consume(QUEUE, QUEUE, needs_room=True)
    try:
        yield poll
    finally:
        poll.close(5.0)


def take(poll: Poller) -> Held:
    held = poll.take(timeout=5.0)
    assert held is not None
    return held


def test_finished_messages_are_deleted_in_batches_of_ten(sqs: FakeSqs) -> None:
    for number in range(30):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs) as poll:
        for held in [take(poll) for _ in range(30)]:
            poll.delete(held)
        until(lambda: len(sqs.all_deleted) == 30)
    assert len(sqs.deleted) <= 4
    assert sorted(sqs.all_deleted) == sorted(f"handle of m{number}" for number in range(30))
    assert sqs.visibility_changes == []


def test_a_single_delete_does_not_wait_for_a_full_batch(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        poll.delete(take(poll))
        until(lambda: sqs.deleted, within=1.0)


def test_the_lease_of_a_message_is_renewed_until_it_is_done(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT) as poll:
        held = take(poll)
        until(lambda: len(sqs.visibility_changes) >= 3)
        assert set(sqs.visibility_changes) == {("handle of m", SHORT)}
        poll.delete(held)
        until(lambda: sqs.deleted)
        count = len(sqs.visibility_changes)
        time.sleep(SHORT)
        assert len(sqs.visibility_changes) == count


def test_the_lease_of_a_waiting_message_is_renewed_too(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT):
        until(lambda: len(sqs.visibility_changes) >= 2)


def test_no_lease_is_renewed_while_the_worker_loop_hangs(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT, is_alive=lambda: False) as poll:
        take(poll)
        time.sleep(1.5 * SHORT)
        assert sqs.visibility_changes == []


def test_a_message_whose_work_is_lost_is_given_back_and_makes_room(sqs: FakeSqs) -> None:
    class Work:
        """An object that may be garbage collected."""

    sqs.arrive(QUEUE, "m")
    lost: list[Held] = []
    with poller(sqs, room=1, lost=lost.append) as poll:
        work = Work()
        held = take(poll)
        found = weakref.ref(work)
        held.is_lost = lambda: found() is None
        time.sleep(1)
        assert (lost, sqs.visibility_changes) == ([], [])
        del work
        gc.collect()
        until(lambda: lost == [held])
        until(lambda: sqs.visibility_changes == [("handle of m", 0)])
        assert poll.count() == 0
        sqs.arrive(QUEUE, "next")
        assert take(poll).payload == "next"


def test_a_message_redelivered_while_it_is_held_is_handed_out_once(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, room=2) as poll:
        held = take(poll)
        sqs.arrive(QUEUE, "m", handle="new")
        sqs.arrive(QUEUE, "other")
        assert take(poll).payload == "other"
        poll.delete(held)
        until(lambda: sqs.all_deleted == ["new"])  # only the newest receipt handle deletes it


def test_a_message_redelivered_after_it_was_done_is_deleted_again(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs) as poll:
        poll.delete(take(poll))
        sqs.arrive(QUEUE, "m", handle="new")
        until(lambda: sqs.all_deleted == ["old", "new"])
        assert poll.take() is None


def test_cancelling_a_queue_gives_back_its_waiting_messages_and_keeps_those_at_work(sqs: FakeSqs) -> None:
    for name in "abc":
        sqs.arrive(QUEUE, name)
    with poller(sqs) as poll:
        held = take(poll)
        until(lambda: poll.count() == 3)
        poll.cancel(QUEUE)
        until(lambda: sorted(sqs.visibility_changes) == [("handle of b", 0), ("handle of c", 0)])
        poll.delete(held)
        until(lambda: sqs.all_deleted == ["handle of a"])


def test_messages_received_after_cancelling_are_given_back(sqs: FakeSqs) -> None:
    with poller(sqs) as poll:
        until(lambda: sqs.asked)
        poll.cancel(QUEUE)
        sqs.arrive(QUEUE, "late")
        until(lambda: sqs.visibility_changes == [("handle of late", 0)])
        assert poll.take() is None


def test_closing_gives_back_messages_at_work(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        take(poll)
    assert sqs.visibility_changes == [("handle of m", 0)]


def test_closing_sends_pending_deletes(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        poll.delete(take(poll))
    assert sqs.all_deleted == ["handle of m"]


def test_a_receive_asks_for_no_more_messages_than_there_is_room(sqs: FakeSqs) -> None:
    for number in range(8):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, room=3) as poll:
        held_messages = [take(poll) for _ in range(3)]
        time.sleep(0.1)
        assert poll.count() == 3
        assert poll.take() is None
        poll.delete(held_messages[0])
        assert take(poll).payload == "m3"
    assert max(sqs.asked) == 3


def test_a_fast_worker_holds_messages_ahead_of_its_work(sqs: FakeSqs) -> None:
    for number in range(100):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, room=2, ahead=10) as poll:
        held_messages = take(poll)
        until(lambda: poll.count() == 2)
        for _ in range(60):
            poll.delete(held_messages)
            held_messages = take(poll)
        until(lambda: poll.count() == 20)
    assert max(sqs.asked) == 10


def test_a_receive_waits_a_moment_until_there_is_room_for_ten(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message that is done wakes the receiver; if it polled at once, each poll would bring one message."""
    monkeypatch.setattr("mdstore.queue.broker.poller._LINGER", 5.0)
    for number in range(30):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, room=20) as poll:
        held_messages = [take(poll) for _ in range(20)]
        before = len(sqs.asked)
        for held in held_messages[:10]:
            poll.delete(held)
            time.sleep(0.01)
        until(lambda: poll.count() == 20)
    assert sqs.asked[before : before + 1] == [10]


def test_messages_of_an_urgent_queue_need_no_room(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "task")
    with poller(sqs, room=1) as poll:
        take(poll)
        sqs.arrive("control", "command")
        poll.consume("control", "control", needs_room=False)
        held = poll.take(timeout=5.0, only_urgent=True)
        assert held is not None
        assert held.payload == "command"
        until(lambda: sqs.all_deleted == ["handle of command"])
        poll.cancel("control")


def test_a_failed_receive_is_retried(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdstore.queue.broker.poller._RECEIVE_AGAIN", 0.05)
    sqs.broken = True
    with poller(sqs) as poll:
        until(lambda: len(sqs.asked) >= 3)
        assert poll.liveness()["receive"] < 1.0
        sqs.broken = False
        sqs.arrive(QUEUE, "m")
        assert take(poll).payload == "m"


def test_liveness_shows_that_a_receive_does_not_return(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(sqs, "receive", lambda *_, **__: [] * release.wait(5.0))
    with poller(sqs) as poll:
        until(lambda: poll.liveness()["receive"] > 0.2)
        release.set()


@pytest.mark.parametrize(
    ("error", "deleted", "visibility_changes"),
    [
        (None, ["handle of m"], []),
        (Unavailable("S3", code="Down"), [], [("handle of m", 300)]),
        (KeyError("x"), [], []),
    ],
    ids=["dead-lettered", "unavailable", "broken"],
)
def test_a_message_that_cannot_be_opened_does_not_affect_others(
    sqs: FakeSqs, error: Exception | None, deleted: list[str], visibility_changes: list[tuple[str, int]]
) -> None:
    def open_message(_: str, message: Message) -> str | None:
        if message.body != "m":
            return message.body
        if error is not None:
            raise error
        return None

    sqs.arrive(QUEUE, "m")
    sqs.arrive(QUEUE, "good")
    with poller(sqs, open_message=open_message, room=2) as poll:
        good = take(poll)
        assert good.payload == "good"
        until(lambda: poll.count() == 1)
        until(lambda: (sqs.all_deleted, sqs.visibility_changes) == (deleted, visibility_changes))
        poll.delete(good)


def test_received_messages_are_held_before_they_are_opened(sqs: FakeSqs) -> None:
    """Opening one may take long. Meanwhile the leases of all are renewed, and cancelling the queue gives them back."""
    release = threading.Event()

    def open_message(_: str, message: Message) -> str:
        release.wait(5.0)
        return message.body

    for number in range(3):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, open_message=open_message, visibility=SHORT) as poll:
        until(lambda: poll.count() == 3)
        until(
            lambda: {handle for handle, _ in sqs.visibility_changes} == {f"handle of m{number}" for number in range(3)}
        )
        assert poll.liveness()["answer"] < 1.0
        poll.cancel(QUEUE)
        release.set()
        until(lambda: poll.count() == 0)
        until(lambda: {(f"handle of m{number}", 0) for number in range(3)} <= set(sqs.visibility_changes))
    assert sqs.deleted == []


def test_a_slow_listener_leaves_further_messages_in_sqs(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that need no room do not pile up without bound."""
    monkeypatch.setattr("mdstore.queue.broker.poller._URGENT", 20)
    for number in range(100):
        sqs.arrive("events", f"e{number}")
    with poller(sqs) as poll:
        poll.consume("events", "events", needs_room=False)
        until(lambda: len(sqs.all_deleted) == 20)
        time.sleep(0.3)
        assert len(sqs.all_deleted) == 20
        for number in range(100):
            assert take(poll).payload == f"e{number}"


def test_a_delete_that_fails_temporarily_is_tried_three_times(sqs: FakeSqs) -> None:
    sqs.refuse["handle of m"] = Failed(code="InternalError")
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        poll.delete(take(poll))
        until(lambda: len(sqs.deleted) == 3)
        time.sleep(0.3)
        assert len(sqs.deleted) == 3


def test_a_lease_that_has_expired_is_not_renewed_again(sqs: FakeSqs) -> None:
    sqs.refuse["old"] = Failed(id="0", code="ReceiptHandleIsInvalid", sender_fault=True)
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, visibility=SHORT, room=2) as poll:
        held = take(poll)
        until(lambda: sqs.visibility_changes == [("old", SHORT)])
        time.sleep(SHORT)
        assert len(sqs.visibility_changes) == 1
        assert poll.count() == 1  # a task works on it, so it still takes room
        sqs.arrive(QUEUE, "m", handle="new")
        until(lambda: ("new", SHORT) in sqs.visibility_changes)
        poll.delete(held)
        until(lambda: sqs.all_deleted == ["new"])


def test_a_waiting_message_whose_lease_expired_is_handed_out_once(sqs: FakeSqs) -> None:
    sqs.refuse["old"] = Failed(id="0", code="ReceiptHandleIsInvalid", sender_fault=True)
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, visibility=SHORT) as poll:
        until(lambda: sqs.visibility_changes and poll.count() == 0)
        sqs.arrive(QUEUE, "m", handle="new")
        assert take(poll).message.receipt_handle == "new"
        assert poll.take(timeout=0.3) is None


def test_a_call_that_is_refused_does_not_abandon_the_message(sqs: FakeSqs) -> None:
    """With an expired token, for example, leases are renewed the next time, and deletes are retried."""
    sqs.refuse["handle of m"] = Failed(code="ExpiredToken", sender_fault=True)
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT) as poll:
        held = take(poll)
        until(lambda: len(sqs.visibility_changes) >= 2)
        poll.delete(held)
        until(lambda: len(sqs.deleted) == 3)


def test_a_queue_is_polled_again_after_any_error(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdstore.queue.broker.poller._RECEIVE_AGAIN", 0.05)
    receive, errors = sqs.receive, [KeyError("x"), OSError("y")]

    def broken(*args: Any, **kwargs: Any) -> list[Message]:
        if errors:
            raise errors.pop()
        return receive(*args, **kwargs)

    monkeypatch.setattr(sqs, "receive", broken)
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        assert take(poll).payload == "m"


def test_a_delete_is_retried_after_any_error(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, errors = sqs.delete, [KeyError("x")]

    def broken(*args: Any, **kwargs: Any) -> list[Failed | None]:
        if errors:
            raise errors.pop()
        return delete(*args, **kwargs)

    monkeypatch.setattr(sqs, "delete", broken)
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as poll:
        poll.delete(take(poll))
        until(lambda: sqs.all_deleted == ["handle of m"])


def test_closing_waits_for_the_poll_of_a_cancelled_queue(sqs: FakeSqs) -> None:
    with poller(sqs) as poll:
        until(lambda: sqs.asked)
        poll.cancel(QUEUE)
        sqs.arrive(QUEUE, "late")
    assert sqs.visibility_changes == [("handle of late", 0)]


def test_the_pace_measures_the_last_second() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for _ in range(1_000):
        now[0] += 0.01
        pace.count()
    assert 90 < pace.rate() < 110
    now[0] += 5.0
    assert pace.rate() < 1


def test_receivers_that_compete_for_the_last_room_keep_running(sqs: FakeSqs) -> None:
    """During bursts and pauses, no receiver ends because another one took the room that it waited for."""
    with poller(sqs, room=2, ahead=10) as poll:
        for burst in range(60):
            for number in range(40):
                sqs.arrive(QUEUE, f"m{burst}-{number}")
            for _ in range(40):
                poll.delete(take(poll))
            poll._pace._at -= 60  # a minute without work


# -- small messages


def small(message: Any) -> bool:
    return str(message).startswith("small")


def arrive_small(sqs: FakeSqs, count: int) -> None:
    for number in range(count):
        sqs.arrive(QUEUE, f"small{number}")


def test_sixteen_small_messages_take_the_room_of_one(sqs: FakeSqs) -> None:
    """Room for two others is room for 32 small ones. Those that are done make room for the next."""
    arrive_small(sqs, 100)
    with poller(sqs, room=2, is_small=small) as poll:
        until(lambda: poll.count() == 32)
        time.sleep(0.3)
        assert poll.count() == 32
        for held in [take(poll) for _ in range(16)]:
            poll.delete(held)
        until(lambda: len(sqs.all_deleted) == 16)
        until(lambda: poll.count() == 32)


def test_few_polls_bring_small_messages(sqs: FakeSqs) -> None:
    """Where the last message was small, a poll asks for as many as there may be room for, and within the bound."""
    arrive_small(sqs, 100)
    with poller(sqs, room=1, ahead=20, is_small=small) as poll:
        until(lambda: poll.count() >= 16)
        del sqs.asked[:]
        for held in [take(poll) for _ in range(16)]:
            poll.delete(held)
        until(lambda: poll.count() >= 16)
    assert max(sqs.asked) == 10


def test_small_messages_are_taken_while_others_have_no_room(sqs: FakeSqs) -> None:
    """And the other way round."""
    for body in ("large", "small"):
        sqs.arrive(QUEUE, body)
    with poller(sqs, is_small=small) as poll:
        until(lambda: poll.count() == 2)
        first = poll.take(timeout=5, only_urgent=True)
        assert first is not None
        assert (first.payload, first.is_small) == ("small", True)
        assert poll.take(only_urgent=True) is None
        arrive_small(sqs, 1)
        until(lambda: poll.count() == 3)
        second = poll.take(timeout=5, no_small=True)
        assert second is not None
        assert (second.payload, second.is_small) == ("large", False)
        assert poll.take(no_small=True) is None


def test_waiting_small_messages_are_given_back_too(sqs: FakeSqs) -> None:
    arrive_small(sqs, 2)
    with poller(sqs, is_small=small) as poll:
        until(lambda: poll.count() == 2)
        poll.cancel(QUEUE)
        until(lambda: sorted(sqs.visibility_changes) == [("handle of small0", 0), ("handle of small1", 0)])
        assert (poll.count(), poll.take()) == (0, None)


def test_a_small_message_counts_less_at_the_pace() -> None:
    """A pace of small messages does not make a worker hold as many others."""
    now = [0.0]
    pace = Pace(lambda: now[0])
    for _ in range(32):
        pace.count(1 / 16)
    assert pace.rate() == pytest.approx(2.0)
